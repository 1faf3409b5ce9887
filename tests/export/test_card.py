"""The model card: what the hub reads in its front matter, and what a reader is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import checkpoint_info, save_checkpoint
from huggingface_hub import ModelCard

from e2llm.cli import main
from e2llm.export import export
from e2llm.export.checkpoint_card import write_checkpoint_card
from e2llm.records import Record, make_row

SCHEDULE = [{"window": 64, "scale": 1.0}, {"window": 300, "scale": 3.0}]


def test_card(tmp_path: Path) -> None:
    data = [{"path": str(tmp_path / "books")}]
    info = checkpoint_info(base_model="owner/base-1b", checkpoint="recommended", steps=70, tokens=12345, data=data)
    name, _ = save_checkpoint(tmp_path / "model", info=info)
    rows = [make_row("perplexity", 8.125, "ratio", 100, low=8.0, high=8.25, window=256, scale=4.0, corpus="novels")]
    rows.append(make_row("loss", 3.5, "nats", 9, window=256, scale=4.0, corpus="novels", position=64))
    Record("evaluate", {}, rows).save(tmp_path / "r.json")
    export(name, tmp_path / "out", scale=4, results=[tmp_path / "r.json"])
    card = (tmp_path / "out/README.md").read_text()
    front = card.split("---")[1]
    assert "base_model: owner/base-1b" in front and "library_name: transformers" in front
    assert "pipeline_tag: text-generation" in front and "# license: fill in" in front and "- yarn" in front
    assert "| novels | 256 | 4.0 | perplexity | 8.125 | 8–8.25 | ratio | 100 |" in card
    assert "| 3.5 |" not in card and "1 further rows are in the Records" in card  # a point of a curve
    assert "recommended" in card and "70 steps, 12345 tokens" in card and "- path books" in card
    assert "Not known. Before publishing" in card and "verified: frequencies in transformers" in card
    for path in ("README.md", "e2llm_export.json", "config.json", "e2llm.json"):
        assert str(tmp_path) not in (tmp_path / "out" / path).read_text(), "no path of this machine"


def test_card_takes_the_license_of_the_source(tmp_path: Path) -> None:
    name, _ = save_checkpoint(tmp_path / "model")
    (tmp_path / "model/README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# base\n")
    export(name, tmp_path / "out", scale=4, verify=False)
    card = (tmp_path / "out/README.md").read_text()
    assert (
        ModelCard(card).data.license == "apache-2.0"
        and "\n# base_model: owner" in card
        and "verification was turned off" in card
    )


def records(folder: Path) -> list[Path]:
    """Of this checkpoint at several scales, of others, of training and of speed."""
    mine = {"checkpoint": "recommended", "method": "yarn", "corpus": "Old novels", "protocol": "whole"}
    rows = [
        make_row("perplexity", 8.125, "ratio", 100, window=300, scale=3.0, **mine),
        make_row("perplexity", 7.5, "ratio", 100, window=64, scale=1.0, **mine),
        make_row("perplexity", 99.0, "ratio", 100, window=300, scale=3.0, **mine | {"checkpoint": "base"}),
        make_row("perplexity", 98.0, "ratio", 100, window=300, scale=3.0, **mine | {"method": "linear"}),
        make_row("retrieval", 0.75, "share", 20, window=300, scale=3.0, task="pass_key", checkpoint="recommended"),
        make_row("retrieval", 0.5, "share", 2, window=300, scale=3.0, task="pass_key", depth=0.5),
    ]
    Record("evaluate", {}, rows).save(folder / "evaluation.json")
    Record("train", {}, [make_row("loss", 2.0, "nats", 1, step=1)]).save(folder / "train.json")
    return [folder / "evaluation.json", folder / "train.json"]


def results_of(card: str) -> dict[str, float]:
    """What the hub's own reader makes of the front matter: name of a metric -> value."""
    found: Any = ModelCard(card).data.eval_results
    assert all(one.task_type == "text-generation" for one in found)
    return {f"{one.dataset_name} ({one.dataset_type}): {one.metric_name}": one.metric_value for one in found}


def card_of(tmp_path: Path, **options: Any) -> str:
    data = [{"path": "hub:owner/long-books"}, {"path": "notes/"}]
    info = checkpoint_info(checkpoint="recommended", base_model="owner/base-1b", schedule=SCHEDULE, data=data)
    name, _ = save_checkpoint(tmp_path / "model", bpe=True, info=info)
    export(name, tmp_path / "out", results=records(tmp_path), verify=False, **options)
    return (tmp_path / "out/README.md").read_text()


def test_results_for_the_hub_are_the_export_s_own(tmp_path: Path) -> None:
    card = card_of(tmp_path, window=300)
    assert results_of(card) == {
        "Old novels (old-novels): perplexity, protocol whole, window 300, scale 3, method yarn": 8.125,
        "unnamed text (unnamed-text): retrieval, task pass_key, window 300, scale 3": 0.75,
    }
    data = ModelCard(card).data
    assert data.base_model == "owner/base-1b" and data.to_dict()["base_model_relation"] == "finetune"
    assert data.datasets == ["owner/long-books"] and data.tags == ["e2llm", "long-context", "yarn"]
    assert "| base | yarn | Old novels | whole |  | 300 | 3.0 | perplexity | 99 | – |" in card, "all are shown"
    assert "| 300 | 3 |" in card and "measured by a calibration" in card and "This export has scale 3." in card
    assert "300 tokens at scale 3, past scale × native window = 192" in card


