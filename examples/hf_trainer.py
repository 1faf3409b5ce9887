"""e2llm inside transformers' own Trainer: python examples/hf_trainer.py MODEL TEXT_FOLDER OUTPUT

Two lines are e2llm's: `extend` before training, `save` after it. Scales are drawn in the model, as a batch arrives:
no column has to pass through a collator. Several GPUs: torchrun --nproc-per-node GPUS examples/hf_trainer.py …
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import e2llm


def windows_of(folder: Path, tokenizer, length: int) -> list[dict[str, torch.Tensor]]:
    """The text files of a folder, one after another, cut into windows of `length` tokens."""
    ids: list[int] = []
    for path in sorted(folder.rglob("*.txt")):
        ids += tokenizer(path.read_text(encoding="utf-8"))["input_ids"] + [tokenizer.eos_token_id]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if not len(rows):
        raise SystemExit(f"{folder}: {len(ids)} tokens of .txt files fill no window of {length}")
    return [{"input_ids": row, "labels": row} for row in rows]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--window", type=int, default=4096, help="tokens of a training window (4096)")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    e2llm.extend(model, training_window=options.window)
    arguments = TrainingArguments(
        str(options.output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=2e-4,
        bf16=not options.cpu,
        use_cpu=options.cpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=windows_of(options.text, tokenizer, options.window))
    trainer.train()
    if trainer.is_world_process_zero():
        e2llm.save(model, tokenizer, options.output / "model", checkpoint="hf-trainer")


if __name__ == "__main__":
    main()
