"""Files that an evaluation names are looked at before weights are read, and its Record's place before anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architectures import WINDOW, tiny_model
from checkpoints import checkpoint_info
from texts import character_tokenizer, random_documents

from e2llm.cli import main
from e2llm.evaluate import calibrate, choice, run, short, suite
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.hf import save_model
from e2llm.infer import Engine
from e2llm.records import check_out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_model(tiny_model("llama"), character_tokenizer(), folder, checkpoint_info())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("abc " * 200)
    return tmp_path / "a.txt"


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads weights fails."""

    def reads(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights are read")

    monkeypatch.setattr(Engine, "load", reads)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"corpora": {"books": "nowhere"}}, r"corpora\.books = nowhere: no such file or folder of evaluation documents"),
    ({"corpora": {"books": "empty"}}, r"corpora\.books = empty: no file ending in \.txt"),
    ({"qa": {"qa_1": "squad.json"}, "protocols": ("qa_1",)}, r"qa = 'squad\.json': no such file of questions"),
    ({"protocols": ("qa_2",)}, r"questions over documents need a file; give qa = qa_2=FILE"),
    ({"kv_files": ("kv.jsonl",), "protocols": ("kv_pairs",)}, r"kv_files: 'kv\.jsonl': no such file"),
    ({"key_model": "./keys", "protocols": ("key_tokens",)}, r"key_model = '\./keys': no such file or folder; leave"),
    ({"out": "."}, r"out = '\.': it is a folder; name a file in it"),
    ({"out": "a.txt/deep/results.json"}, r"out = 'a\.txt/deep/results\.json': .*a\.txt cannot be written \(Not a dir"),
]


@pytest.mark.parametrize(("options", "named"), BAD, ids=[named for _, named in BAD])
@pytest.mark.usefixtures("weightless")
def test_bad_files_are_named_before_weights_are_read(
    options: dict[str, Any], named: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text.parent)
    (text.parent / "empty").mkdir()
    config = EvaluateConfig(**{"model": "m", "corpora": {"a": "a.txt"}, "device": "cpu", **options})
    with pytest.raises(ValueError, match=named):
        run.run(config)
    with pytest.raises(ValueError, match=named):
        choice.choice(config)


def _calibrated(folder: Path) -> None:
    calibrate.run(EvaluateConfig(model=str(folder), corpora={"a": "a.txt"}, out=".", device="cpu"))


def _tasks(folder: Path) -> None:
    suite.run(SuiteConfig(suite="longbench", model=str(folder), tasks_folder="nowhere", out="."))


def _short(folder: Path) -> None:
    short.run(SuiteConfig(suite="short", model=str(folder), tasks_folder="nowhere", out="."))


@pytest.mark.parametrize("ask", [_calibrated, _tasks, _short])
@pytest.mark.usefixtures("weightless")
def test_a_record_that_cannot_be_written_is_known_first(
    ask: Callable[[Path], None], checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text.parent)
    with pytest.raises(ValueError, match=r"out = '\.': it is a folder"):
        ask(checkpoint)


def test_looking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_out(tmp_path / "new" / "deeper" / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_a_key_model_of_another_tokenizer_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["a token more"])
    other = save_model(tiny_model("llama"), tokenizer, tmp_path / "other", checkpoint_info())
    config = EvaluateConfig(
        model="m", windows=(WINDOW,), protocols=("whole", "key_tokens"), key_model=str(other), device="cpu"
    )
    engine = Engine(tiny_model("llama"), character_tokenizer())
    with pytest.raises(ValueError, match=r"key_model = .*its tokenizer is another one"):
        run.plan_parts(engine, {"noise": random_documents(1, WINDOW)}, config)


def test_a_window_beyond_training_is_refused_before_texts_are_read(
    checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("texts are read")

    monkeypatch.setattr(run, "load_documents", reads)
    config = EvaluateConfig(model=str(checkpoint), corpora={"a": str(text)}, windows=(64 * WINDOW,), device="cpu")
    with pytest.raises(ValueError, match="is above the checkpoint's trained range"):
        run.run(config)


@pytest.mark.usefixtures("weightless")
def test_a_label_given_twice_is_refused(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = ["--corpus", f"a={text}", "--corpus", "a=other.txt"]
    for command in ("evaluate", "calibrate"):
        assert main([command, "m", *twice]) == 2
        assert f"--corpus a: named twice, {text} and other.txt; give each a label" in capsys.readouterr().err
    questions = ["--suite", "ruler", "--qa", "qa_1=x.json", "--qa", "qa_1=y.json"]
    assert main(["evaluate", "m", "--corpus", f"a={text}", *questions]) == 2
    assert "--qa qa_1: named twice, x.json and y.json" in capsys.readouterr().err
