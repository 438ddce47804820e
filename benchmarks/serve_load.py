"""What a server gives under load: tokens per second, how long clients wait, and whether every answer is right.

    python benchmarks/serve_load.py [MODEL] [--clients 1 8 32] [--seconds 60] [--tokens 64] [--peers PYTHON]
                                    [--out FILE.json]

`eellm serve` runs in a process of its own, its clients in another. Each client asks for one answer after the other,
streamed, greedy, from a small set of prompts; every answer is compared with what full depth says. At each number of
clients the bare engine then serves as many requests at a time for as long, so that the ratio is what the server costs.

--peers names an interpreter that has transformers with its extra `serving`: `transformers serve` then takes turns with
ours, on the same prompts. Its answers aren't checked.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

import eellm

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
PEERS = {"transformers serve": [], "transformers serve, batching": ["--continuous-batching"]}
START_S = 120


@dataclass(kw_only=True)
class Load:
    """What clients of one server saw."""

    server: str
    clients: int
    tokens_per_s: float = 0.0
    answers: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    between_events_s: list[float] = field(default_factory=list)
    load_average: float = 0.0


def main() -> None:
    options = parse()
    results = []
    model = eellm.load(options.model)
    expected = [answer(model, prompt, options.tokens) for prompt in PROMPTS]
    for clients in options.clients:
        with serving([sys.executable, "-m", "eellm", "serve", options.model, "--port", "{port}"], "/ready") as url:
            results.append(asyncio.run(load(url, "eellm", None, clients, options, expected)))
        results.append(bare(model, clients, options))
        for name, flags in PEERS.items() if options.peers else ():
            command = [str(Path(options.peers).with_name("transformers")), "serve", options.model, *flags]
            with serving([*command, "--port", "{port}", "--dtype", "float32", "--device", "cpu"], "/health") as url:
                results.append(asyncio.run(load(url, name, options.model, clients, options, None)))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([summary(result) for result in results], indent=2) + "\n")
    Console(width=150).print(table(results, options))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT / "models/english"))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has transformers[serving]")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out/serve_load.json")
    return parser.parse_args()


def answer(model: Any, prompt: str, num_tokens: int) -> str:
    (out,) = eellm.generate(model, [prompt], method="full", max_new_tokens=num_tokens)
    return out.text


@contextmanager
def serving(command: Sequence[str], ready: str) -> Iterator[str]:
    """A server's URL, once it answers. `{port}` in the command becomes a free one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = (ROOT / "bench-out/server.log").open("w")
    process = subprocess.Popen([part.format(port=port) for part in command], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_S
        while not answers(url + ready):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command[0]} doesn't serve; see {log.name}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


async def load(
    url: str, server: str, model: str | None, clients: int, options: argparse.Namespace, expected: list[str] | None
) -> Load:
    """Clients that ask until the time is over."""
    result = Load(server=server, clients=clients)
    name = model or Path(options.model).name
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await ask(client, name, 0, options.tokens, Load(server=server, clients=1), None)  # the first one warms up
        begin = time.perf_counter()

        async def one(number: int) -> int:
            num_tokens = 0
            while time.perf_counter() < begin + options.seconds:
                num_tokens += await ask(client, name, number % len(PROMPTS), options.tokens, result, expected)
                number += 1
            return num_tokens

        num_tokens = sum(await asyncio.gather(*(one(i) for i in range(clients))))
        result.tokens_per_s = num_tokens / (time.perf_counter() - begin)
    result.load_average = os.getloadavg()[0]
    return result


async def ask(
    client: httpx.AsyncClient, name: str, index: int, num_tokens: int, result: Load, expected: list[str] | None
) -> int:
    """One streamed answer; how many tokens it has."""
    body = {"model": name, "prompt": PROMPTS[index], "max_tokens": num_tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
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
    result.wrong += expected is not None and text != expected[index]
    return made


def bare(model: Any, clients: int, options: argparse.Namespace) -> Load:
    """The engine alone, with as many requests at a time."""
    result, num_tokens = Load(server="the bare engine", clients=clients), 0
    with eellm.Engine(model, max_batch=16) as engine:
        engine.generate([PROMPTS[0]], method="auto", max_new_tokens=8)
        begin, number = time.perf_counter(), 0
        running: list[Any] = []
        while time.perf_counter() < begin + options.seconds:
            while len(running) < clients:
                running.append(
                    engine.submit(PROMPTS[number % len(PROMPTS)], method="auto", max_new_tokens=options.tokens)
                )
                number += 1
            engine.step()
            for handle in [handle for handle in running if handle.finish_reason is not None]:
                running.remove(handle)
                num_tokens += len(handle.take())
                result.answers += 1
        num_tokens += sum(len(handle.take()) for handle in running)
        result.tokens_per_s = num_tokens / (time.perf_counter() - begin)
    result.load_average = os.getloadavg()[0]
    return result


def summary(result: Load) -> dict[str, Any]:
    made = asdict(result)
    for name in ("first_token_s", "between_events_s"):
        made[name] = dict(zip(("p50", "p95", "p99"), quantiles(made[name]), strict=True))
    return made


def quantiles(seconds: Sequence[float]) -> list[float]:
    return np.quantile(seconds, (0.5, 0.95, 0.99)).tolist() if seconds else [0.0] * 3


def table(results: list[Load], options: argparse.Namespace) -> Table:
    found = Table(title=f"{Path(options.model).name}: {options.seconds:.0f} s, answers of {options.tokens} tokens")
    names = ("server", "clients", "tokens/s", "first token, ms p50/95/99", "between events, ms", "answers", "wrong")
    for name in (*names, "errors", "load"):
        found.add_column(name, justify="left" if name == "server" else "right")
    for result in results:
        times = (quantiles(result.first_token_s), quantiles(result.between_events_s))
        found.add_row(
            result.server,
            str(result.clients),
            f"{result.tokens_per_s:.0f}",
            *(" / ".join(f"{1e3 * second:.1f}" for second in seconds) for seconds in times),
            *(str(result.answers), str(result.wrong), str(len(result.errors)), f"{result.load_average:.1f}"),
        )
    return found


if __name__ == "__main__":
    main()
