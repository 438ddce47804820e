"""A decoder in a process of its own, which generates when it is told to.

    PYTHON decode_worker.py NAME        lines of JSON: stdin → what to do, stdout → what came of it
    {"load": {"model": …, "threads": …, …}}                                → {"versions": {…}}, or {"missing": why}
    {"prompts": [ids, …], "batch": 1, "num_tokens": 128, "settings": {…}}  → {"seconds", "decode_s", "tokens", "detail"}

Prompts go in groups of `batch`, one group after the other; `seconds` is the time of all, prompts included, `decode_s`
that after the first new tokens where the decoder knows it. A peer's packages may live in an environment without eellm.
"""

import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

from decode_peers import Answer, CTranslate2, Decoder, Economize, Generate, LlamaCpp, Transformers


class Eellm(Decoder):
    """An engine for each of its settings, so that none finds another's keys and values.

    untuned_exits: layers at which exits are put in, as copies of the final one."""

    def __init__(self, model: str, threads: int, untuned_exits: Sequence[int] = (), **options: Any) -> None:
        import torch

        import eellm

        torch.set_num_threads(threads)
        self.versions = {"eellm": eellm.__version__, "torch": torch.__version__}
        self.model = eellm.load(model)
        eellm.add_exits(self.model, [eellm.ExitConfig(layer=n, kind="norm", head="tied") for n in untuned_exits])
        self.options = options
        self.engines: dict[str, Any] = {}

    def prepare(self, settings: dict[str, Any], batch: int) -> Generate:
        import eellm

        key = json.dumps([settings, batch], sort_keys=True)
        if key not in self.engines:
            self.engines[key] = eellm.Engine(self.model, max_batch=batch, recall=0, **self.options)
        engine, settings = self.engines[key], dict(settings)
        if isinstance(settings.get("threshold"), dict):  # JSON's keys are strings
            settings["threshold"] = {int(layer): tau for layer, tau in settings["threshold"].items()}

        def generate(prompts: list[list[int]], num_tokens: int) -> Answer:
            out = engine.generate(prompts, max_new_tokens=num_tokens, ignore_eos=True, **settings)
            exits = Counter(layer for generation in out for layer in generation.exits)
            total = sum(exits.values())
            return Answer(
                tokens=[generation.tokens for generation in out],
                decode_s=max(generation.stats.decode_s for generation in out),
                detail={f"exit {layer}": count / total for layer, count in sorted(exits.items())},
            )

        return generate

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


class Memory(Decoder):
    """A token takes as long as the fastest of several ways to read as many bytes as the weights have in float32."""

    def __init__(self, model: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.versions = {"torch": torch.__version__}
        self.values = torch.ones(num_weights(Path(model)))
        first, second = self.values[: len(self.values) // 2 * 2].chunk(2)
        self.ways: dict[str, Callable[[], Any]] = {
            "sum": self.values.sum,
            "largest": self.values.amax,
            "norm": lambda: torch.linalg.vector_norm(self.values),
            "dot product of the halves": lambda: torch.dot(first, second),
            "dot product with itself, a thread a half": lambda: _at_once(lambda x: torch.dot(x, x), first, second),
        }

    def prepare(self, settings: dict[str, Any], batch: int) -> Generate:
        def read(prompts: list[list[int]], num_tokens: int) -> Answer:
            seconds = {way: min(_time(function) for _ in range(5)) for way, function in self.ways.items()}
            way = min(seconds, key=lambda name: seconds[name])
            detail = {"way": way, "GB/s": self.values.nbytes / seconds[way] / 1e9}
            return Answer(tokens=[], decode_s=seconds[way] * (num_tokens - 1), detail=detail)

        return read


def num_weights(model: Path) -> int:
    """Numbers in a model's safetensors files, each read for every token: the embedding too is the output matrix."""
    total = 0
    for file in model.glob("model*.safetensors"):
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                first, last = tensor["data_offsets"]
                total += (last - first) // {"F32": 4, "F16": 2, "BF16": 2}[tensor["dtype"]]
    return total


def _time(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _at_once(function: Callable[[Any], Any], *parts: Any) -> None:
    threads = [Thread(target=function, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


DECODERS: dict[str, Callable[..., Decoder]] = {
    "eellm": Eellm,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "economize": Economize,
    "ctranslate2": CTranslate2,
    "memory": Memory,
}


def serve(name: str, requests: Iterator[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """One line after the other, until there are no more or one fails. The first one loads."""
    try:
        decoder = DECODERS[name](**json.loads(next(requests))["load"])
    except ImportError as error:
        answer({"missing": str(error)})
        return
    answer({"versions": decoder.versions})
    for line in requests:
        answer(_generate(decoder, **json.loads(line)))
    decoder.close()


def _generate(
    decoder: Decoder, prompts: list[list[int]], batch: int, num_tokens: int, settings: dict[str, Any]
) -> dict[str, Any]:
    generate = decoder.prepare(settings, batch)
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    start = time.perf_counter()
    answers = [generate(group, num_tokens) for group in groups]
    seconds = time.perf_counter() - start
    known = [a.decode_s for a in answers if a.decode_s is not None]
    whole = Answer(
        tokens=[tokens for a in answers for tokens in a.tokens],
        decode_s=sum(known) if len(known) == len(answers) else None,
        detail=answers[-1].detail,
    )
    return {"seconds": seconds} | asdict(whole)


def main() -> None:
    # what libraries print must not get among the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        serve(sys.argv[1], iter(sys.stdin.readline, ""), lambda message: print(json.dumps(message), file=answers))
    except Exception:
        print(json.dumps({"error": traceback.format_exc()}), file=answers)


if __name__ == "__main__":
    main()
