"""Who trains: our trainer, transformers' Trainer as it comes and with what it can be given, litgpt's model, unsloth's.

Flows in: a `Contestant`, a folder with text. Flows out: a `Run`, what its steps took. Every trainer sees the same
windows of the same text, starts from the same random weights and trains in bfloat16 arithmetic with float32 AdamW.
Runs in a process of its own (`benchmark.train_worker`), because compiled code, patched kernels and memory outlive a
run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2llm.benchmark.model_folder import model_folder
from e2llm.benchmark.shapes import quick_model, random_model, shape_of
from e2llm.benchmark.step_clock import ClockCallback, Measured, StepClock
from e2llm.benchmark.train_contestants import (
    HF_OPTIONS,
    LITGPT,
    PLAIN_POSITIONS,
    POSITIONS,
    UNSLOTH_OPTIONS,
    Contestant,
    recipe_of,
)

TOKENIZER = Path(__file__).parents[1] / "assets" / "tiny-512"
"""Its 4096 tokens are in every shape's vocabulary."""
TEXT_BYTES = 4 * 2**20
"""Text that windows are cut from: more than a million tokens."""


@dataclass
class Run:
    """What a contestant left behind in its process."""

    clock: StepClock
    trained: int
    """Weights that were trained."""
    frozen: int
    settings: dict[str, Any] = field(default_factory=dict)
    """What the trainer was given, as plain values."""
    profiler: Any = None


def run_contestant(one: Contestant, text: Path, work: Path) -> Run:
    """Train as many steps as the clock wants. `work`: an empty folder, except for the token cache."""
    if one.trainer in POSITIONS:
        return _run_ours(one, text, work)
    if one.trainer in UNSLOTH_OPTIONS:
        return _run_unsloth(one, text, work)
    return (_run_litgpt if one.trainer == LITGPT else _run_hf)(one, text, work)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _counts(model: Any) -> dict[str, int]:
    parameters = list(model.parameters())  # a tied tensor is one parameter
    trained = sum(_weights(p) for p in parameters if p.requires_grad)
    return {"trained": trained, "frozen": sum(_weights(p) for p in parameters) - trained}


def _weights(parameter: Any) -> int:
    """How many weights it holds: two lie in each element of a 4-bit one, none where ZeRO-3 has gathered none."""
    state = getattr(parameter, "quant_state", None)
    whole = getattr(parameter, "ds_numel", parameter.numel())
    return int(whole if state is None else math.prod(state.shape))


def _run_ours(one: Contestant, text: Path, work: Path) -> Run:
    from e2llm.train import distributed, train_loaded

    recipe = recipe_of(one, text, work)
    if recipe.model.offload != "none":
        return _run_offloaded(one, recipe, work)
    processes = distributed.start(recipe)  # refuses what cannot run here before a weight is made
    model = _our_model(one, recipe, work)
    if processes.rank:
        processes.wait()  # the first one makes the token cache
    corpus, tokenizer = _corpus(recipe)
    if not processes.rank:
        processes.wait()
    clock, profiler = StepClock(warmup=one.warmup, steps=one.steps), _profiler(one)
    callback = ClockCallback(clock, profiler, one.profile)
    try:
        train_loaded(recipe, model, tokenizer, corpus, quiet=True, callbacks=[callback])
    except Measured:
        pass
    return Run(clock, **_counts(model), settings=_settings(recipe), profiler=profiler)


def _run_offloaded(one: Contestant, recipe: Any, work: Path) -> Run:
    """A base that is put away while it is read, as a user's: from a folder, by `train` itself."""
    from transformers import AutoTokenizer

    from e2llm.train import train

    folder = model_folder(shape_of(one.shape), work, AutoTokenizer.from_pretrained(TOKENIZER))
    read = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, name=str(folder)))
    clock, profiler = StepClock(warmup=one.warmup, steps=one.steps), _profiler(one)
    callback = CountingCallback(clock, profiler, one.profile)
    try:
        train(read, quiet=True, callbacks=[callback])
    except Measured:
        pass
    return Run(clock, **callback.counts, settings=_settings(recipe), profiler=profiler)


class CountingCallback(ClockCallback):
    """Counts the weights too, of a model that the run makes for itself."""

    counts: dict[str, int]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """With its adapters."""
        self.counts = _counts(model)


def _settings(recipe: Any) -> dict[str, Any]:
    """A recipe as plain values, but for its text."""
    from e2llm.config import to_plain

    plain = to_plain(recipe)
    plain["data"].pop("sources")
    return plain


def _our_model(one: Contestant, recipe: Any, work: Path) -> Any:
    """Random weights with the recipe's method: on their GPU, in host memory where each GPU is to get its share, and
    4-bit ones through a folder, as a user's are read."""
    from transformers import AutoTokenizer

    from e2llm.hf import install, load_model
    from e2llm.train import distributed

    shape, dtype = shape_of(one.shape), recipe.model.dtype
    if recipe.model.quantization == "none":
        if distributed.device_to_load_on(recipe) == "cpu":
            model = quick_model(shape, dtype=dtype)
        else:
            model = random_model(shape, dtype=dtype, device=_device())
        install(model, method=recipe.method, attention=recipe.attention)
        return model
    folder = model_folder(shape, work, AutoTokenizer.from_pretrained(TOKENIZER))
    return load_model(
        str(folder),
        dtype=dtype,
        device=_device(),
        quantization=recipe.model.quantization,
        method=recipe.method,
        attention=recipe.attention,
    )[0]


def _corpus(recipe: Any) -> tuple[Any, Any]:
    """Corpus and tokenizer. The token cache is the first contestant's to fill."""
    from transformers import AutoTokenizer

    from e2llm.data import build_corpus

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return build_corpus(recipe.data, tokenizer, cache_dir=Path(recipe.data.cache_dir), progress=False), tokenizer


