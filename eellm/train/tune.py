"""EE-Tuning: the backbone is frozen and run without gradients, each exit learns on its own from its hidden state.

    batch → hidden states at the exits (no gradients) → loss node per exit → AdamW on the exits

Every loss is a sum over target tokens divided by the step's number of them, however the step is cut into batches.
A step's result depends on the state before it alone, so a run that was killed and resumed is the run that wasn't.
Source: EE-Tuning (arXiv 2402.00518).
"""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eellm.checkpoint.exits import save_adapter
from eellm.config.load import to_dict
from eellm.config.tune import TuneConfig
from eellm.data.loader import Batch, Loader, batches
from eellm.errors import RunError
from eellm.exits.loss import count_targets, exit_loss_node
from eellm.exits.metrics import exit_table
from eellm.log import log
from eellm.train.build import build_model, build_rows
from eellm.train.fit import fit_scales
from eellm.train.metrics import MetricsLog, Row, has_tensorboard
from eellm.train.objective import TuningObjective
from eellm.train.optim import learning_rate, make_optimizer
from eellm.train.run_dir import RunDir

THRESHOLDS = (0.5, 0.7, 0.9)
"""Where validation looks at how many tokens would leave, and how many of those rightly."""


def tune(config: TuneConfig) -> Path:
    """Runs the recipe, from its last saved state if there is one; returns the adapter's directory.

    Raises ConfigError, DataError or CheckpointError for what is wrong with the recipe, RunError for a run that can't
    go on.
    """
    tuner = Tuner(config)  # first: a recipe that is refused leaves nothing behind
    run_dir = RunDir(config.train.out_dir)
    done = tuner.resume(run_dir)
    metrics_log = MetricsLog(
        run_dir.metrics, num_steps=config.train.steps, done=done, title="tuning", tensorboard=has_tensorboard()
    )
    with metrics_log as metrics:
        for step in range(done + 1, config.train.steps + 1):
            row = tuner.step(step)
            if _due(step, config.train.evaluate_every, config.train.steps):
                row |= tuner.evaluate()
            metrics.write(row)
            if _due(step, config.train.save_every, config.train.steps):
                tuner.save(run_dir, step)
    log.info(f"{run_dir.adapter}: exits at {', '.join(map(str, tuner.layers))}, after {config.train.steps} steps")
    return run_dir.adapter


