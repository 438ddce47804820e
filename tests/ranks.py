"""Runs a function on several processes that talk over gloo, and brings back what each returned or raised.

    results = run_on_ranks(4, check_something, "1f1b", tied=True)

The function and its arguments are pickled, so it is a module's own. Each rank has one thread, the process group is
initialised, and the store is a file: no ports. A failure shows every rank's traceback; a rank that doesn't come back
in time is named, and all are killed. Processes are forked from a server that has torch loaded: a second each.
"""

import functools
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.checkpoint",
    "tests.ranks",
]
COLLECTIVE_TIMEOUT_S = 20.0


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120, **kwargs: Any):
    """What `function(*args, **kwargs)` returned on each rank, in their order. Raises AssertionError otherwise."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            work = functools.partial(function, *args, **kwargs)
            process = context.Process(target=_rank_main, args=(rank, world_size, store, pickle.dumps(work), sender))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, timeout_s)
        finally:
            for process in processes:
                process.join(timeout=5)
                process.kill()
                process.join()


def _rank_main(rank: int, world_size: int, store: Path, work: bytes, sender: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        outcome = ("returned", pickle.loads(work)())
    except BaseException:
        outcome = ("raised", traceback.format_exc())
    sender.send_bytes(pickle.dumps(outcome))  # by value: torch's own pickler would hand over memory of this process
    sender.close()
    if dist.is_initialized() and outcome[0] == "returned":
        dist.barrier()  # rank 0's store outlives the others' last calls
        dist.destroy_process_group()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    outcomes: dict[int, tuple[str, Any]] = {}
    deadline = time.monotonic() + timeout_s
    grace_s = COLLECTIVE_TIMEOUT_S + 5  # once one has failed, the others time out in their collectives
    while len(outcomes) < len(pipes):
        missing = [pipe for rank, pipe in enumerate(pipes) if rank not in outcomes]
        ready = wait(missing, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)  # pyrefly: ignore[bad-argument-type]
            try:
                outcomes[rank] = pickle.loads(pipe.recv_bytes())  # pyrefly: ignore[missing-attribute]
            except EOFError:
                outcomes[rank] = ("died", "the process ended without a word")
            if outcomes[rank][0] != "returned":
                deadline = min(deadline, time.monotonic() + grace_s)
    failures = [f"rank {rank} {what}:\n{text}" for rank, (what, text) in sorted(outcomes.items()) if what != "returned"]
    failures += [f"rank {rank} did not come back" for rank in range(len(pipes)) if rank not in outcomes]
    assert not failures, "\n\n".join(failures)
    return [outcomes[rank][1] for rank in range(len(pipes))]
