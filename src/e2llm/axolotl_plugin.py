"""Plugin for axolotl: `plugins: [e2llm.axolotl_plugin.Plugin]` and an `e2llm:` section train with random scales.

Flows in: axolotl's configuration, the model it loaded, adapters included. Flows out: the model extended by
`e2llm.api.extend`, and e2llm.json in its output folder and in every checkpoint. Draws happen in the model, so no
collator, sampler or dropped column can lose them; with `sample_packing` each document of a row draws for itself.
Imported by axolotl alone, which it needs; knows the
plugin interface and nothing else of it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import TrainerCallback

from e2llm.api import checkpoint_info, extend
from e2llm.config import Method, parse_recipe
from e2llm.hf import get_extension
from e2llm.positions.attention import AttentionConfig
from e2llm.positions.placement import Kind, PlacementConfig
from e2llm.positions.scales import Distribution, ScalesConfig

SAMPLES_OF_A_STEP = 1 << 20
"""Indices kept for one optimizer step, more than any has samples: a resumed run draws what an unbroken one does."""


class Section(BaseModel):
    """The `e2llm:` section. What is left out is as in the recipe `recommended-yarn`, or with method self_extend as in
    `recommended`."""

    model_config = ConfigDict(extra="forbid")

    method: Method = "yarn"
    """Frequency method."""
    max_scale: float | None = Field(default=None, ge=1)
    """Largest scale drawn."""
    placement: Kind | dict[str, Any] | None = None
    """A kind, such as jumps, or the keys of a recipe's [placement]."""
    scales: Distribution | dict[str, Any] | None = None
    """A distribution, such as log_uniform, or the keys of a recipe's [scales]."""
    attention: dict[str, Any] | None = None
    """The keys of a recipe's [attention]."""
    training_window: int | None = Field(default=None, ge=1)
    """Tokens of a training sample at most; left out: axolotl's sequence_len."""
    native_window: int | None = Field(default=None, ge=1)
    """L in tokens, where the config's max_position_embeddings is not it."""
    seed: int = Field(default=0, ge=0)
    """Seed of scales and offsets."""

    @model_validator(mode="after")
    def _check(self) -> Section:
        if self.max_scale is not None and isinstance(self.scales, dict):
            raise ValueError(f"e2llm.max_scale = {self.max_scale:g}: say it in e2llm.scales, which is a table")
        self.options()  # names what a recipe would refuse
        return self

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `extend`, without the windows. Raises ValueError that names the key."""
        sections = ("placement", "scales", "attention")
        tables = {name: getattr(self, name) for name in sections if isinstance(getattr(self, name), dict)}
        recipe = parse_recipe(tables, where="e2llm")
        built: dict[str, PlacementConfig | ScalesConfig | AttentionConfig] = {
            name: getattr(recipe, name) for name in tables
        }
        named: dict[str, Any] = {name: getattr(self, name) for name in ("placement", "scales")}
        if self.max_scale is not None and not isinstance(self.scales, dict):
            named["scales"] = ScalesConfig(distribution=self.scales or "uniform_integers", max_scale=self.max_scale)
        return {"method": self.method, "seed": self.seed, **named, **built}


class Args(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    e2llm: Section = Field(default_factory=Section)

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for key, reason in _REFUSED.items():
                if _asked_for(given.get(key)):
                    raise ValueError(f"{key} = {given[key]!r}: {reason}; leave it out with e2llm's plugin")
        return given


_REFUSED = {
    "rl": "the policy and what it is compared with would draw different positions for one text",
    "context_parallel_size": "each process would draw for its own part of a sequence",
    "sequence_parallel_degree": "each process would draw for its own part of a sequence",
}


def _asked_for(value: Any) -> bool:
    return bool(value) and value != 1


class Plugin(BasePlugin):
    """What axolotl loads by the name `e2llm.axolotl_plugin.Plugin`."""

    def get_input_args(self) -> str:
        """Name of the class that checks the `e2llm:` section."""
        return "e2llm.axolotl_plugin.Args"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Extend the model, adapters on it or not. Raises ValueError for a model without rotary embeddings."""
        section = Section(**(cfg.e2llm or {}))
        window = section.training_window or int(cfg.sequence_len)
        extend(model, training_window=window, native_window=section.native_window, **section.options())

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """The callback that counts samples and describes checkpoints."""
        return [_StepCallback(str(cfg.base_model or ""))]


class _StepCallback(TrainerCallback):
    """Each optimizer step draws samples of its own; each checkpoint says how it was trained."""

    def __init__(self, base_model: str) -> None:
        self.base_model = base_model

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Also after a resume: by the step's number, whatever ran in this process."""
        extension = get_extension(model)
        assert extension is not None
        extension.start_at(state.global_step * SAMPLES_OF_A_STEP)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """e2llm.json into the checkpoint that was just written."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            _describe(model, folder, self.base_model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """e2llm.json where axolotl writes the weights next."""
        if state.is_world_process_zero:
            _describe(model, Path(args.output_dir), self.base_model, state.global_step)


def _describe(model: Any, folder: Path, base_model: str, steps: int) -> None:
    info = checkpoint_info(model, base_model=Path(base_model).name, checkpoint="axolotl")
    folder.mkdir(parents=True, exist_ok=True)
    dataclasses.replace(info, steps=steps).save(folder)
