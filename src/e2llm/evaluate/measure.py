"""Measures one part of an evaluation (corpus × protocol × window × scale) and says what its result depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from e2llm.evaluate.config import LOSSES, EvaluateConfig, depths_label
from e2llm.evaluate.context import Part, Results
from e2llm.evaluate.documents import Document
from e2llm.evaluate.fit import begin_of_text
from e2llm.evaluate.logits import TokenScorer
from e2llm.evaluate.partial import Finished, Kept
from e2llm.evaluate.perplexity import DocumentLoss, perplexity, sliding_windows, whole_windows
from e2llm.evaluate.protocols import further, wordings
from e2llm.evaluate.ranks import Ranks
from e2llm.evaluate.retrieval import Retrieved, prompt_template, retrieval, share_by_depth
from e2llm.evaluate.tasks import TASKS, Task
from e2llm.infer import Engine
from e2llm.intervals import (
    DESCRIPTION,
    document_fields,
    interval_fields,
    interval_of_mean,
    interval_of_perplexity,
    wilson,
)
from e2llm.records import make_row, portable
from e2llm.version import __version__


class Measurement:
    """Measures parts: what they share (labels, output step, key of the weights) is found once."""

    def __init__(
        self,
        engine: Engine,
        corpora: Mapping[str, Sequence[Document]],
        config: EvaluateConfig,
        ranks: Ranks = Ranks(),  # noqa: B008  a frozen value
        done: Finished | None = None,
    ) -> None:
        self.engine, self.corpora, self.config, self.ranks = engine, corpora, config, ranks
        self.done = done or Finished(None)
        self.first_token = None if engine.tokenizer is None else begin_of_text(engine.tokenizer)
        self.scorer: TokenScorer | None = None
        if {"whole", "sliding"} & set(config.protocols):
            self.scorer = TokenScorer(engine, compiled=config.compile == "layers")
        self.further = further(config)
        self.memory: dict[Any, Any] = {}
        self.labels = model_labels(engine, config.model, base_model=config.base_model, checkpoint=config.checkpoint)
        shared = [__version__, fingerprint(engine), self.first_token, sorted(config.windows), self.labels]
        documents = {label: [d.sha256 for d in found] for label, found in corpora.items()}
        self._shared_key = json.dumps([shared, documents])

    def key(self, part: Part) -> str:
        """Hash of all that the part's result depends on."""
        c = self.config
        settings = {
            "sliding": (c.stride, c.max_strides),
            **{name: _asked_as(c, task) for name, task in TASKS.items()},
        }.get(part.protocol)
        if part.protocol in self.further:
            settings = self.further[part.protocol].settings(c)
        read = c.compile if part.protocol in LOSSES else ""
        text = json.dumps([self._shared_key, dataclasses.astuple(part), settings, read])
        return hashlib.sha256(text.encode()).hexdigest()

    def kept(self, part: Part) -> Kept:
        return Kept(self.done, self.key(part), dataclasses.asdict(part))

    def __call__(self, part: Part, progress: Callable[[int], None]) -> Results:
        if part.protocol in TASKS:
            return self._retrieval(part, progress)
        if part.protocol in self.further:
            return self.further[part.protocol].measure(self, part, progress)
        return self._perplexity(part, progress)

    def _perplexity(self, part: Part, progress: Callable[[int], None]) -> Results:
        documents, config = self.corpora[part.corpus], self.config
        common: dict[str, Any] = {
            "window": part.window,
            "scale": part.scale,
            "windows": config.windows,
            "scorer": self.scorer,
            "first_token": self.first_token,
            "progress": progress,
        }
        labels = self.labels | dataclasses.asdict(part) | {"documents": len(documents)}
        read = whole_windows
        if part.protocol == "sliding":
            common |= {"stride": config.stride, "max_strides": config.max_strides}
            read = sliding_windows
        kept = self.kept(part)

        def measure(own: list[Document]) -> list[DocumentLoss]:
            return kept.each(
                own,
                lambda document: read(self.engine, [document], **common)[0],
                name=lambda document: document.name,
                dump=dataclasses.asdict,
                load=_document_loss,
            )

        losses = self.ranks.share(documents, measure)
        if part.protocol == "sliding":
            labels |= {"stride": config.stride, "strides": losses[0].passes}
        for loss in losses:
            if not math.isfinite(loss.nats):
                raise ValueError(f"{part}: loss of {loss.document} is {loss.nats}; try dtype = bfloat16 or float32")
        value, tokens = perplexity(losses), sum(loss.tokens for loss in losses)
        each = [loss.nats for loss in losses], [loss.tokens for loss in losses]
        spread = document_fields(*each, losses[0].blocks, of=interval_of_perplexity)
        row = make_row("perplexity", value, "ratio", tokens, **labels, **spread)
        return {"rows": [row], "examples": [_loss_example(part, loss) for loss in losses]}

    def _retrieval(self, part: Part, progress: Callable[[int], None]) -> Results:
        config = self.config
        task = TASKS[part.protocol]
        asked: dict[str, Any] = {"window": part.window, "scale": part.scale, "seed": config.seed, "chat": config.chat}
        asked |= {"task": task, "batch": config.batch_size, "progress": progress, "kept": self.kept(part)}
        asked["depths"] = config.depths
        documents = self.corpora[part.corpus]
        results = self.ranks.share(
            range(config.prompts), lambda own: retrieval(self.engine, documents, indices=own, **asked)
        )
        labels = self.labels | {k: v for k, v in dataclasses.asdict(part).items() if k != "protocol"}
        labels |= {"task": part.protocol, "seed": config.seed}
        named = depths_label(config.depths)
        within = {"depths": named} if named else {}
        labels |= within
        share = sum(result.correct for result in results) / len(results)
        spread = interval_fields(interval_of_mean([float(result.correct) for result in results]))
        rows = [make_row("retrieval", share, "share", len(results), **labels, **spread)]
        for depth, (value, n) in share_by_depth(results).items():
            spread = interval_fields(wilson(value, n))
            rows.append(make_row("retrieval", value, "share", n, **labels, depth=depth, **spread))
        return {"rows": rows, "examples": [_key_example(part, result) | within for result in results]}

    def described(self) -> dict[str, Any]:
        """The resolved configuration as it is written down: paths shortened, defaults filled in."""
        config = dataclasses.asdict(self.config)
        return config | {
            "out": portable(self.config.out),
            "windows": sorted(self.config.windows),
            "scales": list(self.config.scales),
            "protocols": list(self.config.protocols),
            "depths": list(self.config.depths),
            "prompt": _asked(self.config),
            **described_model(self.engine, self.config.model, self.labels),
            "first_token": self.first_token,
            "interval": DESCRIPTION,
            "corpora": {
                label: {
                    "path": portable(self.config.corpora.get(label, "")),
                    "documents": [{"name": d.name, "tokens": len(d.tokens), "sha256": d.sha256} for d in documents],
                }
                for label, documents in self.corpora.items()
            },
        }


