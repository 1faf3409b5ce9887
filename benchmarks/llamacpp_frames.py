"""How near llama.cpp, whose keys are moved from frame to frame, comes to method self_extend in our own attention.

    python benchmarks/llamacpp_frames.py CHECKPOINT TEXT... --out benchmarks/results/llamacpp_frames_cpu.json

Flows in: a checkpoint trained with self_extend, long texts. Flows out: a Record. The first tokens of each text are read
as a prompt in pieces, the last ones one at a time as an answer is written, but with the text's own tokens. Of the true
next token's log-probability it says how far llama.cpp's is from ours (nats_apart: mean of the absolute differences,
nats) and what each comes to (loss: nats a token), by part: `near` before there are far keys, which is what the two
engines differ by anyway; `pieces`, at the ends of the prompt's pieces; `answer`. Readings are the frames as they are
served, finer ones, and two controls: keys where they stood (scale 1), and groups twice as large. Ours is in float32
throughout; llama.cpp has weights of the GGUF (bfloat16) and keys and values of two bytes, as it serves, or of
`--kv-type f32`, which tells their rounding from what frames do. Speed is printed and not kept: others use the machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from e2llm.export.gguf_context import ContextRope  # noqa: E402
from e2llm.infer import Engine  # noqa: E402
from e2llm.llamacpp.convert import CACHE, find_gguf  # noqa: E402
from e2llm.llamacpp.engine import CHUNK_TOKENS, usable_cores  # noqa: E402
from e2llm.llamacpp.gguf_model import GgufModel, read_gguf  # noqa: E402
from e2llm.llamacpp.library import KV_TYPES, Context, Piece, Weights  # noqa: E402
from e2llm.llamacpp.rooms import padded  # noqa: E402
from e2llm.positions.frames import Frame, Frames  # noqa: E402
from e2llm.records import Record, make_row  # noqa: E402

NEAR_CHUNK = 64
"""Tokens of a piece before there are far keys: many ends, for a mean of what the engines differ by anyway."""
Told = dict[str, dict[int, float]]
"""Part -> place of a token -> log-probability of the one after it, nats."""


class Given(NamedTuple):
    """One reading of one text."""

    reading: str
    told: Told
    ours: np.ndarray
    """(T,) by our attention."""


def readings(file: GgufModel, scale: float) -> dict[str, Frames | None]:
    """Name -> frames; None: every key where it stood."""
    usual = file.frames(scale)
    if usual is None:
        raise ValueError(f"window: scale {scale:g} reads it with every key at its own place; name a longer one")
    group, near = usual.group, usual.neighbours
    return {
        "served": usual,
        "finer": Frames(group, near, max(1, usual.piece // 4), max(1, usual.ahead // 4)),
        "scale 1": None,
        "group twice": Frames(2 * group, near, usual.piece, usual.ahead),
    }


def read(context: Context, ids: list[int], new: int, frames: Frames | None, near: int) -> tuple[Told, dict[str, float]]:
    """What llama.cpp says at the ends of pieces, and tokens a second of prompt and answer."""
    told: Told = {"near": {}, "pieces": {}, "answer": {}}
    frame, start, seconds = Frame(), 0, {"prompt": 0.0, "answer": 0.0}
    prompt = len(ids) - 1 - new
    context.forget(0)
    while start < len(ids) - 1:
        decoding = start >= prompt
        count = 1 if decoding else min(prompt - start, CHUNK_TOKENS if start >= near else min(NEAR_CHUNK, near - start))
        begin = time.perf_counter()
        if frames is not None:
            count = count if decoding else frames.piece_of(start, count)
            then = frames.next(frame, start, count, decoding=decoding)
            context.move(0, frames.moves(frame, then, start))
            frame = then
        logits = context.compute([Piece(0, start - frame.back, ids[start : start + count], True)])
        if start >= near:
            seconds["answer" if decoding else "prompt"] += time.perf_counter() - begin
        last = start + count - 1
        part = "answer" if decoding else "near" if last < near else "pieces"
        told[part][last] = float(torch.log_softmax(torch.from_numpy(logits[0]), -1)[ids[last + 1]])
        start += count
    return told, {"prompt": (prompt - near) / seconds["prompt"], "answer": new / seconds["answer"]}


@torch.no_grad()
def own(engine: Engine, ids: list[int], scale: float) -> np.ndarray:
    """(T,) log-probability of the token after each, nats, by our attention."""
    model: Any = engine.model
    engine.extension.set_scale(scale)
    states = model.base_model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).last_hidden_state[0]
    found = []
    for first in range(0, len(ids) - 1, 256):
        logits = model.get_output_embeddings()(states[first : first + 256]).float()
        after = torch.tensor(ids[first + 1 : first + 257])[: len(logits)]
        found.append(torch.log_softmax(logits, -1).gather(1, after[:, None])[:, 0])
    return torch.cat(found).numpy()


def tokens_of(engine: Engine, text: str, window: int) -> list[int]:
    """The first `window` tokens of a file."""
    read = Path(text).read_text(encoding="utf-8")[: 8 * window]
    ids = list(engine.tokenizer(read, add_special_tokens=False, verbose=False).input_ids)[:window]
    if len(ids) < window:
        raise ValueError(f"texts: {Path(text).name} has {len(ids)} tokens; a window needs {window}")
    return ids


def rows_of(window: int, scale: float, given: list[Given]) -> list[dict[str, Any]]:
    """Means over the tokens of all texts."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for one in given:
        for part, places in one.told.items():
            found[one.reading, part] += [(value, float(one.ours[place])) for place, value in places.items()]
    rows = []
    for (reading, part), pairs in found.items():
        labels = {"window": window, "scale": scale, "reading": reading, "part": part}
        apart = [abs(one - other) for one, other in pairs]
        theirs, ours = ([-value for value in values] for values in zip(*pairs, strict=True))
        rows += [
            make_row("nats_apart", statistics.fmean(apart), "nats", len(pairs), **labels),
            make_row("loss", statistics.fmean(theirs), "nats", len(pairs), engine="llamacpp", **labels),
            make_row("loss", statistics.fmean(ours), "nats", len(pairs), engine="e2llm", **labels),
        ]
    return rows


