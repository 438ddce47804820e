"""What a user may ask of generation: each option that makes no sense is refused, each exit gets its threshold."""

import math
from dataclasses import fields

import numpy as np
import pytest

from eellm.config.infer import GenerateConfig, Sampling, thresholds_by_layer
from eellm.errors import ConfigError


@pytest.mark.parametrize("value", [math.nan, True, "0.8", -0.1, [0.5], {2: math.nan}, {2: False}, {2: "x"}, {2: -1}])
def test_a_threshold_that_is_no_number_of_at_least_0_is_refused(value):
    with pytest.raises(ConfigError, match=r"threshold = .*: must be a number of at least 0"):
        GenerateConfig(threshold=value)


@pytest.mark.parametrize("value", [0, 0.5, 1, 7.5, math.inf, np.float32(0.5), np.int64(0), {2: 0.3, 4: 1}, {}])
def test_thresholds_are_numbers_of_any_kind_or_one_per_layer(value):
    assert GenerateConfig(threshold=value).threshold is value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens = 2\.5: must be a whole number"),
        ({"max_new_tokens": "64"}, "max_new_tokens = '64': must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens = True: must be a whole number"),
        ({"max_deferred": 0}, "max_deferred = 0: must be at least 1"),
        ({"max_deferred": None}, "max_deferred = None: must be a whole number"),
        ({"method": "earl"}, r"method = 'earl': must be one of full, early, .*did you mean 'early'"),
        ({"policy": "maxprob"}, r"policy = 'maxprob': .*did you mean 'max_prob'"),
        ({"risk": 0}, "risk = 0: must lie between 0 and 1"),
        ({"risk": 1.0}, r"risk = 1\.0: must lie between 0 and 1"),
        ({"risk": math.nan}, "risk = nan: must lie between 0 and 1"),
        ({"risk": True}, "risk = True: must be a number"),
        ({"risk": "0.02"}, r"risk = '0\.02': must be a number"),
        ({"risk_metric": "rouge"}, r"risk_metric = 'rouge': .*did you mean 'rouge_l'"),
        ({"risk": 0.02, "threshold": 0.5}, r"risk = 0\.02: .* leave threshold out"),
        ({"risk": 0.02, "policy": "max_prob"}, r"risk = 0\.02: .* leave policy out"),
        ({"risk": 0.02, "exits": (2,)}, r"risk = 0\.02: .* leave exits out"),
        ({"risk": 0.02, "method": "full"}, "'full' loses nothing; a risk is for early, pipelined or auto"),
        ({"risk": 0.02, "method": "speculative"}, "'speculative' loses nothing"),
        ({"stop": ("a", "")}, "stop = '': an empty stop string"),
        ({"stop": "abc"}, "stop = 'abc': must be a tuple of strings"),
        ({"stop": ("a", 5)}, r"stop = \('a', 5\): must be a tuple of strings"),
    ],
)
def test_options_of_generation_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(**changes)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, True, "1", None]),
        ("top_k", [-1, 1.5, math.nan, True, "5", None]),
        ("top_p", [-0.1, 1.1, math.nan, math.inf, False, "0.5", None]),
        ("min_p", [-0.1, 1.1, math.nan, math.inf, False, "0.5", None]),
        ("repetition_penalty", [0, -1.0, math.nan, math.inf, True, "1.1", None]),
        ("presence_penalty", [math.nan, math.inf, True, "1", None]),
        ("frequency_penalty", [math.nan, -math.inf, True, "1", None]),
        ("seed", [-1, 2**64, 0.5, True, "7"]),
    ],
)
def test_sampling_refuses_what_is_no_number_or_out_of_range(field, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"^{field} = .*: must"):
            Sampling(**{field: value})


def test_every_field_of_sampling_has_its_refusals_tested():
    assert {f.name for f in fields(Sampling)} == {
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
    }
    Sampling(temperature=2, top_k=np.int64(3), top_p=0, min_p=1, repetition_penalty=0.5, seed=2**64 - 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"threshold": 0.8}, {1: 0.8, 3: 0.8, 5: 0.8}),
        ({"threshold": 0}, {1: 0.0, 3: 0.0, 5: 0.0}),
        ({"threshold": 1}, {}),
        ({"threshold": 3.5}, {}),
        ({"threshold": 0.8, "exits": (5, 1)}, {1: 0.8, 5: 0.8}),
        ({"threshold": 0.8, "exits": ()}, {}),
        ({"threshold": {5: 0.2, 1: 0.9}}, {1: 0.9, 5: 0.2}),
        ({"threshold": {5: 0.2, 1: 1.0}}, {5: 0.2}),
        ({"threshold": {5: 0.2, 1: 0.9}, "exits": (5,)}, {5: 0.2}),
        ({"threshold": {}}, {}),
    ],
)
def test_the_exits_in_use_each_have_their_threshold_and_those_at_1_are_off(options, expected):
    found = thresholds_by_layer(GenerateConfig(**options), (1, 3, 5))
    assert found == expected
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    ("options", "layers", "message"),
    [
        ({"exits": (2,)}, (1, 3), "the model has no exit at layer 2; it has 1, 3"),
        ({"exits": (6,)}, (), "the model has no exit at layer 6; it has none"),
        ({"threshold": {2: 0.5}}, (1, 3), "no exit at layer 2"),
        ({"threshold": {1: 0.5}, "exits": (1, 3)}, (1, 3), "threshold: none given for the exit at layer 3"),
        ({"threshold": {1: 0.5, 2: 0.5}, "exits": (1, 2)}, (1, 3), "no exit at layer 2"),
    ],
)
def test_exits_that_the_model_lacks_and_exits_without_a_threshold_are_refused(options, layers, message):
    with pytest.raises(ConfigError, match=message):
        thresholds_by_layer(GenerateConfig(**options), layers)