def model_labels(engine: Engine, model: str, *, base_model: str = "", checkpoint: str = "") -> dict[str, Any]:
    """Labels that rows about this model share; empty names are filled in from the checkpoint, else from its folder."""
    info, grouping = engine.info, engine.extension.grouping
    name = Path(model).stem if model.endswith(".gguf") else Path(model).name
    labels = {
        "base_model": base_model or (Path(info.base_model).name if info else name) or "unnamed",
        "checkpoint": checkpoint or (info.checkpoint if info else "base") or name or "unnamed",
        "method": engine.extension.method,
        "native_window": engine.native_window,
    }
    if grouping is not None:
        labels["neighbours"] = grouping.neighbours
    return labels


def described_model(engine: Engine, name: str, labels: Mapping[str, Any]) -> dict[str, Any]:
    """The model as a Record's configuration holds it; `labels` are those of `model_labels`."""
    model = engine.model
    return {
        "model": portable(name),
        "method": labels["method"],
        "attention": dataclasses.asdict(engine.extension.attention),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "checkpoint": labels["checkpoint"],
        "base_model": labels["base_model"],
        "native_window": engine.native_window,
        "max_scale": engine.max_scale,
        "schedule": [dataclasses.asdict(step) for step in engine.extension.schedule],
        "weights_fingerprint": fingerprint(engine),
    }


def _asked_as(config: EvaluateConfig, task: Task) -> tuple[Any, ...]:
    """What the answers to a retrieval task depend on."""
    asked = prompt_template(config.chat, task)
    return config.prompts, config.seed, config.chat, config.batch_size > 1, asked, config.depths


def _asked(config: EvaluateConfig) -> str | dict[str, str] | None:
    """Wording of the retrieval prompts: of the one task, or by task."""
    found = {name: prompt_template(config.chat, TASKS[name]) for name in config.protocols if name in TASKS}
    found |= wordings(config)
    return next(iter(found.values())) if len(found) == 1 else found or None


def fingerprint(engine: Engine) -> str:
    """Short hash of the weights (16 values of each tensor), their type and how they are read; training changes every
    tensor."""
    model = engine.model
    digest = hashlib.sha256()
    digest.update(f"{engine.extension.method} {engine.native_window} {model.dtype} {model.device.type}".encode())
    digest.update(str(engine.extension.attention).encode())
    digest.update(str(getattr(model.config, "_attn_implementation", None)).encode())
    if engine.extension.grouping is not None:
        digest.update(str(engine.extension.grouping.neighbours).encode())
    for name, weights in model.named_parameters():
        flat = weights.detach().flatten()
        digest.update(
            name.encode() + flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.float32).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def _document_loss(kept: dict[str, Any]) -> DocumentLoss:
    """From JSON, which has lists for tuples."""
    return DocumentLoss(**kept | {"blocks": tuple((nats, tokens) for nats, tokens in kept["blocks"])})


def _loss_example(part: Part, loss: DocumentLoss) -> dict[str, Any]:
    found = {"document": loss.document, "nats": loss.nats, "tokens": loss.tokens}
    return {"metric": "perplexity", **dataclasses.asdict(part), **found}


def _key_example(part: Part, result: Retrieved) -> dict[str, Any]:
    prompt = result.prompt
    return {
        "metric": "retrieval",
        "task": part.protocol,
        "corpus": part.corpus,
        "window": part.window,
        "scale": part.scale,
        "document": prompt.document,
        "seed": prompt.seed,
        "index": prompt.index,
        "depth": round(prompt.depth, 6),
        "prompt_tokens": prompt.prompt_tokens,
        "expected": prompt.expected,
        "answer": result.answer,
        "correct": result.correct,
    }
