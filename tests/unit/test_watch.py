"""The watch names the rank that hangs, and nobody else. Several ranks play in one process, on a clock of the test's;
at the end real processes do."""

import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import ExitStack
from datetime import timedelta

import pytest
import torch.distributed as dist

from eellm.log import log
from eellm.train.watch import EXIT_CODE, Report, Watch, judge
from tests.ranks import PRELOAD

TIMEOUT_S = 60.0


class Job:
    """Ranks on one store, whose threads are the test's own calls of `look`."""

    def __init__(self, num_ranks):
        self.now = 1000.0
        self.died = []
        self.stopped = set()  # ranks that no longer look, as a stopped process
        store = dist.HashStore()
        self.watches = [
            Watch(
                store,
                rank=rank,
                world_size=num_ranks,
                timeout_s=TIMEOUT_S,
                interval_s=0.001,
                clock=lambda: self.now,
                die=lambda rank=rank: self.died.append(rank),
            )
            for rank in range(num_ranks)
        ]

    def run(self, seconds, *, each_second=lambda: None):
        """Until the time is over or all have died that can."""
        for _ in range(int(seconds)):
            self.now += 1.0
            each_second()
            for rank, watch in enumerate(self.watches):
                if rank not in self.stopped and rank not in self.died:
                    watch.look()
            if len(self.died) == len(self.watches) - len(self.stopped):
                return


