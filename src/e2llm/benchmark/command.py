"""`e2llm benchmark`: speed, as ratios within one run, written as a Record."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("kind", choices=["serve"], help="serve: mixed scales against one, and beside transformers' continuous batching")
    add("model", help="checkpoint folder, hub name or .gguf file")
    add("--requests", type=int, default=24, help="requests in flight at once (24)")
    add("--prompt-tokens", type=int, default=128, help="tokens of each prompt (128)")
    add("--new-tokens", type=int, default=64, help="tokens each writes (64)")
    add(
        "--scales",
        type=float,
        nargs="+",
        default=(1.0, 2.0, 4.0, 8.0),
        metavar="G",
        help="of the mixed batch (1 2 4 8)",
    )
    add("--long-tokens", type=int, default=0, help="a long prompt, behind which a short request waits (none)")
    add("--rounds", type=int, default=5, help="rounds after the warm-up (5)")
    add("--no-transformers", dest="transformers", action="store_false", help="leave transformers' own engine out")
    add("--dtype", choices=["float32", "bfloat16", "float16", "auto"])
    add("--device")
    add("--base-model", default="", help="label of the model in tables")
    add("--out", default="serve.json", help="Record to write (serve.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write the Record, print its rows."""
    from e2llm.benchmark.serve import ServeConfig, benchmark_serve

    names = ("model", "requests", "prompt_tokens", "new_tokens", "long_tokens", "rounds", "transformers", "dtype")
    given = {name: getattr(arguments, name) for name in (*names, "device", "base_model")}
    config = ServeConfig(**given, scales=tuple(arguments.scales))
    record = benchmark_serve(config, progress=lambda line: print(line, file=sys.stderr))
    record.save(arguments.out)
    for row in record.rows:
        keys = ("engine", "mix", "metric")
        values = [e["value"] for e in record.examples if all(e[key] == row[key] for key in keys)]
        where = f"{row['engine']:13} {row['mix']:7} window {row['window']:>7}"
        spread = f"({min(values):.4g} to {max(values):.4g})"
        print(f"{where}  {row['metric']:28} {row['value']:10.4g} {row['unit']:9} {spread}")
    print(arguments.out)
    return 0
