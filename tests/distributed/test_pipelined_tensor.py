"""Tensor parallelism inside a stage: what one process gives, whatever the method."""

import pytest
from hypothesis import HealthCheck, given, settings

import eellm
from eellm.errors import ConfigError
from tests.engines import REQUESTS, assert_same, check_mix, is_running
from tests.models import biased_model, tiny_config
from tests.traffic import LONG, events

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [1, 2, 3], LONG, [5]]
LAYOUTS = [(2, 2), (4, 2)]
"""Workers, and how many of them share a stage."""

pytestmark = pytest.mark.timeout(120)


MODEL = biased_model()


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def engine(request):
    workers, tp = request.param
    with eellm.Engine(MODEL, max_batch=4, workers=workers, tp=tp, timeout_s=20.0) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone():
    return eellm.Engine(MODEL, max_batch=4)


@pytest.mark.parametrize(("policy", "threshold"), [("max_prob", 0.2), ("margin", 0.3), ("entropy", 0.5), ("gate", 0.6)])
def test_early_and_pipelined_give_one_process_s_tokens_exits_and_log_probabilities(engine, alone, policy, threshold):
    options = {"threshold": threshold, "policy": policy, "max_new_tokens": 16}
    reference = alone.generate(PROMPTS, method="early", **options)
    assert len({layer for out in reference for layer in out.exits}) > 2, "tokens leave at several exits"
    for method in ("early", "pipelined"):
        for out, expected in zip(engine.generate(PROMPTS, method=method, **options), reference, strict=True):
            assert_same(out, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "full", "top_logprobs": 3},
        {"method": "full", "sampling": eellm.Sampling(temperature=0.9, top_p=0.9, seed=1)},
        {"method": "speculative", "always_draft": True},
        {"method": "auto"},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_every_method_gives_one_process_s_tokens(engine, alone, fields):
    reference = alone.generate(PROMPTS, max_new_tokens=12, **fields)
    for out, expected in zip(engine.generate(PROMPTS, max_new_tokens=12, **fields), reference, strict=True):
        assert_same(out, expected, exits=fields["method"] == "full")  # drafts depend on what passes take


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=events(REQUESTS))
def test_any_mix_of_requests_that_come_go_and_are_cancelled_gets_what_each_gets_alone(engine, alone, events):
    check_mix(engine, alone, events)


def test_rows_are_reused_and_copied_on_every_process(engine, alone):
    before = engine.stats().reused_tokens
    first = engine.submit(LONG[:48], method="full", max_new_tokens=20)
    next(first)
    others = [engine.submit([*LONG[:40], token], method="full", max_new_tokens=6) for token in (1, 2)]
    for handle, token in zip(others, (1, 2), strict=True):
        assert_same(handle.result(), alone.generate([[*LONG[:40], token]], method="full", max_new_tokens=6)[0])
    assert engine.stats().reused_tokens - before >= 64
    first.cancel()


def test_scores_are_one_process_s(engine, alone):
    for fields in ({}, {"exit": 3}, {"policy": "gate", "threshold": 0.5}):
        (ours,), (expected,) = engine.score([LONG[:30]], **fields), alone.score([LONG[:30]], **fields)
        assert ours.logprobs == pytest.approx(expected.logprobs, abs=1e-6)
        assert ours.exits == expected.exits


def test_each_process_holds_its_own_heads_and_its_part_of_the_matrices_until_the_engine_closes():
    """Memory is all processes' together, and what an engine of one process has."""
    with eellm.Engine(MODEL, max_batch=1) as alone, eellm.Engine(MODEL, max_batch=1, workers=4, tp=2) as engine:
        for each in (alone, engine):
            each.generate([[1, 2, 3]], max_new_tokens=4)
        assert engine.loop.memory.layers[1].shape[1] == 2 * MODEL.config.kv_heads // 2
        assert engine.stats().memory_bytes == alone.stats().memory_bytes
        assert engine.stats().weight_bytes == alone.stats().weight_bytes  # no matrix is read by both stages here
        assert engine.network.num_bytes < alone.network.num_bytes / 2
        pids = engine.crew.pids
    assert len(pids) == 3
    assert not any(map(is_running, pids))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 3, "tp": 2}, "tp = 2: .* workers must be a multiple of it, and it is 3; make it 2 or 4"),
        ({"workers": 1, "tp": 2}, "tp = 2: .* it is 1; make it 2"),
        ({"workers": 2, "tp": 0}, "tp = 0: must be at least 1"),
        ({"workers": 2, "tp": 2, "compile": True}, "compile = True: the kernels run a stage in one process"),
        ({"workers": 14, "tp": 2}, "workers = 14: the model has 6 layers, and each 2 workers need one"),
        ({"workers": 4, "tp": 4}, r"tp = 4: num_kv_heads = 2 is not a multiple of it; .* tp in \[1, 2\]"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        eellm.Engine(MODEL, **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 29}, r"vocab_size = 29 is not a multiple of it; this model takes tp in \[1\]"),
        ({"vocab_size": 30, "intermediate_size": 45}, "intermediate_size = 45 is not"),
    ],
)
def test_sizes_that_cannot_be_shared_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        eellm.Engine(eellm.build(tiny_config(**changes)), workers=2, tp=2)
