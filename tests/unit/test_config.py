"""Configs: strict in what they read, whole in what they write, and a wrong value is named with what would be right."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.config.check import check_at_least, check_fraction
from eellm.config.load import from_dict, from_toml, to_dict
from eellm.config.model import ExitConfig, ModelConfig, RopeConfig
from eellm.config.tune import BaseConfig, TuneConfig
from eellm.errors import ConfigError

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_layers": 6, "num_heads": 4}


def config(**changes) -> ModelConfig:
    return ModelConfig(**SIZES | changes)


# --- reading ---


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    words: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)


@dataclass(frozen=True, kw_only=True)
class Outer:
    number: int
    flag: bool = False
    name: str = "x"
    place: Path = Path("here")
    mode: Literal["fast", "slow"] = "fast"
    limit: float | None = None
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()


def test_plain_data_becomes_nested_dataclasses():
    data = {
        "number": 3,
        "flag": True,
        "place": "a/b",
        "limit": 2,
        "inner": {"rate": 1, "words": ["a", "b"], "pair": [3, 4]},
        "many": [{"rate": 0.1}, {}],
    }
    expected = Outer(
        number=3,
        flag=True,
        place=Path("a/b"),
        limit=2.0,
        inner=Inner(rate=1.0, words=("a", "b"), pair=(3, 4.0)),
        many=(Inner(rate=0.1), Inner()),
    )
    found = from_dict(Outer, data)
    assert found == expected
    assert [type(x) for x in (found.limit, found.inner.rate, found.inner.pair[1])] == [float] * 3
    assert from_dict(Outer, {"number": 1, "limit": None}).limit is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmber": 3}, r"unknown key 'nmber' \(did you mean 'number'\?\)"),
        ({"inner": {"wrds": []}}, r"unknown key 'inner\.wrds' \(did you mean 'words'\?\)"),
        ({"many": [{}, {"raet": 1}]}, r"unknown key 'many\[1\]\.raet' \(did you mean 'rate'\?\)"),
        ({"zzzzzzzz": 3}, r"unknown key 'zzzzzzzz'$"),
        ({"number": 3.0}, r"number = 3\.0: must be a whole number"),
        ({"number": "3"}, "number = '3': must be a whole number"),
        ({"number": True}, "number = True: must be a whole number"),
        ({"number": None}, "number = None: must be a whole number"),
        ({"flag": "false"}, "flag = 'false': must be true or false"),
        ({"flag": 0}, "flag = 0: must be true or false"),
        ({"name": 5}, "name = 5: must be a string"),
        ({"place": 5}, "place = 5: must be a path"),
        ({"limit": "2"}, "limit = '2': must be a number"),
        ({"limit": True}, "limit = True: must be a number"),
        ({"inner": 3}, "inner = 3: must be a table"),
        ({"inner": [{}]}, r"inner = \[\{\}\]: must be a table"),
        ({"inner": {"rate": "fast"}}, r"inner\.rate = 'fast': must be a number"),
        ({"inner": {"words": "abc"}}, r"inner\.words = 'abc': must be a list"),
        ({"inner": {"words": ["a", 1]}}, r"inner\.words\[1\] = 1: must be a string"),
        ({"inner": {"pair": [1]}}, r"inner\.pair = \[1\]: must have 2 items"),
        ({"many": {}}, r"many = \{\}: must be a list"),
        ({"many": [3]}, r"many\[0\] = 3: must be a table"),
    ],
)
def test_a_wrong_key_or_type_is_named_with_its_path(change, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, {"number": 1} | change)


def test_a_missing_key_is_named_with_its_path():
    with pytest.raises(ConfigError, match="'number' is missing"):
        from_dict(Outer, {})
    with pytest.raises(ConfigError, match=r"'model\.base' is missing"):
        from_dict(TuneConfig, {"model": {}, "data": {"train": []}, "train": {"out_dir": "o"}})
    with pytest.raises(ConfigError, match=r"'data' is missing"):
        from_dict(TuneConfig, {"model": {"base": "b", "exits": [{"layer": 1}]}})
    with pytest.raises(ConfigError, match=r"Outer = 3: must be a table"):
        from_dict(Outer, 3)


def test_a_value_that_the_dataclass_refuses_is_named_with_its_path():
    tables = {"data": {"train": ["t"]}, "train": {"out_dir": "o"}}
    model = {"base": "b", "exits": [{"layer": 1}, {"layer": 2, "kind": "mpl"}]}
    with pytest.raises(ConfigError, match=r"model\.exits\[1\]\.kind = 'mpl': must be one of .*did you mean 'mlp'"):
        from_dict(TuneConfig, {"model": model, **tables})
    with pytest.raises(ConfigError, match=r"model\.exits: give either these, to add them, or an adapter"):
        from_dict(TuneConfig, {"model": {"base": "b"}, **tables})


RECIPE = """
optim = { lr = 2, warmup_steps = 3 }
[model]
base = "base"
exits = [{ layer = 2, kind = "mlp" }, { layer = 4, head = "own", gate_size = 8 }]
[data]
train = ["a.txt", "b.jsonl"]
[train]
out_dir = "out"
"""


def test_a_recipe_in_toml_is_read(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE)
    found = from_toml(TuneConfig, file)
    exits = (ExitConfig(layer=2, kind="mlp"), ExitConfig(layer=4, head="own", gate_size=8))
    assert found.model == BaseConfig(base=Path("base"), exits=exits)
    assert found.data.train == (Path("a.txt"), Path("b.jsonl"))
    assert (found.optim.lr, found.optim.warmup_steps) == (2.0, 3)
    assert from_dict(TuneConfig, json.loads(json.dumps(to_dict(found)))) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            RECIPE.replace("warmup_steps", "warmup_step"),
            r"unknown key 'optim\.warmup_step' \(did you mean 'warmup_steps'",
        ),
        (RECIPE.replace("lr = 2", "lr = nan"), r"optim\.lr = nan: must be at least 0"),
        (RECIPE.replace("lr = 2", "lr = true"), r"optim\.lr = True: must be a number"),
        (RECIPE + "[train]", "not a TOML file: "),
        (RECIPE.replace('base = "base"', ""), r"'model\.base' is missing"),
    ],
)
def test_errors_of_a_recipe_begin_with_its_name(tmp_path, text, message):
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        from_toml(TuneConfig, file)
    assert str(caught.value).startswith(f"{file}: ")


def test_a_recipe_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: no such recipe"):
        from_toml(TuneConfig, tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"can't be read: Is a directory"):
        from_toml(TuneConfig, tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: not a TOML file"):
        from_toml(TuneConfig, tmp_path / "latin.toml")


# --- writing ---

exit_configs = st.builds(
    ExitConfig,
    layer=st.integers(1, 5),
    kind=st.sampled_from(["norm", "mlp", "layer"]),
    head=st.sampled_from(["tied", "own"]),
    norm=st.sampled_from(["own", "final"]),
    gate_size=st.integers(0, 9),
) | st.builds(ExitConfig, layer=st.integers(1, 5), kind=st.just("embed"))
rope_configs = st.builds(
    RopeConfig,
    rope_type=st.sampled_from(["default", "linear", "yarn"]),
    rope_theta=st.floats(1.0, 1e7) | st.integers(1, 10**6),
    factor=st.floats(1.0, 64.0),
    attention_factor=st.none() | st.floats(0.1, 2.0),
    truncate=st.booleans(),
)
model_configs = st.builds(
    config,
    num_kv_heads=st.sampled_from([None, 1, 2, 4]),
    head_dim=st.sampled_from([None, 16, 32]),
    max_seq_len=st.integers(1, 10**6),
    rms_norm_eps=st.floats(1e-8, 1e-3),
    rope=rope_configs,
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
    qkv_bias=st.booleans(),
    sliding_window=st.none() | st.integers(1, 100),
    sliding_layers=st.none() | st.lists(st.integers(1, 6), unique=True).map(tuple),
    tie_embeddings=st.booleans(),
    eos_token_ids=st.lists(st.integers(0, 96)).map(tuple),
    exits=st.lists(exit_configs, unique_by=lambda e: e.layer),
)


@settings(deadline=None)  # machines are busy at times
@given(model_configs)
def test_a_model_s_config_written_as_json_is_read_back_equal(model):
    data = json.loads(json.dumps(to_dict(model)))
    assert from_dict(ModelConfig, data) == model


def test_fields_that_hold_their_default_are_not_written():
    assert to_dict(config()) == SIZES
    written = to_dict(config(exits=(ExitConfig(layer=2), ExitConfig(layer=1, kind="mlp"))))
    assert written["exits"] == [{"layer": 1, "kind": "mlp"}, {"layer": 2}]
    assert to_dict(Outer(number=1, place=Path("a/b")))["place"] == "a/b"


# --- models ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": (ExitConfig(layer=6),)}, r"exit at layer 6: the model has 6 layers .* use 1 to 5"),
        ({"exits": (ExitConfig(layer=60),)}, "exit at layer 60: the model has 6 layers"),
        (
            {"exits": (ExitConfig(layer=2), ExitConfig(layer=4), ExitConfig(layer=2, kind="mlp"))},
            "exit at layer 2 is given twice",
        ),
        ({"num_heads": 0}, "num_heads = 0: must be at least 1"),
        ({"num_heads": 5}, "hidden_size = 64: must be a multiple of num_heads = 5"),
        ({"num_kv_heads": 3}, "num_heads = 4: must be a multiple of num_kv_heads = 3"),
        ({"num_kv_heads": 8}, "num_heads = 4: must be a multiple of num_kv_heads = 8"),
        ({"num_kv_heads": 0}, "num_kv_heads = 0: must be at least 1"),
        ({"head_dim": 15}, "head_dim = 15: rotary embeddings need an even one"),
        ({"num_heads": 64}, "head_dim = 1: rotary embeddings need an even one"),
        ({"activation": "relu"}, "activation = 'relu': must be one of silu, gelu, gelu_tanh"),
        ({"vocab_size": True}, "vocab_size = True: must be a whole number"),
        ({"num_layers": 6.0}, r"num_layers = 6\.0: must be a whole number"),
        ({"hidden_size": None}, "hidden_size = None: must be a whole number"),
        ({"max_seq_len": "2048"}, "max_seq_len = '2048': must be a whole number"),
        ({"sliding_window": 0}, "sliding_window = 0: must be at least 1"),
    ],
)
def test_a_model_that_can_not_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 0}, "layer = 0: must be at least 1"),
        ({"layer": "2"}, "layer = '2': must be a whole number"),
        ({"layer": 2, "gate_size": -1}, "gate_size = -1: must be at least 0"),
        ({"layer": 2, "kind": "Norm"}, r"kind = 'Norm': must be one of embed, norm, mlp, layer \(did you mean 'norm'"),
        ({"layer": 2, "head": "tide"}, r"head = 'tide': .*did you mean 'tied'"),
        ({"layer": 2, "kind": "embed", "norm": "final"}, "an 'embed' exit has no norm to share"),
    ],
)
def test_an_exit_that_can_not_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ExitConfig(**changes)


def test_llama3_rope_needs_the_original_context():
    with pytest.raises(ConfigError, match="needs original_max_position_embeddings"):
        RopeConfig(rope_type="llama3")


def test_exits_are_kept_in_the_order_of_their_layers():
    model = config(exits=[ExitConfig(layer=5), ExitConfig(layer=1), ExitConfig(layer=3)])
    assert model.exit_layers == (1, 3, 5)
    assert model.with_exits((ExitConfig(layer=2),)).exit_layers == (2,)
    assert model.exit_layers == (1, 3, 5)


def test_layers_count_from_1_where_windows_slide():
    model = config(sliding_window=7, sliding_layers=(1, 6))
    assert [model.window(n) for n in range(1, 7)] == [7, None, None, None, None, 7]
    assert config(sliding_window=7).window(3) == 7
    assert config().window(3) is None


# --- checks ---


def test_checks_read_the_annotation_of_a_field():
    @dataclass
    class Config:
        whole: int | None = None
        part: float | None = None
        share: float = 0.5

    check_at_least(Config(), 1, "whole", "part")
    check_at_least(Config(whole=1, part=1), 1, "whole", "part")
    with pytest.raises(ConfigError, match=r"whole = 1\.0: must be a whole number"):
        check_at_least(Config(whole=1.0), 1, "whole")
    with pytest.raises(ConfigError, match=r"part = 0\.5: must be at least 1"):
        check_at_least(Config(part=0.5), 1, "part")
    with pytest.raises(ConfigError, match="share = None: must be a number"):
        check_fraction(Config(share=None), "share")
