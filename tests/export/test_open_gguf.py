"""A GGUF whose scale is left open: the unscaled weights, and beside them all that choosing a scale needs."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from architectures import WINDOW
from checkpoints import checkpoint_info, save_checkpoint

from e2llm.export import export
from e2llm.hf import CheckpointInfo, load_model

SCHEDULE = [{"window": 64, "scale": 1.0}, {"window": 512, "scale": 6.0}]


def test_what_stands_in_the_folder(tmp_path: Path) -> None:
    info = checkpoint_info("yarn", attention={"training_slope": 0.0, "slope": 0.04}, schedule=SCHEDULE)
    checkpoint, _ = save_checkpoint(tmp_path / "model", bpe=True, info=info)
    result = export(checkpoint, tmp_path / "out", to="gguf", gguf_type="q8_0")
    (path,) = (tmp_path / "out").glob("*.gguf")
    fields = {field.name: field.contents() for field in gguf.GGUFReader(path).fields.values() if field.types}
    assert fields["llama.rope.scaling.type"] == "none" and fields["llama.context_length"] == WINDOW
    assert "llama.rope.scaling.attn_factor" not in fields and "llama.rope.scaling.factor" not in fields
    assert path.name == "out-q8_0.gguf".replace("out", tmp_path.name), "no window in the name"
    assert CheckpointInfo.load(tmp_path / "out") == info
    assert all((tmp_path / "out" / name).is_file() for name in ("tokenizer.json", "generation_config.json"))
    told = json.loads((tmp_path / "out" / "e2llm_export.json").read_text())
    assert told["open_scales"] == [1, 2, 4, 6, 8] and told["scale"] == 1
    assert next(iter(result.commands)) == "e2llm" and "--engine llamacpp" in result.commands["e2llm"]
    assert any("scales 1, 2, 4, 6, 8 agree" in check.detail for check in result.checks)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_reads_it_as_the_checkpoint(tmp_path: Path) -> None:
    """The file alone was an unknown model before; e2llm.json beside it is now read."""
    checkpoint, _ = save_checkpoint(tmp_path / "model", bpe=True, info=checkpoint_info("linear", schedule=SCHEDULE))
    export(checkpoint, tmp_path / "out", to="gguf", gguf_type="f32", verify=False)
    (path,) = (tmp_path / "out").glob("*.gguf")
    from e2llm.hf import get_extension

    model, _, info = load_model(str(path), device="cpu")
    extension = get_extension(model)
    assert info is not None and extension is not None
    assert (extension.method, extension.native_window, extension.max_scale) == ("linear", WINDOW, 8.0)
    assert [(step.window, step.scale) for step in extension.schedule] == [(64, 1.0), (512, 6.0)]


def test_a_method_that_was_given_instead(tmp_path: Path) -> None:
    info = checkpoint_info("yarn", attention={"training_slope": 0.0, "slope": 0.04}, schedule=SCHEDULE)
    checkpoint, _ = save_checkpoint(tmp_path / "model", bpe=True, info=info)
    export(checkpoint, tmp_path / "out", to="gguf", method="ntk", verify=False)
    told = CheckpointInfo.load(tmp_path / "out")
    assert told is not None and (told.method, told.attention, told.schedule) == ("ntk", {}, [])


def test_a_method_in_place_of_groups(tmp_path: Path) -> None:
    """Neighbours belong to the method: with another one e2llm.json would be refused."""
    info = checkpoint_info("self_extend", neighbours=22)
    checkpoint, _ = save_checkpoint(tmp_path / "model", bpe=True, info=info)
    export(checkpoint, tmp_path / "out", to="gguf", method="linear", verify=False)
    told = CheckpointInfo.load(tmp_path / "out")
    assert told is not None and (told.method, told.neighbours) == ("linear", 0)


def test_what_is_trained_in_groups(tmp_path: Path) -> None:
    info = checkpoint_info("self_extend", neighbours=22)
    checkpoint, _ = save_checkpoint(tmp_path / "model", bpe=True, info=info)
    result = export(checkpoint, tmp_path / "out", to="gguf", gguf_type="f32", verify=False)
    assert result.open_scales == (1, 2, 4, 8) and CheckpointInfo.load(tmp_path / "out") == info
    card = (tmp_path / "out" / "README.md").read_text()
    assert "they have no attention that reads far tokens in groups" in card and "with `--window`" not in card
    with pytest.raises(ValueError, match="recommended-yarn for other runtimes"):
        export(checkpoint, tmp_path / "fixed", to="gguf", scale=4)
    CheckpointInfo.save(checkpoint_info("self_extend", neighbours=1), checkpoint)
    with pytest.raises(ValueError, match="neighbours = 1: an engine that moves keys needs at least 2"):
        export(checkpoint, tmp_path / "fewer", to="gguf")


def test_a_model_that_is_not_ours_gets_no_e2llm_json(tmp_path: Path) -> None:
    """Who serves it says what is assumed; a method that was asked for is written down."""
    checkpoint, _ = save_checkpoint(tmp_path / "model", bpe=True)
    (tmp_path / "model/e2llm.json").unlink()
    export(checkpoint, tmp_path / "out", to="gguf", verify=False)
    assert not (tmp_path / "out/e2llm.json").exists()
    export(checkpoint, tmp_path / "out", to="gguf", verify=False, method="linear")
    told = CheckpointInfo.load(tmp_path / "out")
    assert told is not None and (told.method, told.native_window, told.max_scale) == ("linear", WINDOW, 1.0)


def test_other_targets_need_a_window(tmp_path: Path) -> None:
    checkpoint, _ = save_checkpoint(tmp_path / "model", bpe=True)
    for target in ("hf", "vllm", "ollama"):
        with pytest.raises(ValueError, match="say which window to export for"):
            export(checkpoint, tmp_path / "out", to=target)  # type: ignore[arg-type]
