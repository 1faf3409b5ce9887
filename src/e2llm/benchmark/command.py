"""`e2llm benchmark`: speed as ratios within one run, what turned keys, full-length training and an evaluation cost,
as Records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from e2llm.benchmark import train_command

_MODEL = "checkpoint folder, hub name or .gguf file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command: one of five kinds, each with its own."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, add, about in (
        ("serve", _add_serve, "mixed scales against one scale, and beside transformers' continuous batching"),
        ("rerotate", _add_rerotate, "cached keys turned to another scale, against reading again"),
        ("train", train_command.add_arguments, "our trainer beside transformers' and others, or full-length training"),
        ("evaluate", _add_evaluate, "sliding-window perplexity, against the card's peak and the floor of its shapes"),
        ("answers", _add_answers, "answers to long prompts, against reading as many tokens"),
    ):
        add(kinds.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}."))


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=_MODEL)
    _add_loading(parser)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", choices=["float32", "bfloat16", "float16", "auto"])
    add("--device")
    add("--base-model", default="", help="label of the model in tables")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    add = parser.add_argument
    add("--requests", type=int, default=24, help="requests in flight at once (24)")
    add("--prompt-tokens", type=int, default=128, help="tokens of each prompt (128)")
    add("--new-tokens", type=int, default=64, help="tokens each writes (64)")
    scales = "of the mixed batch (1 2 4 8)"
    add("--scales", type=float, nargs="+", default=(1.0, 2.0, 4.0, 8.0), metavar="G", help=scales)
    add("--long-tokens", default="0", help="a long prompt, behind which a short request waits: 128k (none)")
    add("--prefill", nargs="+", default=(), metavar="TOKENS", help="prompts alone, against the machine's floor")
    add("--decode", nargs="+", default=(), metavar="NxTOKENS", help="decoding against memory bandwidth: 32x2k 1x128k")
    add("--rounds", type=int, default=5, help="rounds after the warm-up (5)")
    add("--no-transformers", dest="transformers", action="store_false", help="leave transformers' own engine out")
    add("--attention", choices=["auto", "kernels", "plain"], default="auto", help="path of decoding (auto)")
    add("--out", default="serve.json", help="Record to write (serve.json)")


def _add_rerotate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    add = parser.add_argument
    add("--texts", nargs="+", default=(), metavar="FILE", help="a window of each is read")
    add("--cached-tokens", nargs="+", default=("2k",), metavar="TOKENS", help="cached before (2k)")
    add("--new-tokens", type=int, default=256, help="tokens that are scored (256)")
    add("--pairs", nargs="+", default=("1:2", "2:4"), metavar="OLD:NEW", help="scales (1:2 2:4)")
    add("--out", default="rerotate.json", help="Record to write (rerotate.json)")


def _add_model_or_shape(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", default="", help=_MODEL)
    which.add_argument("--shape", default="", help="or random weights of this shape: smollm2-135m, llama-1b, …")
    _add_loading(parser)


def _add_answers(parser: argparse.ArgumentParser) -> None:
    _add_model_or_shape(parser)
    add = parser.add_argument
    add("--windows", nargs="+", default=("8k", "32k"), metavar="TOKENS", help="of a prompt with its answer (8k 32k)")
    add("--prompts", type=int, default=16, help="prompts of a round (16)")
    add("--new-tokens", type=int, default=40, help="tokens each answer has (40)")
    add("--batch-size", type=int, nargs="+", default=(8,), metavar="N", help="prompts answered at once (8)")
    chunks = "prompt tokens that a step reads at most (4k 32k)"
    add("--chunk-tokens", nargs="+", default=("4k", "32k"), metavar="TOKENS", help=chunks)
    add("--rounds", type=int, default=3, help="rounds after the warm-up (3)")
    add("--profile", metavar="FILE", help="profile one more round of the last window and way; text to write")
    add("--out", default="answer_speed.json", help="Record to write (answer_speed.json)")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_model_or_shape(parser)
    add = parser.add_argument
    add("--windows", nargs="+", default=("32k",), metavar="TOKENS", help="of the sliding window (32k)")
    add("--stride", type=int, default=256, help="tokens that a window scores (256)")
    add("--steps", type=int, default=4, help="windows in a round (4)")
    add("--rounds", type=int, default=5, help="rounds after the warm-up (5)")
    add("--compile", nargs="+", choices=["none", "layers"], default=("none", "layers"), help="ways of reading (both)")
    add("--out", default="evaluate_speed.json", help="Record to write (evaluate_speed.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write the Record as it grows, print its rows. 1 where a contestant failed."""
    out = arguments.out

    def save(found: Any) -> None:
        found.save(out)

    if arguments.kind == "train":
        record = train_command.measure(arguments, _tokens, _progress, save)
        train_command.show(record)
        print(out)
        return 1 if record.config["failed"] else 0
    kinds = {"serve": _serve, "rerotate": _rerotate, "evaluate": _evaluate, "answers": _answers}
    record = kinds[arguments.kind](arguments, save)
    for row in record.rows:
        labels = {name: row[name] for name in row if name not in ("value", "unit", "n")}
        values = [_value(example, row["metric"]) for example in record.examples if _is_of(example, labels)]
        where = " ".join(str(value) for name, value in labels.items() if name != "base_model")
        print(f"{where:64} {row['value']:10.4g} {row['unit']:9} ({min(values):.4g} to {max(values):.4g})")
    failed = record.config.get("failed", {})
    for name, why in failed.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    print(out)
    return 1 if failed else 0


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _is_of(example: Mapping[str, Any], labels: Mapping[str, Any]) -> bool:
    """Whether an example is one of those that the row with `labels` sums up."""
    metric = labels["metric"]
    same = all(example[name] == value for name, value in labels.items() if name in example)
    return same and (metric in example or example.get("metric") == metric)


