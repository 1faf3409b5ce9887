"""Two commands on a bare machine: extend a small model 16 times, and show in a table and a page that it worked.

Flows in: nothing but this package (or a text folder, or a larger model). Flows out: runs/quickstart with results.json,
report.html, the training run and the extended model. The text is the Python standard library on this machine: real,
long, always there; the files in `data.stdlib_files.HELD_OUT` are kept for evaluation, also from the base's pretraining.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import transformers
from rich.console import Console

from e2llm.config import Recipe, load_recipe
from e2llm.data.stdlib_files import stdlib_documents
from e2llm.data.synthetic import plant
from e2llm.evaluate.config import EvaluateConfig
from e2llm.evaluate.documents import Document
from e2llm.evaluate.run import evaluate
from e2llm.hf import get_extension
from e2llm.infer import Engine
from e2llm.records import Record
from e2llm.report import results_markdown, write_report
from e2llm.train import train

FACTS = "facts.jsonl"
FACTS_SHARE = 0.15
"""Share of the training windows that come from it."""
TINY = Path(__file__).parent / "assets" / "tiny-512"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one quickstart."""

    model: str
    """Folder, .gguf file or hub name of the base."""
    base_model: str
    """Its label."""
    windows: tuple[int, ...]
    """Tokens; the first is the native window."""
    documents: int
    """Held-out files that perplexity is measured on."""
    prompts: int
    """Pass keys asked of the extended model at each window."""
    base_prompts: int
    """Pass keys asked of the base: fewer, for beyond its window it finds none."""
    recipe: Recipe


def quickstart(model: str = "tiny", *, out: Path, text: str | None = None) -> Record:
    """Evaluate the base, extend it, evaluate again; write results.json and report.html into `out`; print the table.

    Rows are labelled checkpoint = base (method none, scale 1 everywhere) or extended. Raises ValueError for text that
    is not there or too short.
    """
    console = Console(stderr=True)
    start = time.monotonic()
    transformers.utils.logging.disable_progress_bar()  # files of a few megabytes load at once
    training, held_out = texts(text)
    _clear(out)
    plan = _plan(model, out, write_text(training, out))
    console.print(f"1/4  {plan.base_model} as it is, at {', '.join(map(str, plan.windows))} tokens")
    engine = Engine.load(plan.model, method="none", dtype=arithmetic())
    documents = join_documents(engine.tokenizer, held_out, num_tokens=max(plan.windows), count=plan.documents)
    base = _measure(engine, documents, plan, "base", plan.base_prompts)
    console.print(f"2/4  one set of weights for any window: {plan.recipe.train.steps} steps of short windows")
    result = train(plan.recipe)
    if result.model_folder is None or result.record is None:
        raise ValueError("the quickstart was stopped in training; start it again")
    console.print("3/4  the extended model, every window at its own scale")
    engine = Engine.load(str(result.model_folder), dtype=arithmetic())
    extended = _measure(engine, documents, plan, "extended", plan.prompts)
    record = Record(
        kind="quickstart",
        config={"windows": list(plan.windows), "recipe": result.record.config, "evaluate": extended.config},
        rows=[*base.rows, *extended.rows],
        examples=[*base.examples, *extended.examples],
    )
    record.save(out / "results.json")
    write_report([out / "results.json", plan.recipe.run_folder / "train.json"], out / "report.html")
    console.print(f"4/4  {out / 'report.html'} and {out / 'results.json'}, {time.monotonic() - start:.0f} s in all")
    print(results_markdown([record]))
    return record


