"""How fast the links between a machine's GPUs are: `torchrun --nproc-per-node 8 benchmarks/links.py`.

What FSDP2, ZeRO and DDP send: an all-gather, a reduce-scatter and an all-reduce of buffers as large as layers and
models, in bfloat16, over NCCL (gloo without GPUs). Writes benchmarks/results/links_<GPUs>.json: bytes a second that
move through each GPU's link, as `e2llm plan` counts them (`plan.exchange`: a gather of B bytes among n GPUs moves
B (n - 1) / n, an all-reduce twice that), median of the rounds, slowest and fastest. The last line sets the slowest
collective at the largest size beside the constant of the plan.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from e2llm.plan.exchange import INSIDE, gather  # noqa: E402
from e2llm.records import Record, make_row  # noqa: E402
from e2llm.train.distributed import Processes  # noqa: E402

MIB = 2**20


def collectives(size: int, world: int, device: torch.device) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Name -> (how often a gather's bytes move, the call), over a buffer of about `size` bytes in all."""
    part = max(1, size // 2 // world)
    whole = torch.zeros(part * world, dtype=torch.bfloat16, device=device)
    own = torch.zeros(part, dtype=torch.bfloat16, device=device)
    return {
        "all-gather": (1, lambda: dist.all_gather_into_tensor(whole, own)),
        "reduce-scatter": (1, lambda: dist.reduce_scatter_tensor(own, whole)),
        "all-reduce": (2, lambda: dist.all_reduce(whole)),
    }


def seconds_of(call: Callable[[], Any], rounds: int, device: torch.device) -> list[float]:
    """Of each round after two that are not counted; all processes start a round together."""
    found = []
    for number in range(rounds + 2):
        dist.barrier()
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        if number > 1:
            found.append(time.perf_counter() - begin)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(sizes: Sequence[int], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of bytes a second, by collective and size in bytes. The slowest process counts in each round."""
    world, rows = dist.get_world_size(), []
    for size in sizes:
        for name, (times, call) in collectives(size, world, device).items():
            slowest = torch.tensor(seconds_of(call, rounds, device), dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            moved = times * gather(float(size // 2 // world * world * 2), world).inside
            speeds = [moved / seconds for seconds in slowest.tolist()]
            labels = {"collective": name, "buffer_bytes": size, "gpus": world, "low": min(speeds), "high": max(speeds)}
            rows.append(make_row("bytes_per_second", statistics.median(speeds), "bytes/s", rounds, **labels))
    return rows


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 256, 1024, 4096], help="sizes (64 256 1024 4096)")
    parser.add_argument("--rounds", type=int, default=20, help="of each collective and size (20)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(given)
    here, gpus = Processes.of_environment(), torch.cuda.device_count()
    if here.world < 2 or here.world != here.local_world or (gpus and here.world > gpus):
        parser.error(f"{here.world} processes for {gpus} GPUs: start with torchrun --nproc-per-node GPUS, two or more")
    if min(args.mib) < 1 or args.rounds < 1:
        parser.error(f"--mib {args.mib} --rounds {args.rounds}: use numbers of at least 1")
    device = torch.device("cuda", here.local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("cuda:nccl,cpu:gloo" if gpus else "gloo")
    rows = measure([MIB * mib for mib in args.mib], args.rounds, device)
    dist.destroy_process_group()
    if here.rank == 0:
        config = {"dtype": "bfloat16", "rounds": args.rounds, "interval": "slowest and fastest round"}
        Record("links", config, rows).save(args.out / f"links_{here.world}.json")
        for row in rows:
            value, low, high = (row[name] / 1e9 for name in ("value", "low", "high"))
            print(
                f"{row['collective']:15}{row['buffer_bytes'] / MIB:8.0f} MiB {value:8.1f} GB/s ({low:.1f}-{high:.1f})"
            )
        least = min(row["value"] for row in rows if row["buffer_bytes"] == MIB * max(args.mib)) / 1e9
        print(f"slowest at the largest size: {least:.1f} GB/s; the plan takes {INSIDE / 1e9:.0f} (plan.exchange)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
