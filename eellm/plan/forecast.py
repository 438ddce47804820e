"""What a training step will cost: a recipe and a piece of hardware, before anything is started.

    recipe → stages, schedule → costs of a microbatch (times.py) → timeline (simulate.py) → seconds, idle time
                              → bytes (memory.py) × microbatches in flight (schedule/check.py) → peak memory

What an exit costs is the difference that it makes: the step with it minus the step without it, all else the same.
"""

from dataclasses import dataclass, replace

from eellm.config.model import ModelConfig
from eellm.config.train import TrainConfig
from eellm.plan.cost import train_flops_per_token
from eellm.plan.hardware import Hardware
from eellm.plan.layout import fit_layout, plan_stages
from eellm.plan.memory import Microbatch, rank_bytes, stage_memory
from eellm.plan.simulate import StageCost, fill_bubbles, simulate
from eellm.plan.times import ranks_of_stages, stage_cost, step_end_s, transfer_s
from eellm.schedule.action import Action, Schedule
from eellm.schedule.check import peak_in_flight
from eellm.schedule.generate import make_schedule
from eellm.schedule.partition import Stage
from eellm.schedule.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class ExitForecast:
    """What one early exit costs."""

    layer: int
    stage: int
    """Where it runs, from 0."""
    cost_s: float
    """By which it makes a step longer."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One training step."""

    config: TrainConfig
    """With the number of microbatches that was counted with."""
    stages: tuple[Stage, ...]
    schedule: Schedule
    timeline: Timeline
    """Of the pipeline's ranks, from the first forward to the last backward."""
    end_s: float
    """What comes behind it: sums of gradients, the optimizer."""
    memory_bytes: tuple[float, ...]
    """At most, on each device of each rank of the pipeline."""

    @property
    def iteration_s(self) -> float:
        """Seconds of a step."""
        return self.timeline.end_s + self.end_s

    @property
    def bubble(self) -> float:
        """Share of the timeline in which ranks idle; extra microbatches that fill bubbles count as work."""
        return self.timeline.bubble

    @property
    def tokens_per_s(self) -> float:
        """Of the global batch."""
        return self.config.train.global_batch_size * self.config.data.seq_len / self.iteration_s

    def utilisation(self, hardware: Hardware) -> float:
        """Model FLOP utilisation: of the peak, what the model's own products come to."""
        config = self.config
        peak = hardware.flops_per_s(config.train.dtype) / hardware.efficiency
        flops = train_flops_per_token(config.model, config.data.seq_len)
        return self.tokens_per_s * flops / (peak * config.parallel.world_size)


@dataclass(frozen=True)
class Parts:
    """What a forecast is made of, before any schedule is run."""

    config: TrainConfig
    stages: tuple[Stage, ...]
    costs: tuple[StageCost, ...]
    """Of a microbatch, by stage."""
    send_s: float
    end_s: float

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Each rank's work on one microbatch."""
        busy = [0.0] * self.config.parallel.pp
        for cost, rank in zip(self.costs, self._ranks, strict=True):
            busy[rank] += cost.total_s
        return tuple(busy)

    @property
    def least_s(self) -> float:
        """No schedule takes less: the busiest rank's work, and the way of one microbatch to it and back."""
        num_microbatches = self.config.parallel.num_microbatches or 1
        first = [self._ranks.index(rank) for rank in range(self.config.parallel.pp)]
        way = [sum(cost.forward_s for cost in self.costs[:stage]) for stage in first]
        busy = [seconds * num_microbatches for seconds in self.busy_s]
        return max(map(sum, zip(busy, way, strict=True))) + self.end_s

    @property
    def _ranks(self) -> tuple[int, ...]:
        """Each stage's."""
        return tuple(ranks_of_stages(self.config.parallel, len(self.stages)))


def forecast(config: TrainConfig, hardware: Hardware) -> Forecast:
    """The step that a recipe asks for. Raises ConfigError for layouts that can't be."""
    return run(prepare(config, hardware), hardware)


def prepare(config: TrainConfig, hardware: Hardware) -> Parts:
    """Stages and their costs."""
    config = fit_layout(config)
    model, parallel, microbatch = config.model, config.parallel, microbatch_of(config, hardware)
    stages = plan_stages(model, parallel)
    costs = tuple(stage_cost(model, stage, parallel, microbatch, hardware) for stage in stages)
    send_s = transfer_s(model, parallel, microbatch, hardware)
    return Parts(config, stages, costs, send_s, step_end_s(model, stages, parallel, microbatch, hardware))


def run(parts: Parts, hardware: Hardware) -> Forecast:
    """Runs the schedule."""
    schedule = schedule_of(parts)
    return Forecast(
        config=parts.config,
        stages=parts.stages,
        schedule=schedule,
        timeline=simulate(schedule, parts.costs, parts.send_s),
        end_s=parts.end_s,
        memory_bytes=memory_of(parts, schedule, hardware),
    )


