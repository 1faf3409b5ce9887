"""Fill and verify the staging folder of one export: a plain folder, or a GGUF file with what goes beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from e2llm.export import gguf_file, lengths, ollama, open_gguf, runtimes, vllm
from e2llm.export.folder import ADAPTER_FOLDER, Source, write_folder
from e2llm.export.gguf_vocabulary import read_vocabulary
from e2llm.export.plan import ExportPlan
from e2llm.export.rope_config import scaled_config
from e2llm.export.verify import Check, Probe, check_frequencies, check_transformers, load_plain, require
from e2llm.hf.exported import EXPORT_MARK
from e2llm.hf.load import ADAPTER_CONFIG
from e2llm.infer import Engine
from e2llm.records import write_atomic

Target = Literal["hf", "vllm", "gguf", "ollama"]
COMMAND_FILE = "vllm_command.sh"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export, checked."""

    source: Source
    to: Target
    gguf_type: str
    keep_adapter: bool
    verify: bool
    trust_remote_code: bool
    name: str
    """Of the model, for files and the card."""
    out: Path
    """Where the result will stand."""


@dataclass(frozen=True)
class Built:
    """What stands in the staging folder."""

    commands: dict[str, str]
    """Runtime -> command line, to be run beside the folder; the first is the target's own."""
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()


def build_folder(job: Job, plan: ExportPlan, engine: Engine, staging: Path, probe: Probe | None) -> Built:
    """For transformers and vLLM."""
    write_folder(
        job.source,
        staging,
        plan,
        engine.info,
        keep_adapter=job.keep_adapter,
        trust_remote_code=job.trust_remote_code,
    )
    config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
    checks: list[Check] = []
    found = vllm.overrides(plan, config) if job.to == "vllm" else {}
    if probe is not None:
        checks += verify_folder(job, plan, engine, staging, probe)
        checks.append(require(lengths.check_folder_length(staging, plan)))
        if job.to == "vllm":
            checks.append(require(lengths.check_vllm_length(config, found, vllm.text_section(config), plan)))
            checks.append(require(runtimes.check_vllm(staging, plan, config, probe)))
    rank = _adapter_rank(staging)
    commands = {"transformers": _python(job.out.name, rank is not None)}
    # What is published must not name a place on this machine.
    with contextlib.suppress(ValueError) if job.to == "hf" else contextlib.nullcontext():  # vLLM cannot serve all of it
        shown = vllm.command_line(job.out.name, plan, config, adapter_rank=rank, remote_code=job.trust_remote_code)
        commands = commands | {"vLLM": shown} if job.to == "hf" else {"vLLM": shown} | commands
    if job.to == "vllm":
        here = vllm.command_line(".", plan, config, adapter_rank=rank, remote_code=job.trust_remote_code)
        write_atomic(staging / COMMAND_FILE, _script(here, job.name))
        (staging / COMMAND_FILE).chmod(0o755)
    return Built(commands, tuple(checks))


def _script(command: str, name: str) -> str:
    """The command as a shell script that works from anywhere: it serves the folder that it lies in."""
    return f'#!/bin/sh\ncd "$(dirname "$0")" && exec {command} --served-model-name {shlex.quote(name)} "$@"\n'


def _adapter_rank(folder: Path) -> int | None:
    path = folder / ADAPTER_FOLDER / ADAPTER_CONFIG
    return int(json.loads(path.read_text()).get("r", 16)) if path.is_file() else None


def _python(folder: str, adapter: bool) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
    ]
    if adapter:
        lines += [
            "from peft import PeftModel",
            f'model = PeftModel.from_pretrained(model, "{folder}/{ADAPTER_FOLDER}")',
        ]
    return "\n".join(lines)


def verify_folder(job: Job, plan: ExportPlan, engine: Engine, folder: Path, probe: Probe) -> list[Check]:
    """The folder in transformers alone. Raises ValueError for a difference."""
    model = load_plain(folder, engine.model, trust_remote_code=job.trust_remote_code)
    merged = job.source.adapter is not None
    return [require(check_frequencies(model, plan)), require(check_transformers(model, probe, merged=merged))]


def build_gguf(job: Job, plan: ExportPlan, engine: Engine, staging: Path, probe: Probe | None) -> Built:
    """For llama.cpp and Ollama: the file, made from a plain folder that is taken away again."""
    from transformers import AutoConfig

    if engine.tokenizer is None:
        raise ValueError("tokenizer: the checkpoint has none, and a GGUF cannot be without; use --to hf")
    config: Any = engine.model.config.get_text_config()
    gguf_file.find_architecture(config, plan.window)
    vocabulary = read_vocabulary(engine.tokenizer, int(config.vocab_size))
    folder = staging / ".plain"
    folder.mkdir()
    unscaled = dataclasses.replace(plan, scale=1.0, window=plan.native_window, scale_window=plan.native_window)
    write_folder(job.source, folder, unscaled, engine.info, trust_remote_code=job.trust_remote_code)
    if plan.open_scales:
        open_gguf.check_open(plan)
    window = "" if plan.open_scales else f"-{plan.window}"
    path = staging / f"{job.name}{window}-{job.gguf_type}.gguf"
    gguf_file.write(path, folder, config, plan, vocabulary, kind=job.gguf_type, name=job.name)
    checks: list[Check] = []
    if probe is not None:
        checks += map(require, gguf_file.read_back(path, folder, config, plan, vocabulary))
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        raw.pop(EXPORT_MARK)
        try:
            scaled = scaled_config(raw, AutoConfig.from_pretrained(str(folder)), plan)
        except ValueError as error:  # said in GGUF, not in a config: nothing for transformers to load
            checks.append(Check("transformers", None, str(error)))
        else:
            write_atomic(folder / "config.json", json.dumps(scaled))
            checks += verify_folder(job, plan, engine, folder, probe)
        fits = vocabulary.differing == 0
        found = runtimes.check_llamacpp(path, probe, job.gguf_type, engine.tokenizer, fits)
        checks += map(require, found)
        if plan.open_scales:
            checks += open_gguf.prove(path, plan, engine, probe, job.gguf_type)
    shutil.rmtree(folder)
    commands = {"llama.cpp": f"llama-server -m {job.out.name}/{path.name} -c {plan.window}"}
    if plan.open_scales:
        open_gguf.write_beside(staging, engine)
        commands = {"e2llm": f"e2llm serve {job.out.name} --engine llamacpp"} | commands
    modelfile = None
    if job.to == "ollama":
        modelfile = staging / "Modelfile"
        write_atomic(modelfile, ollama.modelfile(path.name, plan.window, vocabulary.chat_template))
        commands = {"Ollama": f"ollama create {job.name.lower()} -f {job.out.name}/Modelfile"} | commands
    if probe is not None:
        checks.append(require(lengths.check_gguf_length(gguf_file.context_length(path), modelfile, plan)))
    warning = vocabulary.warning()
    return Built(commands, tuple(checks), (warning,) if warning else ())
