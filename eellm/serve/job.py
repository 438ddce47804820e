"""What goes into a worker and what comes out: jobs, their progress, and work of other kinds."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from eellm.config.infer import GenerateConfig
from eellm.infer.handle import Handle
from eellm.infer.result import Stats, Token
from eellm.serve.refusals import Refusal

T_co = TypeVar("T_co", covariant=True)


class Piecewise(Protocol[T_co]):
    """Work that can be done a piece at a time."""

    def advance(self) -> bool:
        """Does a piece. Returns whether there are more."""
        ...

    def result(self) -> T_co:
        """Of the whole, once there are none."""
        ...


class Progress(NamedTuple):
    """What a job has come to since the last one."""

    index: int
    """The job's, within its request."""
    tokens: list[Token]
    finish_reason: str | None = None
    stats: Stats | None = None
    """With the finish reason."""
    error: Refusal | None = None


class Mailbox:
    """Progress of a request's jobs, from its worker's hand-overs to whoever answers it. Event loop only."""

    def __init__(self) -> None:
        self._items: list[Progress] = []
        self._filled = asyncio.Event()

    def put(self, item: Progress) -> None:
        self._items.append(item)
        self._filled.set()

    async def take(self) -> list[Progress]:
        """All that is there, as soon as anything is."""
        await self._filled.wait()
        self._filled.clear()
        items, self._items = self._items, []
        return items


@dataclass(eq=False, kw_only=True)
class Job:
    """One prompt to continue."""

    index: int
    tokens: Sequence[int]
    options: GenerateConfig
    out: Mailbox
    stream: bool
    """Whether tokens are wanted as they are made; else all come at the end."""
    deadline_s: float
    """On the clock of `time.perf_counter`."""
    over: Callable[["Job", Progress], None]
    """Told once, in the event loop, when it is over, however that came and whoever still listens to `out`."""
    handle: Handle | None = None
    is_open: bool = False
    """Kept in the event loop: submitted, and not over yet."""
    times: list[float] = field(default_factory=list)
    """When its tokens were handed over or kept."""
    kept: list[Token] = field(default_factory=list)
