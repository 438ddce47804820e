"""Work on tensors that stay where they are: on CUDA recorded as a graph and played again, elsewhere simply done.

To start an operation from Python takes longer than a GPU needs to run it on few rows; a graph starts hundreds of them
at once. Work here is a function without arguments that reads and writes static tensors, for one key always the same. To
do it twice is to do it once; it asks for no value, and brings nothing from the host. The first time it is done as it
is, and libraries set themselves up; what comes again is worth a recording. Intermediate results of all graphs share one
pool of memory: graphs follow each other in one stream, and what they hand on is in tensors outside of the pool.
Source: PyTorch's notes on CUDA graphs. Recording and playing never ran on a GPU.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

from eellm.log import log

MOST_GRAPHS = 256
"""Graphs of memory that has grown since are never asked for again, and go when there are so many newer ones."""

Work = Callable[[], None]


class Recorder(Protocol):
    def record(self, work: Work) -> Work:
        """What does the work again whenever it is called. Nothing of it is done yet."""
        ...

    def settle(self) -> None:
        """Waits until nothing that was recorded is being done."""
        ...


class Graphs:
    def __init__(self, recorder: Recorder | None, most: int = MOST_GRAPHS) -> None:
        """recorder: unset, work is simply done. most: recordings that are kept, those used last."""
        self.recorder = recorder
        self.most = most
        self._known: OrderedDict[Hashable, Work | None] = OrderedDict()
        """None: done once."""

    def run(self, key: Hashable, work: Work) -> None:
        """Does the work, in the current stream and without waiting for it. key: says which it is, and all that it
        reads and writes."""
        if self.recorder is None:
            work()
            return
        if key not in self._known:
            self._make_room(self.recorder)
            work()
            self._known[key] = None
            return
        self._known.move_to_end(key)
        again = self._known[key]
        if again is None:
            again = self._record(self.recorder, work)
            self._known[key] = again
        again()

    def _record(self, recorder: Recorder, work: Work) -> Work:
        """What can't be recorded here is done, now and from now on."""
        try:
            return recorder.record(work)
        except RuntimeError as error:
            log.warning(f"passes can't be recorded as graphs here, and are started operation by operation: {error}")
            self.recorder = None
            self._known.clear()
            return work

    def _make_room(self, recorder: Recorder) -> None:
        if len(self._known) >= self.most:
            recorder.settle()  # NOTE the one that goes may be on the GPU's list still
            self._known.popitem(last=False)


_DEVICE = threading.Lock()
"""A recording allows no other one in the process, nor that anybody waits for the whole device."""


class CUDARecorder:
    """Records CUDA graphs. Never ran on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        before = torch.cuda.current_stream(self.device)
        # NOTE `stream(before)`: a recording that fails leaves its own stream behind as the current one
        with _DEVICE, torch.cuda.device(self.device), torch.cuda.stream(before):
            torch.cuda.current_blas_handle()  # NOTE each thread has its own, and none can be made while recording
            graph = torch.cuda.CUDAGraph()
            # NOTE thread_local: what other threads start meanwhile is not taken for a part of the recording
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        return graph.replay

    def settle(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()
