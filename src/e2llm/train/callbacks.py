"""What a run shows and keeps while it trains: progress bar, metrics.jsonl, stops on NaN and on SIGTERM."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from e2llm.train.distributed import any_process


class StopOnNaN(TrainerCallback):
    """Ends the run at the first logged loss that is not finite."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(float(value)):
                raise ValueError(
                    f"{name} = {value} at step {state.global_step}: training diverged. Lower train.learning_rate = "
                    f"{args.learning_rate:g} or lengthen train.warmup_steps, then --resume from the last checkpoint"
                )


class StopOnSignal(TrainerCallback):
    """SIGTERM (a scheduler's or a spot machine's warning): finish the step, save a checkpoint, stop."""

    def __init__(self) -> None:
        self.received = False
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen, where signals can be listened to (the main thread)."""
        try:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        except ValueError:  # not the main thread: whoever owns it owns its signals
            self._previous = None

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Ask for a checkpoint and the end; in all processes at one step, though the signal reaches them one by one."""
        self.received = any_process(self.received)
        if self.received:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signal back."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


class MetricsFile(TrainerCallback):
    """Appends every log line to metrics.jsonl with step, seconds and tokens a second.

    A resumed run drops the lines after the checkpoint it starts from, so that each step stands there once.
    """

    def __init__(self, path: Path, tokens_per_step: int) -> None:
        self.path = path
        self.tokens_per_step = tokens_per_step
        self.rows: list[dict[str, Any]] = []
        self._clock = 0.0
        self._step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keep what the checkpoint knew."""
        if self.path.is_file():
            kept = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            self.rows = [row for row in kept if row["step"] <= state.global_step]
        if state.is_world_process_zero:
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(text)
            os.replace(temporary, self.path)
        self._clock, self._step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One line."""
        if not state.is_world_process_zero or logs is None:
            return
        row: dict[str, Any] = {"step": state.global_step, **logs}
        row.pop("epoch", None)
        now = time.monotonic()
        if "loss" in logs and state.global_step > self._step:
            row["tokens_per_second"] = (state.global_step - self._step) * self.tokens_per_step / (now - self._clock)
            self._clock, self._step = now, state.global_step
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation is not training time."""
        self._clock, self._step = time.monotonic(), state.global_step


class ProgressBar(TrainerCallback):
    """A bar with loss, tokens a second and time left on a terminal; a line for each log elsewhere."""

    def __init__(self, metrics: MetricsFile, console: Console, quiet: bool = False) -> None:
        self.metrics = metrics
        self.console = console
        self.quiet = quiet
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Show it."""
        if self.quiet or not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._bar.start()
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Tell the loss."""
        if self.quiet or not state.is_world_process_zero or not self.metrics.rows:
            return
        row = self.metrics.rows[-1]
        text = ""
        if "loss" in row:
            text = f"loss {row['loss']:.3f}"
            if "tokens_per_second" in row:
                text += f"  {row['tokens_per_second']:,.0f} tokens/s"
        elif "eval_loss" in row:
            parts = [f"{k.rsplit('_', 1)[1]}: {v:.3f}" for k, v in row.items() if "_scale_" in k]
            self.console.print(f"step {row['step']}: held-out loss by scale {{{', '.join(parts)}}}", highlight=False)
        if text and self._bar is not None:
            self._bar.update(self._task, loss=text)
        elif text:
            self.console.print(f"step {row['step']}/{state.max_steps}  {text}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take it away."""
        self.close()

    def close(self) -> None:
        """Also where training ended by an error: a live bar would swallow the message."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
