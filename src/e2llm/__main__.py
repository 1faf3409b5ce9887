"""`python -m e2llm …`, for launchers that start modules: torchrun --nproc-per-node 2 -m e2llm train recipe.toml"""

from __future__ import annotations

import sys


def run() -> int:
    """The command line, as `e2llm` runs it."""
    from e2llm.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
