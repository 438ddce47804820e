"""The harness itself: results in order, every rank's traceback, no waiting for a rank that is gone."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks


def sum_of_ranks(offset):
    value = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(value)
    return dist.get_rank(), int(value)


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} is unwell")
    dist.barrier()


def die_on(rank):
    if dist.get_rank() == rank:
        os._exit(1)


def test_results_come_back_in_the_order_of_ranks():
    assert run_on_ranks(3, sum_of_ranks, 10) == [(0, 33), (1, 33), (2, 33)]


def test_a_failure_shows_the_traceback_of_the_rank_that_failed():
    with pytest.raises(AssertionError, match=r"rank 1 raised(.|\n)*rank 1 is unwell"):
        run_on_ranks(2, fail_on, 1)


def test_a_rank_that_dies_is_named():
    start = time.monotonic()
    with pytest.raises(AssertionError, match="rank 0 died"):
        run_on_ranks(2, die_on, 0)
    assert time.monotonic() - start < 60
