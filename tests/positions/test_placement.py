"""Placements: what each rule promises, over many seeded draws, small enough to count every case."""

from __future__ import annotations

import numpy as np
import pytest

from e2llm.positions.placement import PLACEMENTS, PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

L, R = 16, 8  # tokens: native and training window of the countable cases
G = 4  # fixed scale: target window W = 64, largest offset S = W - R = 56
W, S = L * G, L * G - R
KINDS = {  # settings that fit a window of R = 8
    "none": {},
    "paper": {},
    "jumps": {},
    "pose": {"chunks": 3},
    "randpos": {},
    "end_anchor": {"end_tokens": 3},
}


def make_sampler(
    kind: str,
    *,
    native: int = L,
    window: int = R,
    scale: float = G,
    draw: str = "fixed",
    seed: int = 0,
    **settings: float,
) -> PositionSampler:
    return PositionSampler(
        native_window=native,
        training_window=window,
        scales=ScalesConfig(distribution=draw, max_scale=scale),
        placement=PlacementConfig(kind=kind, **{**KINDS[kind], **settings}),
        seed=seed,
    )


def distances(positions: np.ndarray) -> set[int]:
    return set((positions[None, :] - positions[:, None])[np.triu_indices(len(positions), 1)].tolist())


def test_every_rule_is_covered() -> None:
    assert set(KINDS) == set(PLACEMENTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("native", "window", "scale", "draw"),
    [(16, 8, 4, "fixed"), (512, 256, 20, "uniform_integers"), (100, 100, 7.3, "log_uniform"), (64, 200, 2, "fixed")],
)
def test_positions_rise_and_stay_inside(kind: str, native: int, window: int, scale: float, draw: str) -> None:
    sampler = make_sampler(kind, native=native, window=window, scale=scale, draw=draw)
    scales = set()
    for index in range(150):
        placed = sampler.draw(index)
        scales.add(placed.scale)
        assert placed.positions.dtype == np.int64 and placed.positions.shape == (window,)
        assert (np.diff(placed.positions) >= 1).all()
        assert placed.positions[0] >= 0 and placed.positions[-1] < max(window, placed.scale * native)
        assert 1 <= placed.scale <= scale
    assert len(scales) > 10 or draw == "fixed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_depends_on_seed_and_index_alone(kind: str) -> None:
    forwards = make_sampler(kind, draw="log_uniform", seed=3)
    backwards = make_sampler(kind, draw="log_uniform", seed=3)
    first = [forwards.draw(index) for index in range(40)]
    second = {index: backwards.draw(index) for index in reversed(range(40))}
    for index, placed in enumerate(first):
        assert placed.scale == second[index].scale
        np.testing.assert_array_equal(placed.positions, second[index].positions)
    other_seed = [make_sampler(kind, draw="log_uniform", seed=4).draw(index) for index in range(40)]
    scales = [p.scale for p in first + other_seed]
    assert len(set(scales)) == 80, "each (seed, index) draws its own"


@pytest.mark.parametrize("kind", ["paper", "jumps", "pose", "randpos"])
def test_seed_and_index_are_not_interchangeable(kind: str) -> None:
    drawn = [make_sampler(kind, seed=seed).draw(index).positions.tolist() for seed, index in ((0, 1), (1, 0), (1, 1))]
    assert drawn[0] != drawn[1] and drawn[1] != drawn[2]


@pytest.mark.parametrize("kind", ["paper", "jumps"])
@pytest.mark.parametrize("leading", [0, 1, 4])
def test_leading_tokens_stay(kind: str, leading: int) -> None:
    sampler = make_sampler(kind, leading_tokens=leading, **({"max_jumps": 2} if kind == "jumps" else {}))
    drawn = np.stack([sampler.draw(index).positions for index in range(200)])
    assert (drawn[:, :leading] == np.arange(leading)).all()
    ordinary = drawn[:, leading:] - np.arange(leading, R)
    assert (ordinary >= 0).all() and ordinary.max() == S, "the others move, up to g*L - R"


