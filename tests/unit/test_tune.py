"""EE-Tuning on a tiny model: it learns, it touches the exits only, it resumes exactly, and its formulas hold."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pydoc_data.topics import topics

import pytest
import torch

import eellm
from eellm.cli.main import main
from eellm.config.load import from_dict
from eellm.config.tune import ObjectiveConfig, TuneConfig
from eellm.errors import ConfigError, RunError
from eellm.exits.loss import IGNORE
from eellm.train.objective import TuningObjective
from eellm.train.optim import learning_rate
from eellm.train.tune import Tuner, tune
from tests.models import tiny_config
from tests.worlds import tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved tiny model with a tokenizer; its own logits are sure enough to be worth imitating."""
    directory = tmp_path_factory.mktemp("tune") / "base"
    tokenizer = tiny_tokenizer()
    model = eellm.build(tiny_config(vocab_size=tokenizer.vocab_size, exits=(), init_std=0.2), seed=1)
    model.tokenizer = tokenizer
    eellm.save(model, directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "topics.jsonl"
    file.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)[:12]))
    return file


def recipe(base, text, out_dir, **tables):
    data = {
        "model": {
            "base": str(base),
            "exits": [
                {"layer": 2, "kind": "mlp", "gate_size": 8},
                {"layer": 4, "kind": "layer", "head": "own"},
            ],
        },
        "data": {"train": [str(text)], "seq_len": 48, "validation_rows": 4},
        "train": {"out_dir": str(out_dir), "steps": 12, "batch_size": 2, "evaluate_every": 4, "save_every": 5},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
    }
    for table, values in tables.items():
        data[table] = data.get(table, {}) | values
    return from_dict(TuneConfig, data)


def rows_of(out_dir):
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows]


@pytest.mark.parametrize(("beta", "better"), [(0.0, "val_loss"), (1.0, "val_agreement")])
def test_tuning_makes_every_exit_better_and_leaves_the_backbone_bit_identical(base, text, tmp_path, beta, better):
    before = {name: t.clone() for name, t in eellm.load(base).decoder.state_dict().items()}
    longer = {"train": {"steps": 60, "batch_size": 8, "evaluate_every": 30}, "optim": {"lr": 1e-2}}
    config = recipe(base, text, tmp_path / "run", **longer, objective={"beta": beta})
    first = Tuner(config).evaluate()
    adapter = tune(config)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 61))
    for layer in (2, 4):
        gain = rows[-1][f"{better}/exit_{layer}"] - first[f"{better}/exit_{layer}"]
        assert gain > 0.04 if better == "val_agreement" else gain < -0.04
        assert 0 <= rows[-1][f"val_fraction_0.5/exit_{layer}"] <= 1
    assert sum(row["loss"] for row in rows[-5:]) < sum(row["loss"] for row in rows[:5])
    assert sum(row["gate_loss/exit_2"] for row in rows[-5:]) < sum(row["gate_loss/exit_2"] for row in rows[:5])
    tuned = eellm.load(base, adapter)
    assert tuned.config.exit_layers == (2, 4)
    for name, tensor in tuned.decoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(torch.equal(t, before[n]) for n, t in eellm.load(base).decoder.state_dict().items())


def test_new_exits_start_with_logits_no_surer_than_they_are_right(base, text, tmp_path):
    losses = {}
    for fit in (False, True):
        tuner = Tuner(recipe(base, text, tmp_path / "run", model={"fit_scale": fit}))
        losses[fit] = tuner.evaluate()
    for layer in (2, 4):
        assert losses[True][f"val_loss/exit_{layer}"] < losses[False][f"val_loss/exit_{layer}"] - 0.1
        assert losses[True][f"val_agreement/exit_{layer}"] == losses[False][f"val_agreement/exit_{layer}"]


