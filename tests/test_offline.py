"""benchmarks/offline.py: what is unpacked elsewhere is what was packed here, tokens included."""

from __future__ import annotations

import importlib.util
import random
import shutil
from pathlib import Path
from types import ModuleType

import pytest

import e2llm
from e2llm.config import load_recipe
from e2llm.data.corpus import build_corpus
from e2llm.hf.load import load_tokenizer

TINY = Path(e2llm.__file__).parent / "assets" / "tiny-512"


@pytest.fixture(scope="module")
def offline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("offline", Path(__file__).parents[1] / "benchmarks" / "offline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Workers of a pool would look the module up by name.
    module.ProcessPoolExecutor = lambda *_: Inline()
    return module


class Inline:
    """A pool that is none."""

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function, items):  # type: ignore[no-untyped-def]
        return map(function, items)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The embedded model's folder, with other weights: nothing reads them here."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in TINY.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(200_000))
    return folder


def write_text(folder: Path) -> Path:
    for name, text in {"train/a.txt": "one two\n<|endoftext|>\nthree " * 200, "dev/code/b.txt": "é\n" * 99}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_what_arrives_is_what_was_sent(offline: ModuleType, model: Path, tmp_path: Path) -> None:
    text, out = write_text(tmp_path / "text"), tmp_path / "out"
    parts = offline.pack(model, text, tmp_path / "parts", [20_000, 60_000])
    sizes = [part.stat().st_size for part in parts]
    assert len(parts) > 3 and sizes[:3] == [20_000, 60_000, 60_000]
    (tmp_path / "parts" / "second").mkdir()
    parts[1].rename(tmp_path / "parts" / "second" / parts[1].name)  # pieces may lie in folders of their own
    offline.unpack(tmp_path / "parts", out)
    for folder, there in ((model, out / "model"), (text, out / "text")):
        names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
        assert names == sorted(p.relative_to(there) for p in there.rglob("*") if p.is_file())
        assert all((folder / name).read_bytes() == (there / name).read_bytes() for name in names)
    stored = {path: path.stat().st_mtime_ns for path in (out / "cache").rglob("*")}
    assert stored
    source = f'[{{path="{out}/text/train/a.txt", separator="<|endoftext|>", planted=0.5}}]'
    recipe = load_recipe("recommended", [f"model.name={model}", f"data.sources={source}", "data.window=64"])
    build_corpus(recipe.data, load_tokenizer(str(model)), cache_dir=out / "cache", progress=False)
    assert stored == {path: path.stat().st_mtime_ns for path in (out / "cache").rglob("*")}  # nothing tokenized again


def test_what_cannot_be_done_is_said(offline: ModuleType, model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    with pytest.raises(ValueError, match=r"model = .*no such file"):
        offline.pack(tmp_path / "none.gguf", text, tmp_path / "parts", [1000])
    with pytest.raises(ValueError, match=r"no train/\*.txt"):
        offline.pack(model, tmp_path, tmp_path / "parts", [1000])
    with pytest.raises(ValueError, match="all from part0 on are needed"):
        offline.unpack(tmp_path, tmp_path / "out")
    for part in offline.pack(model, text, tmp_path / "parts", [60_000])[-1:]:
        part.unlink()
    with pytest.raises(ValueError, match="a piece is missing or broken"):
        offline.unpack(tmp_path / "parts", tmp_path / "out")
