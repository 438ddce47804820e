"""The evaluation of a text and the curve over thresholds: their figures, their order of runs, their JSON."""

import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

import eellm
from eellm.data.documents import Document
from eellm.data.loader import batches
from eellm.data.packing import pack
from eellm.errors import ConfigError, DataError
from eellm.evaluate import curve as curve_module
from eellm.evaluate.curve import CurveConfig, cut_prompts, measure_curve
from eellm.evaluate.perplexity import evaluate, text_rows
from eellm.evaluate.tables import CURVE_LEGEND, curve_cells, evaluation_cells
from eellm.exits.metrics import exit_table
from tests.models import tiny_model
from tests.worlds import tiny_tokenizer

CONFIG = CurveConfig(thresholds=(1.0, 0.5, 0.2), num_prompts=2, prompt_tokens=8, new_tokens=6)


def text(num_tokens=150, seq_len=32):
    tokens = np.random.default_rng(0).integers(29, size=num_tokens).astype(np.int32)
    return pack([Document(tokens=tokens, is_target=np.ones(num_tokens, bool))], seq_len)


def curve_of(model, config=CONFIG):
    rows = text()
    return measure_curve(model, rows, evaluate(model, rows).table, config)


def test_an_evaluation_has_the_figures_of_its_table():
    model, rows = tiny_model(seed=1), text()
    evaluation = evaluate(model, rows, batch_size=2)
    table = exit_table(model, batches(rows, 5))
    assert evaluation.num_tokens == 149
    assert [exit.layer for exit in evaluation.exits] == [1, 2, 3, 5, 6]
    assert [exit.kind for exit in evaluation.exits] == ["embed, own", "layer, own", "mlp, tied", "norm, tied", "final"]
    for exit in evaluation.exits:
        assert exit.perplexity == pytest.approx(table.perplexity(exit.layer))
        assert exit.agreement == pytest.approx(table.agreement(exit.layer))
        assert exit.accuracy == pytest.approx(table.accuracy(exit.layer))
        assert exit.bits_per_byte is None, "the model has no tokenizer"


def test_bits_per_byte_count_the_bytes_of_the_tokens_that_are_predicted(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    model.tokenizer = tokenizer
    words = "Two héros, 日本."
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": words}) + "\n")
    evaluation = evaluate(model, text_rows(tmp_path / "text.jsonl", model, seq_len=16, max_tokens=1000))
    first = tokenizer.decode(tokenizer.encode(words)[:1])
    assert evaluation.num_bytes == len(words.encode()) - len(first.encode())
    final = evaluation.exits[-1]
    bits = final.nll * evaluation.num_tokens / math.log(2)
    assert final.bits_per_byte == pytest.approx(bits / evaluation.num_bytes)


def test_a_text_is_read_up_to_the_limit_of_tokens_and_no_further(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    model.tokenizer = tokenizer
    lines = [json.dumps({"text": "one two three four five"}), json.dumps({"text": "six seven eight"})]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines, "this line isn't JSON, and isn't reached"]))
    whole = [*tokenizer.encode("one two three four five"), 0, *tokenizer.encode("six seven eight")]
    rows = text_rows(tmp_path / "text.jsonl", model, seq_len=64, max_tokens=len(whole) - 2)
    assert rows.tokens_NT[0].tolist() == whole[:-2] + [0] * (64 - len(whole) + 2)
    with pytest.raises(ConfigError, match="seq_len = 129: the model's context is 128"):
        text_rows(tmp_path / "text.jsonl", model, seq_len=129, max_tokens=10)
    model.tokenizer = None
    with pytest.raises(DataError, match="no tokenizer"):
        text_rows(tmp_path / "text.jsonl", model, seq_len=64, max_tokens=10)


def test_prompts_are_of_one_length_and_come_from_the_whole_text_without_its_padding():
    rows = text(num_tokens=150, seq_len=32)
    whole = rows.tokens_NT.reshape(-1).tolist()
    prompts = cut_prompts(rows, num_prompts=3, prompt_tokens=10)
    assert prompts == [whole[:10], whole[70:80], whole[140:150]]
    assert cut_prompts(text(num_tokens=7), num_prompts=2, prompt_tokens=10) == [text().tokens_NT[0, :7].tolist()] * 2


def test_a_curve_has_the_table_s_quality_and_generation_s_depth():
    model = tiny_model(seed=0)
    curve, rows = curve_of(model), text()
    table = evaluate(model, rows).table
    assert [quality.threshold for quality, _ in curve.points] == [1.0, 0.5, 0.2]
    prompts = cut_prompts(rows, num_prompts=2, prompt_tokens=8)
    full = eellm.generate(model, prompts, max_new_tokens=6, method="full")
    for quality, measured in curve.points:
        assert quality.agreement == table.at_threshold(quality.threshold).agreement
        outs = eellm.generate(model, prompts, max_new_tokens=6, threshold=quality.threshold)
        assert measured.layers_run == sum(out.stats.layers_run for out in outs)
        assert measured.layers_full == 2 * 6 * 6
        assert measured.mean_exit_layer == pytest.approx(np.mean([out.exits for out in outs]))
        same = []
        for out, other in zip(outs, full, strict=True):
            differs = [i for i in range(6) if out.tokens[i] != other.tokens[i]]
            same.append(differs[0] / 6 if differs else 1)
        assert measured.same_prefix == pytest.approx(np.mean(same))
        assert measured.speedup_range[0] <= measured.speedup <= measured.speedup_range[1]
        assert all(0 < x < math.inf for x in (measured.tokens_per_s, *measured.speedup_range))
    first = curve.points[0][1]
    assert (first.same_prefix, first.mean_exit_layer) == (1, 6)
    assert curve.points[-1][1].layers_run < first.layers_run


