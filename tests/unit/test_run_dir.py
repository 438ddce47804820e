"""A run's directory: one live owner, one row a step, and nothing that is half there."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eellm.checkpoint.files import read_json, read_tensors
from eellm.errors import RunError
from eellm.train.run_dir import RunDir

ROOT = Path(__file__).parents[2]


def write_rows(run_dir, *lines):
    run_dir.metrics.write_text("".join(lines))


def row(step, **values):
    return json.dumps({"step": step, **values}) + "\n"


def test_a_directory_belongs_to_one_live_process_and_is_free_when_that_is_killed(tmp_path):
    script = (
        "import sys; from pathlib import Path; from eellm.train.run_dir import RunDir\n"
        "held = RunDir(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=r"run is in use by a run that is alive.*another out_dir"):
            RunDir(tmp_path / "run")
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    RunDir(tmp_path / "run")


def test_a_resume_drops_rows_beyond_the_checkpoint_and_a_torn_last_line(tmp_path):
    run_dir = RunDir(tmp_path)
    kept = [row(1, loss=3.0), row(2, loss=2.0)]
    for torn in ("", '{"step": 2, "lo', '{"step": 3, "loss": 1.0}', '{"step": 4', "\0\0\0"):
        write_rows(run_dir, *kept, row(3, loss=1.5), torn)
        run_dir.keep_metrics_up_to(2)
        assert run_dir.metrics.read_text() == "".join(kept)
    write_rows(run_dir, *kept, row(3).rstrip("\n"))
    run_dir.keep_metrics_up_to(3)
    assert run_dir.metrics.read_text() == "".join([*kept, row(3)]), "whole but for its line break"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_without_metrics_has_none_to_drop(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.keep_metrics_up_to(5)
    assert not run_dir.metrics.exists()


def test_the_batch_of_the_last_bad_step_is_kept(tmp_path):
    run_dir = RunDir(tmp_path)
    for step in (7, 8):
        directory = run_dir.save_bad_batch(step, {"tokens_BT": torch.tensor([[step, 1]])})
    assert read_json(directory / "batch.json") == {"step": 8}
    assert dict(read_tensors(directory / "batch.safetensors"))["tokens_BT"].tolist() == [[8, 1]]
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["bad-batch"]


def test_a_state_replaces_the_one_before_and_the_newest_is_loaded(tmp_path):
    run_dir = RunDir(tmp_path)
    assert run_dir.load_state() is None
    for step in (9, 10, 1000000):
        run_dir.save_state(step, {"loader": {"epoch": step}}, {"w": torch.full((2,), float(step))})
    data, tensors = run_dir.load_state()
    assert data == {"step": 1000000, "loader": {"epoch": 1000000}}
    assert tensors["w"].tolist() == [1e6, 1e6]
    assert len(list(tmp_path.glob("state-*"))) == 1


def test_the_newest_state_has_the_largest_number_however_many_digits_it_has(tmp_path, monkeypatch):
    run_dir = RunDir(tmp_path)
    monkeypatch.setattr("eellm.train.run_dir._remove", lambda directory: None)  # killed before the older one went
    for step in (999_950, 1_000_000):
        run_dir.save_state(step, {}, {"x": torch.tensor([step])})
    data, tensors = run_dir.load_state()
    assert (data["step"], tensors["x"].item()) == (1_000_000, 1_000_000)


def test_to_start_anew_forgets_everything_that_a_resume_would_take_up(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.save_state(5, {}, {"w": torch.zeros(1)})
    run_dir.save_bad_batch(5, {"w": torch.zeros(1)})
    (run_dir.checkpoints / "step-00000005").mkdir(parents=True)
    write_rows(run_dir, row(1))
    (tmp_path / "wandb-id").write_text("abc")
    run_dir.start_anew()
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    assert run_dir.load_state() is None


def test_a_process_killed_while_it_starts_anew_leaves_no_half_state(tmp_path, monkeypatch):
    run_dir = RunDir(tmp_path)
    run_dir.save_state(5, {}, {"w": torch.zeros(1)})

    def killed(directory, **_):
        if Path(directory).exists():
            (Path(directory) / "state.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_dir.start_anew()
    assert run_dir.load_state() is None
    run_dir.start_anew()
    run_dir.save_state(5, {}, {"w": torch.ones(1)})
    run_dir.start_anew()
    assert run_dir.load_state() is None
