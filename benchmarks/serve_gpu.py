"""Serving on one GPU: `python benchmarks/serve_gpu.py` writes benchmarks/results/serve_gpu_*.json in a few minutes.

First the texts of the kernel path must be those of the plain path; then `e2llm benchmark serve` runs for two models:
SmolLM2-135M (a folder or .gguf file given with --smollm2, else its shape with random weights) and the shape of a Llama
of 1.2B parameters with random weights. Speed does not depend on what the weights are. Every measurement is saved as
soon as it is there; one that fails loses nothing of the others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m-shape": ("smollm2-135m", {}),
    "llama-1b-shape": ("llama-1b", {"max_position_embeddings": 131072}),
}
"""Label -> shape of e2llm.benchmark, and what differs from it."""
COMMON = ["--requests", "32", "--prompt-tokens", "512", "--new-tokens", "128", "--scales", "1", "2", "4", "8"]
LONG = ["--long-tokens", "128k", "--prefill", "32k", "128k", "--decode", "32x2k", "1x127k"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", help="folder or .gguf file; left out: its shape with random weights")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--work", type=Path, default=Path("runs/serve-gpu"), help="for random weights")
    parser.add_argument("--rounds", default="3")
    parser.add_argument("--only", choices=["smollm2", "llama"], help="one of the two models")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run? (also without a GPU)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    begin, codes, written = time.perf_counter(), [], []
    codes.append(smoke())
    for name in ["smollm2", "llama"] if arguments.only is None else [arguments.only]:
        out = arguments.out / f"serve_gpu_{name}.json"
        try:
            model, label = model_of(name, arguments)
            codes.append(benchmark(model, label, out, arguments))
            written.append(out)
        except Exception as error:  # the other model is still measured
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            codes.append(1)
    for out in filter(Path.is_file, written):
        table(out)
    print(f"{time.perf_counter() - begin:.0f} s in all, exit codes {codes}", flush=True)
    return max(codes)


def model_of(name: str, arguments: argparse.Namespace) -> tuple[str, str]:
    """Model folder or file, and its label."""
    if name == "smollm2" and arguments.smollm2:
        return arguments.smollm2, "SmolLM2-135M-Instruct"
    shape = "smollm2-135m-shape" if name == "smollm2" else "llama-1b-shape"
    name, changes = SHAPES[shape]
    changes = changes | ({"num_hidden_layers": 2, "vocab_size": 512} if arguments.small else {})
    return str(random_model(arguments.work / (shape + "-small" * arguments.small), name, changes)), shape


def random_model(folder: Path, shape: str, changes: dict[str, Any]) -> Path:
    """A Llama of this shape with random bfloat16 weights, and a tokenizer that is never asked."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    import e2llm
    from e2llm.benchmark.shapes import shape_of

    if (folder / "model.safetensors").is_file():
        return folder
    config = shape_of(shape).config(**changes, dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20GB")
    AutoTokenizer.from_pretrained(Path(e2llm.__file__).parent / "assets" / "tiny-512").save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters", flush=True)
    return folder


def benchmark(model: str, label: str, out: Path, arguments: argparse.Namespace) -> int:
    sizes = [*COMMON, *LONG, "--rounds", arguments.rounds]
    if arguments.small:
        sizes = ["--requests", "3", "--prompt-tokens", "20", "--new-tokens", "4", "--scales", "1", "2", "--rounds", "1"]
        sizes += ["--long-tokens", "300", "--prefill", "200", "--decode", "2x20"]
    command = ["benchmark", "serve", model, *sizes, "--base-model", label, "--out", str(out)]
    print(" ".join(["e2llm", *command]), flush=True)
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    program = [sys.executable, "-c", "import sys; from e2llm.cli import main; sys.exit(main())"]
    return subprocess.run([*program, *command], env=os.environ | {"PYTHONPATH": path}).returncode


def smoke() -> int:
    """Texts of 24 requests at five scales on the embedded model: kernels and graphs against the plain path, float32."""
    import torch

    import e2llm
    from e2llm.engine import BatchEngine, Request, Sampling

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = str(Path(e2llm.__file__).parent / "assets" / "tiny-512")
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 5, 16, 17, 100, 500, 511, 900, 1500, 2000, 3000, 6000] * 2
    prompts = [torch.randint(3, 500, (n,), generator=generator).tolist() for n in lengths]
    sampling = Sampling(ignore_eos=True, logprobs=0)
    requests = [Request(prompt_ids=tuple(p), max_new_tokens=24, sampling=sampling) for p in prompts]
    requests += [replace(request, scale=3.0) for request in requests[:4]]
    found = {}
    try:
        for attention in ("plain", "auto"):
            options: dict[str, Any] = {"dtype": "float32", "device": device, "max_scale": 16.0, "kv_tokens": 65536}
            with BatchEngine.load(base, method="yarn", attention=attention, **options) as engine:
                streams = [engine.submit(request) for request in requests]
                found[attention] = [[(o.token_ids, o.logprobs) for o in stream if o.token_ids] for stream in streams]
                print(f"smoke: {attention}: {engine.stats().attention}", flush=True)
    except Exception as error:
        print(f"smoke: FAILED: {type(error).__name__}: {error}", flush=True)
        return 1
    same, worst = 0, 0.0
    for plain, ours in zip(found["plain"], found["auto"], strict=True):
        same += [tokens for tokens, _ in plain] == [tokens for tokens, _ in ours]
        for (left, a), (right, b) in zip(plain, ours, strict=True):
            if left != right:
                break  # from here on the texts are two
            worst = max(worst, abs(a[0].logprob - b[0].logprob))
    print(f"smoke: {same} of {len(requests)} texts equal, log probabilities within {worst:.2g}", flush=True)
    return 0 if same == len(requests) and worst < 1e-3 else 1


def table(path: Path) -> None:
    """What was measured, one line a figure."""
    from e2llm.records import Record

    record = Record.load(path)
    print(f"\n{path.name}: {record.config['attention_path']}, {record.config['dtype']}")
    for row in record.rows:
        where = f"{row['engine']:13} {row['mix']:8} {row['requests']:>3} x {row['window']:<7}"
        print(f"{where} {row['metric']:32} {row['value']:12.4g} {row['unit']}")
    for name, why in record.config["failed"].items():
        print(f"FAILED {name}: {why}")


if __name__ == "__main__":
    sys.exit(main())
