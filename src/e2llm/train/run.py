"""One training run: recipe -> run folder.

    <output>/recipe.toml    the resolved recipe
    <output>/checkpoints/   Trainer checkpoints, each complete or ignored
    <output>/metrics.jsonl  every log line
    <output>/train.json     Record of kind "train": loss curve, held-out loss by scale, speed, memory
    <output>/model/         the last weights: plain HF folder and e2llm.json
    <output>/best/          the weights with the lowest held-out loss, where it was measured more than once
    <output>/adapter/       the LoRA adapter, where one was trained
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from torch import nn

from e2llm.config import Recipe, load_recipe, to_plain, to_toml
from e2llm.data import Corpus, HeldOutWindows, WindowDataset, build_corpus, check_sources
from e2llm.hf import attending_far, enable_activation_checkpointing, get_extension, load_model
from e2llm.hf.compiled import compile_layers, whole_layers
from e2llm.hf.masks import one_document_a_row
from e2llm.hf.read_once import is_placeholder
from e2llm.positions.placement import PositionSampler
from e2llm.records import Record, make_row, portable
from e2llm.train import distributed
from e2llm.train.adapters import add_adapters
from e2llm.train.callbacks import MetricsFile, ProgressBar, StopOnNaN, StopOnSignal
from e2llm.train.distributed import Processes
from e2llm.train.loss import loss_in_pieces, teacher_of
from e2llm.train.masks import tell_of_slow_attention
from e2llm.train.memory import check_memory
from e2llm.train.offloading import check_room, offload, remove_offloaded
from e2llm.train.optimizers import optimizer_of
from e2llm.train.packages import check_packages
from e2llm.train.saving import base_name, save
from e2llm.train.sharded import WHOLE, check_resume, described, same_run
from e2llm.train.tensor_parallel import check_model
from e2llm.train.trainer import JumpsOf, PlacingCollator, PlacingTrainer, complete_checkpoints
from e2llm.train.unloaded import check_unloaded


@dataclass(frozen=True)
class TrainResult:
    """What a run left."""

    folder: Path
    """The run folder."""
    model_folder: Path | None
    """Plain HF folder of the last weights; None where a signal stopped the run before its end."""
    steps: int
    """Optimizer steps taken in all."""
    record: Record | None
    """The train Record; None where the run was stopped."""


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    quiet: bool = False,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> TrainResult:
    """Run `recipe` to its end, or until SIGTERM. `resume` goes on from the last complete checkpoint. `callbacks` are
    told of every step; what they raise ends the run.

    Raises ValueError for everything a user can set wrong, before weights are loaded where it can be known then.
    """
    console = Console(stderr=True)
    folder = recipe.run_folder
    processes = distributed.start(recipe)
    check_room(recipe, folder)
    check_model(recipe)
    check_memory(recipe, processes)
    checkpoint = _check_folder(recipe, folder, resume, processes)
    check_sources(recipe.data)
    check_unloaded(recipe)
    left_out = distributed.devices_left_out(processes, torch.cuda.device_count())
    if left_out and not quiet:
        console.print(left_out, highlight=False, soft_wrap=True)
    transformers.set_seed(recipe.seed)
    model, tokenizer, _ = load_model(
        recipe.model.name,
        dtype=recipe.model.dtype,
        device=distributed.device_to_load_on(recipe),
        quantization=recipe.model.quantization,
        attn_implementation=recipe.model.attn_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
        method=recipe.method,
        native_window=recipe.model.native_window,
        attention=recipe.attention,
        neighbours=recipe.neighbours or None,
        once=distributed.reads_once(recipe, processes),
    )
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():  # the others find its cache
        corpus = build_corpus(recipe.data, tokenizer, cache_dir=Path(recipe.data.cache_dir), progress=not quiet)
    try:
        result = _run(recipe, model, tokenizer, corpus, folder, checkpoint, console, quiet, callbacks)
    finally:
        remove_offloaded(folder)
    processes.end()
    return result


def train_loaded(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    *,
    quiet: bool = False,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> TrainResult:
    """`train` with what is loaded already: a study trains one model after another in one process.

    The model's weights are trained in place, from what they are; under strategies that shard them they must be in host
    memory, the same in each process. Its extension must be of the recipe's method and slopes. Raises ValueError for
    another extension, for weights that are elsewhere, and where the run folder holds a run.
    """
    extension = get_extension(model)
    own = None if extension is None else (extension.method, extension.attention)
    other = extension is not None and recipe.neighbours not in (0, extension.neighbours)
    if own != (recipe.method, recipe.attention) or other:
        asked = f"{recipe.method!r}, its slopes and neighbours"
        raise ValueError(f"model: its extension is {extension!r}; install it with {asked}")
    folder = recipe.run_folder
    if recipe.model.offload != "none":
        raise ValueError(f"model.offload = {recipe.model.offload!r}: the model is loaded already; use train()")
    elsewhere = {p.device.type for p in model.parameters()} - {"cpu"}
    if recipe.distributed.strategy not in WHOLE and elsewhere:
        raise ValueError(
            f"distributed.strategy = {recipe.distributed.strategy!r}: the model's weights are on {elsewhere.pop()!r}, "
            "whole; keep them in host memory (device='cpu'), and each process takes its share"
        )
    _check_folder(recipe, folder, False, distributed.start(recipe))
    transformers.set_seed(recipe.seed)
    return _run(recipe, model, tokenizer, corpus, folder, None, Console(stderr=True), quiet, callbacks)


def _run(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    folder: Path,
    checkpoint: Path | None,
    console: Console,
    quiet: bool,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> TrainResult:
    """Train, measure the held-out loss, write what a run folder holds."""
    teacher = teacher_of(recipe, model)  # of the weights as they are before anything is trained
    tell_of_slow_attention(recipe, model, Processes.of_environment())
    # Before layers are compiled or sharded: it reads a few tokens to see whether the model can.
    with attending_far(model) if recipe.weighs_by_channels else nullcontext():
        trainer, (metrics, bar, stop) = _build_trainer(recipe, model, corpus, folder, console, quiet)
        for callback in callbacks:
            trainer.add_callback(callback)
        assert trainer.model is not None
        masks = nullcontext() if recipe.data.document_mask else one_document_a_row()
        with _as_before(trainer.model), masks, whole_layers(), loss_in_pieces(recipe, trainer.model, teacher):
            _claim(recipe, folder, Processes.of_environment())
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                bar.close()
            return _finish(recipe, trainer, tokenizer, corpus, folder, metrics, stop, console)


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """The model's forward afterwards is what it was. Accelerate leaves one with autocast on the instance, which would
    stay for who measures the model next, and a mark by which it does nothing for a later run: that one would compute in
    whatever arithmetic it found."""
    before = model.__dict__.get("forward")
    try:
        yield
    finally:
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            model.__dict__.pop(name, None)
        if before is not None:
            model.forward = before


def _finish(
    recipe: Recipe,
    trainer: PlacingTrainer,
    tokenizer: Any,
    corpus: Corpus,
    folder: Path,
    metrics: MetricsFile,
    stop: StopOnSignal,
    console: Console,
) -> TrainResult:
    """Held-out loss, Record, model; or what was reached when a signal came."""
    steps = trainer.state.global_step
    if stop.received and steps < recipe.train.steps:
        if trainer.is_world_process_zero():
            console.print(f"stopped by SIGTERM after step {steps}; a checkpoint is in {folder}: go on with --resume")
        return TrainResult(folder, None, steps, None)
    # By what every process knows: all of them evaluate, or none.
    measured = any(row.get("step") == steps and "eval_loss" in row for row in trainer.state.log_history)
    if trainer.eval_dataset is not None and not measured:
        trainer.evaluate()
    record = _record(recipe, metrics.rows, corpus)
    if not trainer.is_world_process_zero():
        return TrainResult(folder, folder / "model", steps, record)
    record.save(folder / "train.json")
    save(recipe, trainer, tokenizer, corpus, folder)
    return TrainResult(folder, folder / "model", steps, record)


def _check_folder(recipe: Recipe, folder: Path, resume: bool, processes: Processes) -> Path | None:
    """The checkpoint to go on from. Refuses to mix two runs in one folder."""
    if not recipe.model.name:
        raise ValueError("model.name = '': name the base model, e.g. --set model.name=HuggingFaceTB/SmolLM2-135M")
    if not recipe.data.sources:
        raise ValueError("data.sources = []: give text, e.g. --set 'data.sources=[{path=\"my-text/\"}]'")
    check_packages(recipe)
    found = complete_checkpoints(folder / "checkpoints")
    used = (folder / "recipe.toml").is_file()
    if used and not resume:
        raise ValueError(f"output = {str(folder)!r}: holds a run already; pass --resume to go on, or another output")
    if used and resume and not same_run(load_recipe(str(folder / "recipe.toml")), recipe):
        raise ValueError(
            f"output = {str(folder)!r}: its recipe.toml differs from the one given, and a resumed run must be the "
            f"same run; use e2llm train {folder / 'recipe.toml'} --resume"
        )
    if resume and found:
        check_resume(found[-1], recipe, processes)
    return found[-1] if resume and found else None


def _claim(recipe: Recipe, folder: Path, processes: Processes) -> None:
    """Make the folder this run's, when nothing is left to be wrong: what is mended can be given to it again."""
    processes.wait()  # nobody writes before all have looked
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "recipe.toml.tmp"
        temporary.write_text(to_toml(recipe), encoding="utf-8")
        os.replace(temporary, folder / "recipe.toml")