def test_paper_is_one_offset_drawn_uniformly() -> None:
    """E2-LLM Eq. 7: t ~ U{0 ... gL - R} for all but the first four."""
    n = 100 * (S + 1)
    sampler = make_sampler("paper")
    offsets = np.stack([sampler.draw(index).positions for index in range(n)])[:, 4:] - np.arange(4, R)
    assert (offsets == offsets[:, :1]).all(), "one offset a window"
    counts = np.bincount(offsets[:, 0], minlength=S + 1)
    assert len(counts) == S + 1
    assert ((counts - 100.0) ** 2 / 100.0).sum() < 94.5  # 99.9 % quantile of chi-square with 56 degrees


def test_paper_offset_ends_where_the_drawn_scale_ends() -> None:
    sampler = make_sampler("paper", draw="uniform_integers")
    largest = dict.fromkeys(range(1, G + 1), 0)
    for index in range(4000):
        placed = sampler.draw(index)
        largest[int(placed.scale)] = max(largest[int(placed.scale)], int(placed.positions[-1]))
    assert largest == {g: g * L - 1 for g in range(1, G + 1)}


def test_paper_reaches_far_from_leading_tokens_only() -> None:
    from_leading, ordinary = set(), set()
    sampler = make_sampler("paper")
    for index in range(1500):
        positions = sampler.draw(index).positions
        from_leading |= set((positions[1:] - positions[0]).tolist())
        ordinary |= distances(positions[4:])
    assert from_leading == set(range(1, W)), "every distance up to g*L - 1"
    assert ordinary == set(range(1, R - 4)), "never beyond the window they were read in"


def test_jumps_reach_every_distance_between_ordinary_tokens() -> None:
    sampler = make_sampler("jumps")
    reached: set[int] = set()
    for index in range(3000):
        reached |= distances(sampler.draw(index).positions[4:])
    assert reached == set(range(1, W - 4)), "1 ... g*L - 1 - leading"


@pytest.mark.parametrize(("fewest", "most"), [(1, 3), (0, 2), (2, 2), (0, 0), (1, 7)])
def test_jumps_segments(fewest: int, most: int) -> None:
    """n + 1 segments; the first holds a token after the leading ones and is unshifted; offsets never fall."""
    window = 24
    sampler = make_sampler("jumps", native=64, window=window, scale=16, min_jumps=fewest, max_jumps=most)
    num_offsets, cuts = [], []
    for index in range(400):
        offsets = sampler.draw(index).positions - np.arange(window)
        assert (offsets[:5] == 0).all() and (np.diff(offsets) >= 0).all() and offsets.max() <= 16 * 64 - window
        cuts += np.flatnonzero(np.diff(offsets)).tolist()
        num_offsets.append(len(np.unique(offsets[5:])))
    # Two equal draws or a first offset of 0 hide a cut: rare with 1001 offsets.
    shares = np.bincount(num_offsets, minlength=most + 2) / 400
    assert max(num_offsets) <= most + 1
    if most:
        assert set(cuts) == set(range(4, window - 1)), "a cut may fall anywhere after the first ordinary token"
        np.testing.assert_allclose(shares[fewest + 1 : most + 2], 1 / (most - fewest + 1), atol=0.12)
    else:
        assert shares[1] == 1.0


def test_jumps_offsets_are_uniform_before_sorting() -> None:
    sampler = make_sampler("jumps", min_jumps=1, max_jumps=1)
    last = np.array([sampler.draw(index).positions[-1] - (R - 1) for index in range(100 * (S + 1))])
    counts = np.bincount(last, minlength=S + 1)
    assert ((counts - 100.0) ** 2 / 100.0).sum() < 94.5


