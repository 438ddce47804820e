"""Names the rank that hangs, and ends the run: a rank in trouble leaves all others waiting, in silence.

    with Watch(store, rank=rank, world_size=size, timeout_s=600) as watch:
        watch.step = 12
        with watch("forward of stage 1, microbatch 3"): ...
        with watch("waiting for the activations of microbatch 3", waits=True): ...

Saying what this rank does is an assignment in memory, cheap enough for each microbatch. A thread puts it into a store
about once a second, and listens to the others only when this rank's own action has not changed for a while. After
the whole timeout it decides whose fault that is: a rank that no longer reports, else one that is not waiting for
others, else a wait that all are in. As long as another rank gets on, those that wait for it are fine. The verdict goes
into the store, so that each rank logs the same line before it ends.
Clocks of different ranks are never compared: a report says how old an action is, and counts reports.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import NamedTuple, Self

import torch.distributed as dist

from eellm.log import log

EXIT_CODE = 3
"""Of a process that ends because a rank hangs."""
LISTEN_AFTER = 1 / 4
"""Share of the timeout after which a rank that stands still listens to the others."""
LISTEN_EVERY = 1 / 16
"""Share of the timeout between two times that it reads all reports."""
SILENCE = 1 / 2
"""Share of the timeout for which a rank has no new report when it counts as dead or stopped."""
NUM_LISTED = 8
"""Ranks that one line spells out."""
SEE_OFF_S = 5.0
"""For how long rank 0 waits at the end for the others to be done with the store."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rank last said of itself."""

    beat: int = 0
    """Number of the report; 0: there is none yet."""
    action: str = "start"
    waits: bool = False
    """Whether the action ends only when other ranks do their part."""
    step: int = 0
    age_s: float = 0.0
    """Seconds since the action began."""
    over: bool = False
    """Whether the rank has left the watch."""

    def __str__(self) -> str:
        return f'"{self.action}" of step {self.step}'


def judge(reports: Sequence[Report], silences_s: Sequence[float], timeout_s: float) -> str | None:
    """Which rank hangs, in one line; None while some rank gets on.

    silences_s: for how long each rank has been seen not to report.
    """
    limit = f"(limit {timeout_s:g} s)"
    ranks = range(len(reports))
    silent = [rank for rank in ranks if not reports[rank].over and silences_s[rank] >= timeout_s * SILENCE]
    if silent:
        first = silent[0]
        last = f"last in {reports[first]}" if reports[first].beat else "it never did"
        more = _also("silent", silent[1:])
        return f"rank {first} hangs: it has not reported for {silences_s[first]:.0f} s, {last} {limit}{more}"
    late = [rank for rank in ranks if not reports[rank].over and reports[rank].age_s >= timeout_s]
    stuck = sorted((rank for rank in late if not reports[rank].waits), key=lambda rank: -reports[rank].age_s)
    if stuck:
        first = reports[stuck[0]]
        more = _also("standing still", stuck[1:])
        return f"rank {stuck[0]} hangs: in {first} for {first.age_s:.0f} s {limit}{more}"
    if not late or len(late) < sum(not report.over for report in reports):
        return None
    waits = [f"rank {rank} in {reports[rank]} for {reports[rank].age_s:.0f} s" for rank in late[:NUM_LISTED]]
    waits += [f"rank {rank} has {reports[rank].action}" for rank in ranks if reports[rank].over][:NUM_LISTED]
    more = f"; and {len(reports) - len(waits)} more" if len(waits) < len(reports) else ""
    return f"all ranks wait for each other {limit}: {'; '.join(waits)}{more}"


def _also(what: str, ranks: Sequence[int]) -> str:
    names = ", ".join(map(str, ranks[:NUM_LISTED])) + (" …" if len(ranks) > NUM_LISTED else "")
    return f"; {what} too: {names}" if ranks else ""


class _Action(NamedTuple):
    name: str
    waits: bool
    since: float


