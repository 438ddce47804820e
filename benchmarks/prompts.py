"""How fast a prompt is read: by the compiled kernels, and by torch's plain modules.

    python benchmarks/prompts.py [MODEL] [--rows 128 512] [--threads 1 2] [--rounds 15] [--quantize int8|int4]
                                 [--out FILE.json]

MODEL is a Hugging Face directory, by default models/english. Both sides take a whole prompt through all layers in
float32, without exits, and give the logits of its last row; the kernels also keep the keys and values. The two take
turns in one process (A B A B …), first a round that doesn't count. A rate is rows of the prompt a second, the ratio is
the median of the ratios round by round. `apart` is the largest difference between the two sides' logits.
--quantize rounds the kernels' weights, not torch's.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import eellm
from eellm.infer.attention import Span
from eellm.infer.native.network import NativeNetwork

ROOT = Path(__file__).parents[1]
PAUSE_S = 0.05
"""Between turns: threads that wait for work spin for a while before they sleep."""
Read = Callable[[list[int]], Tensor]
"""A prompt → the logits (1, V) of its last row."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Prompts of one length, by so many threads, in all rounds."""

    rows: int
    threads: int
    ours_rows_per_s: list[float]
    theirs_rows_per_s: list[float]
    apart: float
    load_average: tuple[float, float]
    """Before and after."""

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours_rows_per_s, self.theirs_rows_per_s, strict=True)]


@torch.inference_mode()
def main() -> None:
    options = parse()
    model = eellm.load(options.model)
    sides = by_kernels(model, options.quantize), by_modules(model)
    cases = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        cases += [measure(sides, rows, threads, options.rounds, model.config.vocab_size) for rows in options.rows]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report(cases, options), indent=2) + "\n")
    Console(width=120).print(table(cases, options))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT / "models/english"))
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out/prompts.json")
    return parser.parse_args()


def by_kernels(model: eellm.EarlyExitLM, quantize: Any) -> Read:
    network, depth = NativeNetwork(model, quantize), model.config.num_layers
    memory = network.new_memory()

    def read(tokens: list[int]) -> Tensor:
        memory.reserve(1, len(tokens))
        rows = network.rows([Span(0, 0, len(tokens))])
        h_ND = network.run(network.embed(tokens), 1, depth, rows, memory)
        return network.logits(depth, network.normed(depth, h_ND[-1:]))

    return read


def by_modules(model: eellm.EarlyExitLM) -> Read:
    decoder = model.decoder

    def read(tokens: list[int]) -> Tensor:
        h_BTD = decoder.embed(torch.tensor([tokens]))
        h_BTD = decoder.run(h_BTD, 1, model.config.num_layers, decoder.rows(len(tokens)))
        return decoder.output(decoder.norm(h_BTD[:, -1]))

    return read


def measure(sides: tuple[Read, Read], num_rows: int, threads: int, rounds: int, vocab_size: int) -> Case:
    generator, before = torch.Generator().manual_seed(num_rows), os.getloadavg()[0]
    rates: tuple[list[float], list[float]] = [], []
    apart = 0.0
    for number in range(rounds + 1):
        tokens = torch.randint(vocab_size, (num_rows,), generator=generator).tolist()
        logits = []
        for side, found in zip(sides, rates, strict=True):
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            logits.append(side(tokens))
            if number:
                found.append(num_rows / (time.perf_counter() - start))
        apart = max(apart, float((logits[0] - logits[1]).abs().max()))
    return Case(
        rows=num_rows,
        threads=threads,
        ours_rows_per_s=rates[0],
        theirs_rows_per_s=rates[1],
        apart=apart,
        load_average=(before, os.getloadavg()[0]),
    )


def report(cases: list[Case], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": options.model,
        "quantize": options.quantize,
        "rounds": options.rounds,
        "num_cpus": os.cpu_count(),
        "versions": {"eellm": eellm.__version__, "torch": torch.__version__},
        "cases": [
            asdict(case) | {"ratio": median(case.ratios), "ratio_range": [min(case.ratios), max(case.ratios)]}
            for case in cases
        ],
    }


def table(cases: list[Case], options: argparse.Namespace) -> Table:
    found = Table(title=f"{options.model}, {options.quantize or 'float32'}, {options.rounds} rounds")
    for name in ("threads", "rows", "ours, rows/s", "torch's modules", "ratio", "range", "apart", "load"):
        found.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        found.add_row(
            *(str(case.threads), str(case.rows)),
            *(f"{median(case.ours_rows_per_s):.0f}", f"{median(case.theirs_rows_per_s):.0f}"),
            *(f"{median(case.ratios):.2f}", f"{min(case.ratios):.2f}–{max(case.ratios):.2f}", f"{case.apart:.1e}"),
            ", ".join(f"{load:.1f}" for load in case.load_average),
        )
    return found


if __name__ == "__main__":
    main()
