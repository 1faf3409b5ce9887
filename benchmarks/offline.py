"""A model and its text for a GPU machine without network, in pieces of a size that travels.

    python benchmarks/offline.py pack --model SmolLM2-135M-Instruct.gguf --text DIR --out parts --sizes 62M 63M
    python benchmarks/offline.py unpack --parts parts --out DIR       # there, when all pieces have arrived

MODEL is a GGUF file or a folder of transformers; DIR of --text holds what the other benchmarks read (train/*.txt,
dev/<corpus>, eval/<corpus>). The pieces have the sizes that are given, the last size again and again. Unpacking writes
DIR/model (a folder in bfloat16; the tokenizer is the one that was read where it was packed: versions of transformers
read a GGUF's differently), DIR/text, and DIR/cache with the training text tokenized, for data.cache_dir.
"""

from __future__ import annotations

import argparse
import io
import lzma
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

UNITS = {"k": 1000, "M": 1_000_000, "G": 1_000_000_000}
PART = "part"


def pack(model: Path, text: Path, out: Path, sizes: Sequence[int]) -> list[Path]:
    """Write the pieces, and return them in order. Raises ValueError for a missing model or text."""
    if not model.exists():
        raise ValueError(f"model = {str(model)!r}: no such file or folder")
    found = sorted(path for path in text.rglob("*.txt") if path.is_file())
    if not any(path.parent == text / "train" for path in found):
        raise ValueError(f"text = {str(text)!r}: no train/*.txt there")
    files = {f"text/{path.relative_to(text).as_posix()}": path for path in found}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder)
        if model.is_dir():
            files |= {f"model/{p.relative_to(model).as_posix()}": p for p in sorted(model.rglob("*")) if p.is_file()}
        else:
            from e2llm.hf.load import load_tokenizer

            load_tokenizer(str(model)).save_pretrained(tokenizer)
            files |= {f"model/{path.name}": path for path in sorted(tokenizer.iterdir())}
            files["weights.gguf"] = model
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar, ProcessPoolExecutor() as pool:
            for name, data in zip(files, pool.map(_compressed, files.values()), strict=True):
                member = tarfile.TarInfo(f"{name}.xz")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return write_pieces(archive.getbuffer(), out, sizes)


def write_pieces(data: memoryview, out: Path, sizes: Sequence[int]) -> list[Path]:
    """`data` cut into files of a folder, which loses the pieces that it held."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{PART}*"):
        old.unlink()
    return [_written(out / f"{PART}{i}", piece) for i, piece in enumerate(_pieces(data, sizes))]


def joined(parts: Path) -> bytes:
    """The pieces of a folder, or of its folders, put together. Raises ValueError where one is missing."""
    found = sorted(parts.rglob(f"{PART}*"), key=lambda path: int(path.name.removeprefix(PART)))
    if [path.name for path in found] != [f"{PART}{i}" for i in range(len(found))] or not found:
        raise ValueError(f"parts = {str(parts)!r}: has {[p.name for p in found]}; all from {PART}0 on are needed")
    return b"".join(path.read_bytes() for path in found)


def unpack(parts: Path, out: Path) -> None:
    """Join the pieces and make the model, the text and its tokens of them. Raises ValueError where one is missing."""
    archive = io.BytesIO(joined(parts))
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(fileobj=archive) as tar, ProcessPoolExecutor() as pool:
            members = [(member.name, tar.extractfile(member)) for member in tar.getmembers()]
            jobs = [(out / name.removesuffix(".xz"), file.read()) for name, file in members if file is not None]
            list(pool.map(_decompressed, sorted(jobs, key=lambda job: -len(job[1]))))
    except (tarfile.TarError, lzma.LZMAError) as error:
        raise ValueError(f"parts = {str(parts)!r}: a piece is missing or broken: {error}") from error
    weights = out / "weights.gguf"
    if weights.is_file():
        _convert(weights, out / "model")
        weights.unlink()
    sources = sorted((out / "text" / "train").glob("*.txt"), key=lambda path: -path.stat().st_size)
    os.environ.setdefault("RAYON_NUM_THREADS", "2")
    with ProcessPoolExecutor(min(len(sources), os.cpu_count() or 1)) as pool:
        list(pool.map(_tokenize, [(str(out / "model"), str(file), str(out / "cache")) for file in sources]))


def _compressed(file: Path) -> bytes:
    return lzma.compress(file.read_bytes(), preset=9 | lzma.PRESET_EXTREME)


def _decompressed(job: tuple[Path, bytes]) -> None:
    target, data = job
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(lzma.decompress(data))


def _pieces(data: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    start, index = 0, 0
    while start < len(data):
        size = sizes[min(index, len(sizes) - 1)]
        yield data[start : start + size]
        start, index = start + size, index + 1


def _written(path: Path, data: memoryview) -> Path:
    path.write_bytes(data)
    return path


def _convert(weights: Path, folder: Path) -> None:
    """Weights in bfloat16 beside the tokenizer that is in `folder`, whose files stay as they are."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    kept = {path: path.read_bytes() for path in folder.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(
        str(weights.parent),
        gguf_file=weights.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    for path, data in kept.items():
        path.write_bytes(data)


def _tokenize(job: tuple[str, str, str]) -> None:
    from e2llm.config import load_recipe
    from e2llm.data.corpus import build_corpus
    from e2llm.hf.load import load_tokenizer

    model, file, cache = job
    source = f'[{{path="{file}", separator="<|endoftext|>"}}]'
    # The window is none of the tokens' concern, but text that does not fill one is refused.
    recipe = load_recipe("recommended", [f"model.name={model}", f"data.sources={source}", "data.window=64"])
    build_corpus(recipe.data, load_tokenizer(model), cache_dir=Path(cache), progress=False)


def size(text: str) -> int:
    """Bytes of 62M, 500k or 1000. Raises ValueError, as argparse wants it."""
    return int(float(text[:-1]) * UNITS[text[-1]]) if text[-1] in UNITS else int(text)


def main() -> None:
    """Pack here, unpack there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    here = commands.add_parser("pack")
    here.add_argument("--model", type=Path, required=True)
    here.add_argument("--text", type=Path, required=True)
    here.add_argument("--out", type=Path, required=True)
    here.add_argument("--sizes", type=size, nargs="+", default=[size("60M")], help="of the pieces (60M)")
    there = commands.add_parser("unpack")
    there.add_argument("--parts", type=Path, required=True, help="folder that holds them, or folders that do")
    there.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        if args.command == "pack":
            for path in pack(args.model, args.text, args.out, args.sizes):
                print(path, path.stat().st_size)
        else:
            unpack(args.parts, args.out)
    except ValueError as error:
        raise SystemExit(f"offline.py: {error}") from error


if __name__ == "__main__":
    main()
