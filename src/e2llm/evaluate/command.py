"""`e2llm evaluate`: a command line becomes an evaluation of texts, or a suite of tasks; either writes a Record.

Flows in: parsed arguments. Flows out: the Record and where it is. No torch until something is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from e2llm.evaluate.config import METHODS, PROTOCOLS, EvaluateConfig
from e2llm.evaluate.suite_config import SUITES as TASK_SUITES
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.evaluate.suites import NAMES as TEXT_SUITES
from e2llm.records import Record

_TUPLES = ("windows", "scales", "protocols", "kv_files", "depths")
_NOT_CONFIG = {"command", "stage", "traceback", "argv", "gpus"}
_PROTOCOLS = "whole sliding position difference key_tokens; pass_key uuid_kv needle multi_needle kv_pairs; attention; \
RULER's niah_single_1 to qa_2"
_SUITES = "of texts, protocols and sizes by name, where what is given beside it counts more. paper: sliding window as \
in the paper; context: is the context used; needles: retrieval maps; ruler: its thirteen kinds; attention: where the \
answer looks; choice: the chosen scale against fixed ones, linear and yarn, with --tasks-folder on short tasks too; \
smoke: everything once, in minutes on two cores. Of tasks, instead of texts: longbench, leval, short"


def window_tokens(text: str) -> int:
    """4096, 4k, 128k, 1M -> tokens."""
    lowered = text.strip().lower()
    unit = {"k": 2**10, "m": 2**20}.get(lowered[-1:], 1)
    try:
        return int(lowered[:-1] if unit > 1 else lowered) * unit
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write tokens as 4096, 4k or 1M") from error


def label_path(text: str) -> tuple[str, str]:
    """label=path."""
    label, equals, path = text.partition("=")
    if not equals or not label or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: write label=path, e.g. novels=books/")
    return label, path


def by_label(option: str, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Label -> path. ValueError for a label that is given twice: one of the two would not be measured."""
    found: dict[str, str] = {}
    for label, path in pairs:
        if label in found:
            raise ValueError(
                f"--{option} {label}: named twice, {found[label]} and {path}; give each a label of its own, or one "
                "folder that holds both"
            )
        found[label] = path
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("model", help="checkpoint folder, hub name or .gguf file")
    add("--corpus", type=label_path, action="append", default=[], metavar="LABEL=PATH", help="text to measure on")
    add("--suite", choices=[*TEXT_SUITES, *TASK_SUITES], help=_SUITES)
    add("--windows", type=window_tokens, nargs="+", metavar="TOKENS", help="e.g. 4k 8k 16k 32k (default: 4k 8k)")
    grid = "a full window × scale grid (default: the calibrated scale of each window, else window / native)"
    add("--scales", type=float, nargs="+", metavar="G", help=grid)
    add("--method", choices=METHODS, help="default: the checkpoint's own")
    add("--protocols", nargs="+", choices=PROTOCOLS, metavar="PROTOCOL", help=f"default: whole pass_key; {_PROTOCOLS}")
    add("--qa", type=label_path, action="append", metavar="KIND=FILE", help="questions of qa_1 or qa_2, with documents")
    add("--kv-files", nargs="+", metavar="FILE", help="objects that kv_pairs asks (default: made to fill the window)")
    add("--key-model", help="says which tokens need the context (default: the model itself)")
    add("--neighbours", type=int, help="self_extend: tokens read at their own distance (default: native / 4)")
    add("--stride", type=int, help="tokens one step of the sliding window scores (default: 256)")
    add("--max-strides", type=int, help="steps of the sliding window a document (default: 64)")
    add("--prompts", type=int, help="retrieval prompts per window (default: 20)")
    part = "part of the text that the asked fact of pass_key and uuid_kv stands in, as two shares (default: 0 1)"
    add("--depths", type=float, nargs=2, metavar=("LOW", "HIGH"), help=part)
    together = "questions asked at once, where the model can be served in batches (default: 1; short: 8)"
    add("--batch-size", type=int, metavar="N", help=together)
    template = "ask through the chat template (default: retrieval no, suites where published)"
    add("--chat", action=argparse.BooleanOptionalAction, default=None, help=template)
    add("--max-documents", type=int, help="documents per corpus (default: all that reach the largest window)")
    add("--seed", type=int, help="of the retrieval prompts and of the draw of samples (default: 0)")
    _add_task_arguments(parser)
    add("--dtype", choices=["float32", "bfloat16", "float16", "auto"])
    add("--device")
    spread = "GPUs of this machine to spread over, a process each (default: all; with --device cpu: processes, 1)"
    add("--gpus", type=int, metavar="N", help=spread)
    add("--attn-implementation")
    fast = "layers: torch.compile while losses are measured; worth its half minute on a GPU (none)"
    add("--compile", choices=["none", "layers"], help=fast)
    add("--checkpoint", help="label of the weights in tables, e.g. recommended")
    add("--base-model", help="label of the base model in tables")
    add("--out", help="Record to write (default: evaluation.json)")


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("suites of tasks").add_argument
    add("--tasks", nargs="+", metavar="TASK", help="tasks of the suite (default: all that the data holds)")
    folder = "folder or .zip with TASK.jsonl files (short, choice: YAML tasks of the harness), or hub (default)"
    add("--tasks-folder", metavar="PATH", help=folder)
    add("--max-examples", type=int, metavar="N", help="samples a task, drawn by --seed (default: all)")
    by_request = "choose the scale from each prompt's length instead of one for the window"
    add("--scale-per-request", action="store_true", default=None, help=by_request)


