"""What turned keys cost: the exact way is its own reference, a one-layer model loses nothing, bad input is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import tiny_model

import e2llm
from e2llm.benchmark.rerotate import RerotateConfig, benchmark_rerotate
from e2llm.cli import main
from e2llm.hf import load_tokenizer
from e2llm.records import Record

BASE = str(Path(e2llm.__file__).parent / "assets" / "tiny-512")
TEXT = "def area(width, height):\n    return width * height + {}\n\n\n"


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "a.txt"
    path.write_text("".join(TEXT.format(n * n) for n in range(200)))
    return str(path)


def values(record: Record, metric: str) -> dict[tuple[int, float, float, str], float]:
    rows = [row for row in record.rows if row["metric"] == metric]
    return {(r["window"], r["from_scale"], r["to_scale"], r["keys"]): r["value"] for r in rows}


def test_turned_keys_are_nearer_than_keys_left_alone(text: str) -> None:
    saved: list[Record] = []
    config = RerotateConfig(model=BASE, texts=(text,), prompt_tokens=(64, 128), new_tokens=48, device="cpu")
    record = benchmark_rerotate(config, save=saved.append)
    assert [len({e["window"] for e in one.examples}) for one in saved] == [1, 2], "as it goes"
    divergence = values(record, "kl_nats")
    assert len(divergence) == 2 * 2 * 3
    for window, old, new, _ in divergence:
        assert divergence[window, old, new, "read_again"] == 0
        assert 0 < divergence[window, old, new, "turned"] < divergence[window, old, new, "left"] / 5
    assert {key[-1] for key in values(record, "seconds")} == {"read_again", "turned"}
    assert record.config["texts"] == ["a.txt"]


def test_one_layer_loses_nothing(text: str, tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=4096)
    model.save_pretrained(tmp_path / "m")  # type: ignore[operator]
    load_tokenizer(BASE).save_pretrained(tmp_path / "m")
    config = RerotateConfig(model=str(tmp_path / "m"), texts=(text,), prompt_tokens=(64,), new_tokens=32, device="cpu")
    divergence = values(benchmark_rerotate(config), "kl_nats")
    assert abs(divergence[64, 1.0, 2.0, "turned"]) < 1e-5 < divergence[64, 1.0, 2.0, "left"]


def test_the_command_and_its_errors(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "r.json")
    sizes = ["--cached-tokens", "32", "--new-tokens", "16", "--pairs", "1:2", "--device", "cpu", "--out", out]
    assert main(["benchmark", "rerotate", BASE, "--texts", text, *sizes]) == 0
    assert "kl_nats 32 1.0 2.0 turned" in capsys.readouterr().out and Record.load(out).kind == "rerotate"
    for wrong, named in (
        (["--texts"], "texts is empty"),
        (["--texts", text, "--cached-tokens", "33"], "tokens = 33: use whole pages of 16"),
        (["--texts", text, "--cached-tokens", "64k"], "65552 are needed"),
        (["--texts", text, "--pairs", "1-2"], "pairs = '1-2'"),
        (["--texts", text, "--pairs", "0.5:2"], "at least 1"),
        (["--texts", str(tmp_path / "none.txt")], "cannot be read"),
    ):
        given = wrong if wrong != ["--texts"] else []
        assert main(["benchmark", "rerotate", BASE, *sizes, *given]) == 2
        assert named in capsys.readouterr().err
