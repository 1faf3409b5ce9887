"""What GPUs exchange, against collectives that are carried out piece by piece."""

from __future__ import annotations

import pytest
from architectures import tiny_config

from e2llm.config import Recipe, load_recipe
from e2llm.plan.exchange import BETWEEN, INSIDE, NODE, Exchange, exchanged, gather
from e2llm.plan.memory import trained_parameters
from e2llm.plan.shape import shape_of


def recipe(*overrides: str) -> Recipe:
    return load_recipe("recommended-yarn", overrides)


def ring_gather(pieces: int) -> list[int]:
    """Pieces that each member of a ring sends until all have all: in every round it passes on what came last."""
    held = [{member} for member in range(pieces)]
    last, sent = list(range(pieces)), [0] * pieces
    while any(len(have) < pieces for have in held):
        moved = [(member + 1) % pieces for member in range(pieces)]
        arriving = {target: last[member] for member, target in enumerate(moved)}
        for member, target in enumerate(moved):
            sent[member] += 1
            held[target].add(arriving[target])
        last = [arriving[member] for member in range(pieces)]
    return sent


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_a_gather_is_what_a_ring_sends(gpus: int) -> None:
    size = 24.0 * gpus
    assert ring_gather(gpus) == [gpus - 1] * gpus
    assert gather(size, gpus) == Exchange((gpus - 1) * size / gpus, 0.0)


def test_between_nodes_each_card_brings_its_part_of_what_the_node_lacks() -> None:
    nodes = 4
    found = gather(1.0, nodes * NODE)
    lacking = 1.0 - 1 / nodes
    assert found.between * NODE == pytest.approx(lacking)
    assert gather(1.0, NODE).between == 0.0


def test_strategies_move_what_they_must() -> None:
    shape = shape_of(tiny_config("llama"))
    weights = 4.0 * shape.num_parameters
    assert exchanged(shape, recipe(), 1) == Exchange(0.0, 0.0)
    ddp = exchanged(shape, recipe("distributed.strategy=ddp"), 8)
    assert ddp.inside == pytest.approx(2 * weights * 7 / 8) and ddp.between == 0.0
    assert exchanged(shape, recipe("distributed.strategy=ddp"), 8, batches=4) == ddp, "gradients go once a step"
    low = "model.dtype=bfloat16", "train.optimizer=adamw_split"
    assert exchanged(shape, recipe("distributed.strategy=ddp", *low), 8).inside == ddp.inside / 2
    # bfloat16 weights gathered forward and backward, float32 gradients scattered: as much as DDP
    sharded = exchanged(shape, recipe("distributed.strategy=fsdp2"), 8)
    assert sharded.inside == pytest.approx(ddp.inside)
    kept = exchanged(shape, recipe("distributed.strategy=fsdp2", "distributed.reshard=false"), 8)
    assert kept.inside == pytest.approx(sharded.inside * 3 / 4)
    assert exchanged(shape, recipe("distributed.strategy=fsdp2"), 8, batches=3).inside == 3 * sharded.inside
    assert exchanged(shape, recipe("distributed.strategy=deepspeed"), 8) == ddp
    with pytest.raises(ValueError, match=r"distributed\.strategy = 'none' with 2 GPUs"):
        exchanged(shape, recipe(), 2)


def test_groups_exchange_gradients_only() -> None:
    shape, made = shape_of(tiny_config("llama")), recipe("distributed.strategy=fsdp2", "distributed.shard=8")
    found = exchanged(shape, made, 32)
    inside = exchanged(shape, recipe("distributed.strategy=fsdp2"), 8).inside
    gradients = 4.0 * trained_parameters(shape, made)
    assert found.inside == inside
    assert found.between == pytest.approx(2 * (gradients / 8) * 3 / 4), "an all-reduce of a shard over four groups"
    assert found.seconds == found.inside / INSIDE + found.between / BETWEEN