def test_a_run_killed_at_any_step_and_resumed_has_the_curve_of_one_that_was_not(base, text, tmp_path):
    tune(recipe(base, text, tmp_path / "whole"))
    config = recipe(base, text, tmp_path / "killed", train={"save_every": 3})
    (tmp_path / "recipe.json").write_text(json.dumps({"base": str(base), "text": str(text)}))
    script = (
        "import sys; sys.path.insert(0, '.'); from pathlib import Path\n"
        "from tests.unit.test_tune import recipe; from eellm.train.tune import tune\n"
        f"tune(recipe({str(base)!r}, {str(text)!r}, {str(tmp_path / 'killed')!r}, train={{'save_every': 3}}))\n"
    )
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for kill_at in (4, 8):
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= kill_at):
            assert process.poll() is None or process.returncode == 0, "the run ended by itself with an error"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with metrics.open("a") as file:
            file.write('{"step": 9, "lo')  # torn by the kill
    tune(config)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    states = [eellm.load(base, tmp_path / name / "adapter").exits.state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_finished_run_started_again_does_nothing_and_another_recipe_is_refused(base, text, tmp_path):
    tune(recipe(base, text, tmp_path / "run"))
    rows = rows_of(tmp_path / "run")
    tune(recipe(base, text, tmp_path / "run"))
    assert rows_of(tmp_path / "run") == rows
    with pytest.raises(RunError, match=r"optim\.lr = 0\.003, the recipe says 0\.1"):
        tune(recipe(base, text, tmp_path / "run", optim={"lr": 0.1}))
    tune(recipe(base, text, tmp_path / "run", optim={"lr": 0.1}, train={"resume": False, "steps": 2}))
    assert len(rows_of(tmp_path / "run")) == 2


def test_gradient_accumulation_changes_nothing_but_the_memory(base, text, tmp_path):
    rows = {}
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        out_dir = tmp_path / f"{batch_size}x{accumulate}"
        sizes = {"batch_size": batch_size, "accumulate": accumulate, "steps": 5, "save_every": 0}
        tune(recipe(base, text, out_dir, train=sizes, model={"dtype": "float64"}))
        rows[batch_size] = rows_of(out_dir)
    for other in (2, 1):
        for row, expected in zip(rows[other], rows[4], strict=True):
            assert row == pytest.approx(expected, rel=1e-9)


def test_layers_behind_the_deepest_exit_run_only_where_the_final_exit_teaches(base, text, tmp_path):
    calls = []
    for name, objective, expected in (
        ("plain", {"beta": 0.0, "gate": False}, {1, 2, 3, 4}),
        ("distilled", {"beta": 0.5, "gate": False}, {1, 2, 3, 4, 5, 6}),
        ("gated", {"beta": 0.0, "gate": True}, {1, 2, 3, 4, 5, 6}),
    ):
        tuner = Tuner(recipe(base, text, tmp_path / name, objective=objective))
        calls.clear()
        for number, layer in tuner.model.decoder.layers.items():
            layer.register_forward_hook(lambda *_, number=number: calls.append(int(number)))
        tuner.step(1)
        assert set(calls) == expected


def test_the_objective_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(7, 11, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    labels = torch.tensor([1, IGNORE, 3, 4, IGNORE, 6, 7])
    config = ObjectiveConfig(beta=0.3, temperature=2.0, gate=False)
    objective = TuningObjective(config, labels, teacher=lambda rows: teacher[rows])
    found = objective(torch.zeros(3, 4), logits[:3], slice(0, 3))
    found += objective(torch.zeros(4, 4), logits[3:], slice(3, 7))
    expected = 0.0
    for row in range(7):
        if labels[row] != IGNORE:
            p, q = ((x[row] / 2.0).softmax(-1) for x in (teacher, logits))
            expected += 0.7 * -logits[row].softmax(-1)[labels[row]].log() + 0.3 * 4.0 * (p * (p / q).log()).sum()
    assert found.item() == pytest.approx(float(expected), rel=1e-12)


def test_the_gate_learns_from_the_exit_and_never_bends_it(base, text, tmp_path):
    gradients = {}
    for gate in (False, True):
        tuner = Tuner(recipe(base, text, tmp_path / "run", objective={"gate": gate}))
        tuner.step(1)
        gradients[gate] = {n: p.grad for n, p in tuner.parameters.items() if ".2.gate." not in n}
        gates = [p.grad for n, p in tuner.parameters.items() if ".2.gate." in n]
        assert all((g is not None and g.abs().sum() > 0) == gate for g in gates)
    # the norm that clips includes the gate's gradient: compare directions
    for name, gradient in gradients[False].items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), gradients[True][name].flatten(), dim=0)
        assert cosine > 1 - 1e-6


