"""The terminal's side of a conversation: reads lines, runs commands, prints answers as they come.

Flows in: lines. Flows out: text on standard output, figures and errors on standard error. Ctrl-C stops an answer and
keeps the conversation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TextIO

from e2llm.chat.conversation import Answer, Conversation, Turn

HELP = """/file PATH    put a file's text before your next message
/window N     read from now on at the scale of at least N tokens (4096, 32k); `auto` goes back to the length
/stats        figures of this conversation
/reset        forget the conversation
/exit         leave (also Ctrl-D); Ctrl-C stops an answer"""
PROMPT = "> "


def talk(conversation: Conversation, *, out: TextIO, notes: TextIO, read: Callable[[str], str] = input) -> None:
    """Until /exit or the end of the input. `read` raises EOFError at the end, as `input` does."""
    print(greeting(conversation), file=notes)
    while True:
        try:
            line = read(PROMPT)
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)", file=notes)
            continue
        if line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            if name in ("exit", "quit"):
                return
            command = COMMANDS.get(name)
            try:
                text = command(conversation, argument.strip()) if command else f"no command /{name}\n{HELP}"
            except ValueError as error:
                text = str(error)
            print(text, file=notes)
        elif line.strip():
            try:
                _answer(conversation, line, out, notes)
            except KeyboardInterrupt:  # while the prompt was being made: nothing was said
                print("\nstopped", file=notes)


def greeting(conversation: Conversation) -> str:
    engine = conversation.engine
    largest = int(engine.native_window * engine.max_scale)
    return f"native window {engine.native_window}, up to {largest} tokens; /help lists the commands"


def _answer(conversation: Conversation, line: str, out: TextIO, notes: TextIO) -> None:
    try:
        answer = conversation.say(line)
    except ValueError as error:  # too long, or no room: nothing was said
        print(error, file=notes)
        return
    for warning in answer.turn.admission.warnings:
        print(warning, file=notes)
    _show(answer, out)
    print(file=out, flush=True)
    print(figures(answer.turn), file=notes, flush=True)


def _show(answer: Answer, out: TextIO) -> None:
    pieces: Iterable[str] = iter(answer)
    # The first Ctrl-C may come anywhere in here; closing the pieces stops the engine and keeps what was shown.
    with contextlib.closing(pieces), contextlib.suppress(KeyboardInterrupt):  # type: ignore[type-var]
        for piece in pieces:
            out.write(piece)
            out.flush()


def figures(turn: Turn) -> str:
    """One line about an answer."""
    admission = turn.admission
    parts = [
        f"{admission.prompt_tokens} + {turn.tokens} tokens",
        f"window {admission.window}",
        f"scale {admission.scale:g}",
    ]
    if turn.first_token_seconds is not None:
        parts.append(f"first token {turn.first_token_seconds:.2f} s")
    if turn.tokens_per_second is not None:
        parts.append(f"{turn.tokens_per_second:.1f} tokens/s")
    ends = {"stop": "", "length": "cut at the length limit", "cancelled": "stopped", "error": f"failed: {turn.error}"}
    return f"[{', '.join([*parts, *filter(None, [ends[turn.end]])])}]"


def window_tokens(text: str) -> int | None:
    """4096, 32k -> tokens; auto -> None. Raises ValueError."""
    lowered = text.strip().lower()
    if lowered in ("", "auto"):
        return None
    number, unit = (lowered[:-1], 1024) if lowered.endswith("k") else (lowered, 1)
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"window = {text!r}: write tokens as 4096 or 32k, or auto")
    return int(number) * unit


def _file(conversation: Conversation, path: str) -> str:
    if not path:
        raise ValueError("/file PATH: name a text file")
    return f"{conversation.add_file(path)} characters stand before your next message"


def _window(conversation: Conversation, text: str) -> str:
    tokens = window_tokens(text)
    scale = conversation.set_window(tokens)
    return "the scale is chosen by length" if tokens is None else f"at least {tokens} tokens: scale {scale:g} or more"


def _stats(conversation: Conversation, _: str) -> str:
    lines = [f"{number}. {figures(turn)}" for number, turn in enumerate(conversation.turns, 1)]
    stats = conversation.engine.stats()
    memory = f"key-value memory: {stats.kv_tokens_used} of {stats.kv_tokens_total} tokens"
    written = f"read {stats.prompt_tokens_total}, found again {stats.cached_tokens_total}"
    written += f" ({stats.turned_tokens_total} turned from another scale)" if stats.turned_tokens_total else ""
    return "\n".join([*lines, f"{memory}; {written}, written {stats.output_tokens_total}"])


def _reset(conversation: Conversation, _: str) -> str:
    conversation.reset()
    return "forgotten"


def _help(conversation: Conversation, _: str) -> str:
    return HELP


COMMANDS: dict[str, Callable[[Conversation, str], str]] = {
    "file": _file,
    "window": _window,
    "stats": _stats,
    "reset": _reset,
    "help": _help,
}
