"""Trained weights as what they differ from the first ones by: a sixth of their size, exact, for another machine.

    python benchmarks/offline_weights.py pack --model runs/recommended/model --base SmolLM2 --out pieces --sizes 16M
    python benchmarks/offline_weights.py unpack --pieces pieces --base SmolLM2 --out recommended

MODEL and BASE are folders with one model.safetensors of the same tensors in bfloat16, such as `offline.py unpack`
makes and training from it; --round takes a MODEL in float32 and rounds it, which is no longer exact. Fine-tuning moves
most weights by a few steps of bfloat16's grid or none, so the number of steps compresses well, where the weights do
not. All other files of MODEL travel as they are. The pieces have the sizes that are given, the last size again and
again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from offline import joined, size, write_pieces
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
STEPS = "steps.xz/"
BASE_HASH = "base.sha256"
CHUNK = 4_000_000
"""Weights that are compressed at a time."""


def pack(model: Path, base: Path, out: Path, sizes: Sequence[int], *, rounded: bool = False) -> list[Path]:
    """Write the pieces, and return them in order. `rounded`: float32 weights of `model` become bfloat16. Raises
    ValueError for tensors that are not those of `base`."""
    trained, first = _weights(model, rounded), _weights(base)
    if {name: value.shape for name, value in trained.items()} != {name: value.shape for name, value in first.items()}:
        raise ValueError(
            f"model = {str(model)!r}: its tensors are not those of base = {str(base)!r}"
        )
    steps = np.concatenate([_order(trained[name]) - _order(first[name]) for name in sorted(trained)])
    files = {BASE_HASH: _hash(base).encode()}
    files |= {
        path.name: path.read_bytes() for path in sorted(model.iterdir()) if path.is_file() and path.name != WEIGHTS
    }
    with ProcessPoolExecutor() as pool:
        chunks = [steps[start : start + CHUNK] for start in range(0, len(steps), CHUNK)]
        files |= {f"{STEPS}{i:05d}": data for i, data in enumerate(pool.map(_compressed, chunks))}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return write_pieces(archive.getbuffer(), out, sizes)


def unpack(pieces: Path, base: Path, out: Path) -> None:
    """Make the folder again, bit for bit. Raises ValueError where a piece is missing or `base` is another one."""
    try:
        with tarfile.open(fileobj=io.BytesIO(joined(pieces))) as tar:
            opened = {member.name: tar.extractfile(member) for member in tar.getmembers()}
            files = {name: file.read() for name, file in opened.items() if file is not None}
    except tarfile.TarError as error:
        raise ValueError(f"pieces = {str(pieces)!r}: a piece is missing or broken: {error}") from error
    if files.pop(BASE_HASH, b"").decode() != _hash(base):
        raise ValueError(f"base = {str(base)!r}: the pieces were made of other weights; give the ones trained from")
    with ProcessPoolExecutor() as pool:
        chunks = [files.pop(name) for name in sorted(files) if name.startswith(STEPS)]
        steps = np.concatenate(list(pool.map(_decompressed, chunks)))
    trained, start = {}, 0
    for name, value in sorted(_weights(base).items()):
        order = _order(value) + steps[start : start + value.numel()]
        trained[name], start = _from_order(order).view(torch.bfloat16).reshape(value.shape), start + value.numel()
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
    save_file(trained, out / WEIGHTS, metadata={"format": "pt"})


def _weights(folder: Path, rounded: bool = False) -> dict[str, torch.Tensor]:
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{str(folder)!r}: no {WEIGHTS} there; give a folder with its weights in one file"
        )
    found = load_file(folder / WEIGHTS)
    if rounded:
        found = {k: v.to(torch.bfloat16) if v.dtype == torch.float32 else v for k, v in found.items()}
    wrong = [name for name, value in found.items() if value.dtype != torch.bfloat16]
    if wrong:
        raise ValueError(f"{str(folder)!r}: {wrong[0]} is {found[wrong[0]].dtype}; weights must be bfloat16 (--round)")
    return found


def _order(value: torch.Tensor) -> np.ndarray:
    """(n,) int16: numbers that grow by one from a bfloat16 value to the next; differences wrap around."""
    bits = value.reshape(-1).view(torch.int16).numpy()
    return bits ^ ((bits >> 15) & 0x7FFF)


def _from_order(order: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(order ^ ((order >> 15) & 0x7FFF))  # its own inverse: the sign stays


def _compressed(steps: np.ndarray) -> bytes:
    planes = steps.view(np.uint8).reshape(-1, 2).T  # low bytes, then high ones: those are nearly all 0 or 255
    return lzma.compress(planes.tobytes(), preset=4)


def _decompressed(data: bytes) -> np.ndarray:
    planes = np.frombuffer(lzma.decompress(data), dtype=np.uint8).reshape(2, -1)
    return np.ascontiguousarray(planes.T).view(np.int16).reshape(-1)


def _hash(folder: Path) -> str:
    """Of the weights alone: another version of transformers writes the file's header otherwise."""
    found = hashlib.sha256()
    for name, value in sorted(_weights(folder).items()):
        found.update(name.encode())
        found.update(memoryview(value.contiguous().view(torch.int16).numpy()).cast("B"))
    return found.hexdigest()


def main() -> None:
    """Pack there, unpack here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    there = commands.add_parser("pack")
    there.add_argument("--model", type=Path, required=True)
    there.add_argument("--sizes", type=size, nargs="+", default=[size("60M")], help="of the pieces (60M)")
    there.add_argument("--round", action="store_true", help="weights of float32 become bfloat16")
    here = commands.add_parser("unpack")
    here.add_argument("--pieces", type=Path, required=True, help="folder that holds them, or folders that do")
    for command in (there, here):
        command.add_argument("--base", type=Path, required=True, help="what was trained")
        command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        if args.command == "pack":
            for path in pack(args.model, args.base, args.out, args.sizes, rounded=args.round):
                print(path, path.stat().st_size)
        else:
            unpack(args.pieces, args.base, args.out)
    except ValueError as error:
        raise SystemExit(f"offline_weights.py: {error}") from error


if __name__ == "__main__":
    main()
