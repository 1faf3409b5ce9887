"""A checkpoint folder of a shape's random weights, for what reads models from folders alone: unsloth, 4-bit bases.

Flows in: a shape, a work folder. Flows out: the folder. Knows no trainer.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from e2llm.benchmark.shapes import Shape, quick_model


def model_folder(shape: Shape, work: Path, tokenizer: Any) -> Path:
    """The folder of these sizes under `work`, made by the first contestant that needs it: bfloat16, 13.5 GB for 7B.

    The weights are made in host memory; the GPU's is left alone.
    """
    folder = work / "models" / f"{shape.hidden_size}-{shape.num_hidden_layers}-{shape.vocab_size}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    quick_model(shape, dtype="bfloat16").save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder
