"""Whether microbatches that fill bubbles cost time: iterations under filled_1f1b against 1f1b.

    python benchmarks/filled.py [--quick] [--rounds 15] [--forward-ms 20] [--out bench-out/filled.json]

About 2 minutes. A pipeline of four processes whose stages are alike: a tiny layer, an exit behind it, and a sleep of
20 ms in the forward and twice as long in the backward, so that processes idle as they would on devices of their own,
however few cores there are. What is computed must be little beside the sleeps: a busy machine wants longer ones. Both
schedules are made for these times as a run makes them, live in the same processes and take turns by whole steps (A B A
B …), without an optimizer. Reported are the median of the ratios pair by pair, the extra microbatches in a filled step,
and what the simulator expects of both steps when it is told how long the stages really take.

A pipeline of two such stages has no room: that needs no clock, and stands below the table as the filling says it.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pipelines import Load, load_text, on_processes, recipe, together
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from eellm.config.model import ExitConfig, ModelConfig
from eellm.config.parallel import Schedule
from eellm.config.train import TrainConfig
from eellm.data.loader import Batch
from eellm.model.layers import Layer, Rows
from eellm.parallel.mesh import join
from eellm.pipeline.measure import measure_stages
from eellm.pipeline.placed import PlacedModel, place
from eellm.pipeline.run import Driver
from eellm.pipeline.stage import StepLosses
from eellm.pipeline.watched import unwatched
from eellm.plan.simulate import StageCost, simulate
from eellm.schedule.generate import make_schedule
from eellm.train.driver import describe_filling, fill, make_driver
from eellm.train.start import start_at_random

BACKWARD_RATIO = 2
NUM_STAGES, MICROBATCHES = 4, (8, 16)
SCHEDULES: tuple[Schedule, ...] = ("1f1b", "filled_1f1b")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one number of microbatches."""

    num_microbatches: int
    forward_s: float
    """Sleep in a stage's forward."""
    num_extra: int
    """Microbatches beside them in a filled step."""
    plain_s: tuple[float, ...]
    """Steps under 1f1b."""
    filled_s: tuple[float, ...]
    """The step after each of them, under filled_1f1b."""
    stages_s: tuple[tuple[float, float], ...]
    """Forward and backward of each stage as measured: the sleep and what is computed."""

    @property
    def ratios(self) -> list[float]:
        """Round by round."""
        return [filled / plain for plain, filled in zip(self.plain_s, self.filled_s, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--forward-ms", type=float, default=20.0, help="how long a forward sleeps")
    parser.add_argument("--quick", action="store_true", help="two rounds: does it run?")
    parser.add_argument("--out", type=Path, default=Path("bench-out/filled.json"))
    options = parser.parse_args()
    load, forward_s = os.getloadavg(), options.forward_ms / 1000
    results = on_processes(NUM_STAGES, measure, forward_s, 2 if options.quick else options.rounds)[0]
    console = Console(width=140)
    console.print(table(results, load))
    pair = fill(make_recipe(2, MICROBATCHES[0], "filled_1f1b"), sleeps(2, forward_s))
    console.print(f"Two stages: {describe_filling(pair)}")
    out = {
        "backward_ratio": BACKWARD_RATIO,
        "num_stages": NUM_STAGES,
        "torch": torch.__version__,
        "load_average": [load, os.getloadavg()],
        "results": [asdict(r) | {"ratio": statistics.median(r.ratios), "predicted": predicted(r)} for r in results],
        "num_extra_of_two_stages": len(pair.extras),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(out, indent=2) + "\n")


def make_recipe(num_stages: int, num_microbatches: int, schedule: Schedule) -> TrainConfig:
    """One layer on each stage, with an exit behind it that shares nothing."""
    model = ModelConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_layers=num_stages,
        num_heads=2,
        max_seq_len=8,
        exits=tuple(ExitConfig(layer=layer, head="own") for layer in range(1, num_stages)),
    )
    layout = {"layers_per_stage": (1,) * num_stages, "num_microbatches": num_microbatches, "rows": 1}
    return recipe(model, **layout, schedule=schedule)


def sleeps(num_stages: int, forward_s: float) -> list[tuple[float, float]]:
    """Seconds of a forward and of a backward, by stage."""
    return [(forward_s, BACKWARD_RATIO * forward_s)] * num_stages


def measure(forward_s: float, rounds: int) -> list[Result]:
    """On all processes at once; the first one's clock counts."""
    torch.set_num_threads(1)
    return [measure_turns(num_microbatches, forward_s, rounds) for num_microbatches in MICROBATCHES]


def measure_turns(num_microbatches: int, forward_s: float, rounds: int) -> Result:
    configs = [make_recipe(NUM_STAGES, num_microbatches, schedule) for schedule in SCHEDULES]
    config, world = configs[0], join(configs[0].parallel)
    placed = place(config.model, config.parallel, world, objective=config.objective, dtype=config.train.dtype)
    start_at_random(placed, seed=0)
    (module,) = placed.modules
    layers = module.model.decoder.layers
    for number in list(layers):
        layers[number] = SlowLayer(layers[number], forward_s)
    times = sleeps(NUM_STAGES, forward_s)
    plain, filled = (make_driver(each, placed, world, unwatched, times)[0] for each in configs)
    steps = [(step(plain, placed, config), step(filled, placed, config)) for _ in range(1 + rounds)]
    plain_s, filled_s = zip(*steps[1:], strict=True)  # processes meet for the first time in the first
    stages = measure_stages(
        module,
        config.parallel,
        world,
        microbatch=(1, config.data.seq_len),
        hidden=(config.model.hidden_size, torch.float32),
    )
    return Result(
        num_microbatches=num_microbatches,
        forward_s=forward_s,
        num_extra=filled.num_extra,
        plain_s=plain_s,
        filled_s=filled_s,
        stages_s=tuple(stages),
    )


class SlowLayer(nn.Module):
    """A layer, and a sleep."""

    def __init__(self, layer: Layer, forward_s: float) -> None:
        super().__init__()
        self.layer, self.forward_s = layer, forward_s

    def forward(self, x_BTD: Tensor, rows: Rows) -> Tensor:
        return _Sleep.apply(self.layer(x_BTD, rows), self.forward_s)


class _Sleep(torch.autograd.Function):
    """Identity; in the backward too, where there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float) -> Tensor:
        ctx.backward_s = BACKWARD_RATIO * forward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.backward_s)
        return grad, None


def step(driver: Driver, placed: PlacedModel, config: TrainConfig) -> float:
    """Seconds until all processes are through with a step's microbatches."""
    for parameter in placed.trainable():
        parameter.grad = None
    num_rows = (config.parallel.num_microbatches or 1) + driver.num_extra
    tokens_BT = torch.randint(config.model.vocab_size, (num_rows, config.data.seq_len))
    batch = Batch(
        tokens_BT=tokens_BT,
        labels_BT=tokens_BT,
        positions_BT=torch.arange(config.data.seq_len).expand(num_rows, -1),
        documents_BT=torch.zeros_like(tokens_BT),
        is_packed=False,
    )
    losses = StepLosses(dict.fromkeys((*config.model.exit_layers, config.model.num_layers), 1.0))
    return together(lambda: driver.step(batch, losses))[0]


def predicted(result: Result) -> dict[str, float]:
    """Seconds of a step by schedule, by the stages' measured times."""
    config = make_recipe(NUM_STAGES, result.num_microbatches, "filled_1f1b")
    filled = fill(config, sleeps(NUM_STAGES, result.forward_s))
    costs = [StageCost(forward_s=forward, input_s=backward, weight_s=0.0) for forward, backward in result.stages_s]
    schedules = {"1f1b": make_schedule("1f1b", NUM_STAGES, result.num_microbatches), "filled_1f1b": filled}
    return {name: simulate(schedule, costs).end_s for name, schedule in schedules.items()}


def table(results: list[Result], load: Load) -> Table:
    forward_ms = 1000 * results[0].forward_s
    found = Table(
        title=f"Four stages that sleep {forward_ms:g} + {BACKWARD_RATIO * forward_ms:g} ms: a step, filled or not",
        caption=load_text(load),
    )
    for name in (
        "microbatches",
        "extra",
        "slowest stage, ms",
        "1f1b, s",
        "predicted, s",
        "filled, s",
        "predicted, s",
        "ratio",
        "range",
        "predicted",
    ):
        found.add_column(name, justify="right")
    for r in results:
        plain_s, filled_s = predicted(r).values()
        found.add_row(
            str(r.num_microbatches),
            str(r.num_extra),
            " + ".join(f"{1000 * max(seconds):.1f}" for seconds in zip(*r.stages_s, strict=True)),
            f"{statistics.median(r.plain_s):.3f}",
            f"{plain_s:.3f}",
            f"{statistics.median(r.filled_s):.3f}",
            f"{filled_s:.3f}",
            f"{statistics.median(r.ratios):.3f}",
            f"{min(r.ratios):.2f} to {max(r.ratios):.2f}",
            f"{filled_s / plain_s:.3f}",
        )
    return found


if __name__ == "__main__":
    main()
