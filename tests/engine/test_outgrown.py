"""A conversation that outgrows its scale: read again, exactly; or with keys turned, where that was asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from architectures import tiny_model
from batches import NO_END, expected_tokens, prompt, run, tiny_engine

from e2llm.engine.batch import BatchEngine
from e2llm.engine.request import Request
from e2llm.hf import install

FIRST = Request(prompt_ids=prompt(40), max_new_tokens=9)
"""Scale 1: 49 tokens of 64, of which the last one's key is never written."""


def outgrown(answer: tuple[int, ...], more: int = 40) -> Request:
    """The next turn: what was said, then more; scale 2."""
    return Request(prompt_ids=FIRST.prompt_ids + answer + prompt(more, 3), max_new_tokens=8)


def test_by_default_it_is_read_again() -> None:
    with tiny_engine("llama", "linear", page_tokens=8) as engine:
        follow = outgrown(run(engine, [FIRST])[0].tokens)
        assert run(engine, [follow])[0].tokens == expected_tokens("llama", "linear", follow, 2.0)
        stats = engine.stats()
        assert (stats.cached_tokens_total, stats.turned_tokens_total) == (0, 0)


@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_turned_keys_are_gone_on_from(method: str) -> None:
    """A one-layer model: its keys and values know no attention, so turning is exact."""
    model: Any = tiny_model("llama", num_hidden_layers=1, **NO_END)
    model.generation_config.eos_token_id = None
    install(model, method=method)
    with BatchEngine(model, None, max_scale=8.0, page_tokens=8) as engine:
        first = run(engine, [FIRST])[0]
        follow = outgrown(first.tokens)
        exact = run(engine, [follow])[0]
    with BatchEngine(model, None, max_scale=8.0, page_tokens=8, rerotate=True) as engine:
        assert run(engine, [FIRST])[0] == first, "nothing is turned that need not be"
        assert run(engine, [follow])[0] == exact
        stats = engine.stats()
        assert (stats.turned_tokens_total, stats.cached_tokens_total) == (48, 48), "six full pages"
        assert stats.prompt_tokens_total == 40 + 89 - 48
        # The same again finds what was turned; a longer one at scale 4 turns all of it once more.
        assert run(engine, [follow])[0] == exact
        assert engine.stats().turned_tokens_total == 48
        longer = outgrown(first.tokens, more=140)
        run(engine, [longer])
        assert engine.stats().turned_tokens_total > 48
        engine.clear_prefix_cache()
        assert engine.stats().kv_tokens_used == 0


def test_what_was_turned_is_not_exact_and_never_shared_with_what_is() -> None:
    """In a two-layer model turned keys differ; an exact request of that scale finds none of them."""
    with tiny_engine("llama", "linear", page_tokens=8, rerotate=True) as engine:
        follow = outgrown(run(engine, [FIRST])[0].tokens)
        exact = expected_tokens("llama", "linear", follow, 2.0)
        run(engine, [follow])
        cached = engine.stats().cached_tokens_total
        assert engine.stats().turned_tokens_total == 48
        engine._rerotate, engine._cached_scales = False, {}  # as an engine without the option would look
        assert run(engine, [follow])[0].tokens == exact
        assert engine.stats().cached_tokens_total == cached


def test_memory_that_is_short_and_sources_that_would_make_room() -> None:
    """The pages to turn from are held while others are taken: none is its own target."""
    with tiny_engine("llama", "linear", page_tokens=8, kv_tokens=152, rerotate=True) as engine:
        follow = outgrown(run(engine, [FIRST])[0].tokens)
        assert run(engine, [follow])[0].finish_reason == "length"
        assert engine.stats().turned_tokens_total == 48
        other = Request(prompt_ids=prompt(140, 7), max_new_tokens=8)
        assert run(engine, [other])[0].tokens == expected_tokens("llama", "linear", other, 4.0)
    with tiny_engine("llama", "linear", page_tokens=8, kv_tokens=104, rerotate=True) as engine:
        follow = dataclasses.replace(outgrown(run(engine, [FIRST])[0].tokens), max_new_tokens=4)
        # Twelve of thirteen pages: while six are held to turn from, it would wait for itself.
        assert run(engine, [follow])[0].tokens == expected_tokens("llama", "linear", follow, 2.0)
        assert engine.stats().turned_tokens_total == 0


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="rerotate = True and prefix_cache = False"):
        tiny_engine(rerotate=True, prefix_cache=False)
