"""kill -9 in the middle of a save: whatever is called a checkpoint afterwards loads, and one is always there."""

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch.distributed as dist

from eellm.checkpoint.steps import list_steps, step_dir
from eellm.checkpoint.store import Store, load_tensors
from tests.distributed.layouts import assert_equal, blank, single, tensor_parallel, whole
from tests.ranks import PRELOAD, run_on_ranks

SAVES = ((2, 20), (2, 21), (3, 30))
"""Step and seed of each: one goes on, one replaces, one goes on again; with keep = 1 every save removes one."""


def processes():
    """Starts processes that have torch loaded and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def save(store, step, seed):
    store.save(step, single(whole(seed)), {"seed": seed}, {"tokenizer.json": b"{}"})


def die_at(number, directory):
    """From now on this process kills itself at the `number`th time that it touches a file of `directory`."""
    calls = itertools.count(1)

    def count(event, args):
        touches = event == "open" and str(args[0]).startswith(str(directory))
        if (touches or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")) and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def check_what_is_left(directory):
    """Every checkpoint there is whole, the store finds one, goes on, and leaves nothing else."""
    for step in list_steps(directory):
        into = single(blank(whole()))
        state = load_tensors(step_dir(directory, step), into)
        assert_equal(into, whole(state["seed"]))
    store = Store(directory, keep=1)
    latest = store.latest()
    assert latest is not None, f"of {[path.name for path in directory.iterdir()]}"
    into = single(blank(whole()))
    state = store.load(latest, into)
    assert_equal(into, whole(state["seed"]))
    save(store, 4, 40)
    store.wait()
    assert [path.name for path in directory.iterdir()] == ["step-00000004"]


def die_at_every_file_operation(base):
    """Forks a process for each moment, until one lives through all saves; gives the number of moments."""
    for number in itertools.count(1):
        directory = base.with_name(f"killed-{number}")
        shutil.copytree(base, directory)
        child = os.fork()
        if child == 0:
            die_at(number, directory)
            store = Store(directory, keep=1)
            for step, seed in SAVES:
                save(store, step, seed)
            store.wait()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        check_what_is_left(directory)
        shutil.rmtree(directory)
        if status == 0:
            return number - 1
        assert os.WTERMSIG(status) == signal.SIGKILL


def test_killed_between_any_two_file_operations_there_is_a_checkpoint_and_all_that_are_there_load(tmp_path):
    base = tmp_path / "base"
    store = Store(base, keep=1)
    save(store, 1, 10)
    store.wait()
    with ProcessPoolExecutor(1, mp_context=processes()) as pool:
        num_moments = pool.submit(die_at_every_file_operation, base).result(timeout=240)
    assert num_moments > 40


def save_for_ever(directory, begun):
    store = Store(directory, keep=2)
    for step in itertools.count(1):
        save(store, step, step)
        begun.send(step)


@pytest.mark.slow
@pytest.mark.parametrize("num_saves", [2, 3, 6, 11])
def test_killed_at_a_random_moment_of_a_loop_of_saves(tmp_path, num_saves):
    receiver, sender = processes().Pipe(duplex=False)
    process = processes().Process(target=save_for_ever, args=(tmp_path, sender))
    process.start()
    for _ in range(num_saves):
        assert receiver.poll(60)
        begun = receiver.recv()
    process.kill()  # the last one is somewhere on its way
    process.join()
    assert Store(tmp_path, keep=2).latest() >= begun - 1
    check_what_is_left(tmp_path)


def lose_a_rank(directory, rank, number):
    store = Store(directory, keep=1)
    store.save(1, tensor_parallel(whole(10)), {"seed": 10})
    store.wait()
    if dist.get_rank() == rank:
        die_at(number, directory)
    store.save(2, tensor_parallel(whole(20)), {"seed": 20})
    store.wait()


@pytest.mark.parametrize(("rank", "number"), [(0, 1), (0, 6), (0, 9), (1, 1)])
def test_when_one_rank_is_killed_in_mid_save_the_other_is_told_and_the_checkpoint_before_stays(tmp_path, rank, number):
    with pytest.raises(AssertionError) as caught:
        run_on_ranks(2, lose_a_rank, tmp_path, rank, number)
    assert f"rank {rank} died" in str(caught.value)
    assert f"rank {1 - rank} raised" in str(caught.value)
    assert "CheckpointError: can't write" in str(caught.value)
    assert list_steps(tmp_path)
    check_what_is_left(tmp_path)
