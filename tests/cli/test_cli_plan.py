"""`eellm plan`: its tables and its JSON, its pictures, and what it says to what can't be."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from eellm.cli.main import main

RECIPE = str(Path(__file__).parents[2] / "recipes/paper-1.3b.toml")


@pytest.fixture
def printed(capfd):
    """Runs a command; returns what it printed."""

    def call(*words):
        assert main(["plan", *map(str, words)]) == 0
        return capfd.readouterr().out

    return call


@pytest.fixture
def refused(capfd, tmp_path, monkeypatch):
    """Runs a command that must be refused with one line; returns it."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        assert main(["plan", *map(str, words)]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
        return err

    return call


def test_a_recipe_s_step_as_json(printed):
    plan = json.loads(printed(RECIPE, "--json"))
    assert {"iteration_s", "bubble", "peak_memory_gb", "overhead_vs_no_exits", "exits"} <= plan.keys()
    assert len(plan["peak_memory_gb"]) == 4
    assert [set(exit) for exit in plan["exits"]] == [{"layer", "stage", "cost_s"}] * 2
    assert [exit["layer"] for exit in plan["exits"]] == [6, 12]
    assert 0 < plan["overhead_vs_no_exits"] < 0.05
    assert 0 < plan["bubble"] < 0.5


def test_options_of_the_recipe_count(printed):
    before, after = (json.loads(printed(RECIPE, "--json", "--parallel.recompute", how)) for how in ("none", "full"))
    assert after["iteration_s"] > 1.2 * before["iteration_s"]
    assert max(after["peak_memory_gb"]) < max(before["peak_memory_gb"])


def test_hardware_counts(printed):
    a100, h100 = (json.loads(printed(RECIPE, "--json", "--hardware", name)) for name in ("a100-80", "h100"))
    assert h100["iteration_s"] < 0.6 * a100["iteration_s"]


def test_the_tables_show_stages_exits_the_schedule_and_decoding(printed):
    text = printed(RECIPE, "--decode.exits", "6=0.3,12=0.3,24=0.4", "--decode.pp", 4)
    for word in ("1f1b", "after layer 6", "final", "rank 3", "bubble", "recomputation", "pipelined"):
        assert word in text


@pytest.mark.parametrize("suffix", ["svg", "json", "txt"])
def test_the_timeline_is_drawn(printed, tmp_path, suffix):
    path = tmp_path / f"step.{suffix}"
    printed(RECIPE, "--json", "--timeline", path, "--parallel.num-microbatches", 8, "--train.global-batch-size", 256)
    if suffix == "json":
        events = json.loads(path.read_text())["traceEvents"]
        assert sum(event["ph"] == "X" and event["name"].startswith("F ") for event in events) == 4 * 8
    elif suffix == "svg":
        assert len(list(ET.parse(path).iter("{http://www.w3.org/2000/svg}rect"))) > 64
    else:
        assert "rank 3" in path.read_text()


def test_the_paper_s_table_has_ten_rows_in_order(printed):
    rows = json.loads(printed("--paper-table", "--json"))
    names = {"model", "setup", "iteration_s", "memory_gb", "paper_iteration_s", "paper_memory_gb"}
    assert [set(row) for row in rows] == [names] * 10
    setups = ["standard", "naive", "deferral", "moved", "both"]
    assert [(row["model"], row["setup"]) for row in rows] == [(m, s) for m in ("1.3B", "7B") for s in setups]
    assert "17.93" in printed("--paper-table")


def test_a_search_names_the_best_and_the_others(printed):
    words = (RECIPE, "--search", "--devices", 4, "--json", "--train.global-batch-size", 32)
    plan = json.loads(printed(*words))
    layout = plan["layout"]
    assert layout["pp"] * layout["tp"] * layout["dp_shard"] * layout["dp_replicate"] == 4
    assert all(other["reason"] for other in plan["search"]["runners_up"])
    assert max(plan["peak_memory_gb"]) <= 80


def test_what_cannot_be_is_refused_with_what_can(refused):
    assert "did you mean 'a100-80'" in refused(RECIPE, "--hardware", "a100-8")
    assert "use at most 24 stages" in refused(RECIPE, "--parallel.pp", 32)
    assert "the nearest that work: 4 and 8" in refused(RECIPE, "--parallel.num-microbatches", 2)
    assert "add --search" in refused(RECIPE, "--devices", 8)
    assert "step.png" in refused(RECIPE, "--timeline", "step.png")
    assert "6=0.3" in refused(RECIPE, "--decode.exits", "some")
    assert "no exit at layer 5" in refused(RECIPE, "--decode.exits", "5=0.5,24=0.5")
    assert "unknown option '--hardwear' (did you mean '--hardware'?)" in refused(RECIPE, "--hardwear", "h100")
    assert "no layout fits" in refused(RECIPE, "--search", "--devices", 1, "--memory-limit-gb", 1)
    assert "eellm plan RECIPE.toml" in refused("--json")
    assert "no-such.toml" in refused("no-such.toml")
