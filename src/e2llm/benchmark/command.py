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
    add("--long-tokens", default="0", help="a long prompt, behind which a short request waits: 128k (none)")
    add("--prefill", nargs="+", default=(), metavar="TOKENS", help="prompts alone, against the machine's floor")
    add("--decode", nargs="+", default=(), metavar="NxTOKENS", help="decoding against memory bandwidth: 32x2k 1x128k")
    add("--rounds", type=int, default=5, help="rounds after the warm-up (5)")
    add("--no-transformers", dest="transformers", action="store_false", help="leave transformers' own engine out")
    add("--dtype", choices=["float32", "bfloat16", "float16", "auto"])
    add("--device")
    add("--attention", choices=["auto", "kernels", "plain"], default="auto", help="path of decoding (auto)")
    add("--base-model", default="", help="label of the model in tables")
    add("--out", default="serve.json", help="Record to write (serve.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write the Record after every round, print its rows. 1 where a contestant failed."""
    from e2llm.benchmark.serve import ServeConfig, benchmark_serve

    names = ("model", "requests", "prompt_tokens", "new_tokens", "rounds", "transformers", "dtype")
    given = {name: getattr(arguments, name) for name in (*names, "device", "base_model", "attention")}
    config = ServeConfig(
        **given,
        scales=tuple(arguments.scales),
        long_tokens=_tokens(arguments.long_tokens),
        prefill=tuple(map(_tokens, arguments.prefill)),
        decode=tuple(map(_batch, arguments.decode)),
    )

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    record = benchmark_serve(config, progress=progress, save=lambda found: found.save(arguments.out))
    for row in record.rows:
        keys = ("engine", "mix", "window", "requests", "metric")
        values = [e["value"] for e in record.examples if all(e[key] == row[key] for key in keys)]
        where = f"{row['engine']:13} {row['mix']:8} {row['requests']:>3} × {row['window']:<7}"
        spread = f"({min(values):.4g} to {max(values):.4g})"
        print(f"{where} {row['metric']:32} {row['value']:10.4g} {row['unit']:9} {spread}")
    for name, why in record.config["failed"].items():
        print(f"{name} failed: {why}", file=sys.stderr)
    print(arguments.out)
    return 1 if record.config["failed"] else 0


def _tokens(text: str) -> int:
    """4096, 32k -> tokens. Raises ValueError."""
    number, unit = (text[:-1], 1024) if text.lower().endswith("k") else (text, 1)
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"tokens = {text!r}: write a number as 4096 or 32k")
    return int(number) * unit


def _batch(text: str) -> tuple[int, int]:
    """32x2k -> (32, 2048). Raises ValueError."""
    count, times, tokens = text.partition("x")
    if not times:
        raise ValueError(f"decode = {text!r}: write requests and prompt tokens as 32x2k")
    return _tokens(count), _tokens(tokens)
