"""A tiny random model with text beside it, and a recipe that trains it in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from e2llm.config import Recipe, load_recipe, to_toml

WINDOW = 48


def make_base(folder: Path, **overrides: object) -> Path:
    """A random two-layer Llama with L = 64 and a byte-level tokenizer in `folder`/model, and text beside it."""
    words = [f"w{i} " for i in range(200)]
    generator = torch.Generator().manual_seed(0)
    text = folder / "text"
    text.mkdir()
    for document in range(6):
        picks = torch.randint(0, 200, (400,), generator=generator).tolist()
        (text / f"{document}.txt").write_text("".join(words[i] for i in picks))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        [p.read_text() for p in text.iterdir()],
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], show_progress=False),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    config = LlamaConfig(**(sizes | overrides))
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


def small(base: Path, output: Path, *overrides: str) -> Recipe:
    return load_recipe(
        "recommended-yarn",
        [
            f"model.name={base / 'model'}",
            f'data.sources=[{{path="{base / "text"}"}}]',
            f"data.window={WINDOW}",
            "data.held_out_fraction=0.2",
            "data.planted_weight=1",  # windows too small for facts
            f"data.cache_dir={base / 'cache'}",
            f"output={output}",
            "train.steps=6",
            "train.batch_size=2",
            "train.workers=0",
            "train.log_every=1",
            "train.precision=float32",
            "train.learning_rate=1e-3",
            "train.evaluate_scales=[1, 4]",
            "train.evaluate_windows=2",
            *overrides,
        ],
    )


def write(base: Path, folder: Path, name: str, *overrides: str) -> str:
    """The file of a `small` recipe, for processes; its run is `folder`/`name`."""
    file = folder / f"{name}.toml"
    file.write_text(to_toml(small(base, folder / name, *overrides)))
    return str(file)


def logged(run: Path, key: str) -> dict[int, float]:
    """Step -> value, from the run's metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
