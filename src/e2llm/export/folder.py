"""A checkpoint's files as a plain Hugging Face folder at one fixed scale.

Flows in: a checkpoint (folder, adapter folder, hub name, GGUF file), an `ExportPlan`. Flows out: a folder with the
scaled config, the weights (hard links where the file system allows it, never rewritten unless an adapter is merged or
they are not safetensors), tokenizer, generation config, and an e2llm.json by which our own loader serves it as it is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from e2llm.export.plan import ExportPlan
from e2llm.export.rope_config import scaled_config
from e2llm.hf import CheckpointInfo, get_extension, load_model
from e2llm.hf.exported import EXPORT_MARK
from e2llm.hf.load import ADAPTER_CONFIG, is_adapter
from e2llm.records import portable, write_atomic

PROVENANCE = "e2llm_export.json"
ADAPTER_FOLDER = "adapter"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_BESIDE = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "generation_config.json", "preprocessor_config.json", "processor_config.json", "*.py"),
    *("LICENSE*", "NOTICE*"),
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the weights come from."""

    name: str
    """As the user gave it: folder, hub name or .gguf file."""
    folder: Path | None
    """Local folder whose safetensors can be linked; None where the model has to be loaded and written."""
    adapter: Path | None
    """Folder of the PEFT adapter on top."""
    base: str
    """Name of the model below the adapter; `name` where there is no adapter."""

    @property
    def config_folder(self) -> Path | None:
        """Local folder with the base's config.json."""
        path = Path(self.base).expanduser()
        return path if (path / "config.json").is_file() else None


def find_source(checkpoint: str) -> Source:
    """Raises ValueError for a folder that is an export already."""
    path = Path(checkpoint).expanduser()
    if (path / PROVENANCE).is_file():
        came_from = json.loads((path / PROVENANCE).read_text()).get("checkpoint", "")
        raise ValueError(
            f"checkpoint = {checkpoint!r}: an export already, at one fixed scale; export from the checkpoint it was "
            f"made from ({came_from})"
        )
    adapter = path if is_adapter(path) else None
    if adapter is not None:
        base = json.loads((path / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path") or ""
        return Source(checkpoint, None, adapter, str(base))
    linkable = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    return Source(checkpoint, path if linkable else None, None, checkpoint)


def write_folder(
    source: Source,
    folder: Path,
    plan: ExportPlan,
    info: CheckpointInfo | None,
    *,
    keep_adapter: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Fill the empty `folder`."""
    kept = source.adapter if keep_adapter else None
    weights_from = find_source(source.base) if kept is not None else source
    if weights_from.folder is not None:
        _link(weights_from.folder, folder, _WEIGHTS)
        _copy(weights_from.folder, folder, (*_BESIDE, "config.json"))
    else:
        _save_loaded(weights_from.name, folder, trust_remote_code)
    if kept is not None:
        (folder / ADAPTER_FOLDER).mkdir()
        _link(kept, folder / ADAPTER_FOLDER, ("*.safetensors",))
        settings = json.loads((kept / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = portable(source.base)  # no path of this machine in what is published
        write_atomic(folder / ADAPTER_FOLDER / ADAPTER_CONFIG, json.dumps(settings, indent=2) + "\n")
        _copy(kept, folder, _BESIDE)  # the adapter's tokenizer is what it was trained with
    _scale_config(folder, plan, trust_remote_code)
    _raise_tokenizer_limit(folder / "tokenizer_config.json", plan.window)
    served_as(plan, info).save(folder)


def served_as(plan: ExportPlan, info: CheckpointInfo | None) -> CheckpointInfo:
    """e2llm.json of an export: method none over the scale's window.

    Our loader then serves the model as its config scales it, at scale 1, for all of the window; with the checkpoint's
    own method and native window it would scale a second time.
    """
    told = info or CheckpointInfo(
        method="none", native_window=plan.native_window, training_window=plan.native_window, max_scale=1.0
    )
    return dataclasses.replace(
        told,
        method="none",
        native_window=plan.scale_window,
        max_scale=1.0,
        attention={},
        schedule=[],
        base_model=str(portable(told.base_model)),
        data=portable(told.data),
    )


def _save_loaded(name: str, folder: Path, trust_remote_code: bool) -> None:
    model, tokenizer, _ = load_model(name, dtype="auto", device="cpu", trust_remote_code=trust_remote_code)
    extension = get_extension(model)
    assert extension is not None
    extension.remove()
    saved: Any = model
    saved.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _link(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for path in _matching(source, patterns):
        if path.name.startswith("adapter_") and patterns == _WEIGHTS:
            continue
        try:
            os.link(path.resolve(), target / path.name)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(path, target / path.name)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for path in _matching(source, patterns):
        shutil.copyfile(path, target / path.name)


def _scale_config(folder: Path, plan: ExportPlan, trust_remote_code: bool) -> None:
    from transformers import AutoConfig

    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    if EXPORT_MARK in raw:
        raise ValueError(f"{path}: {EXPORT_MARK} = {raw[EXPORT_MARK]}: an export already; export from its checkpoint")
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    scaled = scaled_config(raw, config, plan)
    write_atomic(path, json.dumps(scaled, indent=2) + "\n")
    check_readable(folder, plan, trust_remote_code=trust_remote_code)


def check_readable(folder: Path, plan: ExportPlan, *, trust_remote_code: bool = False) -> None:
    """Raise ValueError where the model's config class does not take the scaling."""
    from transformers import AutoConfig

    problem = ""
    try:
        AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (KeyError, ValueError, TypeError) as error:
        problem = str(error)
    if problem:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        raise ValueError(
            f"method = {plan.method!r}: the config of model type {kind!r} does not take this scaling ({problem}); "
            "serve with `e2llm serve`, or train with method linear"
        )


def _raise_tokenizer_limit(path: Path, window: int) -> None:
    """A tokenizer's model_max_length below the window would have runtimes cut or warn."""
    if not path.is_file():
        return
    raw = json.loads(path.read_text(encoding="utf-8"))
    limit = raw.get("model_max_length")
    if isinstance(limit, int | float) and limit < window:
        write_atomic(path, json.dumps({**raw, "model_max_length": window}, indent=2, ensure_ascii=False) + "\n")


def check_target(target: Path) -> None:
    """Raise ValueError for a place that an export may not replace."""
    if target.is_dir() and any(target.iterdir()) and not (target / PROVENANCE).is_file():
        raise ValueError(f"out = {str(target)!r}: a folder with other files in it; name a new or empty one")
    if target.exists() and not target.is_dir():
        raise ValueError(f"out = {str(target)!r}: a file; name a folder")