def test_every_early_run_stands_between_two_full_ones_and_is_compared_with_those(monkeypatch):
    order = []
    rates = iter([100, 10, 99, 12, 5, 8, 30, 10, 10, 10, 10])  # the first is thrown away: the process warms up

    def run(model, prompt, options, engine=None):
        order.append("full" if options.method == "full" else options.threshold)
        stats = eellm.generate(model, [prompt], max_new_tokens=2)[0].stats
        return curve_module._Sample([1, 2], type(stats)(**(vars(stats) | {"tokens_per_s": next(rates)})))

    monkeypatch.setattr(curve_module, "_run", run)
    config = CurveConfig(thresholds=(0.2, 0.9), num_prompts=2, prompt_tokens=4, new_tokens=2)
    curve = curve_of(tiny_model(seed=0), config)
    one_prompt = ["full", 0.9, "full", 0.2, "full"]
    assert order == ["full", *one_prompt, *one_prompt]
    (_, at_09), (_, at_02) = curve.points
    assert at_09.speedup_range == pytest.approx((10 / 20, 99 / 11))
    assert at_09.speedup == pytest.approx((10 / 20 + 99 / 11) / 2)
    assert at_02.speedup == pytest.approx((5 / 10 + 10 / 10) / 2)
    assert curve.full_tokens_per_s == 10


def test_a_curve_tells_the_conditions_that_it_was_measured_under():
    machine = curve_of(tiny_model(seed=0)).machine
    assert machine["num_threads"] >= 1
    assert machine["device"] == "cpu"
    assert machine["dtype"] == "float64"
    assert len(machine["load_average"]) == 2


def test_json_forms_survive_a_round_trip_and_fill_the_tables():
    model = tiny_model(seed=0)
    evaluation = evaluate(model, text()).as_json()
    curve = curve_of(model).as_json()
    for data in (evaluation, curve):
        assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert [row[0] for row in evaluation_cells(evaluation).rows] == ["1", "2", "3", "5", "6"]
    cells = curve_cells(curve)
    assert [row[0] for row in cells.rows] == ["1", "0.5", "0.2"]
    assert all(len(row) == len(cells.headers) for row in cells.rows)
    assert curve["points"][0]["agreement_by_exit"] == {"1": None, "2": None, "3": None, "5": None, "6": 1}


def wide_point(perplexity, tokens_per_s):
    """A point of a model with 100 layers whose figures take as much room as they can."""
    measured = {
        "tokens_per_s": tokens_per_s,
        "speedup": 12.34,
        "speedup_range": [10.01, 13.57],
        "layers_run": 9,
        "layers_full": 9,
        "mean_exit_layer": 100.0,
        "same_prefix": 1.0,
    }
    point = {"threshold": 0.95, "taken": {"100": 0.0}, "agreement": 1.0, "perplexity": perplexity}
    return point | {"measured": measured}


def test_tables_fit_into_80_columns_with_every_figure_whole():
    points = [wide_point(*figures) for figures in ((9999.99, 9999.9), (99999.4, 99999.4), (1.5e7, 1.5e5), (None, 1.0))]
    exit = {"layer": 100, "kind": "layer, tied", "perplexity": 9999.99, "bits_per_byte": 99.999}
    evaluation = {"exits": [exit | {"agreement": 1.0, "accuracy": 1.0}]}
    for cells in (curve_cells({"num_layers": 100, "points": points}), evaluation_cells(evaluation)):
        terminal = Console(file=io.StringIO(), width=80)
        terminal.print(cells.as_rich("title"))
        lines = terminal.file.getvalue().splitlines()
        assert all(header in lines[1] for header in cells.headers)
        for row, line in zip(cells.rows, lines[3:], strict=True):
            assert " ".join(line.split()) == " ".join(row)
    assert {"9,999.99", "99,999", "1.5e+07", "–"} == {
        row[3] for row in curve_cells({"num_layers": 100, "points": points}).rows
    }


def test_the_legend_explains_every_column_in_its_order():
    headers = curve_cells({"num_layers": 6, "points": []}).headers
    assert tuple(re.findall(r"(\S+) = ", CURVE_LEGEND)) == headers


def test_what_a_model_can_not_do_is_refused_before_any_run(monkeypatch):
    monkeypatch.setattr(curve_module, "_run", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(ConfigError, match="no exits"):
        curve_of(tiny_model(exits=()))
    gateless = tiny_model(exits=(eellm.ExitConfig(layer=2),))
    with pytest.raises(ConfigError, match="no gate"):
        curve_of(gateless, CurveConfig(policy="gate"))
    with pytest.raises(ConfigError, match="no exit at layer 4"):
        curve_of(tiny_model(), CurveConfig(exits=(4,)))
    with pytest.raises(ConfigError, match="new_tokens = 128"):
        curve_of(tiny_model(), CurveConfig(new_tokens=128))
    with pytest.raises(ConfigError, match="2 new tokens"):
        CurveConfig(new_tokens=1)
    for wrong in ({"method": "pipelined"}, {"workers": 2}):
        with pytest.raises(ConfigError, match="'pipelined' needs two or more"):
            CurveConfig(**wrong)