def test_an_open_export_has_the_results_of_all_its_scales(tmp_path: Path) -> None:
    card = card_of(tmp_path, to="gguf")
    assert len(results_of(card)) == 3 and ModelCard(card).data.library_name == "gguf"
    assert "any window" in card and "e2llm serve out --engine llamacpp" in card and "scales | 1, 2, 3, 4, 8 |" in card


def test_without_records_there_are_none(tmp_path: Path) -> None:
    name, _ = save_checkpoint(tmp_path / "model", info=checkpoint_info())
    export(name, tmp_path / "out", window=200, verify=False)
    card = (tmp_path / "out/README.md").read_text()
    assert ModelCard(card).data.eval_results is None and "## Results" not in card
    assert "| 512 | 8 |" in card and "the smallest step of 1, 2, 4" in card


def test_every_measurement_is_in_the_metadata_with_n_and_interval(tmp_path: Path) -> None:
    """Rows that differ by accuracy, set of tasks or Record alone are all there, each under its own data set."""
    mine = {"checkpoint": "recommended", "method": "yarn", "window": 300, "scale": 3.0}
    short = {"suite": "short", "task": "piqa", "filter": "none", **mine | {"window": None, "scale": None}}
    ends = {"low": 0.125, "high": 0.5}
    rows = [
        make_row("f1", 0.25, "share", 7, suite="longbench", task="qasper", language="en", **ends, **mine),
        make_row("average", 0.375, "share", 90, suite="longbench", tasks="en14", average="plain", **mine),
        make_row("average", 0.3, "share", 90, suite="longbench", tasks="en14", average="macro", **mine),
        make_row("accuracy", 0.5, "share", 8, harness_metric="acc", **short),
        make_row("accuracy", 0.75, "share", 8, harness_metric="acc_norm", **short),
        make_row("loss", 2.5, "nats", 8, position=8, corpus="novels", **mine),
    ]
    again = [make_row("f1", 0.125, "share", 7, suite="longbench", task="qasper", language="en", **mine)]
    info = checkpoint_info(checkpoint="recommended", schedule=SCHEDULE)
    name, _ = save_checkpoint(tmp_path / "model", info=info)
    paths = [Record("evaluate", {}, own).save(tmp_path / f"{n}.json") for n, own in (("one", rows), ("two", again))]
    export(name, tmp_path / "out", window=300, verify=False, results=paths)
    card = (tmp_path / "out/README.md").read_text()
    served = "window 300, scale 3, method yarn"
    assert results_of(card) == {
        f"LongBench qasper (THUDM/LongBench): f1, task qasper, {served}": 0.25,
        f"LongBench qasper (THUDM/LongBench): f1, task qasper, {served}, two": 0.125,
        f"LongBench en14 (THUDM/LongBench): average, tasks en14, average plain, {served}": 0.375,
        f"LongBench en14 (THUDM/LongBench): average, tasks en14, average macro, {served}": 0.3,
        "piqa (piqa): accuracy, task piqa, harness_metric acc, method yarn": 0.5,
        "piqa (piqa): accuracy, task piqa, harness_metric acc_norm, method yarn": 0.75,
    }
    found: Any = ModelCard(card).data.eval_results
    first = next(one for one in found if one.metric_value == 0.25)
    assert first.metric_args == {"n": 7, "low": 0.125, "high": 0.5} and first.dataset_config == "qasper"


def test_the_card_of_a_checkpoint_that_serves_any_window(tmp_path: Path) -> None:
    info = checkpoint_info(checkpoint="recommended", base_model="owner/base-1b", schedule=SCHEDULE)
    save_checkpoint(tmp_path / "mine/model", info=info)
    command = ["report", *map(str, records(tmp_path)), "--card", str(tmp_path / "mine/model")]
    assert main(command) == 0
    readme = tmp_path / "mine/model/README.md"
    card = readme.read_text()
    assert ModelCard(card).data.library_name == "transformers" and ModelCard(card).data.base_model == "owner/base-1b"
    assert sorted(results_of(card).values()) == [0.75, 7.5, 8.125]  # each window at the scale that serves it
    assert "# mine, any window" in card and "e2llm serve mine" in card and "scales | 1, 3 |" in card
    assert "## Verification" not in card and str(tmp_path) not in card
    readme.write_text(card.replace("# license: fill in before publishing", "license: mit"))
    assert main(command) == 0
    assert ModelCard(readme.read_text()).data.license == "mit"  # written anew, the license kept
    readme.write_text("# by hand\n")
    with pytest.raises(ValueError, match=r"README.md was not made by e2llm; move it away"):
        write_checkpoint_card(tmp_path / "mine/model", [])
    with pytest.raises(ValueError, match=r"no folder with an e2llm.json"):
        write_checkpoint_card(tmp_path, [])
