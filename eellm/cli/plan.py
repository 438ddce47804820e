"""`eellm plan RECIPE.toml [--hardware a100-80] [--search --devices 64] [--timeline out.svg] [--decode.exits …]`

Also `eellm plan --paper-table` and `eellm plan --calibrate machine.toml`. Options of the recipe (`--parallel.pp 4`) can
be given as to `eellm train`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from eellm.cli.options import parse, split_options
from eellm.config.load import from_toml
from eellm.config.plan import DecodeConfig, PlanConfig
from eellm.config.train import TrainConfig
from eellm.errors import ConfigError
from eellm.plan.decode import DecodeSpeed, ExitDistribution, decode_speeds
from eellm.plan.decode_cost import decode_costs
from eellm.plan.forecast import (
    ExitForecast,
    Forecast,
    exit_forecasts,
    forecast,
    overhead_of_exits,
    prepare,
    schedule_of,
)
from eellm.plan.hardware import Hardware, find_hardware
from eellm.plan.paper import PaperRow, paper_table
from eellm.plan.search import SearchResult, search
from eellm.plan.simulate import simulate
from eellm.schedule.partition import Stage
from eellm.schedule.render import check_suffix, write_timeline
from eellm.schedule.render_text import as_text
from eellm.train.check import resolve

GIB = 2**30
USAGE = "name the recipe first: eellm plan RECIPE.toml [--hardware a100-80], or eellm plan --paper-table"
MOST_RANKS_SHOWN = 16


@dataclass(frozen=True)
class _Plan:
    """All that is printed of a recipe."""

    step: Forecast
    exits: tuple[ExitForecast, ...]
    overhead: float
    found: SearchResult | None
    decoding: dict[str, DecodeSpeed] | None


def main(args: list[str]) -> None:
    has_recipe = bool(args) and not args[0].startswith("-")
    words, recipe_words = split_options(PlanConfig, TrainConfig, args[1:] if has_recipe else args, verb="plan")
    options = parse(PlanConfig, words, verb="plan RECIPE.toml")
    if has_recipe:
        default = from_toml(TrainConfig, Path(args[0]))
        _plan(parse(TrainConfig, recipe_words, verb="plan", default=default), options)
    elif recipe_words or not (options.paper_table or options.calibrate):
        raise ConfigError(USAGE)
    if options.paper_table:
        _show_paper_table(paper_table(), options)
    if options.calibrate is not None:
        _calibrate(options.calibrate)


def _plan(config: TrainConfig, options: PlanConfig) -> None:
    hardware, found = find_hardware(options.hardware), None
    if options.timeline is not None:
        check_suffix(options.timeline)
    limit = None if options.memory_limit_gb is None else options.memory_limit_gb * GIB
    if options.search:
        num_devices = options.devices or config.parallel.world_size
        found = search(config, hardware, num_devices, memory_limit_bytes=limit)
        step = found.best
    else:
        step = forecast(resolve(config), hardware)
    plan = _Plan(
        step,
        exit_forecasts(step.config, hardware),
        overhead_of_exits(step.config, hardware),
        found,
        _decoding(config, options.decode, hardware),
    )
    if options.timeline is not None:
        write_timeline(step.timeline, options.timeline, title=f"{describe(step)} on {hardware.name}")
    if options.json:
        print(json.dumps(as_json(plan, hardware), indent=2))
    else:
        _show(plan, hardware, limit or hardware.memory_bytes)


def _decoding(config: TrainConfig, options: DecodeConfig, hardware: Hardware) -> dict[str, DecodeSpeed] | None:
    if not options.exits:
        return None
    costs = decode_costs(
        config.model,
        hardware,
        num_stages=options.pp,
        tp=options.tp,
        context=options.context,
        dtype=config.train.dtype,
    )
    generator = np.random.default_rng(options.seed)
    exits = ExitDistribution(shares=options.shares)
    return {**decode_speeds(costs, exits, generator=generator, batch_size=options.batch_size)}


def describe(step: Forecast) -> str:
    """A layout in a few words."""
    parallel = step.config.parallel
    replicas = f" × {parallel.dp_replicate} replicas" if parallel.dp_replicate > 1 else ""
    schedule = f", {parallel.schedule}" if parallel.pp > 1 else ""
    moved = f", exits {parallel.exit_placement}" if parallel.pp > 1 and step.config.model.exits else ""
    return (
        f"pp {parallel.pp} × dp_shard {parallel.dp_shard}{replicas} × tp {parallel.tp}{schedule}, "
        f"{parallel.num_microbatches} microbatches{moved}"
    )


def as_json(plan: _Plan, hardware: Hardware) -> dict[str, Any]:
    """What `--json` prints."""
    step = plan.step
    data: dict[str, Any] = {
        "hardware": hardware.name,
        "layout": _layout(step),
        "iteration_s": step.iteration_s,
        "tokens_per_s": step.tokens_per_s,
        "mfu": step.utilisation(hardware),
        "bubble": step.bubble,
        "peak_memory_gb": [step.memory_bytes[rank] / GIB for rank in step.schedule.ranks],
        "overhead_vs_no_exits": plan.overhead,
        "exits": [asdict(exit) for exit in plan.exits],
        "extra_microbatches": len(step.schedule.extras),
    }
    if plan.found is not None:
        data["search"] = {
            "num_tried": plan.found.num_tried,
            "runners_up": [
                {"layout": _layout(other.forecast), "iteration_s": other.forecast.iteration_s, "reason": other.reason}
                for other in (*plan.found.runners_up, *plan.found.too_large)
            ],
        }
    if plan.decoding is not None:
        data["decode"] = {method: asdict(speed) for method, speed in plan.decoding.items()}
    return data


def _layout(step: Forecast) -> dict[str, Any]:
    parallel = step.config.parallel
    names = ("pp", "dp_replicate", "dp_shard", "tp", "schedule", "num_microbatches", "exit_placement")
    return {name: getattr(parallel, name) for name in names}


def _show(plan: _Plan, hardware: Hardware, limit_bytes: float) -> None:
    console, step = Console(), plan.step
    console.print(f"[bold]{describe(step)}[/bold] on {step.config.parallel.world_size} × {hardware.name}")
    console.print(
        f"{step.iteration_s:.4g} s per step · {step.tokens_per_s:,.0f} tokens/s · "
        f"MFU {step.utilisation(hardware):.1%} · bubble {step.bubble:.1%} · exits cost {plan.overhead:+.2%}"
    )
    if plan.exits:
        each = (f"after layer {e.layer} (stage {e.stage}) {e.cost_s:.3g} s" for e in plan.exits)
        console.print(f"each exit adds: {' · '.join(each)}")
    if step.config.parallel.schedule == "filled_1f1b":
        console.print(f"{len(step.schedule.extras)} extra microbatches fill bubbles")
    console.print(_stage_table(step, limit_bytes))
    if 1 < step.schedule.num_ranks <= MOST_RANKS_SHOWN:
        _show_schedule(console, step, hardware)
    if plan.found is not None:
        console.print(_search_table(plan.found))
    if plan.decoding is not None:
        console.print(_decode_table(plan.decoding))


def _show_schedule(console: Console, step: Forecast, hardware: Hardware) -> None:
    """Drawn with as few microbatches as show its shape; --timeline draws all."""
    parts = prepare(step.config, hardware)
    num_microbatches = min(step.schedule.num_microbatches, 2 * step.schedule.num_ranks)
    timeline = simulate(schedule_of(parts, num_microbatches), parts.costs, parts.send_s)
    console.print(f"the schedule, with {num_microbatches} microbatches:")
    console.print(as_text(timeline, width=console.width, color=True), end="", soft_wrap=True)


def _stage_table(step: Forecast, limit_bytes: float) -> Table:
    table = Table("stage", "rank", "layers", "exits", "peak GiB", "")
    for stage, rank in zip(step.stages, step.schedule.ranks, strict=True):
        needed = step.memory_bytes[rank]
        verdict = "" if needed <= limit_bytes else f"[red]more than {limit_bytes / GIB:.1f}[/red]"
        layers = f"{stage.first}–{stage.last}"
        table.add_row(str(stage.index), str(rank), layers, _exits_on(stage), f"{needed / GIB:.2f}", verdict)
    return table


def _exits_on(stage: Stage) -> str:
    return ", ".join([*map(str, stage.exits), *(["final"] if stage.is_last else [])])


def _search_table(found: SearchResult) -> Table:
    table = Table("runners-up", "s per step", "why not", title=f"{found.num_tried} layouts, best above")
    for other in (*found.runners_up, *found.too_large):
        table.add_row(describe(other.forecast), f"{other.forecast.iteration_s:.4g}", other.reason)
    return table


def _decode_table(speeds: dict[str, DecodeSpeed]) -> Table:
    table = Table("decoding", "tokens/s", "ms per token", "speed-up")
    for method, speed in speeds.items():
        table.add_row(method, f"{speed.tokens_per_s:.1f}", f"{speed.step_s * 1e3:.2f}", f"{speed.speedup:.2f}")
    return table


def _show_paper_table(rows: list[PaperRow], options: PlanConfig) -> None:
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = Table("model", "setup", "s predicted", "s paper", "GB predicted", "GB paper")
    for row in rows:
        seconds = (f"{row.iteration_s:.2f}", f"{row.paper_iteration_s:.2f}")
        table.add_row(row.model, row.setup, *seconds, f"{row.memory_gb:.2f}", f"{row.paper_memory_gb:.2f}")
    Console().print(table)


def _calibrate(path: Path) -> None:
    import torch  # here: only this needs it

    from eellm.log import log
    from eellm.train.calibrate import calibrate, write_hardware

    is_gpu = torch.cuda.is_available()
    hardware = calibrate(name=path.stem, device="cuda" if is_gpu else "cpu", dtype="bfloat16" if is_gpu else "float32")
    write_hardware(hardware, path)
    log.info(f"{path}: this machine; plan with --hardware {path}")
