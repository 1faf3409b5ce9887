"""From a data recipe and a tokenizer to a `Corpus`: sources tokenized once, split into training and held-out documents.

Flows in: `DataConfig` and a fast tokenizer. Flows out: parts to cut windows from, and where they came from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2llm.config_sections import DataConfig, SourceConfig
from e2llm.data.fingerprint import files_sha256, json_sha256, tokenizer_sha256
from e2llm.data.parts import Part, SyntheticPart, TextPart, find_generator
from e2llm.data.planted import PlantedPart
from e2llm.data.progress import progress_bar
from e2llm.data.saved import HUB_PREFIX, Rows, is_saved_folder, open_hub, open_saved_folder
from e2llm.data.sources import Item, find_files, read_files
from e2llm.data.split import choose_held_out
from e2llm.data.tokens import FORMAT, TokenStore, build_store, check_tokenizer
from e2llm.data.windows import check_enough

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEY_LENGTH = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """What training and evaluation read."""

    train: tuple[Part, ...]
    """In the order of data.sources."""
    held_out: tuple[TextPart, ...]
    """Of the sources that have held-out documents; synthetic ones have none."""
    provenance: tuple[dict[str, Any], ...]
    """Per source, JSON: path or synthetic, weight, sha256 of the content, documents, tokens, how many were held out."""


def check_sources(data: DataConfig) -> None:
    """Raise ValueError for what is wrong with the sources and takes no reading to see: files that are not there, names
    of generators."""
    for source in data.sources:
        if source.synthetic:
            find_generator(source.synthetic)
        elif not source.path.startswith(HUB_PREFIX) and not is_saved_folder(Path(source.path).expanduser()):
            find_files(source)


def build_corpus(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, cache_dir: Path, progress: bool = True
) -> Corpus:
    """Tokenize what the cache does not hold and split it. Everything the user can get wrong is a ValueError here.

    Safe in several processes at once, but each would tokenize: let one process per machine go first.
    """
    if not data.sources:
        raise ValueError("data.sources is empty: name at least one source of text")
    check_tokenizer(tokenizer)
    check_sources(data)
    tokenizer_key = tokenizer_sha256(tokenizer)
    stores: dict[int, tuple[TokenStore, str]] = {}
    for number, source in enumerate(data.sources):
        if not source.synthetic:
            stores[number] = _open_store(source, tokenizer, tokenizer_key, cache_dir, progress)
    hashes = [store.hashes for store, _ in stores.values()]
    held_flags = choose_held_out(hashes, fraction=data.held_out_fraction, seed=data.seed)
    held_of = dict(zip(stores, held_flags, strict=True))
    train: list[Part] = []
    held_out: list[TextPart] = []
    provenance = []
    for number, source in enumerate(data.sources):
        if source.synthetic:
            train.append(SyntheticPart(f"synthetic {source.synthetic}", source.weight, source.synthetic, tokenizer))
            provenance.append({"synthetic": source.synthetic, "weight": source.weight})
            continue
        store, content = stores[number]
        kept = TextPart.of(store, ~held_of[number], name=source.path, weight=source.weight)
        held = TextPart.of(store, held_of[number], name=source.path, weight=source.weight)
        check_enough(kept, data.window)
        share, sets = _planted(data, source, holds_chats=kept.store.loss is not None)
        weighed = data.planted_weight, data.planted_loss == "answers"
        train.append(PlantedPart(kept, tokenizer, share, sets, *weighed) if share else kept)
        if held.num_documents:
            held_out.append(held)
        names = ("planted_weight", "planted_loss")
        planted = {"planted": share, "planted_sets": sets, **{name: getattr(data, name) for name in names}}
        provenance.append(_provenance(source, store, content, held) | (planted if share else {}))
    return Corpus(tuple(train), tuple(held_out), tuple(provenance))


def _planted(data: DataConfig, source: SourceConfig, *, holds_chats: bool) -> tuple[float, int]:
    """Share of a source's windows with planted facts, and the most sets of them in one."""
    sets = data.planted_sets if source.planted_sets is None else source.planted_sets
    if not holds_chats:
        return (data.planted if source.planted is None else source.planted), sets
    if source.planted:
        raise ValueError(f"data.sources.planted = {source.planted}: {source.path} holds chats; use it with plain text")
    if data.planted and source.planted is None:
        _log.warning("data.planted = %g: %s holds chats, in which no facts are planted", data.planted, source.path)
    return 0.0, sets


def _provenance(source: SourceConfig, store: TokenStore, content: str, held: TextPart) -> dict[str, Any]:
    return {
        "path": source.path,
        "weight": source.weight,
        "sha256": content,
        "num_documents": store.meta.num_documents,
        "num_tokens": store.meta.num_tokens,
        "num_empty_documents": store.meta.num_empty_documents,
        "num_held_out_documents": held.num_documents,
        "num_held_out_tokens": held.num_tokens,
    }


def _open_store(
    source: SourceConfig, tokenizer: PreTrainedTokenizerBase, tokenizer_key: str, cache_dir: Path, progress: bool
) -> tuple[TokenStore, str]:
    """The source's store, from the cache or built now, and the SHA-256 of its content."""
    rows = _open_rows(source)
    if rows is not None:
        content = json_sha256(rows.identity)
        files: list[Path] = []
        total: float | None = rows.num_rows
    else:
        files = find_files(source)
        total = sum(file.stat().st_size for file in files)
        with progress_bar(f"hashing {source.path}", total, enabled=progress) as advance:
            content = files_sha256(files, advance)
    key = json_sha256(
        {
            "format": FORMAT,
            "content": content,
            "tokenizer": tokenizer_key,
            "text_column": source.text_column,
            "messages_column": source.messages_column,
            "separator": source.separator,
        }
    )
    folder = cache_dir / key[:_KEY_LENGTH]
    if folder.is_dir():
        return TokenStore.open(folder), content
    with progress_bar(f"tokenizing {source.path}", total, enabled=progress) as advance:
        items = rows.read() if rows is not None else _read_unchanged(files, source)
        return build_store(folder, items, tokenizer, name=source.path, advance=advance), content


def _open_rows(source: SourceConfig) -> Rows | None:
    """The source as a data set of the `datasets` library; None for plain files."""
    if source.path.startswith(HUB_PREFIX):
        return open_hub(source)
    path = Path(source.path).expanduser()
    return open_saved_folder(path, source) if is_saved_folder(path) else None


def _read_unchanged(files: list[Path], source: SourceConfig) -> Iterator[Item]:
    """Documents of `files`; ValueError if one was written to meanwhile: the cache would keep it under the old hash."""
    before = [_stamp(file) for file in files]
    yield from read_files(files, source)
    for file, stamp in zip(files, before, strict=True):
        if _stamp(file) != stamp:
            raise ValueError(f"{file} changed while it was read: start again when nothing writes to it")


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
