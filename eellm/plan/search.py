"""The best layout for a number of devices: every one that can be is bounded from below, the promising ones are run.

    recipe, hardware, number of devices → forecasts, best first, and why the others lose

Tried: each way to write the number as pp × dp × tp with tp inside a node, data parallelism sharded or replicated, the
schedules, microbatches of 1, 2, 4 … rows, exits where they are or on the next stage. What doesn't fit into memory is
kept aside. Candidates come in the order of a lower bound of their time, and one whose bound is above what its mesh has
already is not looked at: so the best one is the best of all.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from eellm.config.parallel import ParallelConfig, Schedule
from eellm.config.train import TrainConfig
from eellm.errors import ConfigError
from eellm.plan.forecast import Forecast, Parts, estimate, prepare, run
from eellm.plan.hardware import Hardware

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")
"""gpipe and looped_bfs are left out: they idle as long as 1f1b and interleaved_1f1b, and hold more."""
NUM_RUNNERS_UP = 8
WORTH_NAMING = 1.5
"""A layout that takes so many times the best one's time is none of the runners-up."""

Mesh = tuple[int, int, int]
"""pp, dp, tp."""


@dataclass(frozen=True)
class _Estimate:
    """A layout, roughly."""

    parts: Parts
    iteration_s: float
    memory_bytes: float


@dataclass(frozen=True)
class Candidate:
    """A layout and what became of it."""

    forecast: Forecast
    reason: str
    """Why it isn't the best; empty for the best."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    best: Forecast
    runners_up: tuple[Candidate, ...]
    """The next best: of each (pp, dp, tp) the best."""
    too_large: tuple[Candidate, ...]
    """Those that would be faster than the best, and don't fit into memory: likewise."""
    num_tried: int
    """Layouts that were bounded."""
    num_run: int
    """Layouts whose schedule was run."""


def search(
    config: TrainConfig, hardware: Hardware, num_devices: int, *, memory_limit_bytes: float | None = None
) -> SearchResult:
    """The fastest layout of `config` that fits into `memory_limit_bytes` (of the hardware, if unset) of each device.

    Only `[parallel]` is chosen; its recompute, exit_mode and compile stay as they are. Raises ConfigError where no
    layout fits.
    """
    limit = hardware.memory_bytes if memory_limit_bytes is None else memory_limit_bytes
    parts = sorted(_bounded(config, hardware, num_devices), key=lambda each: each.least_s)
    if not parts:
        raise ConfigError(_nothing_possible(config, num_devices))
    fitting: dict[Mesh, _Estimate] = {}
    too_large: dict[Mesh, _Estimate] = {}
    num_run = 0
    for each in parts:
        if _is_hopeless(each, fitting):
            continue
        num_run += 1
        found = _Estimate(each, *estimate(each, hardware))
        group = fitting if found.memory_bytes <= limit else too_large
        if _mesh(each) not in group or found.iteration_s < group[_mesh(each)].iteration_s:
            group[_mesh(each)] = found
    if not fitting:
        raise ConfigError(_nothing_fits(too_large, limit, hardware))
    ranked = sorted(fitting.values(), key=lambda found: found.iteration_s)[: 1 + NUM_RUNNERS_UP]
    best, *others = sorted((run(found.parts, hardware) for found in ranked), key=lambda each: each.iteration_s)
    faster = [found for found in too_large.values() if found.iteration_s < best.iteration_s]
    return SearchResult(
        best=best,
        runners_up=tuple(Candidate(other, why_slower(other, best)) for other in others),
        too_large=tuple(
            Candidate(run(found.parts, hardware), f"needs {_gib(found.memory_bytes)} of {_gib(limit)} GiB")
            for found in sorted(faster, key=lambda found: found.iteration_s)[:NUM_RUNNERS_UP]
        ),
        num_tried=len(parts),
        num_run=num_run,
    )