def _profiler(one: Contestant) -> Any:
    if not one.profile:
        return None
    import torch

    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * torch.cuda.is_available())


def _rows(one: Contestant, text: Path, work: Path) -> list[dict[str, Any]]:
    """The windows that our own trainer takes, in its order: input_ids and labels (R,) int64."""
    from e2llm.data import WindowDataset

    recipe = recipe_of(dataclasses.replace(one, trainer=PLAIN_POSITIONS, settings=()), text, work)
    count = recipe.train.steps * one.batch_size
    windows = WindowDataset(_corpus(recipe)[0].train, window=one.window, num_samples=count, seed=recipe.data.seed)
    samples = (windows[i] for i in range(count))
    return [{name: sample[name] for name in ("input_ids", "labels")} for sample in samples]


def _peer_model(one: Contestant) -> Any:
    """The model that peers train: float32 weights, or a frozen bfloat16 base under the adapters that ours has."""
    shape = shape_of(one.shape)
    return random_model(shape, dtype="bfloat16" if shape.lora_rank else "float32", device=_device())


def _run_hf(one: Contestant, text: Path, work: Path) -> Run:
    """transformers' Trainer: its own optimizer, loss, collator and loader. ValueError for 4-bit shapes."""
    from e2llm.config_sections import LoraSection
    from e2llm.hf import enable_activation_checkpointing
    from e2llm.train.adapters import add_adapters

    rows, model, shape = _rows(one, text, work), _peer_model(one), shape_of(one.shape)
    if shape.lora_rank:
        model = add_adapters(model, LoraSection(rank=shape.lora_rank))
    if one.checkpointing:
        enable_activation_checkpointing(model)  # as ours: the argument has another name in other versions
    return _run_trainer(one, model, rows, work, {"bf16": True, **HF_OPTIONS[one.trainer]})


def _run_unsloth(one: Contestant, text: Path, work: Path) -> Run:
    """unsloth's model in transformers' Trainer, which it has patched. The process imported it before transformers."""
    from transformers import AutoTokenizer

    from e2llm.benchmark.unsloth_model import precision, unsloth_model

    model, settings = unsloth_model(one, work, AutoTokenizer.from_pretrained(TOKENIZER))
    run = _run_trainer(one, model, _rows(one, text, work), work, precision(one))
    return dataclasses.replace(run, settings={**run.settings, "unsloth": settings})


def _run_trainer(one: Contestant, model: Any, rows: list[dict[str, Any]], work: Path, extra: dict[str, Any]) -> Run:
    """`model` over `rows` in transformers' Trainer with its defaults and `extra` of its arguments."""
    from transformers import DefaultDataCollator, PrinterCallback, Trainer, TrainingArguments

    given: dict[str, Any] = {
        "per_device_train_batch_size": one.batch_size,
        "max_steps": len(rows) // one.batch_size,
        **extra,
    }
    quiet: dict[str, Any] = {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": _device() == "cpu",
    }
    arguments = TrainingArguments(output_dir=str(work / "run"), **given, **quiet)
    clock = StepClock(warmup=one.warmup, steps=one.steps)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=DefaultDataCollator(),
        callbacks=[ClockCallback(clock)],
    )
    trainer.remove_callback(PrinterCallback)
    counts = _counts(model)
    try:
        trainer.train()
    except Measured:
        pass
    return Run(clock, **counts, settings={**given, "optim": getattr(arguments.optim, "value", arguments.optim)})


def _run_litgpt(one: Contestant, text: Path, work: Path) -> Run:
    """litgpt's GPT in a plain loop, as its pretraining script runs one: torch.compile, fused AdamW, its own loss.

    Its float32 weights with bfloat16 arithmetic, as all others here.
    """
    import torch
    from litgpt.utils import chunked_cross_entropy

    device = _device()
    if shape_of(one.shape).lora_rank or one.checkpointing:
        raise ValueError(f"trainer = 'litgpt': full fine-tuning without checkpointing only; not {one.name}")
    rows, model = _rows(one, text, work), _litgpt_model(one, device)
    compiled: Callable[..., Any] = torch.compile(model) if device == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=device == "cuda")
    clock = StepClock(warmup=one.warmup, steps=one.steps)
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=one.batch_size, pin_memory=device == "cuda")  # type: ignore[arg-type]
    for batch in loader:
        ids = batch["input_ids"].to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16):
            logits = compiled(ids)
            loss = chunked_cross_entropy(logits[..., :-1, :], ids[..., 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if clock.step_ended():
            break
    return Run(clock, **_counts(model), settings={"precision": "bf16-mixed", "torch_compile": device == "cuda"})


def _litgpt_model(one: Contestant, device: str) -> Any:
    """litgpt's GPT of the shape; embeddings are tied as its script ties them."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT

    shape = shape_of(one.shape)
    config = Config(
        name=one.shape,
        block_size=one.window,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.num_hidden_layers,
        n_head=shape.num_attention_heads,
        n_query_groups=shape.num_key_value_heads,
        n_embd=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        bias=False,
        parallel_residual=False,
        rotary_percentage=1.0,
        rope_base=int(shape.rope_theta),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(config)
    if shape.tie_word_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    return model


def write_text(folder: Path) -> Path:
    """The standard library of this Python as one long document in `folder`, where it is not there yet."""
    from e2llm.data.stdlib_files import stdlib_documents
    from e2llm.records import write_atomic

    target = folder / "text.txt"
    if not target.is_file():
        pieces: list[str] = []
        total = 0
        for _, text in stdlib_documents(held_out=False):
            pieces.append(text)
            total += len(text)
            if total >= TEXT_BYTES:
                break
        write_atomic(target, "\n".join(pieces))
    return folder
