"""Early-exit decoding against a decoder with no cache at all: tokens, exit layers, log-probabilities, scores."""

import pytest

import eellm
from tests.models import EXITS, oracle, tiny_config, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
THRESHOLDS = (0, 0.1, 0.3, 0.5, 0.8, 0.99, 1)
POLICIES = ("max_prob", "margin", "entropy", "gate")


def generated(model, threshold, *, num_tokens=32, prompt=PROMPT, **options):
    (out,) = eellm.generate(model, [prompt], max_new_tokens=num_tokens, threshold=threshold, **options)
    return list(zip(out.tokens, out.exits, out.logprobs, out.confidences, strict=True))


def assert_same(found, expected):
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row[2:] == pytest.approx(other[2:], abs=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_early_exit_equals_the_decoder_without_a_cache_for_every_threshold_and_cap(policy):
    taken = set()
    for seed in (0, 1, 2):
        model = tiny_model(seed=seed)
        for threshold in THRESHOLDS:
            thresholds = dict.fromkeys(model.config.exit_layers, threshold)
            expected = oracle(model, PROMPT, num_tokens=32, policy=policy, thresholds=thresholds)
            taken |= {layer for _, layer, _, _ in expected}
            for max_deferred in (1, 2, 5, 64):
                assert_same(generated(model, threshold, policy=policy, max_deferred=max_deferred), expected)
    assert taken == {1, 2, 3, 5, 6}, "the models' logits must be spread enough that every exit is taken"


@pytest.mark.parametrize("kind", ["embed", "norm", "mlp", "layer"])
def test_models_whose_exits_are_all_of_one_kind_equal_the_oracle(kind):
    exits = tuple(eellm.ExitConfig(layer=n, kind=kind, head="own") for n in (1, 3, 4))
    model = tiny_model(exits=exits, seed=5)
    for threshold in (0.3, 0.6):
        expected = oracle(model, PROMPT, num_tokens=30, thresholds=dict.fromkeys((1, 3, 4), threshold))
        assert len({layer for _, layer, _, _ in expected}) > 1
        for max_deferred in (1, 3, 64):
            assert_same(generated(model, threshold, num_tokens=30, max_deferred=max_deferred), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 5},
        {"sliding_window": 4, "sliding_layers": (2, 5, 6), "qkv_bias": True},
        {"qk_norm": True, "tie_embeddings": True, "activation": "gelu"},
        {"rope": eellm.RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)},
    ],
)
def test_every_feature_of_the_backbone_keeps_to_the_oracle(changes):
    model = tiny_model(seed=3, **changes)
    for threshold in (0.3, 0.6):
        expected = oracle(model, PROMPT, num_tokens=30, thresholds=dict.fromkeys(model.config.exit_layers, threshold))
        for max_deferred in (1, 4, 64):
            assert_same(generated(model, threshold, num_tokens=30, max_deferred=max_deferred), expected)


def test_a_threshold_for_each_exit_and_a_subset_of_exits_are_kept():
    model = tiny_model(seed=1)
    for thresholds in ({1: 0.9, 3: 0.2}, {2: 0.4, 5: 0.0}, {3: 0.5, 5: 1}):
        expected = oracle(model, PROMPT, num_tokens=30, thresholds=thresholds)
        assert_same(generated(model, thresholds, num_tokens=30, max_deferred=3), expected)
        assert {layer for _, layer, _, _ in expected} <= {*thresholds, 6}
    expected = oracle(model, PROMPT, num_tokens=30, thresholds={2: 0.3, 5: 0.3})
    assert_same(generated(model, 0.3, num_tokens=30, exits=[5, 2]), expected)


def test_thresholds_of_one_and_more_equal_full_depth_even_where_softmax_rounds_to_one():
    model = tiny_model(seed=2, sureness=200.0)
    full = generated(model, 0.5, method="full")
    assert max(confidence for _, _, _, confidence in full) == 1.0
    for threshold in (1, 1.0, 2.5, float("inf")):
        assert generated(model, threshold) == full
    assert [layer for _, layer, _, _ in full] == [6] * 32


def test_the_first_new_token_obeys_the_exit_rule_although_the_prompt_goes_through_every_layer():
    model = tiny_model(seed=0)
    (out,) = eellm.generate(model, [PROMPT], max_new_tokens=2, threshold=0.0)
    assert out.exits == [1, 1]
    assert out.stats.layers_run == 6 + 1
    assert out.stats.deep_passes == 1


def test_a_request_that_is_over_runs_nothing_more():
    model = tiny_model(seed=0)
    (out,) = eellm.generate(model, [PROMPT], max_new_tokens=1, threshold=0.0)
    assert out.exits == [1]
    assert (out.stats.layers_run, out.stats.deep_passes) == (1, 0)


def test_the_cap_bounds_the_rows_that_wait_and_changes_the_work_only():
    model = tiny_model(seed=0)
    runs = {
        cap: eellm.generate(model, [PROMPT], max_new_tokens=34, threshold=0.0, max_deferred=cap)[0] for cap in (1, 7)
    }
    assert runs[1].tokens == runs[7].tokens
    assert runs[1].stats.deep_passes == 1 + 16  # the prompt's, then every second token's
    assert runs[7].stats.deep_passes == 1 + 4
    assert runs[7].stats.layers_run == 6 + 29 * 1 + 4 * 6
    assert runs[7].stats.layers_full == 34 * 6


def test_output_matrices_run_once_per_test_and_never_for_exits_that_are_off():
    model = tiny_model(seed=0)
    (out,) = eellm.generate(model, [PROMPT], max_new_tokens=30, threshold={2: 0.4, 3: 1.0})
    heads = out.stats.heads_run
    assert set(heads) <= {2, 6}
    assert heads[2] == 30  # tested for each token, the prompt's last row included
    assert heads[6] == out.exits.count(6)


def test_under_the_gate_policy_an_exit_s_output_matrix_runs_only_where_its_gate_fires():
    model = tiny_model(seed=0)
    (out,) = eellm.generate(model, [PROMPT], max_new_tokens=30, policy="gate", threshold=0.5)
    for layer, runs in out.stats.heads_run.items():
        assert runs == out.exits.count(layer)


def test_a_prompt_s_tokens_do_not_depend_on_the_prompts_beside_it():
    model = tiny_model(seed=4)
    sampling = eellm.Sampling(temperature=0.9, seed=11)
    together = eellm.generate(model, [PROMPT, [7, 8], PROMPT], max_new_tokens=12, threshold=0.4, sampling=sampling)
    (alone,) = eellm.generate(model, [[7, 8]], max_new_tokens=12, threshold=0.4, sampling=sampling)
    assert together[1].tokens == alone.tokens
    assert together[0].tokens == together[2].tokens


def test_float32_models_take_the_oracle_s_exits_too():
    model = tiny_model(seed=0, dtype="float32")
    expected = oracle(model, PROMPT, num_tokens=30, thresholds=dict.fromkeys(model.config.exit_layers, 0.4))
    found = generated(model, 0.4, num_tokens=30, max_deferred=4)
    assert [row[:2] for row in found] == [row[:2] for row in expected]


def test_tiny_models_have_an_exit_of_every_kind():
    assert {e.kind for e in EXITS} == {"embed", "norm", "mlp", "layer"}
    assert tiny_config().exit_layers == (1, 2, 3, 5)
