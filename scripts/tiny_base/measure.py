"""The few figures that tell whether the base is good enough: perplexity and pass-key retrieval by window.

In: a model on its device, token lists of held-out documents. Out: numbers. The project's own `e2llm evaluate` is what
counts in the end; this one needs nothing but torch and transformers.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

PERPLEXITY_TOKENS = 8192
"""Tokens read of each document, the same at every window."""
TOKENS_PER_FORWARD = 65536


def load_scaled(folder: Path, scale: int, device: str):
    """The saved model in fp32; with transformers' own YaRN where scale > 1."""
    config = AutoConfig.from_pretrained(folder)
    if scale > 1:
        window = config.max_position_embeddings
        config.rope_parameters = {
            "rope_type": "yarn", "rope_theta": config.rope_parameters["rope_theta"], "factor": float(scale),
            "original_max_position_embeddings": window,
        }
        config.max_position_embeddings = scale * window
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).to(device).eval()


@torch.no_grad()
def perplexity(model, documents: list[np.ndarray], window: int) -> float:
    """exp(nats / tokens) over whole windows of the first PERPLEXITY_TOKENS tokens of each document."""
    long_enough = [d[:PERPLEXITY_TOKENS] for d in documents if len(d) >= PERPLEXITY_TOKENS]
    rows = torch.from_numpy(np.concatenate(long_enough).astype(np.int64).reshape(-1, window))
    nats = tokens = 0.0
    for batch in rows.split(max(1, TOKENS_PER_FORWARD // window)):
        ids = batch.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        tokens += ids[:, 1:].numel()
    return math.exp(nats / tokens)


def pass_key_prompts(documents: list[np.ndarray], tokenizer, window: int, count: int, seed: int = 0) -> torch.Tensor:
    """(count, window) int64: real text, a pass key at a depth spread over it, the question, and the five digits."""
    rng = np.random.default_rng((seed, window))
    rows = []
    for i in range(count):
        key = "".join(map(str, rng.integers(10, size=5)))
        fact = tokenizer.encode(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
        question = tokenizer.encode(f"\nWhat is the pass key? The pass key is {key}")
        room = window - len(fact) - len(question)
        text = np.concatenate([documents[j % len(documents)] for j in range(i, i + 2)])
        start = int(rng.integers(len(text) - room))
        text = text[start : start + room].tolist()
        place = int((i + rng.random()) / count * room)
        rows.append([*text[:place], *fact, *text[place:], *question])
    return torch.tensor(rows)


@torch.no_grad()
def retrieval(model, prompts: torch.Tensor) -> float:
    """Share of prompts whose last five tokens are each the most probable one: what greedy decoding would write."""
    correct = 0
    for batch in prompts.split(max(1, TOKENS_PER_FORWARD // prompts.shape[1])):
        ids = batch.to(model.device)
        guesses = model(input_ids=ids, use_cache=False, logits_to_keep=6).logits[:, :-1].argmax(-1)
        correct += (guesses == ids[:, -5:]).all(-1).sum().item()
    return correct / len(prompts)


def measure(folder: Path, tokenizer, documents: list[np.ndarray], device: str, num_prompts: int) -> list[dict]:
    """Base unscaled and with YaRN at scale window/L, for windows of 1, 4 and 16 native ones."""
    rows = []
    transformers.utils.logging.disable_progress_bar()
    for scale, window in ((1, 512), (1, 2048), (1, 8192), (4, 2048), (16, 8192), (16, 512)):
        model = load_scaled(folder, scale, device)
        prompts = pass_key_prompts(documents, tokenizer, window, num_prompts)
        rows.append({
            "scale": scale, "window": window, "perplexity": round(perplexity(model, documents, window), 3),
            "retrieval": retrieval(model, prompts), "prompts": num_prompts,
        })
        print(rows[-1], flush=True)
    return rows