def test_pose() -> None:
    sampler = make_sampler("pose", chunks=2)
    cuts, skips = [], []
    for index in range(5700):
        offsets = sampler.draw(index).positions - np.arange(R)
        assert offsets[0] == 0, "the first chunk is unshifted"
        jumps = np.flatnonzero(np.diff(offsets))
        assert len(jumps) <= 1, "two chunks, each contiguous"
        cuts += (jumps + 1).tolist()
        skips.append(int(offsets[-1]))
    assert set(cuts) == set(range(1, R))
    counts = np.bincount(skips, minlength=S + 1)
    assert ((counts - 100.0) ** 2 / 100.0).sum() < 94.5
    many = make_sampler("pose", chunks=4)
    offsets = np.stack([many.draw(index).positions for index in range(500)]) - np.arange(R)
    assert (np.diff(offsets) >= 0).all() and max(len(np.unique(row)) for row in offsets) == 4


def test_randpos_takes_every_position_alike() -> None:
    sampler = make_sampler("randpos")
    counts = np.bincount(np.concatenate([sampler.draw(i).positions for i in range(4000)]), minlength=W)
    np.testing.assert_allclose(counts, 4000 * R / W, rtol=0.2)


def test_end_anchor() -> None:
    expected = [0, 1, 2, 3, 4, W - 3, W - 2, W - 1]
    assert make_sampler("end_anchor").draw(0).positions.tolist() == expected


def test_none_stays() -> None:
    assert make_sampler("none").draw(7).positions.tolist() == list(range(R))


@pytest.mark.parametrize("kind", KINDS)
def test_no_offset_where_the_target_is_shorter_than_the_window(kind: str) -> None:
    """g * L < R: the paper is silent, t_max is 0."""
    sampler = make_sampler(kind, native=16, window=40, scale=2)
    for index in range(20):
        assert sampler.draw(index).positions.tolist() == list(range(40))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_another_length(kind: str) -> None:
    sampler = make_sampler(kind, window=32, scale=16)
    for window in (12, 50):
        placed = [sampler.draw(index, window).positions for index in range(50)]
        assert all(len(p) == window and p[-1] < 16 * L for p in placed)
        if kind in {"paper", "jumps"}:
            assert all((p[:4] == np.arange(4)).all() for p in placed)
        assert kind == "none" or max(p[-1] for p in placed) > 200, "offsets reach g*L - window"


@pytest.mark.parametrize(("kind", "window"), [("jumps", 5), ("jumps", 4), ("pose", 2), ("end_anchor", 3)])
def test_a_sample_too_short_for_the_placement(kind: str, window: int) -> None:
    sampler = make_sampler(kind, window=32, scale=16)
    with pytest.raises(ValueError, match=f"window = {window}: .*{kind}"):
        sampler.draw(0, window)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "jump"}, r"placement\.kind = 'jump': choose one of none, paper, jumps"),
        ({"leading_tokens": -1}, r"placement\.leading_tokens = -1"),
        ({"min_jumps": 4}, r"placement\.min_jumps = 4.*max_jumps = 3"),
        ({"min_jumps": -1}, r"placement\.min_jumps = -1"),
        ({"chunks": 0}, r"placement\.chunks = 0"),
        ({"end_tokens": 0}, r"placement\.end_tokens = 0"),
        ({"reach": 0.9}, r"placement\.reach = 0\.9: use 1"),
        ({"reach": float("nan")}, r"placement\.reach = nan"),
    ],
)
def test_config_errors_name_the_field(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlacementConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "shortest"), [("none", 1), ("paper", 5), ("jumps", 6), ("pose", 3), ("randpos", 1), ("end_anchor", 4)]
)
def test_windows_too_short_are_refused(kind: str, shortest: int) -> None:
    for index in range(30):
        positions = make_sampler(kind, window=shortest).draw(index).positions
        assert (np.diff(positions) >= 1).all() and positions[-1] < W
    if shortest > 1:
        with pytest.raises(ValueError, match=rf"window = {shortest - 1}: placement '{kind}'.*at least {shortest}"):
            make_sampler(kind, window=shortest - 1)


