"""What an exit costs in time: a pipeline of two processes under 1F1B, with an exit at the end of stage 0 and without.

    python benchmarks/train_overhead.py [--quick] [--rounds 10] [--out bench-out/train_overhead.json]

Both models live in the same two processes, one thread each, and take turns by whole iterations (A B A B …), optimizer
included. For each number of microbatches: the median of the ratios round by round, their range, and beside it what
EE-LLM (arXiv 2312.04916 §3) predicts, k · (f_EE + b_EE) / T: the exit's forward and backward of one microbatch, timed
apart, over an iteration without exits; here k = 1. It holds where the stage with its exit isn't heavier than the last
one: stage 0 has the embedding, 4 layers and the exit, stage 1 has 5 layers and the final head, both heads a matrix of
4096 × 192.

Two idle cores are needed; the load is reported.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from pipelines import iteration, on_processes, recipe
from rich.console import Console
from rich.table import Table

from eellm.config.model import ExitConfig, ModelConfig
from eellm.exits.loss import CrossEntropy, exit_loss_node
from eellm.parallel.mesh import join
from eellm.pipeline.watched import unwatched
from eellm.train.trainer import Trainer

NUM_LAYERS, EXIT = 9, 4
VOCAB_SIZE, HIDDEN_SIZE, SEQ_LEN, ROWS = 4096, 192, 128, 2
MICROBATCHES = (8, 24, 64)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one number of microbatches."""

    num_microbatches: int
    plain_s: tuple[float, ...]
    """Iterations without exits."""
    exit_s: tuple[float, ...]
    """The iteration after each of them, with the exit."""
    plain_passes_s: tuple[float, ...]
    """Their forward and backward only."""
    exit_passes_s: tuple[float, ...]
    head_s: float
    """Forward and backward of the exit of one microbatch on stage 0, alone."""

    @property
    def overheads(self) -> list[float]:
        """Round by round, as a share of the iteration without exits."""
        return [b / a - 1 for a, b in zip(self.plain_s, self.exit_s, strict=True)]

    @property
    def overhead(self) -> float:
        return statistics.median(self.overheads)

    @property
    def overhead_of_passes(self) -> float:
        """The same of forward and backward only."""
        return statistics.median(b / a - 1 for a, b in zip(self.plain_passes_s, self.exit_passes_s, strict=True))

    @property
    def predicted(self) -> float:
        return self.head_s / statistics.median(self.plain_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="pairs of iterations at the most microbatches")
    parser.add_argument("--quick", action="store_true", help="two rounds of 8 microbatches: does it run?")
    parser.add_argument("--out", type=Path, default=Path("bench-out/train_overhead.json"))
    options = parser.parse_args()
    # fewer microbatches make shorter iterations, which want more rounds
    plan = {8: 2} if options.quick else {n: options.rounds * min(3, 64 // n) for n in MICROBATCHES}
    load = [os.getloadavg()]
    results = on_processes(2, measure, plan)[0]
    load.append(os.getloadavg())
    Console(width=120).print(table(results, load))
    out = {
        "sizes": {name: globals()[name] for name in ("NUM_LAYERS", "VOCAB_SIZE", "HIDDEN_SIZE", "SEQ_LEN", "ROWS")},
        "torch": torch.__version__,
        "load_average": load,
        "results": [
            asdict(r) | {"overhead": r.overhead, "of_passes": r.overhead_of_passes, "predicted": r.predicted}
            for r in results
        ],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(out, indent=2) + "\n")


def model(*, has_exit: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=3 * HIDDEN_SIZE,
        num_layers=NUM_LAYERS,
        num_heads=6,
        max_seq_len=SEQ_LEN,
        exits=(ExitConfig(layer=EXIT, head="own"),) if has_exit else (),
    )


def measure(plan: dict[int, int]) -> list[Result]:
    """On both processes at once; the first one's clock counts."""
    torch.set_num_threads(1)
    results = []
    for num_microbatches, rounds in plan.items():
        layout = {"layers_per_stage": (EXIT, NUM_LAYERS - EXIT), "num_microbatches": num_microbatches, "rows": ROWS}
        configs = [recipe(model(has_exit=has_exit), **layout) for has_exit in (False, True)]
        plain, exit = (Trainer(config, join(config.parallel), unwatched) for config in configs)
        times = [(iteration(plain, step), iteration(exit, step), head(exit)) for step in range(1, rounds + 2)]
        without, with_exit, heads = zip(*times[1:], strict=True)  # the optimizer's state comes with the first
        plain_s, plain_passes_s = zip(*without, strict=True)
        exit_s, exit_passes_s = zip(*with_exit, strict=True)
        results.append(
            Result(
                num_microbatches=num_microbatches,
                plain_s=plain_s,
                exit_s=exit_s,
                plain_passes_s=plain_passes_s,
                exit_passes_s=exit_passes_s,
                head_s=statistics.median(heads),
            )
        )
    return results


def head(trainer: Trainer) -> float:
    """Seconds of one microbatch through the exit, forward and backward; on the stage that has it, others wait."""
    (module,) = trainer.placed.modules
    seconds = 0.0
    if EXIT in module.stage.exits:
        seconds = _time(lambda: _run_head(trainer))
    dist.barrier()
    return seconds


def _run_head(trainer: Trainer) -> None:
    (module,) = trainer.placed.modules
    decoder = module.model.decoder
    x_BTD = torch.randn(ROWS, SEQ_LEN, HIDDEN_SIZE, requires_grad=True)
    rows = decoder.rows(SEQ_LEN)
    labels_N = torch.randint(VOCAB_SIZE, (ROWS * SEQ_LEN,))
    chunk_size = trainer.config.objective.chunk_size
    objective = CrossEntropy(labels_N)
    y_BTD = exit_loss_node(x_BTD, module.model.head(EXIT, rows), objective, weight=1.0, chunk_size=chunk_size)
    y_BTD.backward(torch.zeros_like(y_BTD))


def _time(run: Callable[[], None], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def table(results: list[Result], load: list[tuple[float, float, float]]) -> Table:
    found = Table(
        title="An exit at the end of stage 0 against none: overhead of an iteration",
        caption=f"load average {load[0][0]:.2f} before, {load[1][0]:.2f} after",
    )
    for name in (
        "microbatches",
        "without, s",
        "with, s",
        "head, ms",
        "overhead, %",
        "range",
        "of passes, %",
        "predicted, %",
    ):
        found.add_column(name, justify="right")
    for r in results:
        found.add_row(
            str(r.num_microbatches),
            f"{statistics.median(r.plain_s):.3f}",
            f"{statistics.median(r.exit_s):.3f}",
            f"{1000 * r.head_s:.1f}",
            f"{100 * r.overhead:+.2f}",
            f"{100 * min(r.overheads):+.1f} to {100 * max(r.overheads):+.1f}",
            f"{100 * r.overhead_of_passes:+.2f}",
            f"{100 * r.predicted:+.2f}",
        )
    return found


if __name__ == "__main__":
    main()
