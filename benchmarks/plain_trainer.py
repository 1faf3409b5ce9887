"""The reference of `loss_curves.py`: a recipe trained by transformers' own model and PyTorch's AdamW, in float32.

    python benchmarks/plain_trainer.py RECIPE --set model.name=FOLDER --set 'data.sources=[...]' --set output=DIR

Samples, scales and offsets are the recipe's: which tokens a row holds and where they stand is what both sides share.
All else is written out here with nothing of ours: each row goes through transformers' model alone, with its own static
scaling of the row's scale, the row's position ids, far keys as a mask added to the scores, whole logits, PyTorch's
cross entropy, gradients clipped by PyTorch, AdamW step by step, no autocast and no compiler. Slow, and meant to be.
Writes DIR/train.json with the loss of every step and the held-out losses, as `e2llm train` does.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from e2llm.config import Recipe, load_recipe, to_plain  # noqa: E402
from e2llm.data import Corpus, HeldOutWindows, WindowDataset, build_corpus  # noqa: E402
from e2llm.hf.load import load_tokenizer  # noqa: E402
from e2llm.positions.placement import Placement, PositionSampler  # noqa: E402
from e2llm.records import Record, make_row, portable  # noqa: E402

YARN = 0.1
"""YaRN's own slope of the attention scale (Eq. 22)."""


def check(recipe: Recipe) -> None:
    """Raise ValueError for what the plain loop does not do."""
    for name, value, plain in (
        ("method", recipe.method, recipe.method if recipe.method in ("linear", "ntk", "yarn", "none") else "yarn"),
        ("lora.rank", recipe.lora.rank, 0),
        ("train.distill", recipe.train.distill, 0.0),
        ("data.document_mask", recipe.data.document_mask, False),
        ("data.pieces", recipe.data.pieces, "row"),
        ("data.planted_weight", recipe.data.planted_weight, 1.0),
        ("distributed.strategy", recipe.distributed.strategy, "none"),
        ("train.evaluate_every", recipe.train.evaluate_every, 0),
    ):
        if value != plain:
            raise ValueError(f"{name} = {value!r}: the plain reference knows {plain!r}; use that")


def load_plain(name: str) -> nn.Module:
    """The base by transformers alone: float32, PyTorch's attention, on the GPU where there is one."""
    from transformers import AutoModelForCausalLM

    given: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    path = Path(name)
    if path.suffix == ".gguf":
        from transformers import GgufConfig

        given |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        name = str(path.parent)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(name, **given)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train()


class StaticRotary:
    """transformers' rotary module of each scale, with that scale in its config: one model, one scale at a time."""

    def __init__(self, model: Any, method: str) -> None:
        self.base, self.method, self.own = model.base_model, method, model.base_model.rotary_emb
        self.made: dict[tuple[float, float | None], nn.Module] = {}
        kind = model.config.rope_parameters["rope_type"]
        if kind != "default":
            raise ValueError(f"model: its frequencies are scaled already ({kind!r}); the plain reference takes others")

    def use(self, scale: float, slope: float | None) -> None:
        """Let the model's next forward be one at `scale`, whose attention scale is 1 + slope * ln(scale)."""
        if (scale, slope) not in self.made:
            self.made[scale, slope] = self._module(scale, slope)
        self.base.rotary_emb = self.made[scale, slope]

    def _module(self, scale: float, slope: float | None) -> nn.Module:
        if scale == 1 or self.method == "none":
            return self.own
        config = copy.deepcopy(self.own.config)
        rope, window = dict(config.rope_parameters), config.max_position_embeddings
        if self.method == "ntk":
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            rope["rope_theta"] *= scale ** (head / (head - 2))
        else:
            rope |= {"rope_type": self.method, "factor": float(scale)}
            rope |= {"original_max_position_embeddings": window} if self.method == "yarn" else {}
        config.rope_parameters = rope
        module: Any = type(self.own)(config).to(self.own.inv_freq.device)
        slope = (YARN if self.method == "yarn" else 0.0) if slope is None else slope
        module.attention_scaling = slope * math.log(scale) + 1.0
        return module


def far_mask(placement: Placement, device: torch.device) -> torch.Tensor:
    """(1, 1, T, T) float32 added to the scores of one row: the bias of far keys, the lowest number after the query."""
    far = placement.far
    assert far is not None
    segments, bias = (torch.from_numpy(x).to(device) for x in (far.segments, far.bias))
    at = torch.arange(len(segments), device=device)
    is_far = (segments[None, :] < segments[:, None]) & (at >= far.leading_tokens)[None, :]
    mask = torch.where(is_far, bias[:, None], torch.zeros((), device=device))
    return mask.masked_fill(at[None, :] > at[:, None], torch.finfo(torch.float32).min)[None, None]


