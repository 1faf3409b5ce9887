"""What a run leaves as models: the last weights, the best, the adapter, each a folder with e2llm.json.

Flows in: a trainer that is done. Flows out: `model/`, `best/` and `adapter/` of the run folder, whole weights whatever
the strategy and the type that trained were.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from e2llm.config import Recipe, to_plain
from e2llm.data import Corpus
from e2llm.hf import CheckpointInfo, current_versions, load_model, save_model
from e2llm.hf.load import load_whole_models_again
from e2llm.records import portable
from e2llm.train.adapters import add_adapters, merge_adapters
from e2llm.train.interpolate import interpolate, interpolate_adapters
from e2llm.train.sharded import WHOLE, load_whole
from e2llm.train.trainer import PlacingTrainer


def base_name(name: str) -> str:
    """Label of a base model: the last part of its path or hub name, without .gguf."""
    return Path(name).name.removesuffix(".gguf")


def save(recipe: Recipe, trainer: PlacingTrainer, tokenizer: Any, corpus: Corpus, folder: Path) -> None:
    """Write the models of a finished run into its folder."""
    model: Any = _trained(recipe, trainer, folder)
    best = trainer.state.best_model_checkpoint
    info = CheckpointInfo(
        method=recipe.method,
        native_window=trainer.extension.native_window,
        training_window=recipe.data.window,
        max_scale=recipe.scales.max_scale,
        placement=to_plain(recipe.placement),
        scales=to_plain(recipe.scales),
        attention=to_plain(recipe.attention),
        neighbours=trainer.extension.neighbours,
        base_model=base_name(recipe.model.name),
        checkpoint=recipe.name,
        seed=recipe.seed,
        steps=trainer.state.global_step,
        interpolation=recipe.train.interpolation,
        tokens=trainer.state.global_step * trainer.description["windows_per_step"] * recipe.data.window,
        data=portable(corpus.provenance),
        versions=current_versions("torch", "transformers", "peft"),
    )
    _interpolate(recipe, model)
    if recipe.lora.rank:
        model.save_pretrained(folder / "adapter")
        info.save(folder / "adapter")
    # 4-bit weights would round the adapters away, and offloaded ones are not at hand: into the base as it was read.
    at_hand = recipe.model.quantization == "none" and recipe.model.offload == "none"
    whole = merge_adapters(model if at_hand else _load_trained(recipe, folder / "adapter"))
    save_model(whole, tokenizer, folder / "model", info)
    if best is not None and Path(best).is_dir():
        step = int(Path(best).name.rsplit("-", 1)[1])
        chosen = _load_trained(recipe, Path(best))
        _interpolate(recipe, chosen)
        save_model(merge_adapters(chosen), tokenizer, folder / "best", dataclasses.replace(info, steps=step))


def _interpolate(recipe: Recipe, model: nn.Module) -> None:
    """`train.interpolation` of the way from the base's weights to those of `model`, in place."""
    if recipe.train.interpolation == 1:
        return
    if recipe.lora.rank:
        interpolate_adapters(model, recipe.train.interpolation)
    else:
        interpolate(model, _base(recipe), recipe.train.interpolation)


def _trained(recipe: Recipe, trainer: PlacingTrainer, folder: Path) -> Any:
    """The trained model, whole, in this process: its own, or read back from the shards of the last checkpoint."""
    if recipe.distributed.strategy in WHOLE:
        return trainer.accelerator.unwrap_model(trainer.model)
    return _from_shards(recipe, folder / "checkpoints" / f"checkpoint-{trainer.state.global_step}")


def _from_shards(recipe: Recipe, checkpoint: Path) -> nn.Module:
    load_whole_models_again()
    model = _base(recipe)
    if recipe.lora.rank:
        model = add_adapters(model, recipe.lora)
    load_whole(model, checkpoint, recipe.distributed.strategy)
    return model


def _base(recipe: Recipe) -> nn.Module:
    trust = recipe.model.trust_remote_code
    return load_model(recipe.model.name, dtype=recipe.model.dtype, device="cpu", trust_remote_code=trust)[0]


def _load_trained(recipe: Recipe, checkpoint: Path) -> nn.Module:
    """The weights of a checkpoint or adapter folder: whole ones as they are, adapters on a fresh base."""
    if recipe.distributed.strategy not in WHOLE:
        return _from_shards(recipe, checkpoint)
    if not recipe.lora.rank:
        return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=recipe.model.dtype)
    from peft import PeftModel

    return PeftModel.from_pretrained(_base(recipe), str(checkpoint))
