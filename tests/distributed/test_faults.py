"""Training runs that are killed, stopped, starved and spoilt, as processes of their own."""

import os
import random
import signal
import time

import pytest

from tests.distributed.runs import Run, finish, is_alive, last_step, rows_of

SAVE_OFTEN = ("--checkpoint.every", "2")
TWO_SHARDS = ("--parallel.dp_shard", "2")
TWO_STAGES = ("--parallel.pp", "2")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The rows of a run that nothing happened to."""
    return finish(tmp_path_factory.mktemp("unbroken") / "run", *SAVE_OFTEN)


def assert_same_curve(rows, expected, tolerance):
    assert [row["step"] for row in rows] == [row["step"] for row in expected], "each step has one row"
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (row["step"], name)


def is_saving(out_dir):
    return any(path.name.endswith(".tmp") for path in (out_dir / "checkpoints").glob(".step-*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_five_times_two_of_them_while_saving_has_the_curve_of_one_that_was_not(tmp_path, unbroken):
    out_dir, chance = tmp_path / "run", random.Random(7)
    for kill in range(5):
        run = Run(out_dir, *SAVE_OFTEN)
        assert run.until_step(min(last_step(out_dir) + chance.randint(1, 4), 19)), run.printed()
        if kill % 2:
            run.until(lambda: is_saving(out_dir))
        run.kill()
    assert_same_curve(finish(out_dir, *SAVE_OFTEN), unbroken, 0)


@pytest.mark.timeout(600)
def test_a_run_goes_on_under_other_layouts_with_the_same_curve(tmp_path, unbroken):
    out_dir = tmp_path / "run"
    for options, processes, step in ((TWO_SHARDS, 2, 5), (TWO_STAGES, 2, 11)):
        run = Run(out_dir, *SAVE_OFTEN, *options, processes=processes)
        assert run.until_step(step), run.printed()
        run.kill()
    assert_same_curve(finish(out_dir, *SAVE_OFTEN), unbroken, 1e-5)


def test_a_stopped_run_saves_and_ends_well_and_goes_on(tmp_path, unbroken):
    out_dir = tmp_path / "run"
    run = Run(out_dir, "--checkpoint.every", "0")
    assert run.until_step(3)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == 0, run.printed()
    assert "can be taken up again" in run.printed()
    stopped_after = last_step(out_dir)
    assert [path.name for path in (out_dir / "checkpoints").iterdir()] == [f"step-{stopped_after:08d}"]
    assert_same_curve(finish(out_dir), unbroken, 0)


@pytest.mark.timeout(600)
def test_a_killed_rank_ends_the_others_and_max_restarts_takes_the_run_up_again(tmp_path, unbroken):
    out_dir = tmp_path / "run"
    run = Run(out_dir, *SAVE_OFTEN, *TWO_SHARDS, processes=2, max_restarts=1)
    assert run.until_step(6), run.printed()
    os.kill(run.workers()[1], signal.SIGKILL)
    assert run.wait() == 0, run.printed()
    assert "resumed after step" in run.printed()
    assert_same_curve(rows_of(out_dir), unbroken, 1e-5)


def test_workers_end_when_their_launcher_is_killed(tmp_path):
    run = Run(tmp_path / "run", *TWO_SHARDS, "--train.steps", "100000", processes=2)
    assert run.until_step(1), run.printed()
    workers = run.workers()
    assert len(workers) == 2
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


def test_a_directory_held_by_a_live_run_is_refused(tmp_path):
    out_dir = tmp_path / "run"
    run = Run(out_dir, "--train.steps", "100000")
    assert run.until_step(1), run.printed()
    other = Run(out_dir)
    assert other.wait() == 2
    assert f"eellm: {out_dir} is in use by a run that is alive" in other.printed()
    assert run.process.poll() is None
    run.kill()


def test_a_rank_that_hangs_is_named_and_the_run_ends(tmp_path):
    run = Run(tmp_path / "run", *TWO_STAGES, "--train.steps", "100000", "--parallel.timeout_s", "10", processes=2)
    assert run.until_step(2), run.printed()
    workers = run.workers()
    os.kill(workers[1], signal.SIGSTOP)
    try:
        run.wait()
    finally:
        for worker in filter(is_alive, workers):
            os.kill(worker, signal.SIGKILL)
    assert "rank 1 hangs: it has not reported for" in run.printed()


def test_steps_that_are_not_finite_change_nothing_and_end_the_run_with_the_batch_kept(tmp_path):
    out_dir = tmp_path / "run"
    options = ("--optim.lr", "1e35", "--optim.warmup_steps", "0", "--train.max_bad_steps", "3")
    run = Run(out_dir, *options)
    assert run.wait() == 2, run.printed()
    assert "not finite, 3 in a row; lower optim.lr or look at the batch in" in run.printed()
    assert (out_dir / "bad-batch" / "batch.safetensors").exists()
    first, *skipped = rows_of(out_dir)
    assert first["skipped_steps"] == 0
    assert [row["skipped_steps"] for row in skipped] == [1, 2], "the third one ends the run"
    assert [row["grad_norm"] for row in skipped] == [None, None], "a row is JSON, which has no NaN"