def measure(arguments: argparse.Namespace) -> tuple[Record, str]:
    """Measure and write; the Record and its file."""
    given = {k: v for k, v in vars(arguments).items() if k not in _NOT_CONFIG and v is not None}
    if not given["corpus"]:
        del given["corpus"]
    with _told_in_a_line():
        return _tasks(given) if arguments.suite in TASK_SUITES else _texts(given)


@contextlib.contextmanager
def _told_in_a_line() -> Iterator[None]:
    """What was left out is told without the place in our code that tells it."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if category.__name__ == "LeftOutWarning":  # its module loads what is not needed yet
                print(f"warning: {message}", file=sys.stderr)
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield


def _texts(given: dict[str, Any]) -> tuple[Record, str]:
    suite = given.pop("suite", None)
    short = _short_of_choice(given) if suite == "choice" else None
    _refuse_options(given, EvaluateConfig, extra="corpus", hint="it belongs to --suite longbench, leval or short")
    given["corpora"] = by_label("corpus", given.pop("corpus", []))
    given |= {name: tuple(given[name]) for name in _TUPLES if name in given}
    if "qa" in given:
        given["qa"] = by_label("qa", given["qa"])
    if suite not in (None, "choice"):
        from e2llm.evaluate.suites import with_suite

        given = with_suite(suite, given)
    config = EvaluateConfig(**given)
    if config.left_out and config.corpora:
        names, first = ", ".join(config.left_out), config.left_out[0]
        print(f"left out: {names} (questions over documents: give --qa {first}=FILE)", file=sys.stderr)
    if suite == "choice":
        from e2llm.evaluate.choice import choice

        return choice(config, short=short), config.out
    from e2llm.evaluate.run import run as evaluate

    return evaluate(config), config.out


def _short_of_choice(given: dict[str, Any]) -> SuiteConfig | None:
    """The short tasks that `--suite choice` asks beside texts: takes their options out of `given`."""
    own = {name: given.pop(name) for name in ("tasks", "tasks_folder", "max_examples") if name in given}
    if not own:
        return None
    if "tasks_folder" not in own:
        raise ValueError(
            f"--{next(iter(own)).replace('_', '-')}: name the short tasks' folder, or hub, with --tasks-folder"
        )
    own["tasks"] = tuple(own.get("tasks", ()))
    fields = {field.name for field in dataclasses.fields(SuiteConfig)} - {"windows", "scales", "method"}
    shared = {name: value for name, value in given.items() if name in fields}
    return SuiteConfig(suite="short", **shared | own)


def _tasks(given: dict[str, Any]) -> tuple[Record, str]:
    _refuse_options(given, SuiteConfig, extra="", hint=f"--suite {given['suite']} has no use for it")
    given |= {name: tuple(given[name]) for name in ("windows", "scales", "tasks") if name in given}
    config = SuiteConfig(**given)
    if config.suite == "short":
        from e2llm.evaluate.short import run as ask
    else:
        from e2llm.evaluate.suite import run as ask
    return ask(config), config.out


def _refuse_options(given: dict[str, Any], config: type, *, extra: str, hint: str) -> None:
    """An option that a kind of evaluation does not read is a mistake, not to be dropped in silence."""
    unread = sorted(set(given) - {field.name for field in dataclasses.fields(config)} - {extra})
    if unread:
        raise ValueError(f"{', '.join('--' + name.replace('_', '-') for name in unread)}: {hint}")
