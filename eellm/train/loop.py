"""A training run: from a recipe to checkpoints and metrics, through kills and restarts.

The same command starts a run and takes it up again. Rank 0 holds the run's directory and writes what there is one of;
whatever one rank finds out alone (a refusal, a signal) is agreed on before anyone acts on it.
"""

from dataclasses import replace
from typing import Any

import torch

from eellm.checkpoint.store import Store
from eellm.config.load import to_dict
from eellm.config.train import TrainConfig
from eellm.errors import RunError
from eellm.log import log
from eellm.parallel.mesh import World
from eellm.pipeline.record import Recorder
from eellm.schedule.render import check_suffix, write_timeline
from eellm.train.bad_steps import BadSteps
from eellm.train.check import resolve
from eellm.train.metrics import MetricsLog, Row, check_writers
from eellm.train.run_dir import RunDir, hold
from eellm.train.signals import Stop
from eellm.train.start import merged_model
from eellm.train.trainer import Trainer
from eellm.train.watch import Watch

FREE = ("parallel", "checkpoint", "train.out_dir", "train.steps", "train.resume", "train.device", "train.log_every")
FREE += (
    "train.evaluate_every",
    "train.peak_tflops",
    "train.max_bad_steps",
    "train.timeline",
    "train.timeline_step",
    "train.tensorboard",
    "train.wandb",
    "init_from",
)
"""Keys of a recipe that may change when a run is taken up again."""


def train(config: TrainConfig, world: World) -> None:
    """Runs the recipe, from its newest checkpoint if there is one.

    Raises ConfigError, DataError or CheckpointError for what is wrong with the recipe, before anything is written, and
    RunError for a run that can't go on.
    """
    if config.init_from is not None:
        config = replace(config, model=merged_model(config.model, config.init_from))
    config = resolve(config)
    if config.train.timeline is not None:
        check_suffix(config.train.timeline)
    check_writers(tensorboard=config.train.tensorboard, wandb=config.train.wandb)
    torch.use_deterministic_algorithms(config.train.deterministic)
    watch = Watch(world.store, rank=world.rank, world_size=world.size, timeout_s=config.parallel.timeout_s)
    trainer = Trainer(config, world, watch)
    run_dir = hold(config.train.out_dir, world)
    store = Store(
        config.train.out_dir / "checkpoints", keep=config.checkpoint.keep, process_group=world.background_group()
    )
    bad = BadSteps(limit=config.train.max_bad_steps, batch=config.train.out_dir / "bad-batch")
    done = _resume(trainer, store, run_dir, bad)
    with watch, Stop() as stop:
        _Run(trainer, store, run_dir, bad, watch, stop).go(done)


class _Run:
    """The loop and what it holds on to."""

    def __init__(
        self, trainer: Trainer, store: Store, run_dir: RunDir | None, bad: BadSteps, watch: Watch, stop: Stop
    ) -> None:
        self.trainer, self.store, self.run_dir, self.bad = trainer, store, run_dir, bad
        self.watch, self.stop = watch, stop
        self.config, self.world = trainer.config, trainer.world

    def go(self, done: int) -> None:
        options, last = self.config.train, self.config.train.steps
        path = None if self.run_dir is None else self.run_dir.metrics
        metrics_log = MetricsLog(path, num_steps=last, done=done, tensorboard=options.tensorboard, wandb=options.wandb)
        step, recorded = done, None if options.timeline is None else min(done + options.timeline_step, last)
        with metrics_log as metrics:
            for step in range(done + 1, last + 1):
                self.watch.step = step
                row = self._recorded_step(step) if step == recorded else self._step(step)
                if _due(step, options.evaluate_every, last):
                    row |= self.trainer.evaluate()
                if step % options.log_every == 0 or "val_loss/final" in row:
                    metrics.write(row)
                is_stopped = self._is_stopped()
                if _due(step, self.config.checkpoint.every, last) or is_stopped:
                    self._save(step)
                if is_stopped:
                    break
            with self.watch("finishing the checkpoint", waits=True):
                self.store.wait()
        if self.world.is_main:
            how = "stopped, and can be taken up again," if step < last else "done"
            log.info(f"{options.out_dir}: {how} after step {step} of {last}")

    def _recorded_step(self, step: int) -> Row:
        """The same, and its timeline is drawn."""
        recorder = Recorder(self.world, num_microbatches=self.config.parallel.num_microbatches or 1)
        row = self._step(step, recorder)
        with self.watch("gathering the timeline", waits=True):
            timeline = recorder.timeline()
        path = self.config.train.timeline
        if timeline is not None and path is not None:
            try:
                write_timeline(timeline, path, title=f"{self.config.train.out_dir}: step {step}, measured")
            except OSError as error:
                log.warning(f"can't write {path}: {error.strerror or error}; the run goes on without")
        return row

    def _step(self, step: int, recorder: Recorder | None = None) -> Row:
        row, bad_batch = self.trainer.step(step, recorder)
        if bad_batch is not None and self.run_dir is not None:
            self.run_dir.save_bad_batch(step, bad_batch.tensors())
        overflow = bad_batch is not None and row["loss"] == row["loss"] and self.trainer.loss_scale.can_shrink
        self.bad.record(step, finite=bad_batch is None, overflow=overflow)
        return row | {"skipped_steps": self.bad.skipped}

    def _is_stopped(self) -> bool:
        flag = torch.tensor(float(self.stop.requested is not None), device=self.world.device)
        with self.watch("agreeing whether to stop", waits=True):
            return bool(self.world.max(flag))

    def _save(self, step: int) -> None:
        trainer = self.trainer
        state = {"recipe": to_dict(self.config), "bad_steps": self.bad.state(), **trainer.state()}
        files = {} if trainer.tokenizer is None else trainer.tokenizer.files()
        with self.watch("saving a checkpoint", waits=True):
            self.store.save(step, trainer.tensors(), state, files)


def _resume(trainer: Trainer, store: Store, run_dir: RunDir | None, bad: BadSteps) -> int:
    """Takes up the newest checkpoint; returns the steps done."""
    config = trainer.config
    step = store.latest() if config.train.resume else None
    if step is None:
        if run_dir is not None:
            run_dir.start_anew()
        return 0
    _check_same_recipe(store.read_state(step)["recipe"], config)
    state = store.load(step, trainer.tensors())
    trainer.spread_copies()
    trainer.restore(state)
    bad.restore(state["bad_steps"])
    if run_dir is not None:
        run_dir.keep_metrics_up_to(step)
        log.info(f"{config.train.out_dir}: resumed after step {step}")
    return step


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _check_same_recipe(saved: dict[str, Any], config: TrainConfig) -> None:
    before, now = _flat(saved), _flat(to_dict(config))
    for key in sorted(before.keys() | now.keys()):
        is_free = any(key == free or key.startswith(f"{free}.") for free in FREE)
        if not is_free and before.get(key) != now.get(key):
            raise RunError(
                f"{config.train.out_dir} holds a run with {key} = {before.get(key, 'its default')!r}, the recipe says "
                f"{now.get(key, 'its default')!r}; use another train.out_dir, or --train.no-resume to start anew"
            )


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for table, value in tables.items():
        if isinstance(value, dict):
            flat |= {f"{table}.{key}": entry for key, entry in value.items()}
        else:
            flat[table] = value
    return flat