def layouts(config: TrainConfig, hardware: Hardware, num_devices: int) -> Iterator[ParallelConfig]:
    """Every `[parallel]` to be tried."""
    model, rows = config.model, config.train.global_batch_size
    exits_move = ("stay", "next_stage") if model.exits else ("stay",)
    for tp in _divisors(num_devices):
        if tp > hardware.devices_per_node or not _can_share(config, tp):
            continue
        for pp in _divisors(num_devices // tp):
            dp = num_devices // tp // pp
            if pp > model.num_layers or rows % dp:
                continue
            for schedule in SCHEDULES if pp > 1 else ("1f1b",):
                for placement in exits_move if pp > 1 else ("stay",):
                    for num_rows in _powers_of_two(rows // dp):
                        for shard in sorted({1, dp}):
                            yield replace(
                                config.parallel,
                                pp=pp,
                                tp=tp,
                                dp_shard=shard,
                                dp_replicate=dp // shard,
                                schedule=schedule,
                                exit_placement=placement,
                                num_microbatches=rows // dp // num_rows,
                                layers_per_stage=None,
                            )


def why_slower(other: Forecast, best: Forecast) -> str:
    """The largest of the differences: idle time, work of the busiest rank, or what comes after the last backward."""
    slower = f"{other.iteration_s / best.iteration_s - 1:+.1%}"
    work, idle = _work_s(other) - _work_s(best), _idle_s(other) - _idle_s(best)
    end = other.end_s - best.end_s
    largest = max(work, idle, end)
    if largest == idle:
        return f"{slower}: idles {other.bubble:.0%} of the time, the best {best.bubble:.0%}"
    if largest == end:
        return f"{slower}: gradients and optimizer take {other.end_s:.3g} s, the best's {best.end_s:.3g} s"
    tp, best_tp = other.config.parallel.tp, best.config.parallel.tp
    why = "more is sent within layers" if tp > best_tp else "its ranks are less alike or its parts smaller"
    return f"{slower}: ranks compute {_work_s(other):.3g} s, the best's {_work_s(best):.3g} s; {why}"


def _bounded(config: TrainConfig, hardware: Hardware, num_devices: int) -> Iterator[Parts]:
    for parallel in layouts(config, hardware, num_devices):
        try:
            yield prepare(replace(config, parallel=parallel), hardware)
        except ConfigError:  # a schedule that doesn't take these stages or microbatches: not a layout
            continue


def _is_hopeless(parts: Parts, fitting: Mapping[Mesh, _Estimate]) -> bool:
    """Whether a layout can neither be the best of its mesh nor come near the best of all."""
    if not fitting:
        return False
    best_s = min(found.iteration_s for found in fitting.values())
    of_mesh = fitting.get(_mesh(parts))
    return parts.least_s > WORTH_NAMING * best_s or (of_mesh is not None and parts.least_s >= of_mesh.iteration_s)


def _mesh(parts: Parts) -> Mesh:
    parallel = parts.config.parallel
    return parallel.pp, parallel.dp, parallel.tp


def _work_s(forecast: Forecast) -> float:
    """Mean over ranks."""
    return forecast.timeline.end_s * (1 - forecast.bubble)


def _idle_s(forecast: Forecast) -> float:
    return forecast.timeline.end_s * forecast.bubble


def _can_share(config: TrainConfig, tp: int) -> bool:
    """Whether tp divides what tensor and sequence parallelism cut."""
    model = config.model
    sizes = (model.num_heads, model.kv_heads, model.intermediate_size, model.vocab_size, config.data.seq_len)
    return all(size % tp == 0 for size in sizes)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _powers_of_two(most: int) -> list[int]:
    """1, 2, 4 … that divide `most`."""
    return [1 << k for k in range(most.bit_length()) if most % (1 << k) == 0]


def _nothing_possible(config: TrainConfig, num_devices: int) -> str:
    rows = config.train.global_batch_size
    return (
        f"--devices {num_devices}: no layout divides {rows} rows and {config.model.num_layers} layers over so many "
        f"devices; try a divisor of {rows}, or another train.global_batch_size"
    )


def _nothing_fits(too_large: Mapping[Mesh, _Estimate], limit: float, hardware: Hardware) -> str:
    least = min(too_large.values(), key=lambda found: found.memory_bytes)
    parallel = least.parts.config.parallel
    hint = "parallel.recompute = 'full', " if parallel.recompute != "full" else ""
    return (
        f"no layout fits into {_gib(limit)} GiB of {hardware.name}; the smallest (pp {parallel.pp}, dp {parallel.dp}, "
        f"tp {parallel.tp}) needs {_gib(least.memory_bytes)} GiB; try {hint}more devices or fewer rows"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"
