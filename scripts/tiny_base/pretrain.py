"""Pretrain the embedded base on one GPU within a time budget.

    PYTHONPATH=src python3 scripts/tiny_base/pretrain.py --data .carry/tiny --seconds 270 --out $OUT/tiny-512

In: the folder of prepare.py and the tokenizer. Out: a plain Hugging Face folder in bf16 with its tokenizer,
pretrain_record.json (settings, figures, environment) and the model card made from it. The clock starts after the
synthetic windows are built and the first steps have compiled; the learning rate follows the clock.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from card import write_card
from measure import load_scaled, measure, perplexity
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from windows import Source, build_windows

WINDOW = 512
WARM_UP = 0.02
"""Share of the time over which the learning rate rises; it falls in a line to zero after that."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path("src/e2llm/assets/tiny-512"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=270, help="of training, compilation not counted")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--batch", type=int, default=256, help="windows a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak")
    parser.add_argument("--shares", type=float, nargs=3, default=(0.50, 0.33, 0.17), metavar="S",
                        help="of windows: Python, prose, synthetic")
    parser.add_argument("--synthetic-windows", type=int, default=120_000, help="different ones, built beforehand")
    parser.add_argument("--prompts", type=int, default=100, help="pass-key prompts a measurement")
    parser.add_argument("--eval-documents", type=int, default=16, help="held-out Python files measured at the end")
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--rope-theta", type=float, default=10_000.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_model(args: argparse.Namespace, tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=64,
        intermediate_size=args.intermediate, tie_word_embeddings=True, max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta}, initializer_range=0.03,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def read(path: Path) -> np.ndarray:
    """(tokens,) uint16."""
    return np.frombuffer(lzma.decompress(path.read_bytes()), dtype="<u2")


def split_documents(stream: np.ndarray) -> list[np.ndarray]:
    """The documents of a stream, without their end token 0."""
    return [d[d != 0] for d in np.split(stream, np.flatnonzero(stream == 0)) if len(d) > 1]


class Batches:
    """Random windows of WINDOW + 1 tokens, gathered on the device. Synthetic ones come in shuffled rounds."""

    def __init__(self, streams: list[np.ndarray], synthetic: np.ndarray, args: argparse.Namespace) -> None:
        self.device, self.generator = args.device, torch.Generator(args.device).manual_seed(args.seed)
        self.streams = [torch.from_numpy(s.astype(np.int16)).to(args.device) for s in streams]
        self.synthetic = torch.from_numpy(synthetic.astype(np.int16)).to(args.device)
        self.offsets = torch.arange(WINDOW + 1, device=args.device)
        total = sum(args.shares)
        self.counts = [round(args.batch * share / total) for share in args.shares[:2]]
        self.num_synthetic = args.batch - sum(self.counts)
        self.order = torch.empty(0, dtype=torch.long, device=args.device)

    def draw(self) -> torch.Tensor:
        """(batch, WINDOW + 1) int64."""
        parts = []
        for stream, count in zip(self.streams, self.counts, strict=True):
            starts = torch.randint(len(stream) - WINDOW, (count, 1), generator=self.generator, device=self.device)
            parts.append(stream[starts + self.offsets])
        if len(self.order) < self.num_synthetic:
            self.order = torch.randperm(len(self.synthetic), generator=self.generator, device=self.device)
        parts.append(self.synthetic[self.order[: self.num_synthetic]])
        self.order = self.order[self.num_synthetic :]
        return torch.cat(parts).long()


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy; hidden (B, T, D), targets (B, T)."""
    return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), targets.flatten())


def optimizer_for(model, args: argparse.Namespace) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def train(model, batches: Batches, args: argparse.Namespace) -> dict:
    """Train for args.seconds; fp32 weights, bf16 autocast."""
    # Layers are compiled one by one. Compiling the whole model makes transformers build a mask tensor, which keeps
    # SDPA from its fast causal kernel (masking_utils never skips the mask while tracing on torch < 2.14).
    loss_of = head_loss
    if not args.no_compile:
        for layer in model.model.layers:
            layer.compile()
        loss_of = torch.compile(head_loss)
    optimizer = optimizer_for(model, args)
    device_type = torch.device(args.device).type
    is_cuda = device_type == "cuda"
    losses, steps, warm_up_steps = [], 0, 0 if args.no_compile else 5
    began = start = time.perf_counter()
    while True:
        if steps == warm_up_steps:
            if is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            print(f"first steps: {start - began:.1f} s", flush=True)
        done = (time.perf_counter() - start) / args.seconds if steps >= warm_up_steps else 0.0
        if done >= 1:
            break
        factor = min(max(done, 1e-3) / WARM_UP, (1 - done) / (1 - WARM_UP))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        ids = batches.draw()
        with torch.autocast(device_type, torch.bfloat16):
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            loss = loss_of(hidden, model.lm_head.weight, ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        if steps % 10 == 0 or not is_cuda:
            losses.append(loss.item())  # waits for the device: the clock and the work stay together
        if steps % 250 == 0 or not is_cuda:
            rate = (steps - warm_up_steps) * ids[:, 1:].numel() / max(time.perf_counter() - start, 1e-6)
            print(f"step {steps}  {done:.0%}  loss {np.mean(losses[-25:]):.3f}  {rate / 1e3:.0f}k tokens/s", flush=True)
        if not np.isfinite(losses[-1:] or [0.0]).all():
            raise RuntimeError(f"loss is {losses[-1]} at step {steps}; lower --lr")
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    tokens = steps * args.batch * WINDOW
    return {"steps": steps, "tokens": tokens, "seconds": round(seconds, 1), "final_loss": float(np.mean(losses[-25:])),
            "tokens_per_second": round((steps - warm_up_steps) * args.batch * WINDOW / seconds)}


def environment(device: str) -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"}


def main() -> None:
    args = parse()
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    streams = [read(args.data / f"{name}.bin.xz") for name in ("python", "prose")]
    began = time.perf_counter()
    source = Source(python=streams[0], prose=streams[1], tokenizer=tokenizer, length=WINDOW + 1, seed=args.seed)
    synthetic = build_windows(source, args.synthetic_windows)
    print(f"{len(synthetic)} synthetic windows in {time.perf_counter() - began:.0f} s; natural tokens "
          f"{', '.join(f'{len(s) / 1e6:.1f}M' for s in streams)}", flush=True)
    model = build_model(args, tokenizer).to(args.device)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters / 1e6:.2f}M parameters", flush=True)
    training = train(model, Batches(streams, synthetic, args), args)
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    documents = split_documents(read(args.data / "held_out_stdlib.bin.xz"))[: args.eval_documents]
    prose = split_documents(read(args.data / "held_out_prose.bin.xz"))
    rows = measure(args.out, tokenizer, documents, args.device, args.prompts)
    prose_perplexity = perplexity(load_scaled(args.out, 1, args.device), prose, WINDOW)
    print(f"held-out prose, window {WINDOW}: perplexity {prose_perplexity:.2f}", flush=True)
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    record = {"parameters": num_parameters, "settings": settings, "training": training, "measured": rows,
              "held_out_prose_perplexity": round(prose_perplexity, 3), "environment": environment(args.device),
              "corpus": json.loads((args.data / "sources.json").read_text())}
    (args.out / "pretrain_record.json").write_text(json.dumps(record, indent=1) + "\n")
    write_card(args.out)
    print(f"saved {args.out}: {sum(p.stat().st_size for p in args.out.iterdir()) / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
