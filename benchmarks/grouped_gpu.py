"""Attention of grouped training windows on a GPU: right against the written-out path, then how fast, tile by tile
(queries,keys,warps,stages); TFLOP/s count one score a pair, as of causal scaled_dot_product_attention, the floor.

    python benchmarks/grouped_gpu.py --attend "128,64,4,3 128,128,8,3" --back_to_keys "64,128,8,2"
"""

import argparse

import torch
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from e2llm.hf import grouped_training as training

B, H, G, T, D, NEAR = 16, 9, 3, 4096, 64, 2048


def rows(batch: int, tokens: int) -> tuple[torch.Tensor, ...]:
    jumps = torch.rand(batch, 8).mul(131072 - tokens).long().sort(1).values.repeat_interleave(tokens // 8, 1)
    segments = (torch.arange(tokens) // (tokens // 8)).expand(batch, -1)
    groups = torch.tensor([1, 5, 21]).repeat(batch)[:batch]
    given = (torch.arange(tokens) + jumps, groups, segments, torch.rand(batch, tokens) * 3 * (segments > 0))
    return tuple(x.cuda() for x in given)


def tensors(batch: int, tokens: int) -> list[torch.Tensor]:
    made = (torch.randn(batch, tokens, h, D, device="cuda", dtype=torch.bfloat16) for h in (H, H, G, G, G))
    return [x.transpose(1, 2).requires_grad_() for x in made]


parser = argparse.ArgumentParser()
for kernel in training.KERNELS:
    parser.add_argument(f"--{kernel}", default="", metavar="TILES")
small, rest = tensors(2, 2048), (*rows(2, 2048), 4, 512, D**-0.5)
out, wanted = training.grouped_training(*small, *rest), training.written_out(*(x.double() for x in small), *rest)
options, step = parser.parse_args(), torch.randn_like(out)
pairs = zip(torch.autograd.grad(out, small, step), torch.autograd.grad(wanted, small, step.double()), strict=True)
errors = ((a.double() - b).norm() / b.norm() for a, b in ((out.detach(), wanted.detach()), *pairs))
print("relative errors of out and five gradients:", *(f"{e:.1e}" for e in errors))
given, rest = tensors(B, T), (*rows(B, T), 4, NEAR, D**-0.5)
step, work = torch.randn_like(given[0]), 2 * B * H * T * T * D / 1e9  # TFLOP for milliseconds


def report(name: str, attend) -> None:  # type: ignore[no-untyped-def]
    timed = (attend, lambda: torch.autograd.grad(attend(), given, step, allow_unused=True))
    one, both = (do_bench(f, warmup=20, rep=200, return_mode="median") for f in timed)
    rates = f"{work / one:.0f} and {2.5 * work / (both - one):.0f} TFLOP/s"
    print(f"{name:30} forward {one:6.2f} ms  and backward {both:6.2f} ms  {rates}", flush=True)


report("sdpa", lambda: scaled_dot_product_attention(*given[::2], is_causal=True, enable_gqa=True))
report("defaults", lambda: training.grouped_training(*given, *rest))
for kernel in training.KERNELS:
    for tile in getattr(options, kernel).split():
        training.CHOSEN[kernel] = training.Tile(*map(int, tile.split(",")))
        try:
            report(f"{kernel} {tile}", lambda: training.grouped_training(*given, *rest))
        except Exception as error:  # the next tile may fit
            print(f"{kernel} {tile}: {error}")
        training.CHOSEN.clear()
