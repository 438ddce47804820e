"""Intervals over documents: what they hold, and that a paired difference sees what two values' intervals don't."""

from statistics import mean

import numpy as np
import pytest

from eellm.evaluate.task_tables import cost_cells, score_cells
from eellm.evaluate.tasks import FILES, LOCAL, compare


def test_the_interval_is_that_of_the_mean_of_many_draws():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400).tolist()
    value, (low, high), difference, difference_interval = compare(values, values, mean)
    assert value == pytest.approx(mean(values))
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.15)
    assert low < value < high
    assert (difference, difference_interval) == (0, (0, 0))


def test_a_loss_on_the_same_documents_shows_though_both_intervals_overlap():
    generator = np.random.default_rng(2)
    full = generator.normal(0.5, 0.3, 200).tolist()
    less = [value - 0.02 + noise for value, noise in zip(full, generator.normal(0, 0.02, 200), strict=True)]
    _, interval, difference, (low, high) = compare(less, full, mean)
    _, full_interval, _, _ = compare(full, full, mean)
    assert interval[1] > full_interval[0]
    assert low < difference < high < 0


def test_the_same_input_gives_the_same_intervals():
    values = [float(i % 7) for i in range(50)]
    assert compare(values, values[::-1], mean) == compare(values, values[::-1], mean)


def test_every_task_file_of_ours_has_its_data_named():
    assert {file.stem for file in LOCAL.glob("*.yaml")} == set(FILES)
    for name, data in FILES.items():
        assert f"test: evaluation/{data}.jsonl" in (LOCAL / f"{name}.yaml").read_text()


def test_a_table_has_a_row_per_measure_and_rule_and_the_first_has_no_change():
    scores = [
        {
            "task": "t", "metric": metric, "rule": rule, "num_docs": 5, "value": 0.25, "interval": (0.1, 0.4),
            "difference": -0.01, "difference_interval": (-0.02, 0.001),
        }
        for rule in ("full depth", "exit 3") for metric in ("f1", "em")
    ]  # fmt: skip
    costs = [
        {"rule": "full depth", "exits": {"6": 10}, "layers": 1.25, "truncated": 0},
        {"rule": "exit 3", "exits": {"3": 10}, "layers": 0.5, "truncated": 2},
    ]
    report = {"scores": scores, "costs": costs}
    (title,) = score_cells(report)
    assert title == "t, documents: 5"
    rows = score_cells(report)[title].rows
    assert [row[:2] for row in rows] == [("em", "full depth"), ("em", "exit 3"), ("f1", "full depth"), ("f1", "exit 3")]
    assert rows[0][2:] == ("0.25", "0.1–0.4", "", "")
    assert rows[1][4:] == ("-0.01", "-0.02, +0.001")
    assert cost_cells(report)["What it took"].rows[1] == ("exit 3", "40%", "3: 100%", "2")
    markdown = score_cells(report)[title].as_markdown().splitlines()
    assert markdown[0] == "| measure | depth | value | 95% | change | 95% |"
    assert len(markdown) == 6