def _value(example: Mapping[str, Any], metric: str) -> float:
    return float(example[metric] if metric in example else example["value"])


def _serve(arguments: argparse.Namespace, save: Callable[[Any], None]) -> Any:
    from e2llm.benchmark.serve import ServeConfig, benchmark_serve

    names = ("model", "requests", "prompt_tokens", "rounds", "transformers", "dtype", "device", "base_model")
    config = ServeConfig(
        **{name: getattr(arguments, name) for name in (*names, "attention")},
        new_tokens=arguments.new_tokens,
        scales=tuple(arguments.scales),
        long_tokens=_tokens(arguments.long_tokens),
        prefill=tuple(map(_tokens, arguments.prefill)),
        decode=tuple(map(_batch, arguments.decode)),
    )
    return benchmark_serve(config, progress=_progress, save=save)


def _rerotate(arguments: argparse.Namespace, save: Callable[[Any], None]) -> Any:
    from e2llm.benchmark.rerotate import RerotateConfig, benchmark_rerotate

    config = RerotateConfig(
        **{name: getattr(arguments, name) for name in ("model", "dtype", "device", "base_model")},
        texts=tuple(arguments.texts),
        prompt_tokens=tuple(map(_tokens, arguments.cached_tokens)),
        new_tokens=arguments.new_tokens,
        scales=tuple(map(_pair, arguments.pairs)),
    )
    return benchmark_rerotate(config, progress=_progress, save=save)


def _evaluate(arguments: argparse.Namespace, save: Callable[[Any], None]) -> Any:
    from e2llm.benchmark.evaluate import EvaluateSpeedConfig, benchmark_evaluate

    names = ("model", "shape", "stride", "steps", "rounds", "dtype", "device", "base_model")
    config = EvaluateSpeedConfig(
        **{name: getattr(arguments, name) for name in names},
        windows=tuple(map(_tokens, arguments.windows)),
        compile=tuple(arguments.compile),
    )
    return benchmark_evaluate(config, progress=_progress, save=save)


def _answers(arguments: argparse.Namespace, save: Callable[[Any], None]) -> Any:
    from e2llm.benchmark.answers import AnswerSpeedConfig, benchmark_answers

    names = ("model", "shape", "prompts", "new_tokens", "rounds", "dtype", "device", "base_model")
    config = AnswerSpeedConfig(
        **{name: getattr(arguments, name) for name in names},
        windows=tuple(map(_tokens, arguments.windows)),
        batches=tuple(arguments.batch_size),
        chunk_tokens=tuple(map(_tokens, arguments.chunk_tokens)),
    )
    profile = Path(arguments.profile) if arguments.profile else None
    return benchmark_answers(config, progress=_progress, save=save, profile=profile)


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


def _pair(text: str) -> tuple[float, float]:
    """1:2 -> (1.0, 2.0). Raises ValueError."""
    try:
        old, new = map(float, text.split(":"))
    except ValueError as error:
        raise ValueError(f"pairs = {text!r}: write the old and the new scale as 1:2") from error
    return old, new
