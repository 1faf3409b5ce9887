"""The examples run or, where a cluster is needed, say only what the cluster's own tools know."""

from __future__ import annotations

import importlib.util
import json
import os
import py_compile
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import logged, make_base, small, write
from transformers import AutoModelForCausalLM

import e2llm
from e2llm.config import load_recipe
from e2llm.hf import CheckpointInfo, get_extension
from e2llm.positions.frequencies import frequencies
from e2llm.positions.placement import PositionSampler
from e2llm.train import train
from e2llm.train.distributed import Processes

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = Path(e2llm.__file__).parent / "assets" / "tiny-512"
WINDOW = 64
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}A:{% generation %}{{ message['content'] }}"
    "{% endgeneration %}{% else %}Q:{{ message['content'] }}{% endif %}{% endfor %}"
)


def example(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Any]]:
    """What each training forward's first layer turned by: cos (B, T, D), labels, position ids, the sampler."""
    seen: list[Any] = []
    own = e2llm.extend

    def extend(model: Any, **options: Any) -> Any:
        extension = own(model, **options)
        given: dict[str, Any] = {}

        def remember(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            given.update(kwargs)

        def first_layer(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if module.training:
                cos = kwargs["position_embeddings"][0].detach().clone()
                seen.append((cos, given.get("labels"), given.get("position_ids"), extension.sampler))

        model.register_forward_pre_hook(remember, with_kwargs=True)
        model.model.layers[0].register_forward_pre_hook(first_layer, with_kwargs=True)
        return extension

    monkeypatch.setattr(e2llm, "extend", extend)
    return seen


def check_tables(seen: list[Any], batch: int) -> None:
    """Row b of batch n stands where sample n * B + b does: cos worked out again from the draw."""
    assert len(seen) > 1
    plain = AutoModelForCausalLM.from_pretrained(TINY)
    own = e2llm.extend(plain)  # reads the base's frequencies
    scales = set()
    for number, (cos, _, _, sampler) in enumerate(seen):
        assert isinstance(sampler, PositionSampler) and cos.shape[0] == batch
        for row in range(batch):
            draw = sampler.draw(number * batch + row, cos.shape[1])
            table = frequencies(own.rope, "yarn", draw.scale, own.attention.training_slope)
            angles = torch.from_numpy(draw.positions)[:, None].float() * table.inv_freq
            expected = angles.cos() * table.attention_scale
            torch.testing.assert_close(cos[row, :, : expected.shape[1]], expected, atol=1e-4, rtol=0)
            scales.add(draw.scale)
    assert len(scales) > 1, "several scales came by"


def check_folder(folder: Path, name: str) -> None:
    info = CheckpointInfo.load(folder)
    assert info is not None and (info.checkpoint, info.training_window, info.native_window) == (name, WINDOW, 512)
    assert get_extension(AutoModelForCausalLM.from_pretrained(folder)) is None


def test_hf_trainer(tmp_path: Path, tables: list[Any]) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("def f(x):\n    return x + 1\n" * 60)
    options = ["--window", str(WINDOW), "--steps", "3", "--batch-size", "2", "--cpu"]
    example("hf_trainer").main([str(TINY), str(tmp_path / "text"), str(tmp_path / "out"), *options])
    assert len(tables) == 3
    check_tables(tables, batch=2)
    check_folder(tmp_path / "out" / "model", "hf-trainer")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("assistant_only", [False, True])
def test_trl_sft(tmp_path: Path, tables: list[Any], packing: bool, assistant_only: bool) -> None:
    chat = [{"role": "user", "content": "what is x " * 3}, {"role": "assistant", "content": "x is 1 and y is 2 " * 3}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 12)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    options = ["--window", str(WINDOW), "--steps", "3", "--batch-size", "2", "--cpu"]
    options += ["--chat-template", str(tmp_path / "template.jinja")]
    options += ["--packing"] * packing + ["--assistant-only"] * assistant_only
    example("trl_sft").main([str(TINY), str(tmp_path / "chats.jsonl"), str(tmp_path / "out"), *options])
    check_tables(tables, batch=2)
    check_folder(tmp_path / "out" / "model", "trl-sft")
    without_loss = [float((labels == -100).float().mean()) for _, labels, _, _ in tables]
    assert all(share > 0.2 for share in without_loss) == assistant_only
    if packing:
        assert {cos.shape[1] for cos, *_ in tables} == {WINDOW}


def test_cluster_recipe() -> None:
    recipe = load_recipe(str(EXAMPLES / "cluster.toml"))
    assert recipe.distributed.strategy == "fsdp2"
    assert recipe.distributed.global_batch % (16 * recipe.train.batch_size) == 0, "the two machines of the examples"
    tomllib.loads((EXAMPLES / "cluster.toml").read_text())


def test_slurm_script_parses() -> None:
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sbatch")], check=True)
    text = (EXAMPLES / "slurm.sbatch").read_text()
    assert text.index("#SBATCH") < text.index("set -euo"), "SLURM reads its options before the first command"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        assert f"{name}=" in text


SLURM = {
    "scontrol": 'if [ "$1" = show ]; then printf "node-%s\\n" a {1..20000}; else echo "$@" >"$OUT/requeued"; fi',
    "srun": 'echo "$@" >"$OUT/srun"; while [ "${1#--}" != "$1" ]; do shift; done\n'
    'SLURM_PROCID=9 SLURM_LOCALID=1 exec "$@"',
    "python": 'env >"$OUT/environment"; echo "$@" >"$OUT/python"; exit "$CODE"',
}
"""What the script calls, as a cluster of two machines would answer the tenth task."""


@pytest.mark.parametrize("code", [0, 1, 143])
def test_slurm_script_on_two_machines(tmp_path: Path, code: int) -> None:
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"JOB_ID": "20001", "JOB_NODELIST": "node-[a-b]", "CPUS_PER_TASK": "8"}
    job |= {"NTASKS": "16", "NTASKS_PER_NODE": "8"}
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path), "CODE": str(code)}
    given |= {f"SLURM_{name}": value for name, value in job.items()}
    done = subprocess.run(["bash", str(EXAMPLES / "slurm.sbatch"), "mine.toml"], env=given, check=False)
    assert done.returncode == code
    assert (tmp_path / "python").read_text().split() == ["-m", "e2llm", "train", "mine.toml", "--resume"]
    told = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    processes = Processes.of_environment(told)
    assert processes == Processes(rank=9, world=16, local_rank=1, local_world=8, launched=True)
    assert (told["MASTER_ADDR"], told["MASTER_PORT"], told["OMP_NUM_THREADS"]) == ("node-a", "20001", "8")
    assert "--cpus-per-task=8 --kill-on-bad-exit=1" in (tmp_path / "srun").read_text()
    requeued = tmp_path / "requeued"
    assert requeued.read_text().split() == ["requeue", "20001"] if code == 143 else not requeued.exists()


