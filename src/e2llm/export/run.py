"""`export`: a checkpoint and a window go in, a folder for one runtime comes out, verified before it takes its place."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from e2llm.export import gguf_file
from e2llm.export.build import Built, Job, Target, build_folder, build_gguf
from e2llm.export.card import CardFacts, license_of, model_card
from e2llm.export.folder import PROVENANCE, check_target, find_source
from e2llm.export.plan import ExportPlan, make_open_plan, make_plan
from e2llm.export.verify import Check, ask_engine, probe_tokens
from e2llm.hf import current_versions
from e2llm.hf.load import replace_folder
from e2llm.infer import Engine, ScaleWarning
from e2llm.records import Record, portable, write_atomic

SCHEMA = 1


@dataclass(frozen=True)
class ExportResult:
    """What was written and what was compared."""

    folder: Path
    target: str
    scale: float
    window: int
    method: str
    commands: dict[str, str]
    """Runtime -> how to serve it, from the folder that `folder` lies in; the first is the target's."""
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    open_scales: tuple[float, ...] = ()
    """What the runtime chooses from; empty for one fixed scale."""


def export(
    checkpoint: str,
    out: str | Path,
    *,
    to: Target = "hf",
    window: int | None = None,
    scale: float | None = None,
    gguf_type: str = "bf16",
    keep_adapter: bool = False,
    verify: bool = True,
    verify_text: str | None = None,
    results: Sequence[str | Path] = (),
    method: str | None = None,
    native_window: int | None = None,
    dtype: Any = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> ExportResult:
    """Write `checkpoint` at one fixed scale into folder `out`, for transformers, vLLM, llama.cpp or Ollama.

    The scale is the one that serving chooses for `window` tokens, or `scale`; a GGUF with neither holds the unscaled
    weights, for `e2llm serve --engine llamacpp`, which chooses for every request. `out` is as it was until everything
    was verified (`verify`): frequencies, logits and perplexity in transformers, tensors and metadata of a GGUF read
    back, and llama.cpp and vLLM where they are installed. `results` are Records for the model card; `method`,
    `native_window`, `dtype` and `device` as in `hf.load_model`. Raises ValueError for what cannot be said in the
    target's form, and for any difference found; warns (`ScaleWarning`) of scales that training did not draw.
    """
    job = _check(checkpoint, out, to, gguf_type, keep_adapter, verify, trust_remote_code)
    records = [Record.load(path) for path in results]
    engine = Engine.load(
        checkpoint,
        dtype=dtype,
        device=device,
        method=method,
        native_window=native_window,
        trust_remote_code=trust_remote_code,
    )
    is_open = job.to == "gguf" and window is None and scale is None
    plan = make_open_plan(engine) if is_open else make_plan(engine, window=window, scale=scale)
    for note in plan.notes:
        warnings.warn(note, ScaleWarning, stacklevel=2)
    staging = job.out.with_name(f".{job.out.name}.partial")
    if staging.exists():  # of an export that was cut off
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        built = _build(job, plan, engine, staging, verify_text)
        _describe(job, plan, engine, staging, built, records)
        replace_folder(staging, job.out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for note in built.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    notes = (*plan.notes, *built.notes)
    facts = (plan.scale, plan.window, plan.method)
    return ExportResult(job.out, job.to, *facts, built.commands, built.checks, notes, plan.open_scales)


def _check(
    checkpoint: str, out: str | Path, to: str, gguf_type: str, keep_adapter: bool, verify: bool, remote_code: bool
) -> Job:
    """Everything that can be wrong before a model is loaded."""
    if to not in get_args(Target):
        raise ValueError(f"to = {to!r}: choose one of {', '.join(get_args(Target))}")
    target: Target = to  # type: ignore[assignment]
    path = Path(out).expanduser()
    check_target(path)
    source = find_source(checkpoint)
    if keep_adapter and source.adapter is None:
        raise ValueError(f"keep_adapter: {checkpoint!r} is no folder with an adapter alone; leave it out")
    if target in ("gguf", "ollama"):
        gguf_file.check_type(gguf_type)
        if keep_adapter:
            raise ValueError(f"keep_adapter with to = {to!r}: a GGUF holds merged weights; leave keep_adapter out")
    local = Path(checkpoint).expanduser()
    name = local.resolve().name if local.exists() else checkpoint.split("/")[-1]
    if name == "model":  # the folder of the run says more than the one inside it
        name = local.resolve().parent.name
    return Job(
        source=source,
        to=target,
        gguf_type=gguf_type,
        keep_adapter=keep_adapter,
        verify=verify,
        trust_remote_code=remote_code,
        name=name.removesuffix(".gguf"),
        out=path,
    )


def _probe_window(plan: ExportPlan) -> int:
    """Tokens that the long probe should pass: the native window, and the end of scale × native where that is read
    past."""
    past = plan.window > plan.scale * plan.native_window
    return plan.window if past else plan.native_window


def _build(job: Job, plan: ExportPlan, engine: Engine, staging: Path, verify_text: str | None) -> Built:
    probe = None
    if job.verify:
        config: Any = engine.model.config.get_text_config()
        ids = probe_tokens(engine.tokenizer, int(config.vocab_size), plan.window, _probe_window(plan), verify_text)
        probe = ask_engine(engine, plan, ids)
    build = build_gguf if job.to in ("gguf", "ollama") else build_folder
    built = build(job, plan, engine, staging, probe)
    if job.verify:
        return built
    unverified = Check("export", None, "verification was turned off")
    return Built(built.commands, (*built.checks, unverified), built.notes)


def _describe(
    job: Job, plan: ExportPlan, engine: Engine, staging: Path, built: Built, records: Sequence[Record]
) -> None:
    """README.md and e2llm_export.json. What names a folder of this machine keeps its last name only."""
    info = engine.info
    base = (info.base_model if info is not None else "") or job.source.base
    shown_base = str(portable(str(Path(base).resolve()))) if Path(base).expanduser().exists() else base
    facts = CardFacts(
        name=job.name,
        target=job.to,
        plan=plan,
        info=info,
        base_model=shown_base,
        license=license_of(job.source.config_folder),
        commands=built.commands,
        checks=built.checks,
        notes=(*plan.notes, *built.notes),
        records=records,
    )
    write_atomic(staging / "README.md", model_card(facts))
    provenance = {
        "schema": SCHEMA,
        "checkpoint": job.name,
        "base_model": shown_base,
        "target": job.to,
        "method": plan.method,
        "scale": plan.scale,
        "window": plan.window,
        "open_scales": list(plan.open_scales),
        "native_window": plan.native_window,
        "attention_slope": plan.slope,
        "adapter": None if job.source.adapter is None else "kept" if job.keep_adapter else "merged",
        "gguf_type": job.gguf_type if job.to in ("gguf", "ollama") else None,
        "trained": None if info is None else portable(asdict(info)),
        "checks": [asdict(check) for check in built.checks],
        "versions": current_versions("torch", "transformers"),
    }
    write_atomic(staging / PROVENANCE, json.dumps(provenance, indent=2) + "\n")
