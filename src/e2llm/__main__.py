"""`python -m e2llm …`, for launchers that start modules: torchrun … -m e2llm evaluate …"""

from __future__ import annotations

import sys


def _run() -> int:
    from e2llm.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(_run())
