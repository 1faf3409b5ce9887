"""The handle: install, set, place, draw, remove; and that nothing but this instance is touched."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from architectures import WINDOW, statically_scaled, tiny_model, token_ids
from torch import nn

from e2llm.hf import get_extension, install
from e2llm.hf.scaled_rotary import ScaledRotary
from e2llm.positions.placement import Placement, PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

IDS = token_ids(2, 12)


def make_sampler(kind: str = "jumps", *, draw: str = "uniform_integers", window: int = 12, seed: int = 0):
    return PositionSampler(
        native_window=WINDOW,
        training_window=window,
        scales=ScalesConfig(distribution=draw, max_scale=16),
        placement=PlacementConfig(kind=kind),
        seed=seed,
    )


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS, **inputs: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False, **inputs).logits


@pytest.fixture
def model() -> nn.Module:
    return tiny_model("llama")


def test_remove_restores_the_very_module(model: nn.Module) -> None:
    rotary, names, hooks = model.model.rotary_emb, dict(model.named_modules()), dict(model.model._forward_pre_hooks)
    before = logits(model)
    extension = install(model)
    extension.set_scale(4.0)
    extension.sampler = make_sampler()
    assert isinstance(model.model.rotary_emb, ScaledRotary) and get_extension(model) is extension
    extension.remove()
    assert model.model.rotary_emb is rotary and get_extension(model) is None
    assert dict(model.named_modules()) == names and dict(model.model._forward_pre_hooks) == hooks
    assert torch.equal(logits(model), before)
    model.train()
    assert torch.equal(logits(model), before), "no hook draws any more"
    assert install(model.eval(), method="linear").method == "linear", "and it can be extended again"


def test_a_second_install_is_refused(model: nn.Module) -> None:
    extension = install(model)
    for target in (model, model.model):
        with pytest.raises(ValueError, match=r"extended already: call remove\(\)"):
            install(target)
    assert get_extension(model) is extension


def test_a_base_model_without_head(model: nn.Module) -> None:
    extension = install(model.model, method="linear")
    extension.set_scale(2.0)
    expected = statically_scaled(model, rope_type="linear", factor=2.0)
    assert torch.equal(logits(model), logits(expected))


def test_the_checkpoint_keys_stay(model: nn.Module) -> None:
    keys, parameters, buffers = list(model.state_dict()), len(list(model.parameters())), len(list(model.buffers()))
    extension = install(model)
    extension.set_scale([1.0, 2.0])
    logits(model)
    assert list(model.state_dict()) == keys
    assert (len(list(model.parameters())), len(list(model.buffers()))) == (parameters, buffers)


def test_other_instances_and_the_class_are_untouched(model: nn.Module) -> None:
    other = tiny_model("llama", seed=0)
    rotary_class = type(model.model.rotary_emb)
    functions = dict(vars(rotary_class))
    before = logits(other)
    install(model, method="linear").set_scale(4.0)
    assert type(other.model.rotary_emb) is rotary_class and dict(vars(rotary_class)) == functions
    assert torch.equal(logits(other), before) and not torch.equal(logits(model), before)
    install(other, method="linear").set_scale(2.0)
    assert get_extension(model).scale == 4.0 and get_extension(other).scale == 2.0
    assert not torch.equal(logits(model), logits(other))


def test_a_copy_is_independent(model: nn.Module) -> None:
    install(model, method="linear").set_scale(4.0)
    at_four = logits(model)
    twin = copy.deepcopy(model)
    extension = get_extension(twin)
    assert extension is not get_extension(model) and torch.equal(logits(twin), at_four)
    extension.set_scale(2.0)
    assert torch.equal(logits(model), at_four) and not torch.equal(logits(twin), at_four)
    extension.sampler = make_sampler("paper", draw="fixed")
    twin.train()
    extension.expect([3, 4])
    drawn = logits(twin)
    assert not torch.equal(drawn, at_four), "the copy's own hook draws"
    assert torch.equal(logits(model.train()), at_four), "and the original's does not"


def test_a_copy_can_be_removed(model: nn.Module) -> None:
    install(model)
    twin = copy.deepcopy(model)
    rotary = twin.model.rotary_emb.inner
    get_extension(twin).remove()
    assert get_extension(twin) is None and get_extension(model) is not None
    assert twin.model.rotary_emb is rotary and not twin.model._forward_pre_hooks and model.model._forward_pre_hooks


def test_a_pickled_model_is_a_copy(model: nn.Module) -> None:
    extension = install(model, method="linear")
    extension.set_scale(4.0)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), logits(model)) and get_extension(twin).scale == 4.0
    get_extension(twin).remove()
    assert get_extension(twin) is None and get_extension(model) is extension


def test_weights_are_freed_without_waiting_for_the_collector() -> None:
    model = tiny_model("llama")
    install(model).set_scale(2.0)
    gc.disable()
    try:
        gone = weakref.ref(model.lm_head.weight)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_models_are_freed() -> None:
    model = tiny_model("llama")
    install(model).set_scale(2.0)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_original_attributes_are_readable(model: nn.Module) -> None:
    rotary = model.model.rotary_emb
    install(model)
    assert model.model.rotary_emb.rope_type == "default"
    assert model.model.rotary_emb.inv_freq is rotary.inv_freq
    with pytest.raises(AttributeError, match="no_such"):
        _ = model.model.rotary_emb.no_such


def test_names_and_repr(model: nn.Module) -> None:
    extension = install(model, method="ntk", native_window=48)
    assert (extension.method, extension.native_window, extension.rope.native_window) == ("ntk", 48, 48)
    assert extension.scale is None and extension.max_scale == 1.0
    extension.set_scale([1.0, 2.5])
    assert extension.scale == (1.0, 2.5)
    assert repr(extension) == "Extension(method='ntk', native_window=48, scale=(1.0, 2.5))"
    assert "layers=full_attention" in repr(install(tiny_model("gemma3_text")))


@pytest.mark.parametrize(
    "scale",
    [
        2,
        2.0,
        [2.0, 2.0],
        (2, 2),
        np.float64(2.0),
        np.array([2.0, 2.0]),
        torch.full((2,), 2.0),
        np.float32(2.0),
        np.int64(2),
        np.array(2.0),
        torch.tensor(2.0),
        torch.tensor([2, 2]),
    ],
    ids=repr,
)
def test_a_scale_in_any_form(model: nn.Module, scale: object) -> None:
    extension = install(model, method="linear")
    extension.set_scale(scale)
    assert torch.equal(logits(model), logits(statically_scaled(model, rope_type="linear", factor=2.0)))


@pytest.mark.parametrize("bad", [0.5, -1.0, 0, math.nan, math.inf, [1.0, 0.5], (2.0, math.nan)])
def test_bad_scales_change_nothing(model: nn.Module, bad: object) -> None:
    extension = install(model, method="linear")
    extension.set_scale(2.0)
    before = logits(model)
    with pytest.raises(ValueError, match=r"scale = .*at least 1"):
        extension.set_scale(bad)
    assert extension.scale == 2.0 and torch.equal(logits(model), before)


def test_scale_one_is_the_model_and_not_its_table(model: nn.Module) -> None:
    """A `dynamic` base scales itself beyond its window: at scale 1 it goes on doing so, at scale 2 ours decides."""
    dynamic = statically_scaled(model, rope_type="dynamic", factor=4.0)
    ids = token_ids(1, 2 * WINDOW)
    before = logits(dynamic, ids)
    extension = install(dynamic, method="linear")
    extension.set_scale(1.0)
    assert torch.equal(logits(dynamic, ids), before)
    extension.set_scale(2.0)
    expected = logits(statically_scaled(model, rope_type="linear", factor=2.0), ids)
    assert torch.equal(logits(dynamic, ids), expected) and not torch.equal(before, expected)


def test_no_scales_at_all_is_refused(model: nn.Module) -> None:
    extension = install(model)
    for scale in ([], (), np.zeros(0)):
        with pytest.raises(ValueError, match=r"scale = \[\]"):
            extension.set_scale(scale)


@pytest.mark.parametrize("scale", ["two", [None], [[2.0, 3.0]], object()], ids=["text", "none", "nested", "object"])
def test_what_is_no_scale_is_refused(model: nn.Module, scale: object) -> None:
    with pytest.raises(ValueError, match=r"scale = .*: give a number"):
        install(model).set_scale(scale)


def test_no_method_leaves_a_base_its_own_switching(model: nn.Module) -> None:
    """`none` at any scale is the model as it was: a `dynamic` base goes on scaling itself beyond its window."""
    dynamic = statically_scaled(model, rope_type="dynamic", factor=4.0)
    ids = token_ids(1, 2 * WINDOW)
    before = logits(dynamic, ids)
    assert not torch.equal(before, logits(model, ids)), "beyond its window"
    extension = install(dynamic, method="none")
    for scale in (4.0, [1.0, 4.0][:1], 1.0):
        extension.set_scale(scale)
        assert torch.equal(logits(dynamic, ids), before)
    with pytest.raises(ValueError, match=r"scale = 0\.5"):
        extension.set_scale(0.5)


def test_one_scale_a_row_needs_as_many_rows(model: nn.Module) -> None:
    extension = install(model)
    extension.set_scale([2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match="scales are set for 3 rows, the batch has 2"):
        logits(model)
    extension.set_scale([2.0])
    expected = statically_scaled(model, rope_type="yarn", factor=2.0, original_max_position_embeddings=WINDOW)
    assert torch.equal(logits(model), logits(expected)), "one scale in a list serves any batch"


def test_methods_are_checked_at_install(model: nn.Module) -> None:
    rotary = model.model.rotary_emb
    for method, message in (("pi", "method = 'pi': choose one of"), ("longrope", "no long_factor")):
        with pytest.raises(ValueError, match=message):
            install(model, method=method)
    with pytest.raises(ValueError, match="native_window = -3"):
        install(model, native_window=-3)
    assert model.model.rotary_emb is rotary and not model.model._forward_pre_hooks


def test_place_puts_tokens_where_it_says(model: nn.Module) -> None:
    """Placed rows equal the unpatched model given those positions, where the mask does not depend on them."""
    positions = [np.r_[0:4, 50 : 50 + 8], np.r_[0:6, 100:103, 200:203]]
    extension = install(model, method="linear")
    for scale in (1.0, 3.0):
        static = statically_scaled(model, rope_type="linear", factor=scale)
        extension.place([Placement(scale, p) for p in positions])
        # A full mask, given, keeps transformers from taking the jumps for packed documents.
        causal = torch.full((12, 12), -torch.inf).triu(1)[None, None].expand(2, 1, 12, 12)
        at = torch.from_numpy(np.stack(positions))
        expected = logits(static, attention_mask=causal, position_ids=at)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    extension.set_scale(None)
    assert torch.equal(logits(model), logits(statically_scaled(model, rope_type="linear", factor=1.0)))


def test_placements_follow_the_position_ids(model: nn.Module) -> None:
    """Restarting ids (documents kept apart) start again at the leading positions: id m stands at positions[m]."""
    extension = install(model, method="linear")
    where = np.r_[0:4, 30:34, 60:64]
    extension.place([Placement(2.0, where)])
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
    cos, _ = model.model.rotary_emb(torch.zeros(1, 12, 64), ids)
    reference = statically_scaled(model, rope_type="linear", factor=2.0).model.rotary_emb
    assert torch.equal(cos, reference(torch.zeros(1, 12, 64), torch.from_numpy(where)[ids])[0])


def test_place_errors(model: nn.Module) -> None:
    extension = install(model)
    with pytest.raises(ValueError, match=r"one length, got \[3, 4\]"):
        extension.place([Placement(1.0, np.arange(3)), Placement(1.0, np.arange(4))])
    extension.place([Placement(2.0, np.arange(12))])
    with pytest.raises(ValueError, match="placements are set for 1 rows, the batch has 2"):
        logits(model)
    extension.place([Placement(2.0, np.arange(8))] * 2)
    with pytest.raises(ValueError, match="12 tokens, its placements were drawn for 8"):
        logits(model)


@pytest.mark.parametrize("kind", ["paper", "jumps", "none", "pose", "randpos"])
def test_training_draws_what_the_sampler_says(model: nn.Module, kind: str) -> None:
    extension = install(model, method="yarn")
    extension.sampler = sampler = make_sampler(kind, seed=5)
    other = tiny_model("llama")
    by_hand = install(other, method="yarn")
    model.train()
    for indices in ([0, 1], [7, 3], [7, 3]):
        extension.expect(indices)
        drawn = logits(model)
        by_hand.place([sampler.draw(index) for index in indices])
        assert torch.equal(drawn, logits(other))


def test_indices_count_on_where_none_are_named(model: nn.Module) -> None:
    extension = install(model)
    extension.sampler = sampler = make_sampler(draw="log_uniform")
    model.train()
    for first in (0, 2, 4):
        logits(model)
        expected = np.stack([sampler.draw(first + row).positions for row in range(2)])
        assert torch.equal(model.model.rotary_emb.rows.positions, torch.from_numpy(expected))


def test_named_indices_arrive_once_and_are_counted(model: nn.Module) -> None:
    extension = install(model)
    extension.sampler = sampler = make_sampler(draw="log_uniform")
    extension.expect(torch.tensor([40, 41]))
    logits(model.eval())  # an evaluation in between does not use them up
    logits(model.train())
    assert model.model.rotary_emb.rows.positions.tolist() == [sampler.draw(i).positions.tolist() for i in (40, 41)]
    logits(model)
    assert model.model.rotary_emb.rows.positions.tolist() == [sampler.draw(i).positions.tolist() for i in (0, 1)]
    extension.expect([1, 2, 3])
    with pytest.raises(ValueError, match="3 sample indices were named for a batch of 2 samples"):
        logits(model)


def test_evaluation_between_steps_has_the_scale_that_is_set(model: nn.Module) -> None:
    extension = install(model, method="linear")
    at_one = logits(model)
    extension.sampler = make_sampler()
    logits(model.train())
    assert torch.equal(logits(model.eval()), at_one)
    extension.set_scale(2.0)
    at_two = logits(model)
    assert not torch.equal(at_two, at_one)
    extension.expect([8, 9])
    assert not torch.equal(logits(model.train()), at_two)
    assert torch.equal(logits(model.eval()), at_two), "and it comes back after a training forward"
    extension.sampler = None
    assert torch.equal(logits(model.train()), at_two), "without a sampler, training sees the scale that is set"


def test_a_shorter_last_batch_draws_for_its_own_length(model: nn.Module) -> None:
    extension = install(model)
    extension.sampler = sampler = make_sampler("paper", draw="fixed")
    extension.expect([5, 6])
    logits(model.train(), IDS[:, :9])
    expected = [sampler.draw(i, 9).positions.tolist() for i in (5, 6)]
    assert model.model.rotary_emb.rows.positions.tolist() == expected


def test_embeddings_instead_of_ids(model: nn.Module) -> None:
    extension = install(model)
    extension.sampler = make_sampler()
    model.train()
    extension.expect([5, 6])
    with_ids = logits(model)
    extension.expect([5, 6])
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(IDS), use_cache=False).logits
    assert torch.equal(embedded, with_ids)


def test_many_different_scales_do_not_pile_up(model: nn.Module) -> None:
    extension = install(model, method="none")
    for step in range(4200):
        extension._frequencies(None, 1.0 + step / 1000)
    assert len(extension._cache) <= 4097
