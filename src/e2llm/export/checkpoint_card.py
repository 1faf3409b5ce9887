"""The README.md of a checkpoint that was not exported: any window, each request at its own scale.

Flows in: a checkpoint folder (whole weights or an adapter, with e2llm.json), Records. Flows out: its README.md. No
weights are read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from e2llm.export.card import CardFacts, license_of, model_card
from e2llm.export.card_metadata import served_steps
from e2llm.export.plan import ExportPlan
from e2llm.hf import CheckpointInfo
from e2llm.records import Record, portable, write_atomic


def write_checkpoint_card(folder: str | Path, records: Sequence[Record]) -> Path:
    """Write FOLDER/README.md, a model card with the Records' results; the file.

    A README.md of ours is written anew and keeps its license. ValueError for a folder without e2llm.json, and for a
    README.md that someone else wrote.
    """
    folder = Path(folder).expanduser()
    info = CheckpointInfo.load(folder) if folder.is_dir() else None
    if info is None:
        raise ValueError(
            f"card = {str(folder)!r}: no folder with an e2llm.json; name a trained checkpoint (a model at one fixed "
            "scale gets its card from e2llm export --results)"
        )
    readme = folder / "README.md"
    if readme.is_file() and not _is_ours(readme):
        raise ValueError(f"card: {readme} was not made by e2llm; move it away, it would be lost")
    name = folder.resolve().parent.name if folder.resolve().name == "model" else folder.resolve().name
    base = info.base_model
    native = info.native_window
    facts = CardFacts(
        name=name,
        target="peft" if (folder / "adapter_config.json").is_file() else "hf",
        plan=ExportPlan(
            method=info.method,
            scale=1.0,
            window=native,
            scale_window=native,
            native_window=native,
            slope=None,
            ropes={},
            open_scales=tuple(sorted({1.0, *(step.scale for step in served_steps(info))})),
        ),
        info=info,
        base_model=str(portable(str(Path(base).resolve()))) if base and Path(base).expanduser().exists() else base,
        license=license_of(folder),
        commands={"e2llm": f"pip install 'e2llm[serve]'\ne2llm serve {name}"},
        checks=(),
        records=records,
    )
    return write_atomic(readme, model_card(facts))


def _is_ours(readme: Path) -> bool:
    """Whether its front matter has our tag."""
    front = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return front is not None and re.search(r"^- e2llm$", front[1], re.MULTILINE) is not None
