"""Training end to end on a tiny random model: what it writes, that it resumes bit for bit, that it stops cleanly."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import WINDOW, make_base, small, weights
from transformers import AutoModelForCausalLM, masking_utils

from e2llm.config import load_recipe, to_toml
from e2llm.data import build_corpus
from e2llm.hf import CheckpointInfo, get_extension, load_model
from e2llm.positions.placement import PositionSampler
from e2llm.records import Record
from e2llm.train import train, train_loaded
from e2llm.train.trainer import PlacingTrainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def same_weights(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    train(small(base, output, "train.save_every=2", "train.evaluate_every=3"), quiet=True)
    return output


def test_the_run_folder_holds_what_is_promised(base: Path, unbroken: Path) -> None:
    info = CheckpointInfo.load(unbroken / "model")
    assert info is not None
    assert (info.method, info.native_window, info.training_window, info.max_scale) == ("yarn", 64, WINDOW, 32)
    assert (info.steps, info.tokens, info.base_model) == (6, 6 * 2 * WINDOW, "model")
    assert info.placement["kind"] == "jumps"
    assert len(info.data) == 1 and info.data[0]["num_held_out_documents"] >= 1
    assert load_recipe(str(unbroken / "recipe.toml")) == small(
        base, unbroken, "train.save_every=2", "train.evaluate_every=3"
    )
    steps = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {row["step"] for row in steps if "eval_loss_scale_4" in row} == {3, 6}
    record = Record.load(unbroken / "train.json")
    assert record.kind == "train"
    assert {(r["split"], r.get("scale")) for r in record.rows if r["metric"] == "loss"} == {
        ("train", None),
        ("held_out", 1.0),
        ("held_out", 4.0),
    }
    assert (unbroken / "best" / "model.safetensors").is_file()


def test_the_checkpoint_loads_without_us_and_was_trained(base: Path, unbroken: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(unbroken / "model")
    assert get_extension(plain) is None
    assert plain.config.rope_parameters["rope_type"] == "default"
    assert plain.config.max_position_embeddings == 64
    assert not same_weights(base / "model", unbroken / "model")


CURRICULUM = (
    *("scales.distribution=weighted", "scales.values=[1, 4]", "scales.max_scale=4"),
    *("scales.weights=[1, 0]", "scales.final_weights=[0, 1]"),
)


@pytest.mark.parametrize("more", [(), CURRICULUM], ids=["constant", "curriculum"])
def test_the_draws_that_arrive_are_the_samplers(
    more: tuple[str, ...], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = PlacingTrainer.compute_loss

    def spy(self: PlacingTrainer, model, inputs, *args, **kwargs):
        if model.training:
            seen.extend(inputs["placements"])
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PlacingTrainer, "compute_loss", spy)
    recipe = small(base, tmp_path / "run", "train.steps=2", "train.gradient_accumulation=2", "seed=5", *more)
    train(recipe, quiet=True)
    sampler = PositionSampler(
        native_window=64,
        training_window=WINDOW,
        scales=recipe.scales,
        placement=recipe.placement,
        seed=5,
        num_samples=8,
    )
    expected = [sampler.draw(index) for index in range(8)]
    assert [p.scale for p in seen] == [p.scale for p in expected]
    assert all((a.positions == b.positions).all() for a, b in zip(seen, expected, strict=True))


_CHILD = """
import sys
from e2llm.config import load_recipe
from e2llm.train import train, train_loaded
from e2llm.train.trainer import PlacingTrainer
import torch
torch.set_num_threads(1)
kill_at = int(sys.argv[2])
original = PlacingTrainer.training_step
def step(self, *args, **kwargs):
    loss = original(self, *args, **kwargs)
    if self.state.global_step == kill_at:  # gradients are there, the update is not
        print("IN STEP", flush=True)
        import time; time.sleep(60)
    return loss
if kill_at >= 0:
    PlacingTrainer.training_step = step
