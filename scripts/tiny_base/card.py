"""Write the model card from pretrain_record.json, so that no figure in it is typed by hand.

    python scripts/tiny_base/card.py src/e2llm/assets/tiny-512
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from e2llm.data.stdlib_files import HELD_OUT

TEMPLATE = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [en]
tags: [llama, python, quickstart]
---

# tiny-512

The embedded base of e2llm's quickstart: a Llama-architecture model of {parameters:.2f}M parameters with a native window
of 512 tokens, small enough to be extended to 8192 tokens on two CPU cores within minutes. It writes plausible Python
and English for a line or two and looks things up inside its window; it is good for nothing else. It is no assistant.

Loads without e2llm: `AutoModelForCausalLM.from_pretrained(folder)`, `AutoTokenizer.from_pretrained(folder)`.

| | |
|---|---|
| layers × width | {layers} × {hidden}, MLP {intermediate} (SwiGLU) |
| attention | {heads} heads of 64, {kv_heads} key–value heads, RoPE base {rope_theta:.0f} |
| vocabulary | 4096, byte-level BPE of its own; every digit is one token; nothing is added to a text |
| special tokens | `<|endoftext|>` (0) between documents, `<|pad|>` (1); no start token |
| stored as | bf16, embeddings tied |

## Training

{steps} steps of {batch} windows of 512 tokens, {tokens:.0f}M tokens in {seconds:.0f} s on one {device}
({rate:.2f}M tokens/s; torch {torch}, transformers {transformers}). AdamW, peak learning rate {lr}, linear to zero.
Windows: {python_share:.0%} Python, {prose_share:.0%} prose, {synthetic_share:.0%} synthetic copy and name–value
passages among natural text ({synthetic_windows} different windows). Natural tokens: {python_tokens:.1f}M Python,
{prose_tokens:.1f}M prose. Made by `scripts/tiny_base`.

## Figures

Python files held out from training, first 8192 tokens of each, whole windows, summed nats over summed tokens; pass keys
of five digits in the same text, {prompts} prompts, greedy. Scale above 1 is transformers' own YaRN, without training.
Held-out prose at 512: perplexity {prose_perplexity}.

| scale | window | perplexity | pass keys found |
|---|---|---|---|
{rows}

Held out from training: {held_out} of the Python standard library. Left out as near copies of them: {near_copies}.
The wording of the pass-key evaluation, UUIDs and five-digit numbers in sentences occur in no synthetic passage.

## Text it was trained on

| source | licence | documents | MB |
|---|---|---|---|
{sources}

The text was tokenised and is not part of this folder. Textbooks: OpenStax (Anatomy and Physiology; Introduction to
Philosophy; Introduction to Political Science; Psychology; U.S. History), CC BY 4.0, openstax.org.

## Limits

English and Python only. Like any model of its size it repeats itself and states falsehoods; it was trained on books of
past centuries and holds their views. Use it to see context extension work, and a real model for anything else.
"""


def render(record: dict) -> str:
    """The card's text for one record of pretrain.py."""
    settings, training, corpus = record["settings"], record["training"], record["corpus"]
    shares = [s / sum(settings["shares"]) for s in settings["shares"]]
    rows = (f"| {r['scale']} | {r['window']} | {r['perplexity']:.2f} | {r['retrieval']:.2f} |"
            for r in record["measured"])
    sources = (f"| {name} | {s['licence']} | {s['documents']} | {s['bytes'] / 1e6:.1f} |"
               for name, s in corpus["sources"].items())
    environment = record["environment"]
    return TEMPLATE.format(
        parameters=record["parameters"] / 1e6, steps=training["steps"], tokens=training["tokens"] / 1e6,
        seconds=training["seconds"], rate=training["tokens_per_second"] / 1e6, prompts=record["measured"][0]["prompts"],
        prose_perplexity=record["held_out_prose_perplexity"], rows="\n".join(rows), sources="\n".join(sources),
        held_out=", ".join(f"`{n}`" for n in HELD_OUT),
        near_copies=", ".join(f"`{n}`" for n in corpus["near_copies_left_out"]) or "none found",
        python_share=shares[0], prose_share=shares[1], synthetic_share=shares[2],
        python_tokens=corpus["tokens"]["python"] / 1e6, prose_tokens=corpus["tokens"]["prose"] / 1e6,
        device=environment["device"], torch=environment["torch"], transformers=environment["transformers"],
        **{k: settings[k] for k in
           ("layers", "hidden", "intermediate", "heads", "kv_heads", "rope_theta", "batch", "lr", "synthetic_windows")},
    )


def write_card(folder: Path) -> None:
    record = json.loads((folder / "pretrain_record.json").read_text())
    (folder / "README.md").write_text(render(record), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    write_card(parser.parse_args().folder)