class Tuner:
    """The state of a run: exits, optimizer, place in the data."""

    def __init__(self, config: TuneConfig) -> None:
        self.config = config
        self.model, self.layers = build_model(config.model, seed=config.train.seed)
        self.device = self.model.decoder.embed.weight.device
        train, self.validation = build_rows(config.data, self.model)
        self.loader = Loader(train, batch_size=config.train.batch_size, seed=config.train.seed)
        if config.model.fit_scale and config.model.adapter is None:
            fit_scales(self.model, self.layers, train)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters.values(), config.optim)

    def step(self, step: int) -> Row:
        """One optimizer step, numbered from 1. Returns its metrics."""
        config, start = self.config, time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        parts = [self.loader.next().to(self.device) for _ in range(config.train.accumulate)]
        num_targets = torch.stack([count_targets(batch.labels_BT) for batch in parts]).sum()
        sums: dict[str, float] = {}
        for batch in parts:
            for name, value in self.backward(batch, 1 / num_targets).items():
                sums[name] = sums.get(name, 0.0) + value
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), config.optim.clip or math.inf))
        if not math.isfinite(norm):
            raise RunError(f"step {step}: the gradient is {norm}; lower optim.lr and run again (it resumes)")
        rate = learning_rate(step, config.train.steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        num_tokens = sum(batch.tokens_BT.numel() for batch in parts)
        row = {name: value / float(num_targets) for name, value in sums.items()}
        elapsed_s = time.perf_counter() - start
        return {"step": step, **row, "grad_norm": norm, "lr": rate, "tokens_per_s": num_tokens / elapsed_s}

    def backward(self, batch: Batch, weight: Tensor) -> dict[str, float]:
        """Adds the batch's gradients. Returns sums over its target tokens; `loss` is what is minimised."""
        model, objective_config = self.model, self.config.objective
        labels_N = batch.labels_BT.flatten()
        with self.autocast():
            with torch.no_grad():
                rows = model.decoder.packed_rows(batch.positions_BT, batch.documents_BT)
                hiddens = dict(model.hiddens(batch.tokens_BT, rows, self.depth))
                teacher = self._teacher(hiddens.get(model.config.num_layers))
            totals: list[Tensor] = []
            sums: dict[str, float] = {}
            for layer in self.layers:
                gate = model.exit(layer).gate if objective_config.gate else None
                objective = TuningObjective(objective_config, labels_N, teacher=teacher, gate=gate)
                h_BTD = exit_loss_node(
                    hiddens[layer],
                    model.head(layer, rows),
                    objective,
                    weight=weight,
                    chunk_size=objective_config.chunk_size,
                    more_parameters=() if gate is None else tuple(gate.parameters()),
                    report=totals.append,
                )
                h_BTD.backward(torch.zeros_like(h_BTD))
                sums |= {f"{name}/exit_{layer}": float(value) for name, value in objective.sums.items()}
        return {"loss": float(sum(totals)), **sums}

    @property
    def depth(self) -> int:
        """The last layer that must run: the deepest exit's, or all where the final exit teaches."""
        objective = self.config.objective
        has_gates = any(self.model.exit(layer).gate is not None for layer in self.layers)
        needs_final = objective.beta > 0 or (objective.gate and has_gates)
        return self.model.config.num_layers if needs_final else max(self.layers)

    def _teacher(self, h_BTD: Tensor | None) -> Callable[[slice], Tensor] | None:
        """The final exit's logits, made a chunk at a time."""
        if h_BTD is None:
            return None
        decoder = self.model.decoder
        z_ND = decoder.norm(h_BTD).flatten(0, -2)
        return lambda rows: decoder.output(z_ND[rows])

    def evaluate(self) -> Row:
        """Validation loss, agreement with the final exit, and for some thresholds the share of tokens that would leave
        at each exit if it were the only one, with the share of those that agree."""
        with self.autocast():
            table = exit_table(self.model, self._validation_batches(), policies=("max_prob",))
        last = self.model.config.num_layers
        row: Row = {"val_loss/final": math.log(table.perplexity(last))}
        for layer in self.layers:
            row[f"val_loss/exit_{layer}"] = math.log(table.perplexity(layer))
            row[f"val_agreement/exit_{layer}"] = table.agreement(layer)
            for threshold in THRESHOLDS:
                point = table.at_threshold(threshold, exits=(layer,))
                row[f"val_fraction_{threshold}/exit_{layer}"] = point.taken[layer]
                row[f"val_precision_{threshold}/exit_{layer}"] = point.agreement_by_exit[layer]
        return row

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 where the recipe asks for it."""
        enabled = self.config.model.dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if enabled else contextlib.nullcontext()

    def _validation_batches(self) -> list[Batch]:
        return [batch.to(self.device) for batch in batches(self.validation, self.config.train.batch_size)]

    def save(self, run_dir: RunDir, step: int) -> None:
        """Writes the adapter and the state after `step`."""
        save_adapter(self.model, run_dir.adapter, base=self.config.model.base, layers=self.layers)
        tensors: dict[str, Tensor] = {f"weight/{name}": p for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
        run_dir.save_state(step, {"loader": self.loader.state(), "recipe": _identity(self.config)}, tensors)

    @torch.no_grad()
    def resume(self, run_dir: RunDir) -> int:
        """Takes up the newest state; returns the steps done. Raises RunError for a state of another recipe."""
        state = run_dir.load_state() if self.config.train.resume else None
        if state is None:
            run_dir.start_anew()
            return 0
        data, tensors = state
        _check_same_recipe(data["recipe"], _identity(self.config), run_dir.path)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weight/{name}"])
            self.optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].to(parameter.device)  # NOTE `step` too: AdamW is fused
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.loader.restore(data["loader"])
        run_dir.keep_metrics_up_to(data["step"])
        log.info(f"{run_dir.path}: resumed after step {data['step']}")
        return data["step"]


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _identity(config: TuneConfig) -> dict[str, Any]:
    """What a state's run must share with the one that resumes it, as flat plain data."""
    tables = to_dict(config)
    return {f"{t}.{key}": value for t in tables for key, value in tables[t].items() if f"{t}.{key}" not in _FREE}


_FREE = {"train.out_dir", "train.evaluate_every", "train.save_every", "train.resume"}


def _check_same_recipe(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key):
            raise RunError(
                f"{path} holds a run with {key} = {saved.get(key, 'its default')!r}, the recipe says "
                f"{now.get(key, 'its default')!r}; use another train.out_dir, or --train.no-resume to start anew"
            )
