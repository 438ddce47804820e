"""How long something takes on a device: the median of a few runs after one that isn't timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

NUM_RUNS = 5
"""Timed, after one that isn't."""

Clock = Callable[[], float]
"""Seconds from some fixed point."""


@dataclass(frozen=True)
class Timer:
    """Times what a device does."""

    device: torch.device
    clock: Clock = time.perf_counter

    def now(self) -> float:
        """The clock, once all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def seconds(self, run: Callable[[], object]) -> float:
        """What `run` takes."""

        def timed() -> tuple[float]:
            start = self.now()
            run()
            return (self.now() - start,)

        return self.medians(timed)[0]

    def medians(self, run: Callable[[], tuple[float, ...]]) -> list[float]:
        """Of each of the times that `run` returns."""
        runs = [run() for _ in range(1 + NUM_RUNS)]
        return [median(times) for times in zip(*runs[1:], strict=True)]