def _build_trainer(
    recipe: Recipe, model: nn.Module, corpus: Corpus, folder: Path, console: Console, quiet: bool
) -> tuple[PlacingTrainer, tuple[MetricsFile, ProgressBar, StopOnSignal]]:
    extension = get_extension(model)
    assert extension is not None
    extension.max_scale = recipe.scales.max_scale
    config = recipe.train
    processes = Processes.of_environment()
    windows_per_step = distributed.windows_per_step(recipe, processes.world)
    sampler = PositionSampler(
        native_window=extension.native_window,
        training_window=recipe.data.window,
        scales=recipe.scales,
        placement=recipe.placement,
        seed=recipe.seed,
        num_samples=config.steps * windows_per_step,
    )
    if config.gradient_checkpointing:  # not by argument: those were renamed between transformers versions
        enable_activation_checkpointing(model, early_stop=recipe.model.offload == "none")
    if recipe.lora.rank:
        model = add_adapters(model, recipe.lora)
    if recipe.model.offload != "none":
        offload(recipe, model, folder, None if quiet else console)
    if config.compile == "layers":
        compile_layers(model)
    once = distributed.any_process(any(map(is_placeholder, model.parameters())))  # not where all hold a loaded model
    arguments = _arguments(recipe, folder, once, processes)
    train_set = WindowDataset(
        corpus.train,
        window=recipe.data.window,
        num_samples=sampler.num_samples,
        seed=recipe.data.seed,
        document_mask=recipe.data.document_mask,
        jumps=None if recipe.data.pieces == "row" else JumpsOf(sampler, recipe.data.pieces == "documents"),
    )
    held_out = None
    if config.evaluate_windows and corpus.held_out:
        held_out = HeldOutWindows(
            corpus.held_out,
            window=recipe.data.window,
            max_windows=config.evaluate_windows,
            document_mask=recipe.data.document_mask,
        )
    metrics = MetricsFile(folder / "metrics.jsonl", windows_per_step * recipe.data.window)
    bar, stop = ProgressBar(metrics, console, quiet), StopOnSignal()
    trainer = PlacingTrainer(
        extension=extension,
        evaluate_scales=config.evaluate_scales,
        description=described(recipe, processes.world),
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=held_out,
        data_collator=PlacingCollator(sampler),
        callbacks=[StopOnNaN(), metrics, bar, stop],
        optimizer_cls_and_kwargs=optimizer_of(recipe),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    distributed.spread_weights(recipe, trainer.accelerator, once)
    return trainer, (metrics, bar, stop)


def _arguments(
    recipe: Recipe, folder: Path, once: bool, processes: Processes
) -> transformers.TrainingArguments:
    config = recipe.train
    on_gpu = torch.cuda.is_available()
    evaluates = bool(config.evaluate_every and config.evaluate_windows)
    save_every = config.save_every or config.steps
    scheduler = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type=scheduler,
        warmup_steps=config.warmup_steps,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bfloat16",
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        use_cpu=not on_gpu,
        seed=recipe.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it would replace a NaN by the last loss, and StopOnNaN would never see it
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=config.keep_checkpoints,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.evaluate_every if evaluates else None,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        remove_unused_columns=False,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=on_gpu,
        # Pinned batches are copied while the device computes: the host never waits for a step to end.
        accelerator_config={"non_blocking": on_gpu},
        report_to=list(config.trackers) or "none",
        disable_tqdm=True,
        **distributed.arguments(recipe, processes, once),
    )
    distributed.finish(arguments, recipe)
    # One process, one device: with several in sight the Trainer would split each batch over them (DataParallel), away
    # from its placements. More devices are torchrun's to start.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _record(recipe: Recipe, rows: list[dict[str, Any]], corpus: Corpus) -> Record:
    """Loss curve, held-out loss by scale, speed and memory."""
    labels = {"checkpoint": recipe.name, "base_model": base_name(recipe.model.name), "seed": recipe.seed}
    made = []
    for row in rows:
        step = row["step"]
        if "loss" in row:
            steps = recipe.train.log_every
            made.append(make_row("loss", row["loss"], "nats", steps, split="train", step=step, **labels))
        for key, value in row.items():
            if key.startswith("eval_loss_scale_"):
                scale = float(key.rsplit("_", 1)[1])
                where = {"split": "held_out", "step": step, "scale": scale}
                made.append(make_row("loss", value, "nats", recipe.train.evaluate_windows, **where, **labels))
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    if speeds:
        made.append(make_row("tokens_per_second", speeds[len(speeds) // 2], "tokens/s", len(speeds), **labels))
    runtime = next((row["train_runtime"] for row in rows if "train_runtime" in row), None)
    if runtime is not None:
        made.append(make_row("train_seconds", runtime, "s", recipe.train.steps, **labels))
    if torch.cuda.is_available():
        made.append(make_row("peak_memory_bytes", float(torch.cuda.max_memory_allocated()), "bytes", 1, **labels))
    config = {**to_plain(recipe), "data_provenance": list(corpus.provenance)}
    return Record(kind="train", config=portable(config), rows=made)
