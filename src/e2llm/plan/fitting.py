"""What a run that does not fit could be instead: smaller settings, the mildest first, each counted.

Flows in: a `Shape`, a recipe, the bytes of a GPU. Flows out: settings and the memory that they need. Knows no speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from e2llm.config import Recipe, parse_recipe, to_plain
from e2llm.plan.memory import training_memory
from e2llm.plan.shape import Shape

USABLE = 0.95
"""Share of a GPU's memory that a run may plan with."""
ERROR = 0.10
"""Share by which a peak may differ from its prediction."""
Changes = dict[str, Any]
"""section.key -> value."""


@dataclass(frozen=True)
class Alternative:
    """One way to make a run smaller."""

    settings: tuple[str, ...]
    """As of `--set`, all that differ from the recipe."""
    size: float
    """Bytes at the peak of a step, on each GPU."""


def fits(size: float, memory: float) -> bool:
    """Whether a run of `size` bytes fits a GPU with `memory` bytes."""
    return size < USABLE * memory


def cannot_fit(size: float, memory: float) -> bool:
    """Whether a run of `size` predicted bytes is above `memory` bytes by more than the prediction may be wrong."""
    return size * (1 - ERROR) > memory


def alternatives(shape: Shape, recipe: Recipe, memory: float, gpus: int = 1) -> list[Alternative]:
    """Those that fit `memory` bytes on each of `gpus` GPUs: documents kept apart without masks, where they have some,
    then one window at a time, then checkpointing, then adapters, and under these four bits or an offloaded base. Each
    keeps what the ones before it changed. What the rest of the recipe does not go with is left out."""
    found = []
    for changes, made in _smaller(recipe):
        size = sum(training_memory(shape, made, gpus).values())
        if fits(size, memory):
            found.append(Alternative(tuple(f"{key}={_toml(value)}" for key, value in changes.items()), size))
    return found


def offers(found: Sequence[Alternative]) -> list[str]:
    """`alternatives` as lines to read, each with its gigabytes; one line that says so where there are none."""
    if not found:
        return ["nothing smaller fits this GPU: a larger one, a shorter data.window, or fsdp2 over several"]
    lines = ["what would fit:"]
    for way in found:
        lines.append(f"  {way.size / 1e9:10.2f} GB  {' '.join(f'--set {setting}' for setting in way.settings)}")
    return lines


def _smaller(recipe: Recipe) -> Iterator[tuple[Changes, Recipe]]:
    train = recipe.train
    one: Changes = {"train.batch_size": 1}
    if not recipe.distributed.global_batch:
        one["train.gradient_accumulation"] = train.gradient_accumulation * train.batch_size
    adapters: Changes = {"lora.rank": recipe.lora.rank or 16, "model.dtype": "bfloat16", "train.optimizer": "adamw"}
    kept: Changes = {}
    # What keeps documents apart without a mask cannot weigh far keys.
    flex: Changes = {"model.attn_implementation": "flex_attention", "placement.far_weight": 0.0}
    masked = recipe.data.document_mask and recipe.model.attn_implementation in (None, "sdpa")
    masked = masked and recipe.method != "self_extend"  # which has none
    for step in (*([flex] if masked else []), one, {"train.gradient_checkpointing": True}, adapters):
        made = _with(recipe, kept | step)
        if made is not None and made != _with(recipe, kept):
            kept = kept | step
            yield _changed(recipe, kept), made
    for last in ({"model.quantization": "nf4"}, {"model.offload": "cpu", "train.compile": "none"}):
        made = _with(recipe, kept | last)
        if made is not None and made != recipe:
            yield _changed(recipe, kept | last), made


def _with(recipe: Recipe, changes: Changes) -> Recipe | None:
    """The recipe with `changes`; None where they contradict it."""
    plain = {name: value for name, value in to_plain(recipe).items() if value is not None}
    for key, value in changes.items():
        section, name = key.split(".")
        plain[section] = plain[section] | {name: value}
    try:
        return parse_recipe(plain)
    except ValueError:
        return None


def _changed(recipe: Recipe, changes: Changes) -> Changes:
    plain = to_plain(recipe)
    return {key: value for key, value in changes.items() if plain[key.split(".")[0]][key.split(".")[1]] != value}


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
