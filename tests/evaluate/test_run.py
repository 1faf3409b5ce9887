"""From a checkpoint folder and text files to a Record; a stopped evaluation continues where it was."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from architectures import WINDOW, tiny_model
from ruler_texts import word_texts, word_tokenizer
from texts import character_tokenizer, random_documents

from e2llm.evaluate import attention_rows, loss_rows, measure
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.documents import Document
from e2llm.evaluate.measure import fingerprint
from e2llm.evaluate.retrieval import prompt_template
from e2llm.evaluate.run import evaluate, plan_parts, run
from e2llm.hf import CheckpointInfo, install, save_model
from e2llm.infer import Engine
from e2llm.records import Record


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-extended"
    info = CheckpointInfo(
        method="yarn",
        native_window=WINDOW,
        training_window=WINDOW,
        max_scale=16.0,
        base_model="somewhere/tiny",
        checkpoint="paper",
    )
    return save_model(tiny_model("llama"), character_tokenizer(), folder, info)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    letters = random.Random(0)
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("".join(letters.choices("abcdefgh ", k=700)))
    return folder


def settings(checkpoint: Path, texts: Path, out: Path, **options: Any) -> EvaluateConfig:
    defaults: dict[str, Any] = {"windows": (320, 640), "protocols": ("whole", "pass_key", "sliding"), "prompts": 4}
    defaults |= {"max_strides": 2, "stride": 64, "device": "cpu"}
    return EvaluateConfig(model=str(checkpoint), corpora={"noise": str(texts)}, out=str(out), **(defaults | options))


def test_record_of_a_checkpoint(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.json"
    run(settings(checkpoint, texts, out), progress=False)
    record = Record.load(out)
    assert not list(out.parent.glob("*.partial*"))
    asked = record.config["prompt"]
    assert asked == prompt_template(chat=False) and "The pass key is {value}." in asked
    labels = {"base_model": "tiny", "checkpoint": "paper", "method": "yarn", "corpus": "noise", "native_window": WINDOW}
    assert all(row | labels == row for row in record.rows)
    whole = [row for row in record.rows if row.get("protocol") == "whole"]
    assert [(row["window"], row["scale"], row["n"]) for row in whole] == [(320, 5.0, 2 * 638), (640, 10.0, 2 * 638)]
    sliding = [row for row in record.rows if row.get("protocol") == "sliding"]
    assert [(row["window"], row["n"], row["strides"]) for row in sliding] == [(320, 256, 2), (640, 256, 1)]
    overall = [row for row in record.rows if row["metric"] == "retrieval" and "depth" not in row]
    assert [(row["window"], row["n"], row["task"], row["seed"]) for row in overall] == [
        (320, 4, "pass_key", 0),
        (640, 4, "pass_key", 0),
    ]
    assert sum("depth" in row for row in record.rows) == 8
    nats = [e["nats"] for e in record.examples if e.get("protocol") == "whole" and e["window"] == 320]
    # Two documents: the interval's ends are the better and the worse one alone.
    assert whole[0]["low"] == pytest.approx(math.exp(min(nats) / 638))
    assert whole[0]["high"] == pytest.approx(math.exp(max(nats) / 638))
    assert all(row["low"] == 0 and row["high"] == pytest.approx(0.49, abs=0.01) for row in overall)  # Wilson, 0 of 4
    assert len(nats) == 2 and whole[0]["value"] == pytest.approx(2.718281828 ** (sum(nats) / (2 * 638)))
    keys = [e for e in record.examples if e["metric"] == "retrieval"]
    assert len(keys) == 8 and all(len(e["expected"]) == 5 and not e["correct"] for e in keys)
    assert record.config["corpora"]["noise"]["documents"][0]["name"] == "a.txt"
    assert str(tmp_path) not in out.read_text() and str(texts) not in out.read_text()


def test_a_stopped_evaluation_continues(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.json"
    config = settings(checkpoint, texts, out, protocols=("whole", "pass_key"))
    expected = run(
        settings(checkpoint, texts, tmp_path / "unbroken.json", protocols=("whole", "pass_key")), progress=False
    )
    measured: list[int] = []
    real = measure.retrieval

    def stops(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    def counts(*args: Any, **options: Any) -> Any:
        measured.append(options["window"])
        return real(*args, **options)

    monkeypatch.setattr(measure, "retrieval", stops)
    with pytest.raises(KeyboardInterrupt):
        run(config, progress=False)
    partial = Path(f"{out}.partial.jsonl")
    assert len(partial.read_text().split()) > 0 and not out.exists()
    with partial.open("a") as file:
        file.write('\n{"key": "half-writ')  # killed while it wrote
    monkeypatch.setattr(measure, "whole_windows", stops)  # must not run again
    monkeypatch.setattr(measure, "retrieval", counts)
    record = run(config, progress=False)
    assert measured == [320, 640]
    assert record.rows == expected.rows and record.examples == expected.examples
    assert not partial.exists()


PIECES = {
    "whole": (measure, "whole_windows"),
    "sliding": (measure, "sliding_windows"),
    "position": (loss_rows, "whole_losses"),
    "difference": (loss_rows, "compare"),
    "pass_key": (Engine, "complete"),
    "needle": (Engine, "complete"),
    "niah_multikey_3": (Engine, "complete"),
    "attention": (attention_rows, "look"),
}
"""Protocol -> what is called once for each of its documents or prompts."""


@pytest.mark.parametrize("protocol", PIECES)
def test_a_part_that_is_stopped_in_its_middle_continues_there(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", vocab_size=len(word_tokenizer()))
    install(model, method="yarn")
    engine = Engine(model, word_tokenizer())
    config = EvaluateConfig(windows=(512, 1024), protocols=(protocol,), prompts=3, stride=64, max_strides=2)
    tokens = word_texts().documents[0].tokens
    corpora = {"noise": [Document(f"{i}.txt", tokens[i * 2000 : i * 2000 + 1024]) for i in range(3)]}
    expected = evaluate(engine, corpora, config)
    calls: list[int] = []
    stop_at: list[int] = [3]
    place, name = PIECES[protocol]
    real = getattr(place, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == stop_at[0]:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(place, name, counted)
    partial = tmp_path / "x.partial.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(engine, corpora, config, partial=partial)
    calls.clear()
    stop_at[0] = 0
    found = evaluate(engine, corpora, config, partial=partial)
    assert len(calls) == 1 + 3  # the third document or prompt of the first window, all of the second
    assert found.rows == expected.rows
    assert json.loads(json.dumps(found.examples)) == json.loads(json.dumps(expected.examples))


def test_parts_of_other_weights_text_or_settings_are_not_reused(checkpoint: Path, tmp_path: Path) -> None:
    partial = tmp_path / "x.partial.jsonl"
    model = tiny_model("llama")
    install(model, method="yarn")
    engine = Engine(model, character_tokenizer())
    config = EvaluateConfig(windows=(64, 128), protocols=("whole",))
    corpora = {"noise": random_documents(2, 128)}

    def lines() -> int:
        evaluate(engine, corpora, config, partial=partial)
        entries = [json.loads(line) for line in partial.read_text().splitlines() if line]
        return sum("of" not in entry["part"] for entry in entries)  # parts, not the documents in them

    assert (lines(), lines()) == (2, 2)
    before = fingerprint(engine)
    model.model.layers[0].mlp.up_proj.weight.data *= 1.001
    assert fingerprint(engine) != before
    assert lines() == 4
    corpora = {"noise": random_documents(2, 128, seed=5)}
    assert lines() == 6
    config = EvaluateConfig(windows=(32, 64, 128), protocols=("whole",))  # other tokens are scored
    assert lines() == 9
    config = EvaluateConfig(windows=(32, 64, 128), protocols=("whole",), scales=(1.0, 2.0, 4.0))
    assert lines() == 15  # 32 and 64 at scale 1 and 128 at scale 2 are there
    assert len(json.loads(partial.read_text().splitlines()[1])) == 3


def test_grid_labels_and_the_base_without_scaling() -> None:
    corpora = {"noise": random_documents(1, 256)}
    model = tiny_model("llama")
    install(model, method="none")
    engine = Engine(model, character_tokenizer())
    config = EvaluateConfig(windows=(64, 256), protocols=("whole",), base_model="tiny")
    rows = evaluate(engine, corpora, config).rows
    assert [(r["scale"], r["checkpoint"], r["method"]) for r in rows] == [(1.0, "base", "none")] * 2
    with pytest.raises(ValueError, match="method none has no scale but 1"):
        plan_parts(engine, corpora, EvaluateConfig(windows=(64, 256), scales=(2.0,)))
    engine.extension.remove()
    engine = Engine(model, character_tokenizer())
    grid = plan_parts(engine, corpora, EvaluateConfig(windows=(64, 256), scales=(1, 4), protocols=("whole",)))
    assert [(part.window, part.scale) for part in grid] == [(64, 1.0), (64, 4.0), (256, 1.0), (256, 4.0)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"windows": (64, 256)}, "window = 64: .* already takes"),
        ({"windows": (512,)}, r"corpora\.noise: .*0\.txt.* shorter than the largest window 512"),
        ({"windows": (128,), "protocols": ("sliding",)}, "stride = 256"),
    ],
)
def test_what_cannot_be_measured_fails_first(options: dict[str, Any], named: str) -> None:
    engine = Engine(tiny_model("llama"), character_tokenizer())
    with pytest.raises(ValueError, match=named):
        plan_parts(engine, {"noise": random_documents(1, 300)}, EvaluateConfig(**options))


def test_model_and_corpora_are_required(texts: Path) -> None:
    with pytest.raises(ValueError, match="model = ''"):
        run(EvaluateConfig(corpora={"a": str(texts)}))
    with pytest.raises(ValueError, match="corpora"):
        run(EvaluateConfig(model="somewhere"))


def test_progress_reaches_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(tiny_model("llama"), character_tokenizer())
    config = EvaluateConfig(windows=(320, 640), protocols=("whole", "sliding", "pass_key"), prompts=2)
    evaluate(engine, {"noise": random_documents(1, 640)}, config, progress=True)
    assert "100 %" in capsys.readouterr().err