def estimate(parts: Parts, hardware: Hardware) -> tuple[float, float]:
    """Seconds of a step and peak bytes of a device, from two shorter steps where there are many microbatches.

    A schedule repeats itself: from some number of microbatches on, each further one takes as long as the one before,
    and no less than the busiest rank's work. Under `zbv` it starts late: the busiest rank, which is first at its work,
    has idle time that it uses up little by little before the others wait for it.
    """
    pp, num_microbatches = parts.config.parallel.pp, parts.config.parallel.num_microbatches or 1
    short, long = (10 * pp, 12 * pp) if parts.config.parallel.schedule == "zbv" else (4 * pp, 6 * pp)
    if num_microbatches <= long or num_microbatches % pp:
        exact = run(parts, hardware)
        return exact.iteration_s, max(exact.memory_bytes)
    first, second = (schedule_of(parts, num) for num in (short, long))
    first_s, second_s = (simulate(schedule, parts.costs, parts.send_s).end_s for schedule in (first, second))
    each_s = max((second_s - first_s) / (long - short), *parts.busy_s)
    held = [max(memory_of(parts, schedule, hardware)) for schedule in (first, second)]
    each_bytes = (held[1] - held[0]) / (long - short)  # nothing, but where all microbatches are in flight
    more = num_microbatches - long
    return second_s + more * each_s + parts.end_s, held[1] + more * each_bytes


def schedule_of(parts: Parts, num_microbatches: int | None = None) -> Schedule:
    """The orders of a recipe's ranks. num_microbatches: other than the recipe's."""
    parallel = parts.config.parallel
    num_microbatches = num_microbatches or parallel.num_microbatches or 1
    if parallel.pp == 1:  # gradients add up over microbatches
        order = tuple(Action(0, kind, m) for m in range(num_microbatches) for kind in ("F", "B"))
        return Schedule(name="accumulation", ranks=(0,), num_microbatches=num_microbatches, orders=(order,))
    if parallel.schedule == "filled_1f1b":
        plain = make_schedule("1f1b", parallel.pp, num_microbatches)
        return fill_bubbles(plain, parts.costs, parts.send_s)
    return make_schedule(parallel.schedule, parallel.pp, num_microbatches, stages_per_rank=parallel.stages_per_rank)


def memory_of(parts: Parts, schedule: Schedule, hardware: Hardware) -> tuple[float, ...]:
    """Peak bytes of a device of each rank, with what the hardware keeps for itself."""
    config, ranks = parts.config, schedule.ranks
    microbatch = microbatch_of(config, hardware)
    memories = [stage_memory(config.model, stage, config.parallel, microbatch) for stage in parts.stages]
    return tuple(
        hardware.reserved_bytes
        + rank_bytes([memory for memory, at in zip(memories, ranks, strict=True) if at == rank], in_flight)
        for rank, in_flight in enumerate(peak_in_flight(schedule))
    )


def exit_forecasts(config: TrainConfig, hardware: Hardware) -> tuple[ExitForecast, ...]:
    """What each exit of a recipe costs, with the layers divided as they are with all of them."""
    config = fit_layout(config)
    stages = plan_stages(config.model, config.parallel)
    config = _divided_as(config, stages)
    whole = forecast(config, hardware).iteration_s
    found = []
    for exit in config.model.exits:
        others = tuple(other for other in config.model.exits if other is not exit)
        without = forecast(_with_model(config, replace(config.model, exits=others)), hardware).iteration_s
        stage = next(stage.index for stage in stages if exit.layer in stage.exits)
        found.append(ExitForecast(layer=exit.layer, stage=stage, cost_s=whole - without))
    return tuple(found)


def overhead_of_exits(config: TrainConfig, hardware: Hardware) -> float:
    """By which share a step takes longer than the same model's without early exits, its layers divided alike."""
    config = fit_layout(config)
    config = _divided_as(config, plan_stages(config.model, config.parallel))
    without = _with_model(config, replace(config.model, exits=()))
    return forecast(config, hardware).iteration_s / forecast(without, hardware).iteration_s - 1


def microbatch_of(config: TrainConfig, hardware: Hardware) -> Microbatch:
    """A microbatch of a recipe whose number of them is known."""
    parallel = config.parallel
    return Microbatch(
        num_rows=config.train.global_batch_size // parallel.dp // (parallel.num_microbatches or 1),
        seq_len=config.data.seq_len,
        dtype=config.train.dtype,
        chunk_size=config.objective.chunk_size,
        device=hardware.device,
    )


def _divided_as(config: TrainConfig, stages: tuple[Stage, ...]) -> TrainConfig:
    """With `stages`' numbers of layers written down."""
    if config.parallel.pp == 1:
        return config
    layers = tuple(stage.num_layers for stage in stages)
    return replace(config, parallel=replace(config.parallel, layers_per_stage=layers))


def _with_model(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    objective = replace(config.objective, exit_weights=(), initial_weights=())
    return replace(config, model=model, objective=objective)
