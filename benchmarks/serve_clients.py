"""Clients of a server that speaks OpenAI's completions, and the server's own process.

Each client asks for one answer after the other, streamed and greedy, from a small set of prompts, the next prompt each
time; every answer can be compared with what it should be.
"""

import asyncio
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from processes import end_session

ROOT = Path(__file__).parents[1]
PROMPTS = (
    "The Congress of the United States",
    "The history of the city begins",
    "In the year of our Lord",
    "Call me",
    "The economy of the country depends on",
    "It is my duty to",
    "The whale",
    "Our relations with other nations",
)
START_S = 180
END_S = 30


class MissingError(Exception):
    """A server can't be started here; says why."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where to ask, and for what."""

    url: str
    model: str
    """What the server calls it."""
    num_tokens: int
    """Of each answer."""
    expected: Sequence[str] | None = None
    """The answer to each prompt. None: they aren't checked."""


@dataclass(kw_only=True)
class Load:
    """What the clients of one server saw."""

    server: str
    clients: int
    missing: str = ""
    """Why it couldn't be started."""
    tokens_per_s: float = 0.0
    answers: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    between_events_s: list[float] = field(default_factory=list)
    load_average: float = 0.0


@contextmanager
def serving(command: Sequence[str], ready: str, *, threads: int | None = None) -> Iterator[str]:
    """A server's URL, once it answers at `ready`. `{port}` in the command becomes a free one. threads: that it computes
    with; None: as many as it wants. Raises MissingError."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    path = ROOT / "bench-out/server.log"
    path.parent.mkdir(exist_ok=True)
    environ = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with path.open("w") as log:
        try:
            process = subprocess.Popen(
                [part.format(port=port) for part in command],
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,  # a server may start processes of its own: they are ended with it
            )
        except OSError as error:
            raise MissingError(f"{command[0]}: {error.strerror}") from None
        try:
            deadline = time.monotonic() + START_S
            while not _answers(url + ready):
                if process.poll() is not None:
                    raise MissingError(f"it ended while it started: {_last_line(path)}")
                if time.monotonic() > deadline:
                    raise MissingError(f"it didn't answer within {START_S} s")
                time.sleep(0.2)
            yield url
        finally:
            end_session(process, END_S)


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


async def load(server: str, place: Place, clients: int, seconds: float) -> Load:
    """So many clients ask until the time is over; what has begun by then is waited for."""
    result = Load(server=server, clients=clients)
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=place.url, timeout=300, limits=limits) as client:
        await ask(client, place, 0, Load(server=server, clients=1))  # the first one warms up
        begin = time.perf_counter()

        async def one(number: int) -> int:
            num_tokens = 0
            while time.perf_counter() < begin + seconds:
                num_tokens += await ask(client, place, number % len(PROMPTS), result)
                number += 1
            return num_tokens

        num_tokens = sum(await asyncio.gather(*(one(i) for i in range(clients))))
        result.tokens_per_s = num_tokens / (time.perf_counter() - begin)
    result.load_average = os.getloadavg()[0]
    return result


async def ask(client: httpx.AsyncClient, place: Place, index: int, result: Load) -> int:
    """One streamed answer; how many tokens it has."""
    body = {"model": place.model, "prompt": PROMPTS[index], "max_tokens": place.num_tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    begin = last = time.perf_counter()
    text, made = "", 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise httpx.HTTPError(f"{response.status_code}: {(await response.aread())[:200]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event, now = json.loads(line[6:]), time.perf_counter()
                if event.get("usage"):
                    made = event["usage"]["completion_tokens"]
                for choice in event["choices"]:
                    text += choice["text"]
                    (result.between_events_s if last > begin else result.first_token_s).append(now - last)
                    last = now
    except (httpx.HTTPError, KeyError, ValueError) as error:
        result.errors.append(f"{type(error).__name__}: {error}")
        return 0
    result.answers += 1
    result.wrong += place.expected is not None and text != place.expected[index]
    return made
