"""A tuning run: from a recipe to an adapter, through kills and restarts, in one process or in many.

The same command starts a run and takes it up again. A step's result depends on the state before it alone, so a run that
was killed and resumed is the run that wasn't. Rank 0 gathers the exits of all stages and writes the adapter, the states
and the metrics: those of one process, whatever the layout.
"""

from pathlib import Path
from typing import Any

from eellm.checkpoint.exits import save_adapter
from eellm.config.load import to_dict
from eellm.config.tune import TuneConfig
from eellm.errors import RunError
from eellm.log import log
from eellm.parallel.mesh import World, join
from eellm.train.metrics import MetricsLog, has_tensorboard
from eellm.train.run_dir import RunDir, hold, state_tensors
from eellm.train.tuner import Tuner
from eellm.train.watch import Watch

__all__ = ["Tuner", "tune"]


def tune(config: TuneConfig, world: World | None = None) -> Path:
    """Runs the recipe, from its last saved state if there is one; returns the adapter's directory.

    world: unset, that of torchrun, or this process alone. Raises ConfigError, DataError or CheckpointError for what is
    wrong with the recipe, RunError for a run that can't go on.
    """
    world = join(config.parallel, device=config.model.device) if world is None else world
    timeout_s = config.parallel.timeout_s if world.size > 1 else 0.0  # alone, nobody is left waiting
    watch = Watch(world.store, rank=world.rank, world_size=world.size, timeout_s=timeout_s)
    tuner = Tuner(config, world, watch)  # first: a recipe that is refused leaves nothing behind
    run_dir = hold(config.train.out_dir, world)
    done = _resume(tuner, run_dir)
    metrics_log = MetricsLog(
        None if run_dir is None else run_dir.metrics,
        num_steps=config.train.steps,
        done=done,
        title="tuning",
        tensorboard=has_tensorboard(),
    )
    with watch, metrics_log as metrics:
        for step in range(done + 1, config.train.steps + 1):
            watch.step = step
            row = tuner.step(step)
            if _due(step, config.train.evaluate_every, config.train.steps):
                row |= tuner.evaluate()
            metrics.write(row)
            if _due(step, config.train.save_every, config.train.steps):
                _save(tuner, run_dir, step, watch)
    adapter = config.train.out_dir / "adapter"
    if world.is_main:
        log.info(f"{adapter}: exits at {', '.join(map(str, tuner.layers))}, after {config.train.steps} steps")
    return adapter


def _save(tuner: Tuner, run_dir: RunDir | None, step: int, watch: Watch) -> None:
    """Writes the adapter and the state after `step`."""
    tensors = tuner.tensors()
    if run_dir is None:
        return
    with watch("writing the adapter and the state"):
        weights = {name.removeprefix("weight/"): t for name, t in tensors.items() if name.startswith("weight/")}
        model = tuner.source.with_exits(weights)
        save_adapter(model, run_dir.adapter, base=tuner.config.model.base, layers=tuner.layers)
        run_dir.save_state(step, {"loader": tuner.loader.state(), "recipe": _identity(tuner.config)}, tensors)


def _resume(tuner: Tuner, run_dir: RunDir | None) -> int:
    """Takes up the newest state; returns the steps done. Raises RunError for a state of another recipe."""
    config, out_dir = tuner.config, tuner.config.train.out_dir
    state = run_dir.load_state() if run_dir is not None and config.train.resume else None
    data: Any = tuner.world.share(None if state is None else state[0])
    if data is None:
        if run_dir is not None:
            run_dir.start_anew()
        return 0
    _check_same_recipe(data["recipe"], _identity(config), out_dir)
    tuner.restore(state_tensors(out_dir, data["step"]) if state is None else state[1])
    tuner.loader.restore(data["loader"])
    if run_dir is not None:
        run_dir.keep_metrics_up_to(data["step"])
        log.info(f"{out_dir}: resumed after step {data['step']}")
    return data["step"]


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _identity(config: TuneConfig) -> dict[str, Any]:
    """What a state's run must share with the one that resumes it, as flat plain data."""
    tables = to_dict(config)
    tables.pop("parallel", None)
    return {f"{t}.{key}": value for t in tables for key, value in tables[t].items() if f"{t}.{key}" not in _FREE}


_FREE = {"train.out_dir", "train.evaluate_every", "train.save_every", "train.resume"}
"""Keys that may change when a run is taken up again; so may `[parallel]`."""


def _check_same_recipe(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key):
            raise RunError(
                f"{path} holds a run with {key} = {saved.get(key, 'its default')!r}, the recipe says "
                f"{now.get(key, 'its default')!r}; use another train.out_dir, or --train.no-resume to start anew"
            )
