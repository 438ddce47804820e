"""The simulator against this machine: what an exit adds to an iteration, predicted and measured.

    OMP_NUM_THREADS=1 python benchmarks/plan_accuracy.py [--quick] [--rounds 20] [--out bench-out/plan_accuracy.json]

About 5 minutes on two idle cores (estimated); --quick tries it with tiny sizes, in seconds. A pipeline of two
processes under 1F1B, one thread each, 8 and 24 microbatches, with an exit at the end of stage 0 and without: stage 0
has the embedding, 4 layers and the exit, stage 1 has 5 layers and the final head, so with its exit it is still the
lighter one. All models live in the same two processes and take turns by whole iterations (A B A B …). In each round,
each stage's forward and backward of one microbatch are measured too, as a run does for its schedule, both stages at a
time. The medians of these are all that the simulator gets to know.

Measured are forward and backward of an iteration, on the first stage, which ends last; the ratio is the median of the
ratios pair by pair. The whole iteration's, with data and optimizer, stands beside it.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pipelines import Load, iteration, load_text, on_processes, recipe
from rich.console import Console
from rich.table import Table

from eellm.config.model import ExitConfig, ModelConfig
from eellm.parallel.mesh import join
from eellm.pipeline.measure import measure_stages
from eellm.pipeline.watched import unwatched
from eellm.plan.simulate import StageCost, simulate
from eellm.schedule.generate import make_schedule
from eellm.train.trainer import Trainer

LAYERS = (4, 5)
PAIRS = {8: 3, 24: 1}
"""Pairs of iterations in a round, by number of microbatches: shorter ones want more."""
StageTimes = list[tuple[float, float]]
"""Seconds of a forward and of a backward, by stage."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the model and of a microbatch."""

    vocab_size: int = 2048
    hidden_size: int = 256
    seq_len: int = 128
    rows: int = 2


QUICK = Sizes(vocab_size=512, hidden_size=32, seq_len=16, rows=1)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An iteration without exits and the one after it, with the exit."""

    num_microbatches: int
    plain_s: float
    exit_s: float
    plain_passes_s: float
    """Forward and backward only."""
    exit_passes_s: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """By one process."""

    pairs: tuple[Pair, ...]
    plain_stages: tuple[StageTimes, ...]
    """Round by round."""
    exit_stages: tuple[StageTimes, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one number of microbatches, forward and backward only unless it says otherwise."""

    num_microbatches: int
    plain_s: float
    plain_predicted_s: float
    exit_s: float
    exit_predicted_s: float
    ratio: float
    ratios: tuple[float, ...]
    predicted: float
    whole_ratio: float
    """Of whole iterations."""

    @property
    def points(self) -> float:
        """What the prediction is off by."""
        return 100 * (self.predicted - self.ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two rounds of tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, default=Path("bench-out/plan_accuracy.json"))
    options = parser.parse_args()
    load, sizes = os.getloadavg(), QUICK if options.quick else Sizes()
    measured = on_processes(2, measure, sizes, 2 if options.quick else options.rounds)[0]
    results = [result(measured, num_microbatches) for num_microbatches in PAIRS]
    console = Console(width=160)
    console.print(stages_table(measured))
    console.print(table(results, load))
    out = {
        "sizes": asdict(sizes),
        "layers": LAYERS,
        "torch": torch.__version__,
        "load_average": [load, os.getloadavg()],
        "results": [asdict(each) | {"points": each.points} for each in results],
        "measured": asdict(measured),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(out, indent=2) + "\n")


def model(sizes: Sizes, *, has_exit: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=3 * sizes.hidden_size,
        num_layers=sum(LAYERS),
        num_heads=8,
        max_seq_len=sizes.seq_len,
        exits=(ExitConfig(layer=LAYERS[0], head="own"),) if has_exit else (),
    )


def measure(sizes: Sizes, rounds: int) -> Measured:
    """On both processes at once; the first one's clock counts."""
    torch.set_num_threads(1)
    trainers = {
        num_microbatches: tuple(make_trainer(sizes, num_microbatches, has_exit=has_exit) for has_exit in (False, True))
        for num_microbatches in PAIRS
    }
    for plain, exit in trainers.values():  # the optimizer's state comes with the first step
        pair(plain, exit, 1)
    pairs, stages = [], ([], [])
    for step in range(rounds):
        for num_microbatches, times in PAIRS.items():
            plain, exit = trainers[num_microbatches]
            pairs += [pair(plain, exit, 2 + step * times + i) for i in range(times)]
        for trainer, found in zip(trainers[min(PAIRS)], stages, strict=True):
            found.append(stage_times(trainer, sizes))
    return Measured(pairs=tuple(pairs), plain_stages=tuple(stages[0]), exit_stages=tuple(stages[1]))


