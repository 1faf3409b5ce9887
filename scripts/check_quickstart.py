"""Does a quickstart's results.json show what the README promises? Exits 1 and says which figure does not.

    python scripts/check_quickstart.py runs/quickstart/results.json
"""

from __future__ import annotations

import sys

from e2llm.records import Record


def main() -> int:
    """Compare the figures of base and extended model."""
    record = Record.load(sys.argv[1])
    values = {(r["metric"], r["checkpoint"], r["window"]): r["value"] for r in record.rows if "depth" not in r}

    def perplexity(checkpoint: str, window: int) -> float:
        return float(values["perplexity", checkpoint, window])

    def retrieval(window: int) -> float:
        return float(values["retrieval", "extended", window])

    base, extended = perplexity("base", 512), perplexity("extended", 512)
    checks = {
        "base without scaling: 8192 at least twice its 512": perplexity("base", 8192) >= 2 * base,
        "extended: 8192 below its own 512": perplexity("extended", 8192) < extended,
        "extended: 512 within 2 % of the base's": extended <= 1.02 * base,
        "extended: retrieval at 2048 at least 0.9": retrieval(2048) >= 0.9,
        "extended: retrieval at 8192 at least 0.6": retrieval(8192) >= 0.6,
    }
    for name, holds in checks.items():
        print("ok  " if holds else "FAIL", name)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
