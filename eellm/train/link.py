"""What connects two devices of this machine, measured between two processes: gloo on a CPU, NCCL between two GPUs."""

import json
import tempfile
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from eellm.plan.hardware import Link
from eellm.train.timing import Clock, Timer

TIMEOUT = timedelta(seconds=120)
"""For the two to meet."""


def measure_link(device: str, *, message_bytes: int) -> Link:
    """Between two new processes, each with a GPU of its own where `device` is cuda. Starting them takes seconds."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_measure, (device, message_bytes, directory), nprocs=2)
        return Link(**json.loads(_result(directory).read_text(encoding="utf-8")))


def _measure(rank: int, device: str, message_bytes: int, directory: str) -> None:
    place, backend = torch.device(device), "gloo"
    if device == "cuda":
        place, backend = torch.device(device, rank), "nccl"
        torch.cuda.set_device(place)
    store = f"file://{directory}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=2, timeout=TIMEOUT)
    link = time_link(place, message_bytes=message_bytes)
    if rank == 0:
        _result(directory).write_text(json.dumps(asdict(link)), encoding="utf-8")
    dist.destroy_process_group()


def _result(directory: str) -> Path:
    return Path(directory) / "link.json"


def time_link(device: torch.device, *, message_bytes: int, clock: Clock = time.perf_counter) -> Link:
    """Between the two processes of the default group, which call it together: half of the way there and back."""
    timer, is_first, other = Timer(device, clock), dist.get_rank() == 0, 1 - dist.get_rank()

    def seconds(num_bytes: int) -> float:
        message = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

        def there_and_back() -> None:
            (dist.send if is_first else dist.recv)(message, other)
            (dist.recv if is_first else dist.send)(message, other)

        return timer.seconds(there_and_back) / 2

    return Link(latency_s=seconds(1), bytes_per_s=message_bytes / seconds(message_bytes))
