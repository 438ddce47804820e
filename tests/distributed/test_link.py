"""What connects two processes, measured between two processes."""

import itertools

import torch

from eellm.train.link import time_link
from tests.ranks import run_on_ranks


def timed(*, seconds=None):
    """With the machine's clock, or with one that says so many more seconds with each look."""
    clock = {} if seconds is None else {"clock": itertools.count(0.0, seconds).__next__}
    return time_link(torch.device("cpu"), message_bytes=2**16, **clock)


def test_half_of_the_way_there_and_back_counts():
    for link in run_on_ranks(2, timed, seconds=4.0):
        assert link.latency_s == 2.0
        assert link.bytes_per_s == 2**16 / 2.0


def test_the_link_of_this_machine_is_plausible():
    for link in run_on_ranks(2, timed):
        assert 1e-7 < link.latency_s < 20
        assert 1e3 < link.bytes_per_s < 1e12