def test_kubeflow_job_has_the_fields_of_a_pytorchjob() -> None:
    job = yaml.safe_load((EXAMPLES / "kubeflow.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert job["spec"].keys() <= {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"}
    assert isinstance(job["spec"]["nprocPerNode"], str), "the operator's type for it is a string"
    for replica in (job["spec"]["pytorchReplicaSpecs"][name] for name in ("Master", "Worker")):
        assert replica.keys() <= {"replicas", "restartPolicy", "template"}
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch" and container["command"][:3] == ["torchrun", "-m", "e2llm"]
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]


def test_ray_trains_as_one_process_does(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'ray[train]'")
    base = make_base(tmp_path)
    batch = ("train.batch_size=2", "distributed.global_batch=4")
    train(small(base, tmp_path / "one", *batch), quiet=True)
    file = write(base, tmp_path, "two", *batch, "distributed.strategy=fsdp2")
    # Ray keeps results and a token in the home folder.
    own = {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(e2llm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(EXAMPLES / "ray_train.py"), file, "--workers", "2", "--cpu"]
    done = subprocess.run(
        command, env=os.environ | own | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "world_rank=1" in done.stdout + done.stderr, "two workers"
    expected, found = logged(tmp_path / "one", "loss"), logged(tmp_path / "two", "loss")
    assert len(expected) == 6 and found == pytest.approx(expected, abs=1e-5)
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_python_examples_compile(path: Path, tmp_path: Path) -> None:
    py_compile.compile(str(path), cfile=str(tmp_path / "out.pyc"), doraise=True)
