"""What every layer would say of a text, on models whose answer is known."""

import json

import numpy as np
import pytest
import torch

import eellm
from eellm.data.packing import label_rows
from eellm.errors import ConfigError, DataError
from eellm.evaluate.suit import SuitConfig, measure_parts, probe_model, suit, tuned_probes
from tests.models import tiny_model
from tests.unit.test_advice import part_costs

COSTS = {"norm": part_costs(6), "mlp": part_costs(6, head_s=1.5), "layer": part_costs(6, head_s=2.0)}


def rows_of(num_rows=6, seq_len=32, seed=0):
    generator = np.random.default_rng(seed)
    tokens_NS = generator.integers(0, 29, (num_rows, seq_len + 1))
    return label_rows(tokens_NS, np.ones_like(tokens_NS, bool), np.zeros_like(tokens_NS))


@torch.no_grad()
def settled_after(layer, **changes):
    """A model whose layers behind `layer` add nothing to the hidden state."""
    model = tiny_model(seed=3, exits=(), dtype="float32", **changes)
    for number in range(layer + 1, 7):
        behind = model.decoder.layer(number)
        behind.attn.out.weight.zero_()
        behind.mlp.down.weight.zero_()
    return model


def test_where_layers_add_nothing_the_layer_before_them_is_right_and_gets_the_exit():
    found = suit(settled_after(3), rows_of(), costs=COSTS)
    data = found.as_json()
    (lens,) = data["probes"]
    assert lens["layers"] == [1, 2, 3, 4, 5, 6]
    assert lens["agreement"][2:] == [1, 1, 1, 1]
    assert max(lens["agreement"][:2]) < 1
    assert sum(lens["settled"][:3]) == pytest.approx(1)
    assert found.advice.verdict == "put"
    assert found.advice.exits == (3,)
    assert json.loads(json.dumps(data))["advice"]["exits"] == [3]


def test_a_random_model_gets_no_exits():
    found = suit(tiny_model(seed=3, exits=(), dtype="float32"), rows_of(), costs=COSTS)
    assert found.advice.verdict == "do not"
    assert found.advice.text.startswith("Do not")


def test_agreement_is_that_of_the_final_head_on_each_layer_s_hidden_state():
    model = tiny_model(seed=4, exits=(), dtype="float32")
    rows = rows_of(num_rows=3)
    (lens,) = suit(model, rows, costs=COSTS).as_json()["probes"]
    with torch.inference_mode():
        tokens_BT = torch.tensor(rows.tokens_NT.astype(int))
        h = model.decoder.embed(tokens_BT)
        choices = []
        for number in range(1, 7):
            h = model.decoder.run(h, number, number, model.decoder.rows(tokens_BT.shape[1]))
            choices.append(model.decoder.output(model.decoder.norm(h)).argmax(-1))
    expected = [float((choice == choices[-1]).double().mean()) for choice in choices]
    assert lens["agreement"] == pytest.approx(expected)
    right = torch.stack([choice == choices[-1] for choice in choices])
    first = right.int().argmax(0) + 1
    assert lens["mean_first_right"] == pytest.approx(float(first.double().mean()))


def test_the_exits_that_a_model_has_are_asked_too_and_it_stays_as_it_is():
    model = tiny_model(seed=5, dtype="float32")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = suit(model, rows_of(), SuitConfig(tune_steps=2), tune_rows=rows_of(seed=1), costs=COSTS)
    assert [probe.name for probe in found.probes] == ["logit lens", "own exits", "tuned"]
    own = found.probes[1]
    assert own.costs == COSTS["layer"]
    with torch.inference_mode():
        logits = model(torch.tensor(rows_of().tokens_NT.astype(int)))
    expected = {n: float((logits[n].argmax(-1) == logits[6].argmax(-1)).double().mean()) for n in (1, 2, 3, 5)}
    assert own.choices.agreement() == pytest.approx(expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_tuning_makes_probes_say_more_often_what_the_final_head_says():
    model, rows = tiny_model(seed=6, exits=(), dtype="float32"), rows_of(num_rows=24)
    found = [
        suit(model, rows, SuitConfig(tune_steps=steps, tune_lr=3e-3), tune_rows=rows, costs=COSTS).as_json()["probes"][
            1
        ]
        for steps in (1, 60)
    ]
    assert found[0]["layers"] == found[1]["layers"] == [1, 2, 3, 4, 5, 6]
    early, late = (np.mean(one["agreement"][:-1]) for one in found)
    assert late > early + 0.05


def test_probes_share_the_backbone():
    model = tiny_model(exits=(), dtype="float32")
    probe = probe_model(model, [eellm.ExitConfig(layer=2, norm="final")])
    assert probe.decoder is model.decoder
    assert list(probe.exits.parameters()) == []
    assert tuned_probes(model, rows_of(), SuitConfig(tune_steps=1)).decoder is model.decoder


def test_parts_are_timed_on_this_machine():
    model = tiny_model(exits=(), dtype="float32")
    costs = measure_parts(model, "mlp")
    assert costs.num_layers == 6
    assert min(costs.layer_s.at(1), costs.head_s.at(1), costs.exit_s.at(1), costs.gate_s.at(1)) > 0


def test_what_can_not_be_judged_is_refused():
    with pytest.raises(ConfigError, match="one layer"):
        suit(tiny_model(exits=(), num_layers=1, dtype="float32"), rows_of(), costs=COSTS)
    with pytest.raises(DataError, match="tune_steps"):
        suit(tiny_model(exits=(), dtype="float32"), rows_of(), SuitConfig(tune_steps=3), costs=COSTS)
