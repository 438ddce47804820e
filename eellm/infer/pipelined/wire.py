"""Messages from one process to another: a row of numbers and perhaps a tensor, in order, over gloo.

    Outbox.send(kind, values, tensor) → Inbox.take() → Message

A small message is one transfer: its head (number, kind, sizes), the values as float64, the tensor's bytes. A tensor
that doesn't fit follows by itself. The receiver has several receives posted ahead, so that a message is on its way as
soon as it is sent. No process waits for a message that may not come unless it has nothing else to do: `is_ready` looks
at the memory that the oldest receive fills.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor


class Group(Protocol):
    """Some processes that can reach each other."""

    def send(self, tensors: list[Tensor], peer: int, tag: int, /) -> dist.Work: ...

    def recv(self, tensors: list[Tensor], peer: int, tag: int, /) -> dist.Work: ...


def gloo(store: dist.Store, rank: int, size: int) -> Group:
    """A group of its own, apart from torch's default one: a process may have several engines, and a training run."""
    return cast(Group, dist.ProcessGroupGloo(store, rank, size, START_TIMEOUT))


class PeerLostError(Exception):
    """The other process is gone, or silent for too long."""


FOREVER = timedelta(days=365)
START_TIMEOUT = timedelta(seconds=120)
TAG = 0
"""Of messages; tensors that follow them have the next one."""
NUM_AHEAD = 4
"""Receives that are posted."""
MESSAGE_BYTES = 1 << 16
"""A whole message; beyond it, the tensor follows by itself, or all that comes behind the head."""
HEAD = 4
"""Numbers in front of the values."""


@dataclass(frozen=True, slots=True)
class Message:
    kind: int
    values: list[float]
    data: Tensor | None
    """Bytes; see `tensor`."""

    def tensor(self, dtype: torch.dtype, width: int) -> Tensor:
        """(N, width) of the CPU."""
        assert self.data is not None, "this message has no tensor"
        return self.data.view(dtype).view(-1, width)


class Outbox:
    def __init__(self, group: Group, peer: int) -> None:
        self._group, self._peer = group, peer
        self._number = 0
        self._sent: deque[tuple[int, dist.Work, Tensor]] = deque()
        """Until the transfer is known to be over, the memory must stay."""

    def send(self, kind: int, values: Sequence[float], data: Tensor | None = None) -> int:
        """Returns at once, with the message's number."""
        self._number += 1
        num_bytes = 0 if data is None else data.nbytes
        start = 8 * (HEAD + len(values))
        whole = torch.empty(start, dtype=torch.uint8)
        whole.view(torch.float64).numpy()[:] = [self._number, kind, len(values), num_bytes, *values]
        if data is not None:
            data = data.detach().contiguous().cpu().view(torch.uint8).flatten()
            if start > MESSAGE_BYTES or start + num_bytes <= MESSAGE_BYTES:
                whole, data = torch.cat((whole, data)), None
        if start > MESSAGE_BYTES:
            whole, data = whole.tensor_split((8 * HEAD,))
        self._post(whole, TAG)
        if data is not None:
            self._post(data, TAG + 1)
        return self._number

    def _post(self, data: Tensor, tag: int) -> None:
        try:
            self._sent.append((self._number, self._group.send([data], self._peer, tag), data))
        except RuntimeError as error:
            raise PeerLostError(str(error)) from error

    def arrived(self, number: int) -> None:
        """Forgets the messages up to that number: they are known to have been received."""
        while self._sent and self._sent[0][0] <= number:
            wait_for(self._sent.popleft()[1], FOREVER)

    def flush(self) -> None:
        """Waits until all have been received."""
        self.arrived(self._number)

    def keep(self, num_messages: int) -> None:
        """Waits until at most so many have not been received."""
        self.arrived(self._number - num_messages)


class Inbox:
    def __init__(self, group: Group, peer: int) -> None:
        self._group, self._peer = group, peer
        self._posted: deque[tuple[dist.Work, Tensor, Tensor]] = deque()
        self._number = 0
        for _ in range(NUM_AHEAD):
            self._post()

    def _post(self) -> None:
        # NOTE what comes is mostly shorter: gloo fills the front of the memory, and the head says how much
        message = torch.empty(MESSAGE_BYTES, dtype=torch.uint8)
        head = message[: 8 * HEAD].view(torch.float64)
        head[0] = -1
        try:
            self._posted.append((self._group.recv([message], self._peer, TAG), message, head))
        except RuntimeError as error:
            raise PeerLostError(str(error)) from error

    def is_ready(self) -> bool:
        """Whether the next message has begun to arrive."""
        # NOTE a hint only, from memory that another thread fills; `take` waits for all of it. A receive's own
        # `is_completed` says nothing before that
        return bool(self._posted[0][2].numpy()[0] != -1)

    def take(self, timeout: timedelta = FOREVER) -> Message:
        """Waits for the next message. Raises PeerLostError."""
        work, message, head = self._posted.popleft()
        wait_for(work, timeout)
        self._post()
        self._number += 1
        number, kind, num_values, num_bytes = map(int, head.tolist())
        assert number == self._number, f"message {number} came where {self._number} was due"
        start = 8 * (HEAD + num_values)
        if start > MESSAGE_BYTES:
            rest = self._more(start + num_bytes - 8 * HEAD, timeout)
            numbers, data = rest.tensor_split((start - 8 * HEAD,))
        elif start + num_bytes <= MESSAGE_BYTES:
            numbers, data = message[8 * HEAD : start], message[start : start + num_bytes]
        else:
            numbers, data = message[8 * HEAD : start], self._more(num_bytes, timeout)
        return Message(kind, numbers.view(torch.float64).tolist(), data if num_bytes else None)

    def _more(self, num_bytes: int, timeout: timedelta) -> Tensor:
        """What follows the message by itself."""
        data = torch.empty(num_bytes, dtype=torch.uint8)
        wait_for(self._group.recv([data], self._peer, TAG + 1), timeout)
        return data


def wait_for(work: dist.Work, timeout: timedelta) -> None:
    """Until a transfer is over. NOTE only once for each: a second time would hang."""
    try:
        work.wait(timeout)
    except RuntimeError as error:
        raise PeerLostError(str(error)) from error