def _clear(out: Path) -> None:
    """An empty folder: a quickstart starts anew, but only ever over another quickstart."""
    if out.exists():
        ours = out.is_dir() and (not any(out.iterdir()) or (out / FACTS).is_file())
        if not ours:
            raise ValueError(f"out = {str(out)!r}: holds something other than a quickstart; name another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True)


def texts(text: str | None = None) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, text) pairs to train on and to evaluate on: the standard library's, or those of a folder, of which the
    longest are held out. Raises ValueError for a folder with too little."""
    if text is None:
        return list(stdlib_documents(False)), list(stdlib_documents(True))
    root = Path(text)
    files = sorted(p for p in root.rglob("*") if p.suffix in {".txt", ".md", ".py"}) if root.is_dir() else []
    if len(files) < 4:
        raise ValueError(f"text = {text!r}: give a folder with at least four .txt, .md or .py files, some of them long")
    found = [(str(p.relative_to(root)), p.read_text(encoding="utf-8")) for p in files]
    longest = sorted(found, key=lambda pair: -len(pair[1]))
    held = longest[: max(1, len(found) // 8)]
    return [pair for pair in found if pair not in held], held


def write_text(training: Sequence[tuple[str, str]], out: Path) -> tuple[Path, Path]:
    """text.jsonl: the documents. facts.jsonl: passages of them with names and values planted, to be looked up again.
    Both in the folder `out`, which is there.

    The planted wording shares nothing with the evaluation's (see `data.synthetic`).
    """
    files = out / "text.jsonl", out / FACTS
    rows = ([text for _, text in training], list(_planted([text for _, text in training])))
    for file, written in zip(files, rows, strict=True):
        temporary = file.with_suffix(f".tmp{os.getpid()}")
        temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in written), encoding="utf-8")
        os.replace(temporary, file)
    return files


def sources(files: tuple[Path, Path], facts: float = FACTS_SHARE) -> str:
    """`data.sources` of the two files of `write_text`, as TOML; `facts`: the share of windows, 0 to 1, that the planted
    passages get."""
    shares = zip(files, (1 - facts, facts), strict=True)
    rows = [f"{{path={json.dumps(str(file))}, weight={share:g}}}" for file, share in shares if share]
    return f"[{', '.join(rows)}]"


def _planted(texts: Sequence[str], count: int = 1500, seed: int = 0) -> Iterator[str]:
    """Passages of 700 to 1500 characters, each with facts stated and asked for."""
    rng = np.random.default_rng(seed)
    sizes = np.array([len(text) for text in texts], dtype=np.float64)
    for index in range(count):
        text = texts[int(rng.choice(len(texts), p=sizes / sizes.sum()))]
        length = int(rng.integers(700, 1500))
        start = int(rng.integers(max(1, len(text) - length)))
        yield plant(seed, index, text[start : start + length])


def _plan(model: str, out: Path, files: tuple[Path, Path]) -> Plan:
    folders = [f"output={out / 'train'}", f"data.cache_dir={out / 'cache'}"]
    # The facts are a source of their own.
    settings = [f"data.sources={sources(files)}", "data.planted=0", *folders, f"train.precision={arithmetic()}"]
    if model == "tiny":
        recipe = load_recipe("quickstart", [f"model.name={TINY}", "name=extended", *settings])
        return Plan(
            model=str(TINY),
            base_model="tiny-512",
            windows=(512, 2048, 8192),
            documents=8,
            prompts=50,
            base_prompts=5,
            recipe=recipe,
        )
    return _smollm2_plan(settings)


def _smollm2_plan(settings: list[str]) -> Plan:
    """The real recipe on a GPU; on a CPU sizes that end within half an hour and show the way rather than the result."""
    import torch

    from e2llm.smollm2 import find_smollm2

    on_gpu = torch.cuda.is_available()
    path = find_smollm2(Path(".e2llm-cache") / "smollm2")
    settings = [f"model.name={path}", "name=extended", *settings]
    if not on_gpu:
        settings += ["data.window=1024", "train.steps=30", "train.batch_size=2", "train.learning_rate=5e-5"]
        settings += ["train.log_every=1", "train.evaluate_windows=0", "train.workers=0"]
    return Plan(
        model=path,
        base_model="SmolLM2-135M-Instruct",
        windows=(8192, 32768, 131072) if on_gpu else (8192, 16384),
        documents=4 if on_gpu else 1,
        prompts=20 if on_gpu else 3,
        base_prompts=20 if on_gpu else 3,
        recipe=load_recipe("recommended", settings),
    )


def join_documents(
    tokenizer: Any, held_out: Sequence[tuple[str, str]], *, num_tokens: int, count: int = 8
) -> list[Document]:
    """The first `count` held-out texts of at least `num_tokens` tokens; texts one after the other where a single one is
    too short. Raises ValueError where all together are."""
    found: list[Document] = []
    names: list[str] = []
    rest = np.empty(0, dtype=np.int64)
    for name, text in held_out:
        tokens = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        names, rest = [*names, name], np.concatenate([rest, tokens])
        if len(rest) >= num_tokens:
            found.append(Document(" + ".join(names), rest))
            names, rest = [], np.empty(0, dtype=np.int64)
    if not found:
        raise ValueError(f"text: the held-out files have {len(rest)} tokens together, a window needs {num_tokens}")
    return found[:count]


def _measure(engine: Engine, documents: list[Document], plan: Plan, checkpoint: str, prompts: int) -> Record:
    extension = get_extension(engine.model)
    assert extension is not None
    config = EvaluateConfig(
        model=plan.model,
        corpora={"python": "standard library"},
        windows=plan.windows,
        scales=(1.0,) if checkpoint == "base" else (),
        method=extension.method,
        prompts=prompts,
        checkpoint=checkpoint,
        base_model=plan.base_model,
    )
    return evaluate(engine, {"python": documents}, config, progress=True)


def arithmetic() -> Literal["float32", "bfloat16"]:
    """bfloat16 where this machine computes in it (half the time), else float32; the same for base and extended."""
    import torch

    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if torch.cuda.is_available() or units else "float32"
