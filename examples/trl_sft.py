"""e2llm inside TRL's SFTTrainer: python examples/trl_sft.py MODEL CHATS.jsonl OUTPUT [--packing] [--assistant-only]

Each line of CHATS.jsonl is {"messages": [{"role": "user", "content": "…"}, …]}. Scales are drawn in the model, so they
arrive whatever the collator drops. Packed windows are cut to one length ("wrapped"), each with one scale: TRL's other
ways to pack join a batch into one row, in which each chat has a scale and offsets of its own. Several GPUs: torchrun
--nproc-per-node GPUS examples/trl_sft.py …
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import e2llm


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("chats", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--window", type=int, default=4096, help="tokens of a training window at most (4096)")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--packing", action="store_true", help="fill windows with several chats")
    parser.add_argument("--assistant-only", action="store_true", help="loss on the assistant's tokens only")
    parser.add_argument("--chat-template", type=Path, help="Jinja file, with {%% generation %%} for --assistant-only")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.chat_template:
        tokenizer.chat_template = options.chat_template.read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    e2llm.extend(model, training_window=options.window)
    config = SFTConfig(
        output_dir=str(options.output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=2e-5,
        max_length=options.window,
        packing=options.packing,
        packing_strategy="wrapped",
        assistant_only_loss=options.assistant_only,
        bf16=not options.cpu,
        use_cpu=options.cpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    chats = load_dataset("json", data_files=str(options.chats), split="train")
    trainer = SFTTrainer(model=model, args=config, train_dataset=chats, processing_class=tokenizer)
    trainer.train()
    if trainer.is_world_process_zero():
        e2llm.save(model, tokenizer, options.output / "model", checkpoint="trl-sft")


if __name__ == "__main__":
    main()