def nats(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor, placement: Placement | None) -> torch.Tensor:
    """Summed loss of one row, ids and labels (T,). None: positions 0, 1, 2, ... and every key once."""
    device = next(model.parameters()).device
    ids, labels = ids.to(device), labels.to(device)
    positions = torch.arange(len(ids)) if placement is None else torch.from_numpy(placement.positions)
    far = placement is not None and placement.far is not None
    # Never without a mask: transformers would take every jump of the positions for the end of a document.
    mask = far_mask(placement, device) if far and placement is not None else torch.ones_like(ids)[None]
    logits = model(
        input_ids=ids[None], position_ids=positions.to(device)[None], attention_mask=mask, use_cache=False
    ).logits[0]
    return F.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum")


def targets(rows: Sequence[dict[str, Any]]) -> int:
    """Tokens of a batch that are scored."""
    return sum(int((row["labels"][1:] != -100).sum()) for row in rows)


def steps(recipe: Recipe, model: nn.Module, rotary: StaticRotary, corpus: Corpus) -> Iterator[float]:
    """Train; the loss (nats a token) of each step."""
    from transformers import get_scheduler

    config = recipe.train
    windows = config.batch_size * config.gradient_accumulation
    sampler = PositionSampler(
        native_window=recipe.model.native_window or model.config.max_position_embeddings,
        training_window=recipe.data.window,
        scales=recipe.scales,
        placement=recipe.placement,
        seed=recipe.seed,
        num_samples=config.steps * windows,
    )
    samples = WindowDataset(
        corpus.train, window=recipe.data.window, num_samples=sampler.num_samples, seed=recipe.data.seed
    )
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.betas[0], config.betas[1]), foreach=False, fused=False
    )
    kind = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    schedule = get_scheduler(kind, optimizer, config.warmup_steps, config.steps)
    for step in range(config.steps):
        rows = [samples[index] for index in range(step * windows, (step + 1) * windows)]
        count, total = targets(rows), 0.0
        for row in rows:
            placement = sampler.draw(row["sample_index"])
            rotary.use(placement.scale, recipe.attention.training_slope)
            loss = nats(model, row["input_ids"], row["labels"], placement) / count
            loss.backward()
            total += float(loss.detach())
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield total


@torch.no_grad()
def held_out(recipe: Recipe, model: nn.Module, rotary: StaticRotary, corpus: Corpus) -> dict[float, float]:
    """Scale -> mean loss of the held-out windows, as a served request has it."""
    if not (recipe.train.evaluate_windows and corpus.held_out):
        return {}
    windows = HeldOutWindows(corpus.held_out, window=recipe.data.window, max_windows=recipe.train.evaluate_windows)
    found = {}
    model.eval()
    for scale in recipe.train.evaluate_scales:
        rotary.use(scale, recipe.attention.serving())
        rows = [windows[index] for index in range(len(windows))]
        losses = [float(nats(model, row["input_ids"], row["labels"], None)) / targets([row]) for row in rows]
        found[scale] = sum(losses) / len(losses)
    return found


def run(recipe: Recipe) -> Record:
    """Train `recipe` plainly. Raises ValueError for what it does not do."""
    check(recipe)
    torch.set_float32_matmul_precision("highest")
    tokenizer = load_tokenizer(recipe.model.name)
    corpus = build_corpus(recipe.data, tokenizer, cache_dir=Path(recipe.data.cache_dir), progress=False)
    model = load_plain(recipe.model.name)
    rotary = StaticRotary(model, recipe.method)
    labels = {"checkpoint": recipe.name, "base_model": Path(recipe.model.name).name, "seed": recipe.seed}
    rows = []
    for step, loss in enumerate(steps(recipe, model, rotary, corpus), 1):
        rows.append(make_row("loss", loss, "nats", 1, split="train", step=step, **labels))
        print(f"step {step}/{recipe.train.steps}: {loss:.4f}", flush=True)
    for scale, loss in held_out(recipe, model, rotary, corpus).items():
        where: dict[str, Any] = {"split": "held_out", "step": recipe.train.steps, "scale": scale}
        rows.append(make_row("loss", loss, "nats", recipe.train.evaluate_windows, **where, **labels))
    return Record(kind="train", config=portable(to_plain(recipe)), rows=rows)


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    try:
        recipe = load_recipe(args.recipe, args.set)
        record = run(recipe)
    except ValueError as error:
        raise SystemExit(f"plain_trainer.py: {error}") from error
    recipe.run_folder.mkdir(parents=True, exist_ok=True)
    record.save(recipe.run_folder / "train.json")


if __name__ == "__main__":
    main()
