"""Documents -> token ids in a memory-mapped folder, written once.

Flows in: `Piece`s and `Chat`s and a fast tokenizer. Flows out: a `TokenStore`. Knows neither windows nor splits.
A store is a folder. It is written under a temporary name and renamed when complete, so a final name means whole:

    tokens.bin   uint16 or uint32 (N,)  ids of all documents one after another, each ended by EOS
    offsets.bin  int64 (D + 1,)         where document d begins in tokens.bin; the last entry is N
    hashes.bin   uint64 (D,)            hash of each document's content, for the held-out choice
    loss.bin     uint8 (N,)             1 where the token carries loss; only if some document is a chat
    meta.json    counts and dtype
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from e2llm.data.chat import encode_chats
from e2llm.data.progress import Advance
from e2llm.data.sources import Chat, Item, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Part of the cache key: raise it when the files or the tokenization change."""
_BATCH_CHARACTERS = 4_000_000
_ABANDONED_SECONDS = 24 * 3600
_TEMPORARY = "building-"


@dataclass(frozen=True)
class StoreMeta:
    """Counts of a store, as in its meta.json."""

    format: int
    dtype: str
    num_documents: int
    num_tokens: int
    num_empty_documents: int
    """Blank documents that were read and left out."""
    has_loss: bool


@dataclass(frozen=True)
class TokenStore:
    """A finished store. Arrays are opened when first used and not pickled, so that worker processes map them anew."""

    folder: Path
    meta: StoreMeta

    @staticmethod
    def open(folder: Path) -> TokenStore:
        """ValueError if the files are not as long as meta.json says."""
        meta = StoreMeta(**json.loads((folder / "meta.json").read_text()))
        store = TokenStore(folder, meta)
        item_bytes = np.dtype(meta.dtype).itemsize
        expected = {
            "tokens.bin": meta.num_tokens * item_bytes,
            "offsets.bin": (meta.num_documents + 1) * 8,
            "hashes.bin": meta.num_documents * 8,
        }
        if meta.has_loss:
            expected["loss.bin"] = meta.num_tokens
        for name, size in expected.items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise ValueError(f"{file} of the token cache is damaged ({size} bytes expected): delete its folder")
        return store

    @functools.cached_property
    def tokens(self) -> np.ndarray:  # (N,) uint16 or uint32
        return np.memmap(self.folder / "tokens.bin", dtype=self.meta.dtype, mode="r")

    @functools.cached_property
    def offsets(self) -> np.ndarray:  # (D + 1,) int64
        return np.memmap(self.folder / "offsets.bin", dtype=np.int64, mode="r")

    @functools.cached_property
    def hashes(self) -> np.ndarray:  # (D,) uint64
        return np.memmap(self.folder / "hashes.bin", dtype=np.uint64, mode="r")

    @functools.cached_property
    def loss(self) -> np.ndarray | None:  # (N,) uint8
        return np.memmap(self.folder / "loss.bin", dtype=np.uint8, mode="r") if self.meta.has_loss else None

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "meta": self.meta}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError for a tokenizer that training data cannot be made with."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name!r} is a slow (pure Python) one: load it with AutoTokenizer's use_fast=True")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {name!r} has no EOS token, which ends every document: set tokenizer.eos_token to one it has"
        )


