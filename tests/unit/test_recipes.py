"""Every file in recipes/ is a recipe that loads, and the paper's have the paper's sizes."""

from pathlib import Path

import pytest
import torch

from eellm.config.load import from_toml
from eellm.config.train import TrainConfig
from eellm.config.tune import TuneConfig
from eellm.exits.lm import EarlyExitLM
from eellm.schedule.partition import check_microbatches, partition

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*.toml"))
TUNING = {"quickstart.toml", "smollm2-exits.toml"}

# layers, hidden size, heads; exits; weights; tied; tp, pp, rows in a microbatch; parameters. What is called 30B is
# Llama's model of 32.5 billion.
PAPER = {
    "1.3b": (24, 2048, 32, (6, 12), (0.25, 0.5), True, 1, 4, 4, 1.3e9),
    "7b": (32, 4096, 32, (8, 16), (0.1, 0.2), False, 1, 4, 2, 6.7e9),
    "13b": (40, 5120, 40, (10, 20), (0.1, 0.2), False, 2, 4, 1, 13e9),
    "30b": (60, 6656, 52, (15, 30), (0.1, 0.2), False, 4, 4, 1, 32.5e9),
}


def train_recipe(name) -> TrainConfig:
    return from_toml(TrainConfig, RECIPES / f"{name}.toml")


def meta_model(recipe: TrainConfig) -> EarlyExitLM:
    """The model without any memory for its weights."""
    with torch.device("meta"):
        return EarlyExitLM(recipe.model)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_loads(file):
    from_toml(TuneConfig if file.name in TUNING else TrainConfig, file)


def test_the_recipes_are_these():
    expected = {
        "quickstart",
        "smollm2-exits",
        "smollm2-full",
        "tutorial",
        "debug",
        "english",
        "english-bytes",
        *(f"paper-{size}" for size in PAPER),
    }
    assert {file.stem for file in FILES} == expected


@pytest.mark.parametrize("file", [f for f in FILES if f.name not in TUNING], ids=lambda file: file.stem)
def test_a_training_recipe_s_layout_fits_its_model_and_batch(file):
    recipe = from_toml(TrainConfig, file)
    model, layout = recipe.model, recipe.parallel
    assert recipe.data.seq_len <= model.max_seq_len
    assert len(recipe.objective.exit_weights) == len(model.exits), "each exit has a weight of its own"
    assert recipe.train.global_batch_size % layout.dp == 0
    if layout.num_microbatches is not None:
        assert recipe.train.global_batch_size % (layout.dp * layout.num_microbatches) == 0
        check_microbatches(layout.schedule, layout.pp, layout.num_microbatches)
    for size in (model.vocab_size, model.num_heads, model.kv_heads, model.intermediate_size, recipe.data.seq_len):
        assert size % layout.tp == 0
    stages = partition(model.num_layers, layout.pp, model.exit_layers, layers_per_stage=layout.layers_per_stage)
    assert sum(stage.num_layers for stage in stages) == model.num_layers


@pytest.mark.parametrize("size", PAPER)
def test_a_paper_recipe_says_what_the_paper_says(size):
    layers, hidden, heads, exits, weights, tied, tp, pp, rows, _ = PAPER[size]
    recipe = train_recipe(f"paper-{size}")
    model, layout = recipe.model, recipe.parallel
    assert (model.num_layers, model.hidden_size, model.num_heads) == (layers, hidden, heads)
    assert model.exit_layers == exits
    assert recipe.objective.exit_weights == weights
    assert model.tie_embeddings == tied
    assert {exit.head for exit in model.exits} == {"tied" if tied else "own"}
    assert (layout.tp, layout.pp) == (tp, pp)
    assert recipe.train.global_batch_size == layout.dp * layout.num_microbatches * rows == 2048
    assert (model.vocab_size, model.init_std, recipe.data.seq_len) == (32000, 0.01, 2048)
    optim = recipe.optim
    assert (optim.lr, optim.min_lr, optim.schedule, optim.warmup_steps) == (3e-4, 3e-5, "cosine", 2000)
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip) == (0.9, 0.95, 0.1, 1.0)


@pytest.mark.parametrize("size", PAPER)
def test_a_paper_model_has_about_as_many_parameters_as_its_name_says(size):
    model = meta_model(train_recipe(f"paper-{size}"))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == pytest.approx(PAPER[size][-1], rel=0.05)


@pytest.mark.parametrize("size", PAPER)
def test_a_paper_model_s_exits_start_its_second_and_third_stage(size):
    recipe = train_recipe(f"paper-{size}")
    model, layout = recipe.model, recipe.parallel
    stages = partition(
        model.num_layers,
        layout.pp,
        model.exit_layers,
        layers_per_stage=layout.layers_per_stage,
        placement=layout.exit_placement,
    )
    first, second = model.exit_layers
    assert [stage.exits for stage in stages] == [(), (first,), (second,), ()]
    assert (stages[1].first, stages[2].first) == (first + 1, second + 1)


@pytest.mark.parametrize(("pp", "tp", "dp", "microbatches"), [(8, 1, 1, 8), (2, 2, 2, 8), (1, 4, 2, 1), (1, 1, 8, 2)])
def test_the_debug_recipe_divides_by_every_layout_of_eight_processes(pp, tp, dp, microbatches):
    recipe = train_recipe("debug")
    model = recipe.model
    assert model.num_layers % pp == 0
    assert all(size % tp == 0 for size in (model.vocab_size, model.num_heads, model.kv_heads, recipe.data.seq_len))
    assert recipe.train.global_batch_size % (dp * microbatches) == 0


def test_the_debug_recipe_is_small_exact_and_has_an_exit_with_a_head_of_its_own():
    recipe = train_recipe("debug")
    assert recipe.model.exit_layers == (2, 4, 6)
    assert sorted(exit.head for exit in recipe.model.exits) == ["own", "tied", "tied"]
    assert recipe.train.dtype == "float32"
    assert recipe.train.deterministic
    assert recipe.train.steps == 20
    assert sum(parameter.numel() for parameter in meta_model(recipe).parameters()) < 1_000_000


def test_the_english_model_has_twelve_layers_and_4_to_24_million_parameters():
    recipe = train_recipe("english")
    assert (recipe.model.num_layers, recipe.model.exit_layers) == (12, (3, 6))
    assert 4e6 < sum(parameter.numel() for parameter in meta_model(recipe).parameters()) < 24e6
