"""`auto`: speculation or early exit as far as they pay by measured costs, plain decoding where they don't."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eellm
from eellm.infer import measure
from eellm.infer.costs import StepCosts
from eellm.infer.decode.guarded import ExitShares
from eellm.infer.packed import PackedNetwork
from eellm.infer.prepare import network_of
from tests.models import oracle, tiny_model
from tests.step_costs import step_costs

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def model_with(**costs):
    model = tiny_model(seed=4)
    network_of(model).costs = step_costs((*model.config.exit_layers, 6), **costs)
    return model


def test_without_a_threshold_auto_gives_full_depth_s_tokens():
    model = model_with(layer_s=1.0, head_s=0.01)
    (out,) = eellm.generate(model, [PROMPT], method="auto", max_new_tokens=60)
    assert out.tokens == [row[0] for row in oracle(model, PROMPT, num_tokens=60, thresholds={})]
    assert out.stats.accepted > 0


def test_where_heads_are_dear_nothing_is_drafted_but_a_probe_now_and_then():
    model = model_with(layer_s=1.0, head_s=50.0, exit_s={6: 1.0})
    (out,) = eellm.generate(model, [PROMPT], method="auto", lookup=False, max_new_tokens=100)
    assert out.stats.drafted <= 100 // 48 + 1
    assert out.stats.layers_run <= 1.03 * out.stats.layers_full
    options = {"method": "speculative", "lookup": False, "max_new_tokens": 100}
    (speculative,) = eellm.generate(model, [PROMPT], **options)
    assert speculative.stats.drafted <= 100 // 48 + 1
    (forced,) = eellm.generate(model, [PROMPT], always_draft=True, **options)
    assert forced.stats.drafted > 20
    assert forced.tokens == speculative.tokens == out.tokens


def test_with_a_threshold_exits_that_pay_are_used_and_others_are_not():
    cheap, dear = model_with(layer_s=1.0, head_s=0.01), model_with(layer_s=1.0, head_s=50.0, exit_s={6: 1.0})
    options = {"threshold": 0.3, "max_new_tokens": 110}
    (early,) = eellm.generate(cheap, [PROMPT], method="early", **options)
    (auto,) = eellm.generate(cheap, [PROMPT], method="auto", **options)
    assert auto.stats.layers_run < 0.9 * auto.stats.layers_full
    assert set(auto.exits) <= set(early.exits)
    (guarded,) = eellm.generate(dear, [PROMPT], method="auto", **options)
    late = guarded.exits[32:]
    assert sum(layer < 6 for layer in late) <= len(late) // 32 + 1, (
        "but for tokens that ask all exits, none leaves early"
    )


def test_costs_are_measured_once_for_a_model_and_kept_in_the_cache_directory(tmp_path, monkeypatch):
    calls, real = [], measure.measure
    monkeypatch.setattr(measure, "measure", lambda network: calls.append(1) or real(network))
    for _ in range(2):
        model = tiny_model(seed=4)  # another one, with the same weights
        with eellm.Engine(model, cache_dir=tmp_path) as engine:
            engine.generate([PROMPT], method="full")
            assert len(calls) <= 1, "full depth needs no costs"
            for _ in range(2):
                engine.generate([PROMPT], method="auto")
    assert len(calls) == 1
    (path,) = tmp_path.iterdir()
    assert StepCosts.from_json(path.read_text()) == network_of(model).costs
    path.write_text("{")
    assert isinstance(measure.measured(network_of(model), tmp_path), StepCosts)
    assert len(calls) == 2
    assert json.loads(path.read_text())["stops"] == [1, 2, 3, 5, 6]


def test_a_cache_directory_that_can_not_be_written_costs_a_warning_only(tmp_path):
    (tmp_path / "file").write_text("")
    costs = measure.measured(network_of(tiny_model(seed=4)), tmp_path / "file")
    assert costs.stops == (1, 2, 3, 5, 6)


def test_what_is_measured_is_what_runs(monkeypatch):
    network = network_of(tiny_model(seed=4))
    seen = set()
    run = PackedNetwork.run

    def watching(self, h_ND, first, last, rows, memory):
        seen.add((first, last, len(h_ND)))
        return run(self, h_ND, first, last, rows, memory)

    monkeypatch.setattr(PackedNetwork, "run", watching)
    costs = measure.measure(network)
    rows = costs.segment_s[0].rows
    assert rows == (1, 2, 4, 8, 16, 32, 64)
    segments = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 6))
    assert {item for item in seen if item[:2] != (1, 6)} == {(first, last, n) for first, last in segments for n in rows}
    assert set(costs.gate_s) == {1, 2, 3, 5}


@pytest.mark.parametrize("batch", [1, 5])
def test_batches_under_auto_stay_lossless(batch):
    model = model_with(layer_s=1.0, head_s=0.1)
    prompts = [PROMPT[: 3 + i] for i in range(batch)]
    outs = eellm.generate(model, prompts, method="auto", max_new_tokens=40)
    for out, prompt in zip(outs, prompts, strict=True):
        assert out.tokens == [row[0] for row in oracle(model, prompt, num_tokens=40, thresholds={})]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), gated=st.booleans(), whole=st.booleans())
def test_whatever_costs_and_thresholds_know_only_exits_with_a_threshold_are_used(data, gated, whole):
    exits = sorted(data.draw(st.sets(st.integers(1, 11), min_size=1, max_size=5)))
    used = sorted(data.draw(st.sets(st.sampled_from(exits), min_size=1)))
    head_s = st.sampled_from([1e-300, 1e-9, 0.1, 1.0, 30.0])
    costs = step_costs(
        (*exits, 12),
        layer_s=data.draw(st.sampled_from([1e-9, 1.0])),
        exit_s={layer: data.draw(head_s) for layer in (*exits, 12)},
        overhead_s=data.draw(st.sampled_from([0.0, 1.0])),
    )
    # a gate is there for those that the request names, and for some others
    have = {*used, *data.draw(st.sets(st.sampled_from(exits)))}
    costs = replace(costs, gate_s={layer: costs.gate_s[layer] for layer in have if gated})
    shares = ExitShares(costs, dict.fromkeys(used, 0.5), data.draw(st.integers(1, 16)), gated=gated, whole=whole)
    for layer in data.draw(st.lists(st.sampled_from([*used, 12]), min_size=16, max_size=48)):
        shares.batch_size = data.draw(st.sampled_from([1, 2, 100]))
        shares.saw(layer)
        assert shares.in_use.keys() <= set(used)


def test_an_exit_without_a_gate_is_no_obstacle_to_others_under_the_gate_policy():
    gates = (eellm.ExitConfig(layer=2, kind="norm", gate_size=8), eellm.ExitConfig(layer=4, kind="norm"))
    model = tiny_model(seed=4, exits=gates)
    (out,) = eellm.generate(model, [PROMPT], method="auto", policy="gate", exits=(2,), threshold=0.3, max_new_tokens=40)
    assert set(out.exits) <= {2, 6}