def make_trainer(sizes: Sizes, num_microbatches: int, *, has_exit: bool) -> Trainer:
    config = recipe(
        model(sizes, has_exit=has_exit), layers_per_stage=LAYERS, num_microbatches=num_microbatches, rows=sizes.rows
    )
    return Trainer(config, join(config.parallel), unwatched)


def pair(plain: Trainer, exit: Trainer, step: int) -> Pair:
    plain_s, plain_passes_s = iteration(plain, step)
    exit_s, exit_passes_s = iteration(exit, step)
    return Pair(
        num_microbatches=plain.config.parallel.num_microbatches or 1,
        plain_s=plain_s,
        exit_s=exit_s,
        plain_passes_s=plain_passes_s,
        exit_passes_s=exit_passes_s,
    )


def stage_times(trainer: Trainer, sizes: Sizes) -> StageTimes:
    return measure_stages(
        trainer.placed.modules[0],
        trainer.config.parallel,
        trainer.world,
        microbatch=(sizes.rows, sizes.seq_len),
        hidden=(sizes.hidden_size, torch.float32),
    )


def result(measured: Measured, num_microbatches: int) -> Result:
    pairs = [pair for pair in measured.pairs if pair.num_microbatches == num_microbatches]
    ratios = tuple(pair.exit_passes_s / pair.plain_passes_s for pair in pairs)
    plain_predicted_s = predicted_s(measured.plain_stages, num_microbatches)
    exit_predicted_s = predicted_s(measured.exit_stages, num_microbatches)
    return Result(
        num_microbatches=num_microbatches,
        plain_s=statistics.median(pair.plain_passes_s for pair in pairs),
        plain_predicted_s=plain_predicted_s,
        exit_s=statistics.median(pair.exit_passes_s for pair in pairs),
        exit_predicted_s=exit_predicted_s,
        ratio=statistics.median(ratios),
        ratios=ratios,
        predicted=exit_predicted_s / plain_predicted_s,
        whole_ratio=statistics.median(pair.exit_s / pair.plain_s for pair in pairs),
    )


def predicted_s(rounds: Sequence[StageTimes], num_microbatches: int) -> float:
    costs = [StageCost(forward_s=f, input_s=b, weight_s=0.0) for f, b in medians(rounds)]
    return simulate(make_schedule("1f1b", len(costs), num_microbatches), costs).end_s


def medians(rounds: Sequence[StageTimes]) -> StageTimes:
    """Of each stage over the rounds."""
    by_stage = zip(*rounds, strict=True)
    return [tuple(statistics.median(times) for times in zip(*stage, strict=True)) for stage in by_stage]


def stages_table(measured: Measured) -> Table:
    found = Table(title="One microbatch on a stage, ms")
    for name in ("stage", "forward", "backward", "forward, with the exit", "backward, with the exit"):
        found.add_column(name, justify="right")
    both = zip(medians(measured.plain_stages), medians(measured.exit_stages), strict=True)
    for stage, (plain, exit) in enumerate(both):
        found.add_row(str(stage), *(f"{1000 * seconds:.2f}" for seconds in (*plain, *exit)))
    return found


def table(results: list[Result], load: Load) -> Table:
    found = Table(title="An exit at the end of stage 0 against none: forward and backward", caption=load_text(load))
    for name in (
        "microbatches",
        "without, s",
        "predicted, s",
        "with, s",
        "predicted, s",
        "ratio",
        "range",
        "predicted",
        "off by, points",
        "ratio of whole iterations",
    ):
        found.add_column(name, justify="right")
    for r in results:
        found.add_row(
            str(r.num_microbatches),
            f"{r.plain_s:.3f}",
            f"{r.plain_predicted_s:.3f}",
            f"{r.exit_s:.3f}",
            f"{r.exit_predicted_s:.3f}",
            f"{r.ratio:.4f}",
            f"{min(r.ratios):.3f} to {max(r.ratios):.3f}",
            f"{r.predicted:.4f}",
            f"{r.points:+.2f}",
            f"{r.whole_ratio:.4f}",
        )
    return found


if __name__ == "__main__":
    main()
