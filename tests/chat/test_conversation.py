"""The chat: what the model is given, what is shown, and that Ctrl-C stops an answer and nothing else."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from interrupts import listen_to_interrupts

from e2llm.chat.conversation import Conversation, Options
from e2llm.chat.terminal import talk, window_tokens
from e2llm.engine.batch import BatchEngine
from e2llm.infer import Engine
from e2llm.quickstart import TINY

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def base():
    engine = Engine.load(str(TINY), dtype="float32", device="cpu")
    engine.max_scale = 16.0
    return engine


@pytest.fixture(scope="module")
def engine(base):
    with BatchEngine.load(str(TINY), dtype="float32", device="cpu", max_scale=16.0, kv_tokens=16_384) as made:
        made.tokenizer.chat_template = TEMPLATE
        yield made


@pytest.fixture
def run(engine):
    """run(*lines, **options) -> (conversation, standard output, notes)."""

    def go(*lines, conversation=None, **options):
        made = conversation or Conversation(engine, Options(max_new_tokens=8, **options))
        out, notes, rest = io.StringIO(), io.StringIO(), iter(lines)

        def read(_):
            line = next(rest, None)
            if line is None:
                raise EOFError
            if isinstance(line, BaseException):
                raise line
            return line

        talk(made, out=out, notes=notes, read=read)
        return made, out.getvalue(), notes.getvalue()

    return go


def alone(base, prompt, tokens=8, scale=None):
    return base.generate(prompt, max_new_tokens=tokens, scale=scale).text


def test_every_answer_follows_from_the_whole_conversation(base, run):
    first = alone(base, "system: Short.\nuser: The river\nassistant:")
    second = alone(base, f"system: Short.\nuser: The river\nassistant: {first}\nuser: And then?\nassistant:")
    made, out, notes = run("The river", "", "And then?", system="Short.")
    assert out == f"{first}\n{second}\n"
    assert [m["role"] for m in made.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert notes.count("window 512, scale 1") == 2 and "tokens/s" in notes and "cut at the length limit" in notes


def test_raw_is_one_text(base, run):
    first = alone(base, "def add(a,")
    second = alone(base, f"def add(a,{first}def sub(")
    _, out, _ = run("def add(a,", "def sub(", raw=True)
    assert out == f"{first}\n{second}\n"


def test_without_a_template_only_raw(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"no chat template.*--raw"):
        Conversation(engine, Options())
    Conversation(engine, Options(raw=True))


def test_files_and_windows(base, run, tmp_path):
    (tmp_path / "a.txt").write_text("The mill stood by the water. " * 100)
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    commands = (f"/file {tmp_path}/a.txt", f"/file {tmp_path}/none", f"/file {tmp_path}/b.bin", "/file")
    made, out, notes = run(*commands, "What stood?", "/stats", "/reset", "/window 4k", "Hi", "/window auto", "Hi")
    whole = "The mill stood by the water. " * 100 + "\n\nWhat stood?"
    assert out.startswith(alone(base, f"user: {whole}\nassistant:", scale=2.0))
    assert "2900 characters stand before" in notes
    assert (
        "none: cannot be read (No such file" in notes and "b.bin: not a text" in notes and "name a text file" in notes
    )
    assert "1. [" in notes and "key-value memory:" in notes
    assert [turn.admission.scale for turn in made.turns] == [8, 1]  # /reset forgot the first
    assert "window 1024, scale 2" in notes and "window 4096, scale 8" in notes


def test_what_cannot_be_done_is_said_and_nothing_is_lost(run):
    made, _, notes = run("Hi", "river " * 9000, "/window 99k", "/window few", "/nonsense", "/window 0", "/help")
    assert "largest trained window is 8192" in notes and "use 1 to 8192 tokens" in notes
    assert "'few'" in notes and "no command /nonsense" in notes and "/reset" in notes
    assert len(made.turns) == 1 and len(made.messages) == 2


def test_interrupted_answers_stay_as_far_as_they_came(engine, run):
    conversation, before = Conversation(engine, Options(max_new_tokens=300)), engine.stats().output_tokens_total
    pieces = iter(conversation.say("The river"))
    shown = next(pieces) + next(pieces)
    pieces.close()  # what the terminal does on Ctrl-C
    assert conversation.messages[-1] == {"role": "assistant", "content": shown}
    assert conversation.turns[0].end == "cancelled"
    end = time.monotonic() + 5
    while engine.stats().running:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert engine.stats().output_tokens_total - before < 100  # freed at once, not when it was done
    _, _, notes = run(KeyboardInterrupt(), "/stats", "/exit", conversation=conversation)
    assert "stopped" in notes and "Ctrl-D leaves" in notes


def test_windows_as_people_write_them():
    assert [window_tokens(t) for t in ("4096", "32k", "8K", "auto", "")] == [4096, 32768, 8192, None, None]
    for bad in ("-1", "4.5k", "k", "many"):
        with pytest.raises(ValueError, match="window"):
            window_tokens(bad)


COMMAND = """
import argparse, sys
from e2llm.chat.command import add_arguments, run
parser = argparse.ArgumentParser()
add_arguments(parser)
sys.exit(run(parser.parse_args()))
"""


def test_ctrl_c_in_a_terminal():
    """The real thing: a terminal, a running answer, SIGINT, and a conversation that goes on."""
    ours, theirs = pty.openpty()
    arguments = [str(TINY), "--raw", "--temperature", "0", "--max-new-tokens", "480", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=listen_to_interrupts,
    )
    os.close(theirs)
    seen = ""

    def until(*texts: str, seconds: float = 60) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while not any(text in seen for text in texts):
            ready, _, _ = select.select([ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, seen
            seen += os.read(ours, 4096).decode(errors="replace")

    try:
        until("> ")
        for _ in range(5):  # a machine that is slow enough may get to us when the answer is written already
            seen = ""
            os.write(ours, b"def add(a, b):\n")
            until("def add(a, b):\r\n")
            seen += os.read(ours, 4096).decode(errors="replace")  # the answer's beginning
            process.send_signal(signal.SIGINT)
            until("stopped]", "Ctrl-D leaves)")
            if "stopped]" in seen:
                break
        assert "stopped]" in seen
        os.write(ours, b"/stats\n")
        until("1. [")
        os.write(ours, b"/exit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_conversation_that_outgrows_its_scale_may_turn_its_keys(run):
    """Raw text in two turns: 300 tokens and more at scale 1, then some 600 at scale 2."""
    text = "def area(width, height):\n    return width * height\n\n\n" * 24
    with BatchEngine.load(
        str(TINY), dtype="float32", device="cpu", max_scale=16.0, kv_tokens=4096, rerotate=True
    ) as engine:
        conversation = Conversation(engine, Options(max_new_tokens=8, raw=True))
        _, _, notes = run(text, text, "/stats", conversation=conversation)
        first, second = (turn.admission for turn in conversation.turns)
        assert (first.scale, second.scale) == (1.0, 2.0)
        turned = engine.stats().turned_tokens_total
        assert first.prompt_tokens - 16 < turned <= first.prompt_tokens + 8
        assert f"({turned} turned from another scale)" in notes
