"""`e2llm generate`: where the prompt comes from, what is written while it is made, and what is refused in one line."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from interrupts import listen_to_interrupts

from e2llm.cli import main
from e2llm.generate import read_prompt
from e2llm.infer import Engine
from e2llm.quickstart import TINY

PROMPT = "def add(a, b):\n    return"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base as if extended to 8192 tokens."""
    folder = tmp_path_factory.mktemp("model") / "extended"
    shutil.copytree(TINY, folder)
    told = {"schema": 1, "method": "yarn", "native_window": 512, "training_window": 512, "max_scale": 16.0}
    (folder / "e2llm.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return Engine.load(str(checkpoint), dtype="float32", device="cpu")


def go(*arguments: str) -> int:
    return main(["generate", *arguments, "--device", "cpu"])


def test_the_answer_is_the_engine_s(checkpoint: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=20)
    assert go(str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "20") == 0
    out, err = capsys.readouterr()
    assert out == expected.text + "\n"
    assert f"[{expected.prompt_tokens} prompt + 20 new tokens, scale 1, window 512, finished by length" in err
    stop = expected.text[4:7]
    assert go(str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "20", "--stop", stop) == 0
    out, err = capsys.readouterr()
    assert out == expected.text[: expected.text.index(stop)] + "\n" and "finished by stop" in err


def test_text_is_written_while_it_is_made(engine: Engine) -> None:
    seen: list[int] = []
    done = engine.generate(PROMPT, max_new_tokens=5, on_token=seen.append)
    assert seen == done.token_ids

    def stop(token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # it is called between the tokens, not after the last
        engine.generate(PROMPT, max_new_tokens=10**3, on_token=stop)


def test_a_file_a_pipe_or_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("from a file, straße", encoding="utf-8")
    pipe = io.BytesIO("from a pipe, straße".encode())
    assert read_prompt("a flag", None, pipe, piped=True) == "a flag"
    assert read_prompt(None, str(file), pipe, piped=True) == "from a file, straße"
    assert read_prompt(None, None, pipe, piped=True) == "from a pipe, straße"
    assert read_prompt(None, "-", io.BytesIO(b"typed"), piped=False) == "typed"


@pytest.mark.parametrize(
    ("text", "path", "data", "message"),
    [
        (None, None, None, "or send it through a pipe"),
        ("a", "b", None, "not both"),
        ("", None, None, "prompt: empty"),
        (None, None, b"", "standard input: empty"),
        (None, None, b"ab\xff", r"standard input: not a text in UTF-8 \(byte 2 is 0xff\)"),
        (None, "-", b"\xc3", "standard input: not a text in UTF-8"),
        (os.fsdecode(b"\xfe"), None, None, "prompt: not a text in UTF-8"),
        (None, "nowhere.txt", None, "prompt-file = 'nowhere.txt': no such file"),
        (None, "/", None, "prompt-file = '/': Is a directory"),
    ],
)
def test_what_is_no_prompt(text: str | None, path: str | None, data: bytes | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompt(text, path, io.BytesIO(data or b""), piped=data is not None)


def test_past_the_largest_trained_window(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "9000"]
    assert go(*arguments) == 2
    assert "largest trained window is 8192 tokens" in capsys.readouterr().err
    # Allowed by a flag; the stop string keeps it short.
    assert go(*arguments, "--beyond-trained", "--stop", "(") == 0
    assert "warning: scale 32 for" in capsys.readouterr().err


def test_without_e2llm_json_it_says_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert go(str(TINY), "--prompt", PROMPT, "--max-new-tokens", "2") == 0
    assert "no e2llm.json with" in (err := capsys.readouterr().err)
    assert "assuming method yarn, native window 512" in err
    assert go(str(TINY), "--prompt", "river " * 600) == 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-new-tokens", "0", "max_new_tokens = 0"),
        ("--max-new-tokens", "-5", "max_new_tokens = -5"),
        ("--temperature", "nan", "temperature = nan"),
        ("--temperature", "-1", "temperature = -1"),
        ("--top-p", "0", "top_p = 0"),
        ("--top-p", "7", "top_p = 7"),
        ("--scale", "0.5", "scale = 0.5"),
        ("--scale", "inf", "scale = inf"),
        ("--seed", str(10**30), "seed = 1000"),
        ("--stop", "", "stop = ''"),
        ("--device", "cuda:99", "device = 'cuda:99'"),
        ("--device", "potato", "device = 'potato'"),
    ],
)
def test_absurd_settings(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert main(["generate", str(checkpoint), "--prompt", "a", "--device", "cpu", option, value]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == ""


def damage(folder: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    if what == "cut weights":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif what == "garbled weights":
        data = bytearray(weights.read_bytes())
        data[8:100] = bytes(92)
        weights.write_bytes(data)
    elif what == "missing weights":
        from safetensors.torch import load_file, save_file

        tensors: Any = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif what == "cut tokenizer":
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:2000])
    else:
        (folder / what).write_text("{")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cut weights", "cannot be read (Error while deserializing"),
        ("garbled weights", "cannot be read (Error while deserializing"),
        ("missing weights", "missing from its files (1, such as model.layers.1.mlp.up_proj.weight)"),
        ("no tokenizer", "its tokenizer cannot be read"),
        ("cut tokenizer", "its tokenizer cannot be read"),
        ("config.json", "cannot be read ("),
        ("e2llm.json", "not an e2llm.json"),
    ],
)
def test_a_corrupt_checkpoint(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], what: str, message: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "bad")
    damage(tmp_path / "bad", what)
    assert go(str(tmp_path / "bad"), "--prompt", "a") == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in err and str(tmp_path / "bad") in err


def test_through_a_pipe_into_one_that_closes(checkpoint: Path) -> None:
    """`cat prompt | e2llm generate model | head -c 5`."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "e2llm.cli",
        "generate",
        str(checkpoint),
        "--max-new-tokens",
        "400",
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(PROMPT.encode())
    process.stdin.close()
    assert process.stdout.read(5)
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 141 and "Traceback" not in error and "Exception" not in error, error


def test_ctrl_c_in_a_terminal(checkpoint: Path) -> None:
    import signal

    ours, theirs = pty.openpty()
    command = [sys.executable, "-W", "ignore", "-m", "e2llm.cli", "generate", str(checkpoint), "--prompt", PROMPT]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        preexec_fn=listen_to_interrupts,
    )
    os.close(theirs)
    try:
        seen = b""
        while len(seen) < 20:
            seen += os.read(ours, 64)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None and b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        assert process.stderr is not None
        process.stderr.close()
