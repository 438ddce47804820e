"""Who is alive: what the engine's process and a worker know of each other besides messages.

With one tag a worker receives a question at most, and the engine nothing ever: either receive fails at once when the
other process ends. A question is answered by a thread of its own, so that a worker answers while it waits for others.
"""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
import torch.distributed as dist

from eellm.infer.pipelined.wire import FOREVER, Group, PeerLostError, wait_for

LIFE_TAG = 20
"""Of questions; answers have the next one."""
ANSWER_S = 1.0
NO_ANSWER = -1.0


def watch_worker(group: Group, rank: int) -> None:
    """In the engine's process: returns when the worker's ends."""
    with suppress(PeerLostError):
        wait_for(group.recv([torch.empty(1, dtype=torch.float32)], rank, LIFE_TAG), FOREVER)


def live_with_engine(group: Group, is_waiting: Callable[[], bool]) -> None:
    """In a worker's: answers whether it waits for others of its stage, and ends the process when the engine's ends."""
    try:
        while True:
            wait_for(group.recv([torch.empty(1, dtype=torch.float32)], 0, LIFE_TAG), FOREVER)
            wait_for(group.send([torch.tensor([float(is_waiting())], dtype=torch.float32)], 0, LIFE_TAG + 1), FOREVER)
    except PeerLostError:
        os._exit(1)


def waiting(group: Group, ranks: Iterable[int]) -> set[int]:
    """In the engine's: those of the workers who say within `ANSWER_S` that they wait for others of their stage."""
    answers = {rank: torch.full((1,), NO_ANSWER, dtype=torch.float32) for rank in ranks}
    transfers: list[dist.Work] = []  # NOTE dropped, they would never happen
    for rank, answer in answers.items():
        # NOTE no wait for these: gloo breaks all connections of a group once one wait in it has timed out
        with suppress(RuntimeError):  # the connection is broken already
            transfers.append(group.send([torch.zeros(1, dtype=torch.float32)], rank, LIFE_TAG))
            transfers.append(group.recv([answer], rank, LIFE_TAG + 1))
    deadline = time.monotonic() + ANSWER_S
    while any(answer == NO_ANSWER for answer in answers.values()) and time.monotonic() < deadline:
        time.sleep(0.001)
    return {rank for rank, answer in answers.items() if answer == 1}
