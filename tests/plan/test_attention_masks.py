"""Masks of window x window tokens: what the plan counts against tensors that models really make and keep."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config, tiny_model, token_ids
from tiny_run import make_base, small
from torch import nn

from e2llm.config import Recipe, load_recipe
from e2llm.hf import install, load_model
from e2llm.hf.compiled import decoder_layers
from e2llm.plan.masks import masks_of
from e2llm.plan.memory import layer_bytes, training_memory
from e2llm.plan.shape import shape_of
from e2llm.plan.speed import GPUS
from e2llm.plan.step import step_of
from e2llm.train import run, train

BATCH, WINDOW = 2, 32
DOCUMENTS = "data.document_mask=true"


@dataclass
class Seen:
    """Storages of tensors (B, 1, T, T): bytes by address. Holding them keeps the addresses apart."""

    window: int
    given: dict[int, int] = field(default_factory=dict)
    """Masks that decoder layers were called with."""
    kept: dict[int, int] = field(default_factory=dict)
    """Masks that were saved for the backward pass."""
    held: list[torch.Tensor] = field(default_factory=list)

    def note(self, where: dict[int, int], tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.shape[1:] == (1, self.window, self.window):
            self.held.append(tensor)
            where[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    @property
    def total(self) -> int:
        return sum((self.given | self.kept).values())


@contextmanager
def watched(model: nn.Module, window: int) -> Iterator[Seen]:
    """What forwards inside the block make and keep."""
    seen = Seen(window)

    def before(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.note(seen.given, kwargs.get("attention_mask"))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.note(seen.kept, tensor)
        return tensor

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in decoder_layers(model)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen
    for hook in hooks:
        hook.remove()


def recipe(*overrides: str) -> Recipe:
    given = (f"data.window={WINDOW}", f"train.batch_size={BATCH}", "train.precision=float32", "placement.far_weight=0")
    return load_recipe("recommended-yarn", [*given, *overrides])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_masks_are_those_that_a_forward_makes(family: str, documents: bool, attention: str) -> None:
    """Of two layers gemma's first looks back 16 tokens, less than the window: it has a mask in any case."""
    sizes = {"num_hidden_layers": 3} if family == "llama" else {"sliding_window": 16}
    model = tiny_model(family, attn_implementation=attention, **sizes).train()
    position_ids = torch.cat((torch.arange(9), torch.arange(WINDOW - 9)))[None].expand(BATCH, -1)
    with watched(model, WINDOW) as seen:
        model(input_ids=token_ids(BATCH, WINDOW), position_ids=position_ids if documents else None, use_cache=False)
    made = recipe(f"data.document_mask={str(documents).lower()}", f"model.attn_implementation={attention}")
    parts = training_memory(shape_of(tiny_config(family, **sizes)), made)
    assert parts.get("attention masks", 0) == seen.total
    assert bool(seen.total) == (documents or attention == "eager" or family == "gemma3_text")
    assert sum(seen.given.values()) == masks_of(shape_of(model.config), made).shared


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
@pytest.mark.parametrize("low", [False, True])
def test_compiled_layers_keep_as_many(low: bool) -> None:
    """What torch.compile's partition saves for the backward pass, asked without a compiler behind it."""
    model = tiny_model("llama").train()
    for layer in decoder_layers(model):
        layer.compile(backend="aot_eager_decomp_partition")
    position_ids = torch.cat((torch.arange(9), torch.arange(WINDOW - 9)))[None].expand(BATCH, -1)
    with watched(model, WINDOW) as seen, torch.autocast("cpu", torch.bfloat16, enabled=low):
        model(input_ids=token_ids(BATCH, WINDOW), position_ids=position_ids, use_cache=False)
    made = recipe(DOCUMENTS, "train.compile=layers", *(("train.precision=bfloat16",) if low else ()))
    assert training_memory(shape_of(model.config), made)["attention masks"] == seen.total
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("base"), num_attention_heads=4, num_key_value_heads=2)
    words = (folder / "text" / "0.txt").read_text().split()
    lines = [json.dumps({"text": " ".join(words[i : i + 12])}) for i in range(0, 360, 12)]
    (folder / "short.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        ("train.precision=float32",),
        ("train.precision=bfloat16",),
        ("train.precision=bfloat16", "model.dtype=bfloat16", "train.optimizer=adamw_split"),
        ("train.precision=bfloat16", "train.gradient_checkpointing=true"),
    ],
)
def test_a_training_step_makes_those_that_are_counted(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    """Far keys, the loss in pieces and autocast included; several documents in a row."""
    made = small(base, tmp_path / "run", DOCUMENTS, *settings, "train.steps=1", "train.evaluate_windows=0",
                 f'data.sources=[{{path="{base / "short.jsonl"}"}}]')  # fmt: skip
    found = []

    def loaded(*given: Any, **named: Any) -> Any:
        answer = load_model(*given, **named)
        found.append(stack.enter_context(watched(answer[0], made.data.window)))
        return answer

    monkeypatch.setattr(run, "load_model", loaded)
    with ExitStack() as stack:
        train(made, quiet=True)
    shape = shape_of(load_model(str(base / "model"), method=made.method)[0].config)
    parts = training_memory(shape, made)
    assert parts["attention masks"] == found[0].total > 0
    if made.train.gradient_checkpointing:  # a layer's own mask comes with the layer that is computed again
        assert not found[0].kept


def test_a_layer_computed_again_brings_its_mask() -> None:
    shape = shape_of(tiny_config("llama", num_key_value_heads=4))  # no keys to repeat: the mask is all that differs
    common = ("train.gradient_checkpointing=true", "train.logits_tokens=1")
    apart, together = (training_memory(shape, recipe(*common, *more)) for more in ((DOCUMENTS,), ()))
    assert apart["activations"] - together["activations"] == pytest.approx(4 * BATCH * WINDOW * WINDOW)


def test_keys_are_repeated_beside_a_mask() -> None:
    """Bytes of keys and values that a layer saves, with documents and without."""
    model = tiny_model("llama").train()
    install(model)
    saved: dict[bool, int] = {}
    for documents in (False, True):
        sizes: dict[int, int] = {}
        held = []

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes, held: list[Any] = held) -> torch.Tensor:
            if tensor.dim() == 4 and tensor.shape[-2:] == (WINDOW, 16):  # queries, keys and values, a head at a time
                held.append(tensor)
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        position_ids = torch.cat((torch.arange(9), torch.arange(WINDOW - 9)))[None]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ids = token_ids(1, WINDOW)
            model(input_ids=ids, position_ids=position_ids if documents else None, use_cache=False)
        saved[documents] = sum(sizes.values())
    shape = shape_of(model.config)
    assert shape.num_key_channels < shape.num_query_channels
    counted = [layer_bytes(shape, recipe("train.compile=layers", *more)) for more in ((DOCUMENTS,), ())]
    assert saved[True] - saved[False] == (counted[0] - counted[1]) * WINDOW * shape.num_layers


def test_no_mask_no_bytes_and_no_speed_where_it_was_not_measured() -> None:
    shape = shape_of(tiny_config("llama"))
    for settings in ((), (DOCUMENTS, "model.attn_implementation=flex_attention")):
        assert "attention masks" not in training_memory(shape, recipe(*settings))
        assert step_of(shape, recipe("train.precision=bfloat16", *settings), GPUS["h100"]) is not None
    assert step_of(shape, recipe("train.precision=bfloat16", DOCUMENTS), GPUS["h100"]) is None
    local = shape_of(tiny_config("gemma3_text", sliding_window=WINDOW + 1))
    assert "attention masks" not in training_memory(local, recipe())