def build_store(
    folder: Path, items: Iterable[Item], tokenizer: PreTrainedTokenizerBase, *, name: str, advance: Advance
) -> TokenStore:
    """Tokenize `items` into `folder` unless another process gets there first; either way return what is there.

    Memory: one batch (about 4 MB of text) and its tokens. Any error leaves `folder` absent. `name` is for messages.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    temporary = folder.parent / f"{_TEMPORARY}{folder.name}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        with _Writer(temporary, tokenizer) as writer:
            for batch in _batches(items):
                before = writer.num_tokens
                writer.add(batch)
                advance(sum(item.size for item in batch), writer.num_tokens - before)
        if writer.num_documents == 0:
            raise ValueError(f"data.sources.path = {name!r}: no text in it ({writer.num_empty_documents} blank rows)")
        writer.write_meta()
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "meta.json").is_file():
                raise
            # Another process finished the same store first.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenStore.open(folder)


def _remove_abandoned(cache_dir: Path) -> None:
    """Delete what killed builds left. By age, because another machine may be building in the same folder."""
    for folder in cache_dir.glob(f"{_TEMPORARY}*"):
        try:
            newest = max(entry.stat().st_mtime for entry in (folder, *folder.iterdir()))
        except FileNotFoundError:  # its owner has just renamed or removed it
            continue
        if time.time() - newest > _ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Lists of about `_BATCH_CHARACTERS`, enough for all cores; chats and text never in the same one."""
    batch: list[Item] = []
    characters = 0
    for item in items:
        if batch and type(item) is not type(batch[0]):
            yield batch
            batch, characters = [], 0
        batch.append(item)
        characters += len(item.text) if isinstance(item, Piece) else sum(len(str(m)) for m in item.messages)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends documents to the files of a store."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        # The largest id, not the vocabulary's length: added tokens may leave gaps.
        self.dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
        self.num_tokens = self.num_documents = self.num_empty_documents = 0
        names = ("tokens.bin", "offsets.bin", "hashes.bin")
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in names}
        self._digest = hashlib.blake2b(digest_size=8)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())  # the rename that follows must not outlive the bytes in a power cut
            file.close()

    def add(self, batch: list[Item]) -> None:
        """All of `batch` is of one type."""
        chats = [item for item in batch if isinstance(item, Chat)]
        if chats:
            for chat, (ids, loss) in zip(chats, encode_chats(self.tokenizer, chats), strict=True):
                self._digest.update(json.dumps(chat.messages, sort_keys=True, default=str).encode())
                self._write(ids, loss)
                self._end_document(ids, loss)
            return
        pieces = [item for item in batch if isinstance(item, Piece) and not self._skip_blank(item)]
        for piece, ids in zip(pieces, encode_pieces(self.tokenizer, pieces), strict=True):
            self._digest.update(piece.text.encode())
            self._write(ids, None)
            if piece.is_last:
                self._end_document(ids, None)

    def write_meta(self) -> None:
        meta = StoreMeta(
            FORMAT,
            self.dtype.name,
            self.num_documents,
            self.num_tokens,
            self.num_empty_documents,
            "loss.bin" in self._files,
        )
        (self.folder / "meta.json").write_text(json.dumps(asdict(meta), indent=2))

    def _skip_blank(self, piece: Piece) -> bool:
        is_blank = piece.is_first and piece.is_last and not piece.text.strip()
        self.num_empty_documents += is_blank
        return is_blank

    def _write(self, ids: list[int], loss: np.ndarray | None) -> None:
        if loss is not None and "loss.bin" not in self._files:
            self._start_loss()
        self._files["tokens.bin"].write(np.asarray(ids, dtype=self.dtype).tobytes())
        if "loss.bin" in self._files:
            self._files["loss.bin"].write(b"\1" * len(ids) if loss is None else loss.astype(np.uint8).tobytes())
        self.num_tokens += len(ids)

    def _start_loss(self) -> None:
        """The first chat after documents that all carry loss."""
        file = self._files["loss.bin"] = (self.folder / "loss.bin").open("wb")
        for start in range(0, self.num_tokens, 2**20):
            file.write(b"\1" * min(2**20, self.num_tokens - start))

    def _end_document(self, ids: list[int], loss: np.ndarray | None) -> None:
        if self.num_documents == 0:
            self._files["offsets.bin"].write(np.int64(0).tobytes())
        if not ids or ids[-1] != self.eos:  # some tokenizers and many chat templates write it themselves
            # After an assistant's turn EOS is how the turn ends, elsewhere in a chat it is nobody's word.
            self._write([self.eos], None if loss is None else loss[-1:])
        self._files["offsets.bin"].write(np.int64(self.num_tokens).tobytes())
        self._files["hashes.bin"].write(self._digest.digest())
        self.num_documents += 1
        self._digest = hashlib.blake2b(digest_size=8)


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece]) -> list[list[int]]:
    """Ids of each piece.

    Together, the pieces of a document give the ids of the whole document where they were cut between two lines of text
    (checked for byte-level and SentencePiece-like tokenizers); a cut elsewhere may change the token or two beside it.
    """
    encoded: list[list[int]] = [[] for _ in pieces]
    firsts = [number for number, piece in enumerate(pieces) if piece.is_first]
    for number, ids in zip(firsts, _encode(tokenizer, [pieces[n].text for n in firsts], True), strict=True):
        if not pieces[number].is_last and ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # added by a tokenizer that takes the piece for a whole text
        encoded[number] = ids
    rest = [number for number, piece in enumerate(pieces) if not piece.is_first]
    if not rest:
        return encoded
    # SentencePiece-like tokenizers put a space mark before a text. Giving them the line end as well, and dropping its
    # tokens, keeps that mark out of the middle of a document.
    lead = _encode(tokenizer, ["\n"], False)[0]
    texts = ["\n" + pieces[n].text if pieces[n].after_line_end else pieces[n].text for n in rest]
    for number, ids in zip(rest, _encode(tokenizer, texts, False), strict=True):
        if pieces[number].after_line_end:
            ids = ids[len(lead) :] if ids[: len(lead)] == lead else _encode(tokenizer, [pieces[number].text], False)[0]
        encoded[number] = ids
    return encoded


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    out = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # documents are meant to be longer than the model's window: no warning about it
    )
    return out["input_ids"]
