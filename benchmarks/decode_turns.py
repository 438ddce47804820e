"""Two decoders take turns: A B A B …, each in a process of its own that sleeps while the other generates.

A side may be set up in several ways; all are tried on prompts of their own first, and the fastest few take part. Of
each side the way with the highest median rate counts. The ratio of the two is the median of those round by round.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

SCRIPT = Path(__file__).with_name("decode_worker.py")
PAUSE_S = 0.2
"""Between turns: threads that wait for work spin for a while before they sleep."""
NUM_WAYS = 2
"""Ways of a side that take part, of those that were tried."""
SIDES = ("ours", "theirs")
NUM_TRIED = 2
"""Batches that every way is tried on."""
Measure = Literal["seconds", "decode_s"]


class MissingError(Exception):
    """A decoder isn't installed."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two."""

    decoder: str
    """A name in decode_worker.DECODERS."""
    python: str = sys.executable
    """The interpreter that has its packages."""
    options: dict[str, Any]
    """What it is loaded with; `model` and `threads` are among them."""
    ways: tuple[dict[str, Any], ...] = ({},)
    """Settings of its generation."""
    missing: str | None = None
    """Why there is no such interpreter."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is generated in a turn."""

    batch: int
    """Prompts at once."""
    num_tokens: int
    """New ones for each prompt."""
    measure: Measure = "seconds"
    """The whole call, or only what comes after the first new tokens."""


@dataclass(kw_only=True)
class Runs:
    """One way of a side, in all rounds."""

    settings: dict[str, Any]
    rates: list[float] = field(default_factory=list)
    """Tokens per second of all prompts, by round."""
    tokens: list[list[int]] = field(default_factory=list)
    """By prompt, all rounds'."""
    details: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return median(self.rates)


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What came of a comparison."""

    ours: tuple[Runs, ...]
    """The fastest way first."""
    theirs: tuple[Runs, ...]
    tried: dict[str, dict[str, float]]
    """By side, every way that was tried beforehand, with its rate."""
    versions: dict[str, str]
    load: tuple[tuple[float, float, float], ...]
    """Load averages before and after."""

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours[0].rates, self.theirs[0].rates, strict=True)]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def same_tokens(self) -> float | None:
        """Mean share of a prompt's new tokens before the first that differs. None where one side has no tokens."""
        pairs = list(zip(self.ours[0].tokens, self.theirs[0].tokens, strict=False))
        return sum(same_prefix(a, b) for a, b in pairs) / len(pairs) if pairs else None


def same_prefix(tokens: Sequence[int], others: Sequence[int]) -> float:
    same = [a == b for a, b in zip(tokens, others, strict=True)]
    return same.index(False) / len(same) if False in same else 1.0


class Worker:
    """The other process, seen from here."""

    def __init__(self, side: Side, log: Any) -> None:
        self.side, self.log = side, log
        # OpenMP reads it once, and processes that an engine starts inherit it
        environment = os.environ | {"OMP_NUM_THREADS": str(side.options["threads"])}
        command = [side.python, str(SCRIPT), side.decoder]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )

    def load(self) -> dict[str, str]:
        """Versions of what it runs on."""
        return self._ask({"load": self.side.options})["versions"]

    def generate(self, prompts: Sequence[Sequence[int]], work: Work, settings: dict[str, Any]) -> dict[str, Any]:
        time.sleep(PAUSE_S)
        request = {"prompts": prompts, "batch": work.batch, "num_tokens": work.num_tokens, "settings": settings}
        return self._ask(request)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(message), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"it died:\n{self._last_words()}"}
        if "missing" in answer:
            raise MissingError(f"{self.side.decoder}: {answer['missing']}")
        if "error" in answer:
            raise RuntimeError(f"{self.side.decoder}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self.log.seek(0)
        return self.log.read()[-2000:].decode(errors="replace")

    def close(self) -> None:
        """Lets it end, or ends it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(timeout=30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()


@contextmanager
def working(side: Side) -> Iterator[Worker]:
    with tempfile.TemporaryFile() as log:
        worker = Worker(side, log)
        try:
            yield worker
        finally:
            worker.close()


def take_turns(ours: Side, theirs: Side, rounds: Sequence[Sequence[Sequence[int]]], work: Work) -> Turns:
    """rounds: prompts of each round, of equal length; those of the first one are for trying out what each side can do.

    Every round has prompts of its own: a decoder that keeps what it has seen has seen none of them. Raises
    MissingError, and RuntimeError for what went wrong in a process.
    """
    for side in (ours, theirs):
        if side.missing is not None:
            raise MissingError(f"{side.decoder}: {side.missing}")
    load = os.getloadavg()
    with working(ours) as a, working(theirs) as b:
        versions = a.load() | b.load()
        tried = [_try(worker, rounds[0], work) for worker in (a, b)]
        runs = [[Runs(settings=runs.settings) for runs in ways[:NUM_WAYS]] for ways in tried]
        for prompts in rounds[1:]:
            for worker, ways in zip((a, b), runs, strict=True):
                for way in ways:
                    _run(worker, prompts, work, way)
    first, second = (tuple(sorted(ways, key=lambda way: -way.rate)) for ways in runs)
    return Turns(
        ours=first,
        theirs=second,
        tried={side: {str(way.settings): way.rate for way in ways} for side, ways in zip(SIDES, tried, strict=True)},
        versions=versions,
        load=(load, os.getloadavg()),
    )


def _try(worker: Worker, prompts: Sequence[Sequence[int]], work: Work) -> list[Runs]:
    """Every way of a side, the fastest first. The first run of each is slower, and doesn't count."""
    ways = [Runs(settings=settings) for settings in worker.side.ways]
    for way in ways:
        worker.generate(prompts[: work.batch], work, way.settings)
    for way in ways:
        _run(worker, prompts[: NUM_TRIED * work.batch], work, way)
    return sorted(ways, key=lambda way: -way.rate)


def _run(worker: Worker, prompts: Sequence[Sequence[int]], work: Work, way: Runs) -> None:
    answer = worker.generate(prompts, work, way.settings)
    seconds = answer[work.measure]
    assert seconds is not None, f"{worker.side.decoder} doesn't tell its {work.measure}"
    counted = work.num_tokens - (work.measure == "decode_s")
    way.rates.append(len(prompts) * counted / seconds)
    way.tokens += answer["tokens"]
    way.details.append(answer["detail"])
