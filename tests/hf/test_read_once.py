"""Weights read by one process: what all are told when that cannot be, and buffers that stay while weights are sent."""

from __future__ import annotations

import multiprocessing
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import save_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from e2llm.hf import load_model
from e2llm.hf.read_once import buffers_apart, is_placeholder


def _load_all(rank: int, meeting: str, names: list[str], told: Any) -> None:
    """One of two processes: for each model, what it is or why it cannot be."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for name in names:
        try:
            model = load_model(name, device="cpu", dtype="bfloat16", once=True)[0]
        except ValueError as error:
            told.put((rank, name, str(error)))
        else:
            placeholders = sum(map(is_placeholder, model.parameters()))
            types = {str(parameter.dtype) for parameter in model.parameters()}
            told.put((rank, name, (placeholders, types, model.training)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Name of a model -> what the first process and the other say of it."""
    folder = tmp_path_factory.mktemp("models")
    whole, _ = save_checkpoint(folder / "whole", tie_word_embeddings=True)
    save_checkpoint(folder / "lacking")
    file = folder / "lacking" / "model.safetensors"
    save_file({k: w for k, w in load_file(file).items() if "up_proj" not in k}, file, {"format": "pt"})
    # An output layer trained apart from the embeddings that the base's config ties it to.
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # just what is wanted here
        get_peft_model(AutoModelForCausalLM.from_pretrained(whole), config).save_pretrained(folder / "untying")
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    names = [str(folder / name) for name in ("lacking", "untying", "absent", "whole")]
    given = [(rank, str(folder / "meeting"), names, told) for rank in (0, 1)]
    workers = [context.Process(target=_load_all, args=one) for one in given]
    for worker in workers:
        worker.start()
    answers = sorted((told.get(timeout=120) for _ in range(2 * len(names))), key=lambda answer: answer[0])
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return {Path(name).name: [what for _, other, what in answers if other == name] for name in names}


def test_the_others_hold_no_weights(found: dict[str, list[Any]]) -> None:
    (none, types, training), (all_of_them, others, others_training) = found["whole"]
    assert none == 0 and all_of_them == 20
    assert types == others == {"torch.bfloat16"} and not training and not others_training


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lacking", r"weights are missing from its files \(2, such as model.layers.0.mlp.up_proj.weight\)"),
        ("untying", r"1 weights, such as 'lm_head.weight', are read in another shape .* distributed.strategy = ddp"),
        ("absent", "no such file or folder"),
    ],
)
def test_what_the_first_cannot_read_is_told_to_all(found: dict[str, list[Any]], name: str, message: str) -> None:
    first, other = found[name]
    assert first == other and re.search(message, first)


def test_four_bits_are_not_sent(tmp_path: Path) -> None:
    name, _ = save_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="quantization = 'nf4': 4-bit weights cannot be sharded; use once = False"):
        load_model(name, device="cpu", quantization="nf4", once=True)


class Buffered(nn.Module):
    """One saved buffer, and one that two modules share and nobody saves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("saved", torch.tensor([1.0, 2.0]))
        shared = torch.tensor([3.0])
        for part in (self.first, self.second):
            part.register_buffer("shared", shared, persistent=False)
            part.register_buffer("empty", None)


def test_buffers_are_no_part_of_what_is_sent() -> None:
    model = Buffered()
    before = {name: buffer.tolist() for name, buffer in model.named_buffers(remove_duplicate=False)}
    saved = set(model.state_dict())
    with buffers_apart(model, torch.device("cpu")):
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} == saved - {"saved"}
        model.to("meta")
    assert set(model.state_dict()) == saved
    after = {name: buffer.tolist() for name, buffer in model.named_buffers(remove_duplicate=False)}
    assert after == before and len(after) == 3
    assert model.first.shared is model.second.shared