def test_packed_documents_do_not_see_each_other(base, text):
    model = eellm.load(base, dtype="float64")
    tokens = torch.randint(0, 200, (1, 20), generator=torch.Generator().manual_seed(2))
    documents = torch.tensor([[0] * 7 + [1] * 13])
    positions = torch.tensor([[*range(7), *range(13)]])
    rows = model.decoder.packed_rows(positions, documents)
    ((_, packed),) = model.hiddens(tokens, rows)
    parts = (tokens[:, :7], tokens[:, 7:])
    apart = [dict(model.hiddens(part, model.decoder.rows(part.shape[1])))[6] for part in parts]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-12, atol=1e-12)


def test_exits_of_the_base_stay_as_they_are_and_an_adapter_can_be_tuned_further(base, text, tmp_path):
    model = eellm.load(base)
    eellm.add_exits(model, [eellm.ExitConfig(layer=1, kind="mlp", head="own")], init="random", seed=3)
    eellm.save(model, tmp_path / "with_exit")
    adapter = tune(recipe(tmp_path / "with_exit", text, tmp_path / "run"))
    both = eellm.load(tmp_path / "with_exit", adapter)
    assert both.config.exit_layers == (1, 2, 4)
    for name, tensor in model.exits.state_dict().items():
        assert torch.equal(both.exits.state_dict()[name], tensor)
    further = recipe(tmp_path / "with_exit", text, tmp_path / "further")
    further = from_dict(
        TuneConfig,
        {
            "model": {"base": str(tmp_path / "with_exit"), "adapter": str(adapter)},
            "data": {"train": [str(text)], "seq_len": 48, "validation_rows": 4},
            "train": {"out_dir": str(tmp_path / "further"), "steps": 2},
        },
    )
    again = eellm.load(tmp_path / "with_exit", tune(further))
    assert again.config.exit_layers == (1, 2, 4)
    assert eellm.load(base, adapter).config.exit_layers == (2, 4), "the backbone is the same"


def test_a_directory_in_use_is_refused(base, text, tmp_path):
    from eellm.train.run_dir import RunDir

    held = RunDir(tmp_path / "run")
    with pytest.raises(RunError, match="in use by a run that is alive"):
        tune(recipe(base, text, tmp_path / "run"))
    assert held.path.exists()


def test_exits_without_weights_of_their_own_can_not_be_tuned(base, text, tmp_path):
    with pytest.raises(ConfigError, match="weights of its own"):
        tune(recipe(base, text, tmp_path / "run", model={"exits": [{"layer": 2, "kind": "embed"}]}))


def test_options_override_the_recipe_and_exits_are_for_the_recipe_alone(base, text, tmp_path, capsys):
    file = tmp_path / "recipe.toml"
    file.write_text(
        f'[model]\nbase = "{base}"\nexits = [{{ layer = 2, kind = "norm" }}]\n'
        f'[data]\ntrain = ["{text}"]\nseq_len = 32\n[train]\nout_dir = "{tmp_path / "run"}"\nsteps = 9\n'
    )
    assert main(["tune", str(file), "--train.steps", "2", "--optim.lr", "1e-2"]) == 0
    assert [row["lr"] for row in rows_of(tmp_path / "run")] == pytest.approx([0.001, 0.002])
    assert main(["tune", str(file), "--train.steps", "2"]) == 2
    assert "optim.lr" in capsys.readouterr().err
    assert main(["tune", str(file), "--model.exits", "2"]) == 2
    assert "write them in the recipe" in capsys.readouterr().err


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    config = recipe("b", "t", "o", optim={"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4}).optim
    rates = [learning_rate(step, 20, config) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[11] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[3:]))