@pytest.fixture
def lines():
    """What is logged, line by line."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log.addHandler(handler)
    yield lambda: stream.getvalue().splitlines()
    log.removeHandler(handler)


def wait_all(job, stack, *ranks):
    for rank in ranks:
        stack.enter_context(job.watches[rank](f"waiting for gradients of stage {rank + 1}", waits=True))


def test_the_rank_that_stands_still_is_named_by_all_and_not_those_that_wait_for_it(lines):
    job = Job(4)
    with ExitStack() as stack:
        for watch in job.watches:
            watch.step = 12
        wait_all(job, stack, 0, 1, 2)
        job.now += 3  # it begins last, so that it isn't found by its age alone
        stack.enter_context(job.watches[3]("forward of stage 1, microbatch 3"))
        job.run(59)
        assert job.died == []
        job.run(30)
    assert sorted(job.died) == [0, 1, 2, 3]
    assert len(set(lines())) == 1
    assert lines()[0].startswith('rank 3 hangs: in "forward of stage 1, microbatch 3" of step 12 for 6')
    assert lines()[0].endswith("s (limit 60 s)")
    assert len(lines()) == 4, "each says it once"


def test_of_two_that_stand_still_the_one_that_did_so_first_is_named(lines):
    job = Job(3)
    with ExitStack() as stack:
        stack.enter_context(job.watches[2]("forward"))
        job.run(5)
        stack.enter_context(job.watches[0]("forward"))
        wait_all(job, stack, 1)
        job.run(100)
    assert lines()[0].startswith('rank 2 hangs: in "forward"')


def test_the_longest_in_its_action_comes_first_and_the_others_are_mentioned():
    reports = [Report(beat=9, action=f"forward {rank}", age_s=age) for rank, age in enumerate((61.0, 75.0, 3.0, 62.0))]
    verdict = judge(reports, [0.0] * 4, TIMEOUT_S)
    assert verdict == 'rank 1 hangs: in "forward 1" of step 0 for 75 s (limit 60 s); standing still too: 3, 0'


def test_the_others_take_over_the_verdict_though_they_have_not_waited_that_long_themselves(lines):
    job = Job(2)
    with ExitStack() as stack:
        stack.enter_context(job.watches[1]("forward"))
        job.run(55)
        wait_all(job, stack, 0)
        job.run(12)
    assert sorted(job.died) == [0, 1]
    assert len(set(lines())) == 1


def test_a_rank_that_no_longer_reports_is_named_with_what_it_did_last(lines):
    job = Job(3)
    with ExitStack() as stack:
        stack.enter_context(job.watches[1]("saving checkpoint", waits=True))
        wait_all(job, stack, 2)
        stack.enter_context(job.watches[0]("all-reduce that nobody called waiting"))
        job.run(10)
        job.stopped = {1}
        job.run(90)
    assert sorted(job.died) == [0, 2]
    assert lines()[0].startswith("rank 1 hangs: it has not reported for ")
    assert lines()[0].endswith('s, last in "saving checkpoint" of step 0 (limit 60 s)')


def test_a_rank_that_never_reported_is_named(lines):
    job = Job(2)
    job.stopped = {0}
    with job.watches[1]("waiting for the first batch", waits=True):
        job.run(90)
    assert job.died == [1]
    assert "rank 0 hangs: it has not reported for " in lines()[0]
    assert "it never did (limit 60 s)" in lines()[0]


def test_where_all_wait_the_line_says_who_waits_for_what(lines):
    job = Job(2)
    with ExitStack() as stack:
        wait_all(job, stack, 0, 1)
        job.run(90)
    assert sorted(job.died) == [0, 1]
    assert lines()[0].startswith("all ranks wait for each other (limit 60 s): rank 0 in ")
    assert 'rank 1 in "waiting for gradients of stage 2" of step 0 for 6' in lines()[0]


def test_a_rank_that_left_is_no_suspect_but_those_that_wait_for_it_say_so(lines):
    job = Job(2)
    with job.watches[1]("waiting for activations", waits=True):
        with pytest.raises(ValueError), job.watches[0]:
            raise ValueError
        job.stopped = {0}
        job.run(90)
    assert job.died == [1]
    assert "all ranks wait" in lines()[0]
    assert "rank 0 has ended with ValueError" in lines()[0]


def test_nobody_is_named_while_one_rank_gets_on_however_long_the_others_wait(lines):
    job = Job(3)
    with ExitStack() as stack:
        wait_all(job, stack, 1, 2)
        batches = stack.enter_context(ExitStack())

        def evaluate():
            if int(job.now) % 50 == 0:  # slow ones, of nearly the timeout
                batches.close()
                batches.enter_context(job.watches[0]("evaluating"))

        job.run(1000, each_second=evaluate)
        assert (job.died, lines()) == ([], [])
        batches.close()
        stack.enter_context(job.watches[0]("compiling"))
        job.run(90)
    assert 'rank 0 hangs: in "compiling"' in lines()[0], "and then it is"


def test_an_action_inside_another_counts_and_leaving_it_too():
    job = Job(1)
    with job.watches[0]("step"):
        for _ in range(10):
            job.run(40)
            with job.watches[0]("receive", waits=True):
                job.run(40)
    assert job.died == []
    job.run(90)
    assert job.died == [0], "between actions time counts as well"


def test_a_job_that_was_stopped_as_a_whole_and_goes_on_is_left_alone():
    job = Job(2)
    with ExitStack() as stack:
        wait_all(job, stack, 0)
        stack.enter_context(job.watches[1]("forward"))
        job.run(40)
        job.now += 3600
        job.run(40)
        assert job.died == []
        job.run(60)
    assert sorted(job.died) == [0, 1]


def test_no_timeout_means_no_watch():
    before = threading.active_count()
    watch = Watch(dist.HashStore(), rank=0, world_size=2, timeout_s=0.0, die=lambda: None)
    with watch, watch("anything"):
        assert threading.active_count() == before


class FrozenStore:
    """Answers nothing, as one whose process was stopped."""

    def __init__(self):
        self.thawed = threading.Event()

    def clone(self):
        return self

    def set(self, key, value):
        self.thawed.wait()
        raise RuntimeError("gone")


def test_a_rank_whose_store_does_not_answer_still_speaks_for_itself(lines):
    store, died = FrozenStore(), threading.Event()
    watch = Watch(store, rank=1, world_size=2, timeout_s=0.2, interval_s=0.01, die=died.set)
    with watch, watch("backward of stage 0"):
        assert died.wait(30)
        store.thawed.set()
    assert "the store of the ranks does not answer, so the process that serves it (rank 0 or" in lines()[0]
    assert 'rank 1 is in "backward of stage 0" of step 0 for' in lines()[0]


def hang(rank, port, directory, how):
    """One of three processes; rank 1 hangs."""
    sys.stderr = open(directory / f"stderr-{rank}", "w", buffering=1)  # noqa: SIM115, PTH123
    store = dist.TCPStore("localhost", port, is_master=False, timeout=timedelta(seconds=60))
    store.set(f"here/{rank}", "")
    with Watch(store, rank=rank, world_size=3, timeout_s=4.0, interval_s=0.1) as watch:
        store.wait([f"here/{other}" for other in range(3)])
        watch.step = 7
        if rank != 1:
            with watch("waiting for rank 1", waits=True):
                store.get("never")  # it blocks in C++, as a collective does
        with watch("forward of stage 1"):
            store.wait(["watch/1"])
            while b"forward" not in store.get("watch/1"):  # until the thread has said so
                pass
            os.kill(os.getpid(), signal.SIGSTOP) if how == "stopped" else threading.Event().wait()


@pytest.mark.parametrize("how", ["blocked", "stopped"])
def test_of_real_processes_each_that_can_names_the_one_that_hangs_and_ends(tmp_path, how):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent holds it
    processes = [context.Process(target=hang, args=(rank, store.port, tmp_path, how)) for rank in range(3)]
    for process in processes:
        process.start()
    speak = [0, 2] if how == "stopped" else [0, 1, 2]
    try:
        for rank in speak:
            processes[rank].join(timeout=60)
            assert processes[rank].exitcode == EXIT_CODE
        assert how == "blocked" or processes[1].is_alive()
    finally:
        for process in processes:
            process.kill()
            process.join()
    said = {(tmp_path / f"stderr-{rank}").read_text() for rank in speak}
    assert len(said) == 1, said
    (line,) = said
    assert line.startswith("rank 1 hangs: " + ('in "forward of' if how == "blocked" else "it has not reported"))
    assert '"forward of stage 1" of step 7' in line
    assert line.count("\n") == 1
