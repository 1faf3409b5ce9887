"""Recipes: read, overridden, refused, written back."""

from __future__ import annotations

import pytest

from e2llm.config import Recipe, load_recipe, parse_recipe, shipped_recipes, to_toml
from e2llm.positions.placement import PositionSampler


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_parses_and_is_named_for_its_file(name: str) -> None:
    assert load_recipe(name).name == name


def test_paper_recipe_is_the_papers_sampling() -> None:
    recipe = load_recipe("paper")
    assert (recipe.method, recipe.placement.kind, recipe.placement.leading_tokens) == ("linear", "paper", 4)
    assert (recipe.scales.distribution, recipe.scales.max_scale) == ("uniform_integers", 20)


def test_study_recipes_share_one_budget_of_tokens() -> None:
    shipped = shipped_recipes()
    study = [name for name, path in shipped.items() if path.parent.name == "study"]
    assert set(study) == {"drope-like"} | {
        *("plain", "pi", "pi-16k", "pi-64k", "yarn-16k", "yarn-64k", "pose", "pose-yarn", "randpos", "end-anchor"),
        *("clex-like", "jumps"),
        *("without-offset", "without-scale"),
    }
    budgets = set()
    for name in [*study, "paper"]:
        recipe, train = load_recipe(name), load_recipe(name).train
        windows = train.steps * train.batch_size * train.gradient_accumulation
        budgets.add((windows * recipe.data.window, train.learning_rate, train.schedule, train.warmup_steps))
    assert budgets == {(39_321_600, 2e-4, "cosine", 20)}


@pytest.mark.parametrize("name", ["pi-16k", "pi-64k", "yarn-16k", "yarn-64k"])
def test_full_length_recipes_train_at_the_window_that_their_scale_covers(name: str) -> None:
    recipe = load_recipe(name)
    assert f"-{recipe.data.window // 1024}k" in name and recipe.placement.kind == "none"
    assert recipe.scales.distribution == "fixed" and recipe.scales.max_scale == recipe.data.window / 8192
    assert recipe.method == {"pi": "linear", "yarn": "yarn"}[name.split("-")[0]]


def test_the_clex_like_recipe_draws_a_scale_a_window_and_its_places_all_over_that_scales_window() -> None:
    recipe = load_recipe("clex-like")
    sampler = PositionSampler(
        native_window=8192, training_window=4096, scales=recipe.scales, placement=recipe.placement
    )
    draws = [sampler.draw(i) for i in range(200)]
    assert len({draw.scale for draw in draws}) == 200 and all(1 <= draw.scale <= 16 for draw in draws)
    # Of a sorted uniform choice out of g * L places, the mean stands in the middle; its error is below 2 %.
    for draw in draws:
        assert (draw.positions[1:] > draw.positions[:-1]).all()
        assert abs(draw.positions.mean() / (draw.scale * 8192) - 0.5) < 0.02


def test_no_recipe_hides_another() -> None:
    folder = shipped_recipes()["paper"].parent
    files = sorted(folder.rglob("*.toml"))
    assert sorted(shipped_recipes().values()) == files and len({file.stem for file in files}) == len(files)


@pytest.mark.parametrize("name", ["paper-llama2-7b", "paper-llama2-13b"])
def test_llama2_recipes_hold_the_papers_hyperparameters(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.train.learning_rate, recipe.train.steps, recipe.train.betas) == (1e-5, 30_000, (0.9, 0.95))
    assert "NOT RUN HERE" in shipped_recipes()[name].read_text()


@pytest.mark.parametrize("name", shipped_recipes())
def test_resolved_recipe_reads_back_equal(name: str, tmp_path) -> None:
    awkward = 'a "quoted" back\\slash\tand ü'
    recipe = load_recipe(name, [f"model.name={awkward}", 'data.sources=[{path="x", separator="<|end|>"}]'])
    assert recipe.model.name == awkward
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(str(file)) == recipe


def test_overrides_reach_nested_keys_and_convert() -> None:
    recipe = load_recipe("paper", ["train.steps=7", "scales.max_scale=8", "train.betas=[0.8, 0.9]", "model.name=a/b"])
    assert (recipe.train.steps, recipe.scales.max_scale, recipe.train.betas) == (7, 8.0, (0.8, 0.9))
    assert isinstance(recipe.scales.max_scale, float)
    assert recipe.model.name == "a/b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=1", r"unknown key train\.step; did you mean train\.steps\?"),
        ("trian.steps=1", r"unknown key trian; did you mean train\?"),
        ("method=yarm", "method = 'yarm': choose one of none, linear, ntk, yarn"),
        ("train.steps=many", r"train\.steps = 'many': expected int"),
        ("train.steps=true", r"train\.steps = True: expected int"),
        ("train.steps=0", r"train\.steps = 0: use at least 1"),
        ("scales.max_scale=0.5", r"scales\.max_scale = 0\.5"),
        ("scales.max_scale=2.5", "log_uniform takes reals"),
        ("placement.kind=jump", r"placement\.kind = 'jump': choose one of"),
        ("placement.min_jumps=5", r"placement\.min_jumps = 5"),
        ("data.window=4", r"data\.window = 4"),
        ('data.sources=[{path="a", synthetic="copies"}]', "give path or synthetic"),
        ("data.sources=3", "expected a list"),
        ("train=3", "expected a table"),
        ("train.betas=[0.9]", "two betas"),
        ("train.keep_checkpoints=1", "use at least 2"),
        ("model.dtype=bfloat16", "loses small updates"),
        ("lora.train_norms=true", "without lora.rank all is trained"),
        ("steps", "write section.key=value"),
        ("name.x=1", "'name' is not a section"),
    ],
)
def test_bad_override_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("paper", [override])


def test_flash_attention_keeps_documents_apart_in_batches_of_one_row() -> None:
    both = ["data.document_mask=true", "model.attn_implementation=flash_attention_2"]
    with pytest.raises(ValueError, match=r"train\.batch_size = 2: data\.document_mask with flash attention needs 1"):
        load_recipe("paper", [*both, "train.batch_size=2"])
    load_recipe("paper", [*both, "train.batch_size=1"])
    load_recipe("paper", [both[0], "model.attn_implementation=flex_attention", "train.batch_size=2"])
    load_recipe("paper", [both[1], "train.batch_size=2"])


def test_unknown_recipe_is_suggested() -> None:
    with pytest.raises(ValueError, match="did you mean 'recommended'"):
        load_recipe("recomended")


def test_broken_toml_names_the_file(tmp_path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text("name = ")
    with pytest.raises(ValueError, match=r"broken\.toml: not valid TOML"):
        load_recipe(str(file))


def test_empty_recipe_is_the_defaults() -> None:
    assert parse_recipe({}) == Recipe()
