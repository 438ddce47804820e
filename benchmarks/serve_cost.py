"""What a server adds to its engine: the two take turns (A B A B …), and the ratio is the median of those by round.

The engine has one thread in both, so that on two cores the other is left to what only the server has: its event loop
and its clients. The bare engine serves the same prompts in the same order with as many in flight, each replaced by the
next at the step that ends it, and its tokens are taken after each step. Each side sleeps while the other runs.
"""

import asyncio
import os
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from serve_clients import PROMPTS, Load, Place, load

import eellm

PAUSE_S = 0.3
"""Between turns: threads that wait for work spin for a while before they sleep."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A server against its engine, in all rounds."""

    clients: int
    method: str
    bare_tokens_per_s: list[float]
    served_tokens_per_s: list[float]
    wrong: int
    errors: list[str]
    load_average: float

    @property
    def ratios(self) -> list[float]:
        """By round: the share of the engine's rate that the server loses."""
        pairs = zip(self.served_tokens_per_s, self.bare_tokens_per_s, strict=True)
        return sorted(1 - served / bare for served, bare in pairs)

    def __str__(self) -> str:
        low, middle, high = self.ratios[0], median(self.ratios), self.ratios[-1]
        return (
            f"{self.clients} clients, {self.method}, one thread for the engine: the server gives "
            f"{median(self.served_tokens_per_s):.0f} tokens/s, the bare engine {median(self.bare_tokens_per_s):.0f}; "
            f"overhead {middle:.1%} ({low:.1%} to {high:.1%}) over {len(self.ratios)} rounds, {self.wrong} wrong, "
            f"{len(self.errors)} errors, load {self.load_average:.1f}"
        )


def cost(model: Any, place: Place, *, clients: int, rounds: int, seconds: float, method: str) -> Cost:
    """place: a server of the same model, whose engine has one thread and the same method."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    bare: list[Load] = []
    served: list[Load] = []
    try:
        with eellm.Engine(model, max_batch=16, recall=0) as engine:
            _serve_bare(engine, clients, 1.0, place.num_tokens, method)  # the first turn warms up
            asyncio.run(load("", place, clients, 1.0))
            for _ in range(rounds):
                bare.append(_serve_bare(engine, clients, seconds, place.num_tokens, method))
                time.sleep(PAUSE_S)
                served.append(asyncio.run(load("eellm", place, clients, seconds)))
                time.sleep(PAUSE_S)
    finally:
        torch.set_num_threads(threads)
    return Cost(
        clients=clients,
        method=method,
        bare_tokens_per_s=[one.tokens_per_s for one in bare],
        served_tokens_per_s=[one.tokens_per_s for one in served],
        wrong=sum(one.wrong for one in served),
        errors=[error for one in served for error in one.errors],
        load_average=os.getloadavg()[0],
    )


def _serve_bare(engine: eellm.Engine, clients: int, seconds: float, num_tokens: int, method: Any) -> Load:
    """As `serve_clients.load`: what is in flight when the time is over is waited for."""
    result, made = Load(server="the bare engine", clients=clients), 0
    begin = time.perf_counter()

    def begun(number: int) -> tuple[int, Any]:
        prompt = PROMPTS[number % len(PROMPTS)]
        return number, engine.submit(prompt, method=method, max_new_tokens=num_tokens)

    running = [begun(number) for number in range(clients)]
    while running:
        engine.step()
        going = []
        for number, handle in running:
            made += len(handle.take())
            if handle.finish_reason is None:
                going.append((number, handle))
            else:
                result.answers += 1
                if time.perf_counter() < begin + seconds:
                    going.append(begun(number + 1))
        running = going
    result.tokens_per_s = made / (time.perf_counter() - begin)
    return result
