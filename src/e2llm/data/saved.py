"""Sources that the `datasets` library reads: a saved folder, or a data set of the hub ("hub:owner/name").

Flows in: a `SourceConfig`. Flows out: a `Rows` with what identifies the content and an iterator over its documents.
A hub data set is streamed from one commit. "hub:owner/name/config" picks a configuration, "@revision" at the end
a revision.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2llm.config_sections import SourceConfig
from e2llm.data.sources import Item, check_columns, row_items

HUB_PREFIX = "hub:"
_COMMIT_LENGTH = 40


@dataclass(frozen=True)
class Rows:
    """An opened data set."""

    identity: dict[str, Any]
    """JSON that changes when the content does."""
    num_rows: int | None
    """None where only the hub knows."""
    read: Callable[[], Iterator[Item]]


def is_saved_folder(path: Path) -> bool:
    """Whether `datasets` wrote this folder with save_to_disk."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def open_saved_folder(path: Path, source: SourceConfig) -> Rows:
    """A folder written by `save_to_disk`; `source.split` picks the split where it holds several."""
    import datasets

    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        if source.split not in splits:
            raise ValueError(f"data.sources.split = {source.split!r}: {path} has the splits {', '.join(splits)}")
        path = path / source.split
    table = datasets.load_from_disk(str(path))
    check_columns(table.column_names, source, str(path))
    table = table.select_columns([name for name in table.column_names if name in _columns(source)])
    # The library's fingerprint follows the content through every operation; the sizes catch files replaced by hand.
    fingerprint = json.loads((path / "state.json").read_text())["_fingerprint"]
    sizes = sorted(file.stat().st_size for file in path.glob("*.arrow"))
    identity = {"fingerprint": fingerprint, "arrow_bytes": sizes}
    return Rows(identity, len(table), lambda: _read(table, source, str(path)))


def open_hub(source: SourceConfig) -> Rows:
    """A hub data set, streamed; nothing but the rows being tokenized is kept."""
    import datasets

    name, config, revision = _parse_hub_path(source.path)
    commit = revision
    if commit is None or len(commit) != _COMMIT_LENGTH:
        commit = _latest_commit(source, name, revision)
    identity = {"hub": name, "config": config, "commit": commit, "split": source.split}

    def read() -> Iterator[Item]:
        try:
            table = datasets.load_dataset(name, config, split=source.split, revision=commit, streaming=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"data.sources.path = {source.path!r}, split {source.split!r}: {error}") from error
        yield from _read(table, source, source.path)

    return Rows(identity, None, read)


def _parse_hub_path(path: str) -> tuple[str, str | None, str | None]:
    """ "hub:owner/name/config@revision" -> ("owner/name", config or None, revision or None)."""
    name, _, revision = path.removeprefix(HUB_PREFIX).partition("@")
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(
            f"data.sources.path = {path!r}: write hub:owner/name, hub:owner/name/config or either with @revision"
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, revision or None


def _latest_commit(source: SourceConfig, name: str, revision: str | None) -> str:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    # A hub out of reach raises the HTTP library's own error; which library that is changes with huggingface_hub.
    unreachable: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        commit = huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
    except unreachable as error:
        raise ValueError(
            f"data.sources.path = {source.path!r}: the hub does not answer for this data set "
            f"({type(error).__name__}: {error}); check the name, or give a folder written by datasets' save_to_disk"
        ) from error
    if commit is None:
        raise ValueError(f"data.sources.path = {source.path!r}: the hub names no commit of this data set")
    return commit


def _read(table: Any, source: SourceConfig, name: str) -> Iterator[Item]:
    for number, row in enumerate(table, start=1):
        kept = {key: value for key, value in row.items() if key in _columns(source)}
        yield from row_items(kept or row, source, f"{name}, row {number}", 1)


def _columns(source: SourceConfig) -> tuple[str, str]:
    return source.messages_column, source.text_column
