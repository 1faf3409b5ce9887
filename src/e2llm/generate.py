"""`e2llm generate`: a prompt from a file, a pipe or a flag, its answer on standard output while it is written.

Flows in: a command line. Flows out: text on standard output, figures and warnings on standard error, an exit code. No
torch until it runs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from e2llm.infer import Completion, Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `e2llm generate`."""
    add = parser.add_argument
    add("model", help="checkpoint folder, hub name or .gguf file")
    add("--prompt", help="the prompt itself")
    add("--prompt-file", help="file that holds the prompt; '-' reads standard input, as does a pipe without either")
    add("--max-new-tokens", type=int, help="default: 1024, and never beyond the scale's window")
    add("--scale", type=float, help="default: chosen from prompt and new tokens")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--stop", action="append", default=[], help="text that ends the answer; repeatable")
    add("--beyond-trained", action="store_true", help="go past the largest trained window, with a warning")
    add("--dtype", choices=["float32", "bfloat16", "float16", "auto"])
    add("--device")


def run(arguments: argparse.Namespace) -> int:
    """Answer one prompt. Raises ValueError for what the user can mend."""
    prompt = read_prompt(arguments.prompt, arguments.prompt_file, sys.stdin.buffer, piped=not sys.stdin.isatty())
    if not -(2**63) <= arguments.seed < 2**63:
        raise ValueError(f"seed = {arguments.seed}: use a whole number of at most 63 bits")
    from e2llm.hf.checkpoint import assumed_without_info
    from e2llm.infer import Engine, ScaleWarning

    engine = Engine.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    if engine.info is None:
        note = assumed_without_info(arguments.model, engine.extension.method, engine.native_window)
        print(note, file=sys.stderr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ScaleWarning)
        completion = _stream(engine, prompt, arguments)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(
        f"[{completion.prompt_tokens} prompt + {len(completion.token_ids)} new tokens, scale {completion.scale:g}, "
        f"window {completion.window}, finished by {completion.finish_reason}, {completion.seconds:.1f} s]",
        file=sys.stderr,
    )
    return 0


def read_prompt(text: str | None, path: str | None, stdin: BinaryIO, *, piped: bool) -> str:
    """The prompt, from the one place that is named. Raises ValueError for none or two, and for what is no text."""
    if text is not None and path is not None:
        raise ValueError("prompt: give either --prompt TEXT or --prompt-file FILE, not both")
    if text is not None:
        return _checked(text.encode("utf-8", "surrogateescape"), "prompt")
    if path is None and not piped:
        raise ValueError("prompt: give either --prompt TEXT or --prompt-file FILE, or send it through a pipe")
    if path in (None, "-"):
        return _checked(stdin.read(), "standard input")
    try:
        return _checked(Path(str(path)).expanduser().read_bytes(), f"prompt-file = {path!r}")
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"prompt-file = {path!r}: {reason}") from error


def _checked(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not a text in UTF-8 (byte {error.start} is {data[error.start]:#04x})") from error
    if not text:
        raise ValueError(f"{where}: empty; give at least one character")
    return text


def _stream(engine: Engine, prompt: str, arguments: argparse.Namespace) -> Completion:
    """The completion, written out as it grows."""
    from e2llm.engine.text import TextStream

    text = TextStream(engine.tokenizer, tuple(arguments.stop))

    shown = False

    def show(piece: str) -> None:
        nonlocal shown
        shown = True
        sys.stdout.write(piece)
        sys.stdout.flush()

    options: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("max_new_tokens", "scale", "temperature", "top_p", "seed")
    }
    try:
        completion = engine.generate(
            prompt,
            stop=tuple(arguments.stop),
            beyond_trained=arguments.beyond_trained,
            on_token=lambda token: show(text.push(token)[0]),
            **options,
        )
        show(text.rest())
    finally:
        if shown:
            print(flush=True)
    return completion