class Watch:
    """This rank's part in the watch: a context manager, and inside it a function that opens an action."""

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        die: Callable[[], None] = lambda: os._exit(EXIT_CODE),
    ) -> None:
        """store: one that all ranks share. timeout_s: of one action; 0 turns the watch off. interval_s: between
        reports. die: ends the process; it must not wait for the main thread, which hangs."""
        self.step = 0
        """The optimizer step that this rank is in."""
        # NOTE a client of its own: the main thread may be blocked in the other one
        self._store = store.clone()  # pyrefly: ignore[missing-attribute]
        self._rank, self._world_size = rank, world_size
        self._timeout_s = timeout_s
        self._interval_s = min(interval_s, timeout_s / 10)
        self._clock, self._die = clock, die
        self._now = _Action("between actions", False, clock())
        self._beat = 0
        self._looked_at = self._awake_since = clock()
        self._heard: dict[int, tuple[int, float]] = {}  # of each rank, its last report's number and when it was new
        self._heard_at = clock()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._look_on, self._guard)]

    def __enter__(self) -> Self:
        if self._timeout_s > 0:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=2.0)
        if self._timeout_s > 0 and not any(thread.is_alive() for thread in self._threads):
            how = "finished" if kind is None else f"ended with {kind.__name__}"
            with suppress(RuntimeError):  # the store may have gone with the rank that held it
                self._publish(Report(beat=self._beat + 1, action=how, step=self.step, over=True))
                if self._rank == 0 and kind is None:
                    self._see_off()

    @contextmanager
    def __call__(self, action: str, *, waits: bool = False) -> Iterator[None]:
        """Within this context the rank is in `action`; waits: for others. Actions may nest."""
        outer = self._now
        self._now = _Action(action, waits, self._clock())
        try:
            yield
        finally:
            self._now = outer._replace(since=self._clock())

    def _see_off(self) -> None:
        """Rank 0 serves the store: it stays a moment, so that the others don't talk to nobody."""
        for _ in range(int(SEE_OFF_S / 0.02)):
            if all(self._read(rank).over for rank in range(self._world_size)):
                return
            time.sleep(0.02)

    def look(self) -> None:
        """One round, of many that the thread makes: reports, and when this rank stands still, listens and judges."""
        now = self._clock()
        if now - self._looked_at > self._timeout_s * LISTEN_AFTER:  # we were stopped ourselves, and perhaps all of us
            self._awake_since = now
            self._heard.clear()
        self._looked_at = now
        self._beat += 1
        present = self._now
        age_s = self._age_s(now, present)
        mine = Report(beat=self._beat, action=present.name, waits=present.waits, step=self.step, age_s=age_s)
        self._publish(mine)
        verdict = self._get("watch/verdict")
        if verdict is None and age_s >= self._timeout_s * LISTEN_AFTER:
            verdict = self._listen(now, age_s)
        if verdict is not None:
            self._end(verdict)

    def _listen(self, now: float, age_s: float) -> str | None:
        """Reads all reports; after the whole timeout, says whose fault it is."""
        if self._heard and now - self._heard_at < self._timeout_s * LISTEN_EVERY:
            return None
        self._heard_at = now
        reports = [self._read(rank) for rank in range(self._world_size)]
        for rank, report in enumerate(reports):
            if rank not in self._heard or self._heard[rank][0] != report.beat:
                self._heard[rank] = (report.beat, now)
        if age_s < self._timeout_s:
            return None
        silences_s = [now - self._heard[rank][1] for rank in range(self._world_size)]
        verdict = judge(reports, silences_s, self._timeout_s)
        if verdict is not None:
            self._store.set("watch/verdict", verdict)
        return verdict

    def _age_s(self, now: float, action: _Action) -> float:
        return now - max(action.since, self._awake_since)

    def _publish(self, report: Report) -> None:
        self._store.set(f"watch/{self._rank}", json.dumps(asdict(report)))

    def _read(self, rank: int) -> Report:
        text = self._get(f"watch/{rank}")
        return Report() if text is None else Report(**json.loads(text))

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _look_on(self) -> None:
        try:
            while not self._stopping.wait(self._interval_s):
                self.look()
        except RuntimeError as error:  # torch's, from the store: `_guard` sees that nobody looks any more
            log.debug(f"rank {self._rank}: the watch lost its store: {error}")

    def _guard(self) -> None:
        """The store may be gone, or frozen and `look` with it: then this rank can speak for itself alone."""
        looked_at, missed = self._looked_at, 0
        while not self._stopping.wait(self._interval_s):
            missed = missed + 1 if looked_at == self._looked_at else 0
            looked_at = self._looked_at
            action = self._now
            age_s = self._age_s(self._clock(), action)
            if missed * self._interval_s >= self._timeout_s and age_s >= self._timeout_s:
                report = Report(action=action.name, step=self.step)
                self._end(
                    "the store of the ranks does not answer, so the process that serves it (rank 0 or the launcher) is "
                    f"dead or stopped; rank {self._rank} is in {report} for {age_s:.0f} s (limit {self._timeout_s:g} s)"
                )

    def _end(self, verdict: str) -> None:
        log.error(verdict)
        self._stopping.wait(2 * self._interval_s)  # the others read it before the launcher, who sees us end, ends them
        self._die()
