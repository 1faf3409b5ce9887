"""transformers' Trainer, taught four things: rows have placements, held-out loss has scales, a checkpoint is complete
or absent, and samples come in the order of their index.

The rest (optimizer, schedule, accumulation, clipping, distribution, resume) is the Trainer's own.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from e2llm.data import Jumps, collate
from e2llm.hf import Extension
from e2llm.positions.placement import PositionSampler
from e2llm.train.distributed import any_process, local
from e2llm.train.sharded import COMPLETE
from e2llm.train.split_adamw import SplitAdamW


class PlacingCollator:
    """Stacks windows and draws their placements, in the loader's worker processes.

    A list of placements travels beside the tensors: trainers drop columns that the model's forward does not name, so
    the trainer below takes it out of the batch by hand.
    """

    def __init__(self, sampler: PositionSampler) -> None:
        self.sampler = sampler

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = collate(rows)
        indices = batch.pop("sample_index").tolist()
        window = batch["input_ids"].shape[1]
        batch["placements"] = [self.sampler.draw(index, window) for index in indices]
        return batch


@dataclass(frozen=True)
class JumpsOf:
    """Sample index -> the jumps that its positions will make, for text that jumps with them (data.pieces)."""

    sampler: PositionSampler
    other_documents: bool

    def __call__(self, sample_index: int) -> Jumps:
        return Jumps.of(self.sampler.draw(sample_index).positions, other_documents=self.other_documents)


class PlacingTrainer(Trainer):
    """Trainer whose batches carry placements (see `PlacingCollator`)."""

    def __init__(
        self, *, extension: Extension, evaluate_scales: tuple[float, ...], description: dict[str, Any], **arguments: Any
    ) -> None:
        """description: what each checkpoint says of the run (`sharded.described`)."""
        super().__init__(**arguments)
        self.extension = extension
        self.description = description
        self.evaluate_scales = evaluate_scales
        self._round = self._counted = 0
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True  # else every gradient is copied there and back

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one batch, its rows standing where their placements say."""
        placements = inputs.pop("placements", None)
        if model.training:
            assert placements is not None, "a training batch arrived without its placements"
            self.extension.place(placements)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Any:
        # The data set already is in the order of training: sample i is drawn from (seed, i), on any rank.
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[arg-type]

    def get_tp_size(self) -> int:
        """Processes that compute a batch together. transformers 5.17 itself counts those of its own loader alone."""
        spread = getattr(self.accelerator, "parallelism_config", None)
        return 1 if spread is None else int(spread.tp_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Loader of held-out windows; their positions are the model's own at the scale that is set."""
        training_collator, self.data_collator = self.data_collator, collate
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out loss (nats a token) at each of the evaluation scales, and their mean as `eval_loss`."""
        metrics: dict[str, float] = {}
        for scale in self.evaluate_scales:
            self.extension.set_scale(scale)
            self._round = 0
            self.gather_function = self._gather_windows  # the loop puts the Trainer's own back
            output = self.evaluation_loop(
                self.get_eval_dataloader(eval_dataset),
                description=f"held-out loss at scale {scale:g}",
                prediction_loss_only=True,
                metric_key_prefix=metric_key_prefix,
            )
            metrics[f"{metric_key_prefix}_loss_scale_{scale:g}"] = output.metrics[f"{metric_key_prefix}_loss"]  # type: ignore[index]
        self.extension.set_scale(None)
        metrics[f"{metric_key_prefix}_loss"] = sum(metrics.values()) / len(metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Loss of a held-out batch. Accelerate fills the last batches of several processes with windows from the
        beginning; these do not count."""
        found = inputs.pop("sample_index")
        share = self.get_tp_size()
        groups, mine = self.accelerator.num_processes // share, self.accelerator.process_index // share
        start = (self._round * groups + mine) * self.args.eval_batch_size
        self._round += 1
        due = torch.arange(start, start + len(found), device=found.device)
        self._counted = int((found == due).sum())
        # A process without windows of its own computes one all the same: the others wait for it where they shard.
        kept = {name: value[: max(1, self._counted)] for name, value in inputs.items()}
        return super().prediction_step(model, kept, prediction_loss_only, ignore_keys)

    def _gather_windows(self, losses: torch.Tensor) -> torch.Tensor:
        """Loss of each window of all processes' batches, once where several compute a batch together; the windows of a
        batch have its mean. losses: this process's, the same number repeated."""
        own = torch.stack((losses[0].float(), torch.tensor(float(self._counted), device=losses.device)))
        gathered: Any = self.accelerator.gather(own[None])
        found = gathered[:: self.get_tp_size()]
        return found[:, 0].repeat_interleave(found[:, 1].long())

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        split = self._split_adamw()
        # Its step clips while it reads the gradients; scaling them here would round them to bfloat16 once more.
        return super()._clip_grad_norm(model) if split is None else split.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        split = self._split_adamw()
        if split is not None and grad_norm is None:
            return split.clip(0.0)
        return super()._get_grad_norm(model, grad_norm)

    def _split_adamw(self) -> SplitAdamW | None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return optimizer if isinstance(optimizer, SplitAdamW) else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        finite = all(bool(torch.isfinite(local(p)).all()) for p in model.parameters() if p.requires_grad)
        if any_process(not finite):
            raise ValueError(
                f"weights are not finite at step {self.state.global_step}: nothing was saved. Lower "
                f"train.learning_rate = {self.args.learning_rate:g} and resume from the last checkpoint"
            )
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # left by a save that was cut off
        if self.args.should_save:
            folder.mkdir(parents=True)  # where shards are saved, the Trainer looks for the best folder before it stands
        any_process(False)  # nobody writes before it is empty
        super()._save_checkpoint(model, trial)
        any_process(False)  # complete when all have written their parts
        if self.args.should_save:
            (folder / COMPLETE).write_text(json.dumps(self.description))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were saved to the end, earliest first."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / COMPLETE).is_file()]
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))
