"""Settings outside their range are refused in words, before anything is started."""

import math

import pytest

import eellm
from eellm.errors import ConfigError, EellmError
from tests.models import tiny_model

NO_WHOLE = (True, 1.5, "4", None, math.nan)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def nothing_starts(monkeypatch):
    def start(*_, **__):
        raise AssertionError("something was started")

    monkeypatch.setattr("eellm.infer.engine.Backend", start)


def bad(**values):
    return [(name, value) for name, some in values.items() for value in some]


@pytest.mark.parametrize(
    ("name", "value"),
    bad(
        max_batch=(0, -1, *NO_WHOLE),
        max_tokens=(0, -5, *NO_WHOLE),
        workers=(0, -1, *NO_WHOLE),
        tp=(0, *NO_WHOLE),
        quantize=("int3", "8", 8, True),
        compile=(1, "yes", 0.0),
        timeout_s=(0, -1.0, math.nan, math.inf, True, "60", None),
        shadow=(-0.1, 1.1, math.nan, True, "0.1", None),
    ),
)
def test_an_engine_s(model, nothing_starts, name, value):
    with pytest.raises(ConfigError, match=f"^{name} = "):
        eellm.Engine(model, **{name: value})


OPTIONS = bad(
    max_new_tokens=(0, -1, *NO_WHOLE),
    max_deferred=(0, *NO_WHOLE),
    max_draft=(0, *NO_WHOLE),
    top_logprobs=(-1, *NO_WHOLE),
    threshold=(math.nan, -0.1, True, "0.5", {2: math.nan}),
    risk=(math.nan, 0, 1, True, "0.1"),
    method=("earl", "", 3, True),
    policy=("maxprob", 3, False),
    risk_metric=("rouge", None),
    typical=(math.nan, -0.1, 2, True, None),
    exits=((True,), (1.5,), ("2",), 5, (0,)),
    stop=(5, ("",), (3,), True),
    lookup=("no", 0, None),
    always_draft=(1, "yes"),
    ignore_eos=("false", 1),
    sampling=({"temperature": 1}, None, 0.7),
    max_tokens_new=(3,),
)


@pytest.mark.parametrize(("name", "value"), OPTIONS)
def test_generation_s(model, nothing_starts, name, value):
    with pytest.raises(ConfigError, match=f"^'?{name}"):
        eellm.generate(model, [[1, 2]], **{name: value})


@pytest.mark.parametrize(("name", "value"), bad(workers=(0, True), tp=(0, 1.5)))
def test_generation_s_workers(model, nothing_starts, name, value):
    with pytest.raises(ConfigError, match=f"^{name} = "):
        eellm.generate(model, [[1, 2]], **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    bad(
        temperature=(-0.1, math.nan, math.inf, True, "1"),
        top_k=(-1, 1.5, True),
        top_p=(-0.1, 2, math.nan, True),
        min_p=(-0.1, 1.1, math.nan),
        repetition_penalty=(0, -1, math.nan, math.inf, True),
        presence_penalty=(math.nan, math.inf, True),
        frequency_penalty=(math.nan, -math.inf, "0"),
        seed=(-1, 2**64, 1.5, True),
    ),
)
def test_sampling_s(name, value):
    with pytest.raises(ConfigError, match=f"^{name} = "):
        eellm.Sampling(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    bad(
        exit=(0, -1, True, 1.5, "2", 4, 99),
        top_logprobs=(-1, *NO_WHOLE),
        threshold=(math.nan, -1, True),
        exits=(5, (4,), (True,)),
        policy=("sure",),
        risk=(math.nan,),
        tresh=(1,),
    ),
)
def test_scoring_s(model, name, value):
    with eellm.Engine(model) as engine, pytest.raises(EellmError):
        engine.score([[1, 2, 3]], **{name: value})


def test_a_cache_directory_is_a_path_however_it_is_written(tmp_path):
    for number, kind in enumerate((str, lambda path: path)):
        model = tiny_model(dtype="float32", head_dim=16, hidden_size=64)
        expected = eellm.generate(model, [[1, 2]], max_new_tokens=4)
        directory = tmp_path / str(number)
        with eellm.Engine(model, quantize="int4", cache_dir=kind(directory)) as engine:
            engine.generate([[1, 2]], method="auto", max_new_tokens=4)
        assert {path.name.split("-")[0] for path in directory.iterdir()} >= {"rounded", "costs"}
        found = eellm.generate(model, [[1, 2]], max_new_tokens=4, cache_dir=kind(directory))
        assert found[0].tokens == expected[0].tokens
