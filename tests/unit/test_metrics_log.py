"""Where a run's numbers go: valid rows in metrics.jsonl, and the same numbers wherever else they are asked for."""

import importlib
import io
import json
import math
import sys
import types

import pytest
from rich.console import Console

from eellm.errors import ConfigError
from eellm.train import metrics
from eellm.train.metrics import MetricsLog, check_writers
from eellm.train.run_dir import RunDir

ROW = {"step": 1, "loss": 2.5, "loss/exit_2": 3.0, "peak_memory_mb": [10.0, 20.5], "tokens_per_s": 12345.6}


def rows_of(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class FakeWandb(types.ModuleType):
    """Keeps what it was given, run by run."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.num_finished = [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, values, *, step):
        self.logged.append((step, values))

    def finish(self):
        self.num_finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_rows_are_appended_and_readable_as_soon_as_they_are_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, num_steps=3) as log:
        log.write(ROW)
        assert rows_of(path) == [ROW]
    with MetricsLog(path, num_steps=3, done=1) as log:
        log.write(ROW | {"step": 2})
    assert rows_of(path) == [ROW, ROW | {"step": 2}]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"], "nothing that was not asked for"


def test_numbers_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, num_steps=1) as log:
        log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "peak_memory_mb": [-math.inf, 1.0]})
    assert rows_of(path) == [{"step": 1, "loss": None, "grad_norm": None, "peak_memory_mb": [None, 1.0]}]


def test_a_process_that_is_not_to_write_writes_nothing(tmp_path, monkeypatch, wandb):
    monkeypatch.chdir(tmp_path)
    with MetricsLog(None, num_steps=1, tensorboard=True, wandb="project") as log:
        log.write(ROW)
    assert list(tmp_path.iterdir()) == []
    assert wandb.inits == []


def test_tensorboard_has_every_number_and_lists_by_index(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for done in (0, 1):  # the second log goes on after step 1, and replaces the 7.0 of a step 2 that was lost
        with MetricsLog(tmp_path / "metrics.jsonl", num_steps=3, done=done, tensorboard=True) as log:
            for step in range(done + 1, 3):
                log.write(ROW | {"step": step, "loss": [2.5, 7.0 if done == 0 else 2.0][step - 1]})
    board = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    names = {"loss", "loss/exit_2", "peak_memory_mb/0", "peak_memory_mb/1", "tokens_per_s"}
    assert set(board.Tags()["scalars"]) == names
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 2.5), (2, 2.0)]
    assert [event.value for event in board.Scalars("peak_memory_mb/1")] == [20.5, 20.5]


def test_a_resumed_run_is_the_same_run_at_wandb_and_one_started_anew_another(tmp_path, wandb):
    run_dir = RunDir(tmp_path)
    for anew in (False, False, True):
        if anew:
            run_dir.start_anew()
        with MetricsLog(run_dir.metrics, num_steps=2, wandb="english") as log:
            log.write(ROW)
    first, resumed, anew = wandb.inits
    assert first == resumed
    assert first["project"] == "english"
    assert first["resume"] == "allow"
    assert first["id"] != anew["id"]
    numbers = {"loss": 2.5, "loss/exit_2": 3.0, "peak_memory_mb/0": 10.0, "peak_memory_mb/1": 20.5}
    assert wandb.logged[0] == (1, numbers | {"tokens_per_s": 12345.6})
    assert wandb.num_finished == 3


@pytest.mark.parametrize("asked", [{"wandb": "english", "tensorboard": False}, {"wandb": None, "tensorboard": True}])
def test_what_is_asked_for_and_not_installed_is_refused_with_what_to_install(tmp_path, monkeypatch, asked):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    name = "wandb" if asked["wandb"] else "tensorboard"
    for refused in (lambda: check_writers(**asked), lambda: MetricsLog(tmp_path / "m.jsonl", num_steps=1, **asked)):
        with pytest.raises(ConfigError, match=rf"train\.{name}.*pip install 'eellm\[{name}\]'"):
            refused()
    check_writers(tensorboard=False, wandb=None)


def test_a_folder_of_wandb_runs_is_not_taken_for_the_package(tmp_path, monkeypatch):
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"train\.wandb"):
        check_writers(tensorboard=False, wandb="english")
    sys.modules.pop("wandb", None)


@pytest.mark.parametrize(("is_terminal", "writes"), [(True, True), (True, False), (False, True)])
def test_the_progress_line_is_for_a_terminal_of_the_process_that_writes(tmp_path, monkeypatch, is_terminal, writes):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=120)
    monkeypatch.setattr(metrics, "Console", lambda **_: console)
    with MetricsLog(tmp_path / "metrics.jsonl" if writes else None, num_steps=4) as log:
        log.write(ROW)
        log.write(ROW | {"step": 2, "loss": math.nan})
        log.write(ROW | {"step": 3})
    shown = screen.getvalue()
    if is_terminal and writes:
        assert "loss 2.500, 12,346 tokens/s" in shown
        assert "3/4" in shown
    else:
        assert shown == ""