result = train(load_recipe(sys.argv[1]), resume="--resume" in sys.argv, quiet=True)
sys.exit(0 if result.model_folder else 143)
"""


def child(recipe: Path, kill_at: int, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(recipe), str(kill_at), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


def wait_for_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None and process.stderr is not None
    for text in process.stdout:
        if line in text:
            return
    raise AssertionError(process.stderr.read())


def test_kill_in_mid_step_then_resume_gives_the_same_weights(base: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    recipe = small(base, output, "train.save_every=2", "train.evaluate_every=3")
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe))
    process = child(file, 5)
    wait_for_line(process, "IN STEP")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (output / "model").exists()
    # A save that was cut off must not be taken for a checkpoint.
    (output / "checkpoints" / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match="holds a run already; pass --resume"):
        train(recipe, quiet=True)
    assert train(recipe, resume=True, quiet=True).steps == 6
    assert same_weights(output / "model", unbroken / "model")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_sigterm_saves_and_resume_ends_equal(base: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    recipe = small(base, output, "train.save_every=2", "train.evaluate_every=3")
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe))
    code = _CHILD.replace("import time; time.sleep(60)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    process = subprocess.run(
        [sys.executable, "-c", code, str(file), "2"], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 143, process.stderr
    assert "stopped by SIGTERM after step 3" in process.stderr
    assert (output / "checkpoints" / "checkpoint-3" / "COMPLETE").is_file()
    train(recipe, resume=True, quiet=True)
    assert same_weights(output / "model", unbroken / "model")


def test_another_recipe_is_not_resumed(base: Path, unbroken: Path) -> None:
    with pytest.raises(ValueError, match="differs from the one given"):
        train(small(base, unbroken, "train.learning_rate=5e-3"), resume=True, quiet=True)


def test_a_loss_that_is_not_finite_stops_with_a_remedy(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not finite|training diverged"):
        train(small(base, tmp_path / "nan", "train.learning_rate=1e38", "train.max_grad_norm=0"), quiet=True)
    assert not (tmp_path / "nan" / "model").exists()


def test_lora_trains_only_adapters_and_merges(base: Path, tmp_path: Path) -> None:
    overrides = ("lora.rank=4", "lora.train_norms=true", "lora.train_embeddings=true", "train.learning_rate=1e-2")
    overrides += ("train.save_every=3", "train.evaluate_every=3")
    result = train(small(base, tmp_path / "lora", *overrides), quiet=True)
    assert (result.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert result.model_folder is not None
    before, after = weights(base / "model"), weights(result.model_folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed)
    assert any("norm" in name for name in changed)
    assert "model.embed_tokens.weight" in changed
    # The lowest held-out loss was the last one here, so the best weights are the last ones: loaded anew and merged.
    best = weights(result.folder / "best")
    assert all(torch.allclose(best[name], after[name], atol=1e-6) for name in after)


def test_bfloat16_and_checkpointing_run(base: Path, tmp_path: Path) -> None:
    overrides = ("train.precision=bfloat16", "train.gradient_checkpointing=true", "train.steps=2")
    result = train(small(base, tmp_path / "bf16", *overrides), quiet=True)
    assert result.model_folder is not None
    assert all(w.dtype == torch.float32 for w in weights(result.model_folder).values())


def test_16_bit_master_weights_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="full fine-tuning loses small updates"):
        small(base, tmp_path, "model.dtype=bfloat16")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=./nowhere", "no such file or folder"),
        ('data.sources=[{path="./nowhere"}]', "nowhere"),
        ('data.sources=[{synthetic="nothing"}]', "no such generator"),
        ("data.window=100000", "a window needs 100000"),
        ("train.trackers=[\"wandb\"]", "wandb is not installed"),
        ("method=longrope", "no long_factor"),
    ],
)
def test_bad_input_fails_before_training(
    base: Path, tmp_path: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sources" in override:
        monkeypatch.setattr("e2llm.train.run.load_model", lambda *given, **options: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        train(small(base, tmp_path / "bad", override), quiet=True)
    assert not (tmp_path / "bad" / "recipe.toml").exists(), "the folder takes the run that is right"


def test_a_loaded_model_trains_the_same(base: Path, unbroken: Path, tmp_path: Path) -> None:
    """Twice in one process from the same weights: each ends as `train` does from disk."""
    recipe = small(base, tmp_path / "first", "train.save_every=2", "train.evaluate_every=3")
    model, tokenizer, _ = load_model(str(base / "model"), dtype="float32", device="cpu", attention=recipe.attention)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    corpus = build_corpus(recipe.data, tokenizer, cache_dir=Path(recipe.data.cache_dir), progress=False)
    for name in ("first", "second"):
        model.load_state_dict(start)
        run = dataclasses.replace(recipe, output=str(tmp_path / name))
        result = train_loaded(run, model, tokenizer, corpus, quiet=True)
        assert result.steps == 6 and same_weights(result.model_folder, unbroken / "model")
    with pytest.raises(ValueError, match="holds a run already"):
        train_loaded(recipe, model, tokenizer, corpus, quiet=True)
    other = dataclasses.replace(recipe, method="linear", output=str(tmp_path / "third"))
    with pytest.raises(ValueError, match=r"its extension is Extension\(method='yarn'.*install it with 'linear'"):
        train_loaded(other, model, tokenizer, corpus, quiet=True)
    assert not (tmp_path / "third").exists()


SPLIT = ("train.optimizer=adamw_split", "model.dtype=bfloat16", "train.precision=bfloat16")


def test_split_weights_train_like_float32_and_resume_bit_for_bit(base: Path, tmp_path: Path) -> None:
    steps = ("train.steps=30", "train.save_every=10", "train.keep_checkpoints=3", "train.warmup_steps=2")
    reference = train(small(base, tmp_path / "float32", *steps), quiet=True)
    run = small(base, tmp_path / "split", *steps, *SPLIT)
    result = train(run, quiet=True)
    assert result.record is not None and reference.record is not None and result.model_folder is not None
    losses = [
        [row["value"] for row in record.rows if row["metric"] == "loss" and row["split"] == "train"]
        for record in (result.record, reference.record)
    ]
    assert losses[1][-1] < losses[1][0] - 0.1, "something was learned"
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.02
    assert all(w.dtype == torch.bfloat16 for w in weights(result.model_folder).values())

    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "split", cut)
    shutil.rmtree(cut / "model")
    for later in ("checkpoint-20", "checkpoint-30"):
        shutil.rmtree(cut / "checkpoints" / later, ignore_errors=True)
    assert (cut / "checkpoints" / "checkpoint-10").is_dir()
    again = dataclasses.replace(run, output=str(cut))
    (cut / "recipe.toml").write_text(to_toml(again))
    assert train(again, resume=True, quiet=True).steps == 30
    assert same_weights(cut / "model", tmp_path / "split" / "model")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.dtype=float32",), "needs model.dtype = bfloat16, not float32"),
        (("train.precision=float32",), "needs train.precision = bfloat16"),
        (("lora.rank=4",), "adapters are float32 already"),
        (("train.gradient_accumulation=2",), "added up in bfloat16"),
    ],
)
def test_where_split_weights_make_no_sense(base: Path, tmp_path: Path, overrides: tuple[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"train.optimizer = .*{message}"):
        small(base, tmp_path, *SPLIT, *overrides)


def test_a_distilled_model_stays_nearer_to_its_base(base: Path, tmp_path: Path) -> None:
    """Trained towards its own base at every scale, it moves less than towards the text."""
    moved = {}
    for share in (0.0, 1.0):
        run = small(base, tmp_path / str(share), f"train.distill={share}", "train.steps=20")
        result = train(run, quiet=True)
        assert result.model_folder is not None
        before, after = weights(base / "model"), weights(result.model_folder)
        moved[share] = sum(float((after[k] - before[k]).square().sum()) for k in before) ** 0.5
    assert 0 < moved[1.0] < 0.9 * moved[0.0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(("train.distill=1.5",), "share from 0 to 1"), (("train.distill=0.5", "train.logits_tokens=0"), "in pieces")],
)
def test_what_cannot_be_distilled(base: Path, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"train.distill = .*{message}"):
        small(base, tmp_path, *overrides)


def test_adapters_over_four_bits_end_in_whole_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # Blocks of 64 weights: on CPUs bitsandbytes takes no rows that they do not fill.
    base = make_base(tmp_path, hidden_size=64, intermediate_size=128)
    overrides = ("model.dtype=bfloat16", "lora.rank=4", "train.steps=20")
    plain = train(small(base, tmp_path / "plain", *overrides), quiet=True)
    result = train(small(base, tmp_path / "nf4", *overrides, "model.quantization=nf4"), quiet=True)
    assert result.model_folder is not None and result.record is not None and plain.record is not None
    losses, whole = (
        [r["value"] for r in run.record.rows if r["metric"] == "loss" and r["split"] == "train"]
        for run in (result, plain)
        if run.record is not None
    )
    assert losses[-1] < losses[0]
    assert 0 < abs(losses[0] - whole[0]) < 0.05, "trained over what four bits leave of the base"
    before, after = weights(base / "model"), weights(result.model_folder)
    adapter = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight"] for part in "AB")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = before[name].to(torch.bfloat16).float() + 32 / 4 * (b @ a)  # lora.alpha / lora.rank
    torch.testing.assert_close(after[name].float(), expected, atol=2e-3, rtol=1e-2)
    assert after[name].dtype == torch.bfloat16 and b.abs().max() > 0
    frozen = "model.embed_tokens.weight"
    assert torch.equal(after[frozen], before[frozen].to(torch.bfloat16)), "not what four bits leave of it"


def test_the_base_is_four_bits_while_it_trains(base: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, _, _ = load_model(str(base / "model"), dtype="bfloat16", device="cpu", quantization="nf4")
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit) and layer.weight.quant_type == "nf4"
    assert layer.weight.numel() * layer.weight.element_size() == 32 * 32 // 2, "two weights a byte"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("lora.rank=0",), "cannot be trained: set lora.rank"),
        (("model.dtype=float32",), "use bfloat16"),
        (("model.name=base.gguf",), "quantization of its own"),
        (("train.distill=0.5",), "second base in memory"),
    ],
)
def test_what_four_bits_cannot_be(base: Path, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    given = ("model.quantization=nf4", "model.dtype=bfloat16", "lora.rank=4")
    with pytest.raises(ValueError, match=f"model.quantization = .*{message}"):
        small(base, tmp_path, *given, *overrides)


def test_four_bits_without_their_package(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(ValueError, match=r"bitsandbytes is not installed: pip install 'e2llm\[qlora\]'"):
        load_model(str(base / "model"), dtype="bfloat16", device="cpu", quantization="nf4")


@pytest.mark.parametrize("document_mask", [False, True])
def test_documents_are_looked_for_where_rows_may_hold_several(
    document_mask: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[torch.Tensor] = []
    own = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda ids: (searched.append(ids), own(ids))[1]
    )
    mask = f"data.document_mask={str(document_mask).lower()}"
    train(small(base, tmp_path / "run", "train.steps=2", mask), quiet=True)
    # Whole windows only: what asks whether the model weighs far keys is six tokens.
    assert any(ids.shape[-1] == WINDOW for ids in searched) == document_mask