@pytest.mark.parametrize("name", ["native_window", "training_window"])
def test_sampler_windows_are_checked(name: str) -> None:
    settings = {"native_window": L, "training_window": R, name: 0}
    with pytest.raises(ValueError, match=f"{name} = 0"):
        PositionSampler(**settings, scales=ScalesConfig(), placement=PlacementConfig(kind="none"))


def test_seeds_and_indices_are_not_negative() -> None:
    with pytest.raises(ValueError, match="seed = -1"):
        make_sampler("none", seed=-1)
    with pytest.raises(ValueError, match="sample_index = -2"):
        make_sampler("none").draw(-2)


def test_a_short_window_has_as_many_jumps_as_it_holds() -> None:
    sampler = make_sampler("jumps", window=8, scale=16, min_jumps=1, max_jumps=31)
    steps = [np.diff(sampler.draw(index).positions) for index in range(500)]
    most = max(int((step > 1).sum()) for step in steps)
    assert most == 3, "8 tokens, 4 of them leading, one in the first segment"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_reach_lengthens_the_target_window_above_scale_1(kind: str) -> None:
    furthest = {
        (scale, reach): max(
            int(make_sampler(kind, scale=scale, reach=reach).draw(index).positions[-1]) for index in range(2000)
        )
        for scale in (1, G)
        for reach in (1.0, 1.5)
    }
    assert furthest == {(1, 1.0): L - 1, (1, 1.5): L - 1, (G, 1.0): W - 1, (G, 1.5): W * 3 // 2 - 1}


@pytest.mark.parametrize("native_kind", ["none", "paper"])
def test_scale_1_may_have_a_rule_of_its_own(native_kind: str) -> None:
    sampler = make_sampler("jumps", draw="uniform_integers", native_kind=native_kind)
    alone = {1: make_sampler(native_kind, draw="uniform_integers"), 0: make_sampler("jumps", draw="uniform_integers")}
    seen = set()
    for index in range(200):
        found = sampler.draw(index)
        seen.add(found.scale)
        expected = alone[found.scale == 1].draw(index)
        assert found.scale == expected.scale
        assert np.array_equal(found.positions, expected.positions)
    assert seen == {1, 2, 3, 4}


def test_both_rules_must_fit_the_window() -> None:
    with pytest.raises(ValueError, match="placement 'none' and 'pose' as set needs at least 9"):
        make_sampler("none", native_kind="pose", chunks=9)
    config = PlacementConfig(kind="none", native_kind="jumps", leading_tokens=3, max_jumps=7)
    assert (config.sinks, config.most_segments, config.shortest_window) == (3, 8, 5)


def test_an_unknown_rule_at_scale_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"placement\.native_kind = 'flat': choose one of same, none, paper"):
        PlacementConfig(native_kind="flat")


def test_a_curriculum_follows_the_sample_index() -> None:
    scales = ScalesConfig(distribution="weighted", max_scale=4, values=(1, 4), weights=(0, 1), final_weights=(1, 0))
    sampler = PositionSampler(
        native_window=L, training_window=R, scales=scales, placement=PlacementConfig(), num_samples=3000
    )
    drawn = np.array([sampler.draw(index).scale for index in range(3000)])
    shares = [(part == 1).mean() for part in np.split(drawn, 3)]
    np.testing.assert_allclose(shares, [1 / 6, 1 / 2, 5 / 6], atol=0.05)
    assert sampler.draw(5000).scale == 1, "beyond the end it stays"


def test_a_curriculum_needs_an_end() -> None:
    scales = ScalesConfig(distribution="weighted", max_scale=4, values=(1, 4), final_weights=(1, 0))
    with pytest.raises(ValueError, match=r"scales\.final_weights = \(1, 0\): needs to know where training ends"):
        PositionSampler(native_window=L, training_window=R, scales=scales, placement=PlacementConfig())