def measure(arguments: argparse.Namespace) -> Record:
    """Read everything. The Record is written after each text, so that a run that is cut off leaves what it has."""
    threads = arguments.threads or usable_cores()
    torch.set_num_threads(threads)
    path = find_gguf(arguments.checkpoint, dtype="bfloat16", cache=Path(arguments.cache), tell=print)
    file = read_gguf(path)
    if file.method != "self_extend":
        raise ValueError(f"checkpoint: method {file.method!r}; give one that was trained with self_extend")
    engine = Engine.load(arguments.checkpoint, dtype="float32", device="cpu")
    weights = Weights(path, file.architecture)
    config = {
        "checkpoint": "" if engine.info is None else engine.info.checkpoint,
        "base_model": arguments.base_model,
        "texts": [Path(text).name for text in arguments.texts],
        "windows": arguments.windows,
        "new_tokens": arguments.new_tokens,
        "neighbours": file.neighbours,
        "native_window": file.native_window,
        "weights": "bfloat16",
        "kv_type": arguments.kv_type,
        "threads": threads,
    }
    rows: list[dict[str, Any]] = []
    for window in arguments.windows:
        scale = engine.plan(window - 1, max_new_tokens=1).scale
        context = weights.context(
            ContextRope(),
            padded(window),
            sequences=1,
            batch_tokens=CHUNK_TOKENS,
            kv_type=arguments.kv_type,
            threads=threads,
        )
        given: list[Given] = []
        for text in arguments.texts:
            ids = tokens_of(engine, text, window)
            ours = own(engine, ids, scale)
            for reading, frames in readings(file, scale).items():
                if arguments.readings and reading not in arguments.readings:
                    continue
                told, rate = read(context, ids, arguments.new_tokens, frames, file.neighbours)
                given.append(Given(reading, told, ours))
                shown = ", ".join(f"{part} {value:.1f} tokens/s" for part, value in rate.items())
                print(f"{window} {Path(text).name} {reading}: {shown}", flush=True)
            record = Record("llamacpp_frames", config, rows + rows_of(window, scale, given))
            record.save(arguments.out)
        context.close()
        rows = record.rows
    weights.close()
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", help="folder with e2llm.json, method self_extend")
    add("texts", nargs="+", help="files of text")
    add("--windows", type=int, nargs="+", default=[16384], help="tokens read of each text (16384)")
    add("--new-tokens", type=int, default=512, help="of these, one at a time (512)")
    add("--readings", nargs="+", help="only these")
    add("--kv-type", default="f16", choices=[*KV_TYPES], help="of llama.cpp's keys and values (f16)")
    add("--threads", type=int, help="(all cores)")
    add("--cache", default=str(CACHE), help="folder for the GGUF")
    add("--base-model", default="", help="label of the model in tables")
    add("--out", default="llamacpp_frames.json")
    arguments = parser.parse_args()
    record = measure(arguments)
    record.save(arguments.out)
    for row in record.rows:
        shown = f"{row['reading']:12} {row['part']:7} {row['metric']:18} {row.get('engine', ''):9}"
        print(f"{row['window']:6} {shown} {row['value']:10.4g} {row['unit']} ({row['n']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
