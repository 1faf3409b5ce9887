"""Compiled layers: the same numbers, found in every family, and gone outside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model, token_ids

from e2llm.evaluate.logits import TokenScorer
from e2llm.hf import attend_far, install
from e2llm.hf.chunked_loss import chunked_forward
from e2llm.hf.compiled import compile_layers, decoder_layers, layers_compiled, whole_layers
from e2llm.hf.head import find_head
from e2llm.infer import Engine


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_neox", "falcon", "phi", "qwen3_moe"])
def test_layers_are_found_in_every_family(family: str) -> None:
    model = tiny_model(family)
    assert len(decoder_layers(model)) == model.config.get_text_config().num_hidden_layers


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own tracing
def test_probes_compile_nothing() -> None:
    compiled: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = tiny_model("llama")
    install(model)
    for layer in decoder_layers(model):
        layer.compile(backend=counting)
    assert find_head(model) is not None
    attend_far(model)
    assert not compiled
    model(input_ids=token_ids(1, 32), use_cache=False)
    assert compiled, "and what comes after is compiled"
    torch._dynamo.reset()


def _layers() -> None:
    compile_layers(tiny_model("llama"))


def _layers_for_a_while() -> None:
    with layers_compiled(tiny_model("llama"), {}):
        pass


def _loss() -> None:
    with chunked_forward(tiny_model("llama"), rows=32, compiled=True):
        pass


@pytest.mark.parametrize("compiles", [_layers, _layers_for_a_while, _loss])
def test_whatever_compiles_keeps_torchs_workers(compiles: Callable[[], None]) -> None:
    """torch ends them after a minute, and forks the next ones from a process with threads."""
    with torch._inductor.config.patch(quiesce_async_compile_pool=True):
        compiles()
        assert not torch._inductor.config.quiesce_async_compile_pool


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own tracing
@pytest.mark.parametrize("whole", [True, False])
def test_a_layer_under_ddp_is_one_graph(whole: bool, one_process: None) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = tiny_model("llama", intermediate_size=8192).train()  # 2 MB in a matrix of its MLP
    for layer in decoder_layers(model):
        layer.compile(backend=counting)
    ddp = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=2)
    with whole_layers() if whole else contextlib.nullcontext():
        ddp(input_ids=token_ids(1, 32), use_cache=False).logits.sum().backward()
    assert (len(graphs) == 1) == whole, "equal layers share a graph; torch's own way cuts it"
    torch._dynamo.reset()


def test_a_model_without_layers_is_refused() -> None:
    model = tiny_model("llama")
    del model.model.layers
    with pytest.raises(ValueError, match=r"compile = 'layers': model type 'llama' .*use compile = 'none'"):
        decoder_layers(model)


def test_losses_by_compiled_layers_and_nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    engine = Engine(model, None)
    compiled: list[Any] = []
    original = torch.nn.Module.compile

    def compile_once(self: torch.nn.Module, *args: Any, **options: Any) -> None:
        compiled.append(self)
        original(self, *args, **options, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_once)
    plain, fast = TokenScorer(engine), TokenScorer(engine, compiled=True)
    torch._dynamo.utils.counters.clear()
    for shape in ((2, 40), (1, 64), (2, 40)):
        ids = token_ids(*shape)
        with engine.at_scale(2.0):
            torch.testing.assert_close(fast.nats(ids, first=5), plain.nats(ids, first=5), atol=1e-5, rtol=1e-5)
        assert all(layer._compiled_call_impl is None for layer in model.model.layers)
    assert len(compiled) == len(model.model.layers), "kept between uses"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "dynamo did run"


def test_layers_that_were_compiled_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    compile_layers(model)
    before = [layer._compiled_call_impl for layer in model.model.layers]
    with layers_compiled(model, {}):
        assert [layer._compiled_call_impl for layer in model.model.layers] == before
    assert [layer._compiled_call_impl for layer in model.model.layers] == before


def test_they_are_put_back_after_an_error() -> None:
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="stop"), layers_compiled(model, {}):
        raise RuntimeError("stop")
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)
