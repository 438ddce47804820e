"""One step of EE-Tuning: the backbone is frozen and run without gradients, each exit learns on its own.

    rows of the step → this rank's part → stages, forward only → loss node per exit → sums over the mesh → AdamW

Every loss is a sum over target tokens divided by the step's number of them, however the step is cut into microbatches
and laid out over processes. Exits stay where they read: a stage trains those of its own layers, and its data-parallel
copies sum their gradients. Source: EE-Tuning (arXiv 2402.00518).
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eellm.config.tune import TuneConfig
from eellm.data.loader import Batch, Loader, batches
from eellm.errors import RunError
from eellm.exits.lm import EarlyExitLM
from eellm.exits.loss import count_targets, exit_loss_node
from eellm.exits.metrics import ExitTable
from eellm.parallel.data import shard_frozen
from eellm.parallel.gather import gather_stages
from eellm.parallel.gradients import scale_gradients, square_sum
from eellm.parallel.mesh import World, join, new_group
from eellm.pipeline.frozen import FrozenStage, Passed, frozen_part, plan_frozen_stages
from eellm.pipeline.watched import Watch, unwatched
from eellm.plan.layout import ENOUGH_MICROBATCHES_PER_STAGE
from eellm.train.build import Source, build_rows, open_source
from eellm.train.fit import NUM_SEQUENCES, fit_scale
from eellm.train.metrics import Row
from eellm.train.objective import TuningObjective
from eellm.train.optim import learning_rate, make_optimizer
from eellm.train.validate import Validation

THRESHOLDS = (0.5, 0.7, 0.9)
"""Where validation looks at how many tokens would leave, and how many of those rightly."""


class Tuner:
    """The state of a run on this process: its stage with its exits, their optimizer, the place in the data."""

    def __init__(self, config: TuneConfig, world: World | None = None, watch: Watch = unwatched) -> None:
        """world: unset, that of torchrun, or this process alone."""
        self.config, self.watch = config, watch
        self.world = join(config.parallel, device=config.model.device) if world is None else world
        self.source = open_source(config.model, seed=config.train.seed)
        self.layers = self.source.config.exit_layers
        self.is_taught = _is_taught(config, self.source)
        self.stage = self._make_stage()
        self.model: EarlyExitLM = self.stage.model
        self.copies = self._make_group_of_copies()
        train, validation = build_rows(config.data, self.source.parts.tokenizer, self.source.config.max_seq_len)
        self.loader = Loader(train, batch_size=config.train.batch_size, seed=config.train.seed)
        validated = list(batches(validation, config.train.batch_size))
        self.validation = Validation(validated, self.source, self.stage, self.world)
        if config.model.fit_scale and config.model.adapter is None:
            self._fit(next(batches(train, NUM_SEQUENCES)).to(self.world.device))
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters.values(), config.optim) if self.parameters else None
        self.num_microbatches = _num_microbatches(config)

    def _make_stage(self) -> FrozenStage:
        config, world, source = self.config, self.world, self.source
        stages = plan_frozen_stages(source.config, config.parallel, config.data.seq_len, is_taught=self.is_taught)
        part = frozen_part(source.config, stages[world.index("pp")], is_taught=self.is_taught).to(source.dtype)
        if config.parallel.dp_shard > 1:
            shard_frozen(part.decoder.layers, world.submesh("dp_shard"))
        model = source.load(part, world.device)
        return FrozenStage(model, stages, world, self.watch, dtype=source.dtype, is_taught=self.is_taught)

    def _make_group_of_copies(self) -> dist.ProcessGroup | None:
        """The processes that have this stage's exits too."""
        dp = self.config.parallel.dp
        if dp == 1:
            return None
        first = self.world.index("pp") * dp
        return new_group(range(first, first + dp))

    def _fit(self, batch: Batch) -> None:
        """Every data-parallel rank does the same."""
        passed = self.stage.forward(batch, 0)
        for layer, h_BTD in passed.exits.items():
            fit_scale(self.model, layer, h_BTD, passed.rows, batch.labels_BT)
        self.stage.finish()

    def step(self, step: int) -> Row:
        """One optimizer step, numbered from 1. Returns its metrics."""
        config, start = self.config, time.perf_counter()
        self.model.zero_grad(set_to_none=True)
        batch = self.loader.take(config.rows_per_step)
        num_targets = float(count_targets(batch.labels_BT))
        with self.autocast():
            sums = self._learn(self._microbatches(batch), 1 / num_targets)
        norm, means = self._reduce(sums, num_targets)
        if not math.isfinite(norm):
            raise RunError(f"step {step}: the gradient is {norm}; lower optim.lr and run again (it resumes)")
        rate = learning_rate(step, config.train.steps, config.optim)
        self._update(norm, rate)
        tokens_per_s = batch.tokens_BT.numel() / (time.perf_counter() - start)
        return {"step": step, **means, "grad_norm": norm, "lr": rate, "tokens_per_s": tokens_per_s}

    def _microbatches(self, batch: Batch) -> list[Batch]:
        """This data-parallel rank's."""
        size = self.config.rows_per_step // self.config.parallel.dp // self.num_microbatches
        first = self.world.dp_index * self.num_microbatches
        starts = [size * number for number in range(first, first + self.num_microbatches)]
        return [batch.part(slice(start, start + size)).to(self.world.device) for start in starts]

    def _learn(self, parts: list[Batch], weight: float) -> dict[str, Tensor]:
        """Adds the gradients of all microbatches. Returns sums over their targets; `loss` is what is minimised."""
        stage, sums, passed = self.stage, dict[str, Tensor](), deque[Passed]()
        for number in range(len(parts) + stage.num_ahead):
            if number < len(parts):
                passed.append(stage.forward(parts[number], number))
            if number >= stage.num_ahead:
                here = number - stage.num_ahead
                self._teach(parts[here], passed.popleft(), here, weight, sums)
        stage.finish()
        return sums

    def _teach(self, batch: Batch, passed: Passed, number: int, weight: float, sums: dict[str, Tensor]) -> None:
        """Adds one microbatch's gradients, and to `sums`."""
        model, config = self.model, self.config.objective
        teacher = self._teacher(self.stage.final_hidden(batch, passed, number)) if self.is_taught else None
        for layer, h_BTD in passed.exits.items():
            with self.watch(f"exit {layer}, microbatch {number}"):
                gate = model.exit(layer).gate if config.gate else None
                objective = TuningObjective(config, batch.labels_BT.flatten(), teacher=teacher, gate=gate)
                minimised: list[Tensor] = []
                y_BTD = exit_loss_node(
                    h_BTD,
                    model.head(layer, passed.rows),
                    objective,
                    weight=weight,
                    chunk_size=config.chunk_size,
                    more_parameters=() if gate is None else tuple(gate.parameters()),
                    report=minimised.append,
                )
                y_BTD.backward(torch.zeros_like(y_BTD))
            found = {f"{name}/exit_{layer}": value for name, value in objective.sums.items()}
            for name, value in [("loss", minimised[0]), *found.items()]:
                sums[name] = sums.get(name, 0) + value.double()

    def _teacher(self, z_BTD: Tensor | None) -> Callable[[slice], Tensor] | None:
        """The final exit's logits, made a chunk at a time."""
        if z_BTD is None:
            return None
        z_ND = z_BTD.flatten(0, -2)
        return lambda rows: self.model.decoder.output(z_ND[rows])

    def _reduce(self, sums: dict[str, Tensor], num_targets: float) -> tuple[float, Row]:
        """Sums gradients over the copies of each exit; the norm of all exits' gradients, and the means for the log."""
        parameters = list(self.parameters.values())
        zero = torch.zeros((), dtype=torch.float64, device=self.world.device)
        with self.watch("summing gradients and losses", waits=True):
            if self.copies is not None:
                for parameter in parameters:
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad, group=self.copies)
            names = self._sum_names()
            assert sums.keys() <= set(names), sums.keys()
            values = [square_sum(parameters, self.world), *(sums.get(name, zero) for name in names)]
            square, *totals = self.world.sum(torch.stack(values)).tolist()
        return math.sqrt(square), {name: total / num_targets for name, total in zip(names, totals, strict=True)}

    def _sum_names(self) -> list[str]:
        """What is summed over target tokens, of the exits on all stages."""
        objective, names = self.config.objective, ["loss"]
        for exit in self.source.config.exits:
            parts = {
                "loss": True,
                "agreement": self.is_taught,
                "kl": self.is_taught and objective.beta > 0,
                "gate_loss": objective.gate and exit.gate_size > 0,
            }
            names += [f"{name}/exit_{exit.layer}" for name, is_there in parts.items() if is_there]
        return names

    def _update(self, norm: float, rate: float) -> None:
        if self.optimizer is None:
            return
        clip = self.config.optim.clip
        scale_gradients(self.parameters.values(), min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def evaluate(self) -> Row:
        """Validation loss, agreement with the final exit, and for some thresholds the share of tokens that would leave
        at each exit if it were the only one, with the share of those that agree. Empty on other ranks than 0."""
        with self.autocast():
            table = self.validation.table()
        return {} if table is None else _validation_row(table, self.layers)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 where the recipe asks for it."""
        enabled = self.config.model.dtype == "bfloat16"
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16) if enabled else contextlib.nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """Weights and the optimizer's moments of the exits on all stages, on rank 0; nothing elsewhere."""
        tensors: dict[str, Tensor] = {f"weight/{name}": p for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state = {} if self.optimizer is None else self.optimizer.state[parameter]
            tensors |= {f"{key}/{name}": value for key, value in state.items()}
        with self.watch("gathering the exits", waits=True):
            return gather_stages(tensors, self.world)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes up this process's part of what `tensors` gave, under whatever layout."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weight/{name}"])
            # NOTE `step` goes to the device too: AdamW is fused. A gate that isn't trained has none of these
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
            if keys and self.optimizer is not None:
                state = {key: tensors[f"{key}/{name}"].to(parameter.device, copy=True) for key in keys}
                self.optimizer.state[parameter] = state


def _is_taught(config: TuneConfig, source: Source) -> bool:
    """Whether the final exit teaches, so that all layers run."""
    has_gates = any(exit.gate_size > 0 for exit in source.config.exits)
    return config.objective.beta > 0 or (config.objective.gate and has_gates)


def _num_microbatches(config: TuneConfig) -> int:
    """Of a data-parallel rank: as the recipe says, or the fewest of `batch_size` rows at most that keep a pipeline
    busy."""
    parallel, rows = config.parallel, config.rows_per_step // config.parallel.dp
    if parallel.num_microbatches is not None:
        return parallel.num_microbatches
    fits = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= config.train.batch_size]
    enough = [n for n in fits if parallel.pp == 1 or n >= ENOUGH_MICROBATCHES_PER_STAGE * parallel.pp]
    return min(enough) if enough else max(fits)


def _validation_row(table: ExitTable, layers: tuple[int, ...]) -> Row:
    row: Row = {"val_loss/final": math.log(table.perplexity(table.final))}
    for layer in layers:
        row[f"val_loss/exit_{layer}"] = math.log(table.perplexity(layer))
        row[f"val_agreement/exit_{layer}"] = table.agreement(layer)
        for threshold in THRESHOLDS:
            point = table.at_threshold(threshold, exits=(layer,))
            row[f"val_fraction_{threshold}/exit_{layer}"] = point.taken[layer]
            row[f"val_precision_{threshold}/exit_{layer}"] = point.agreement_by_exit[layer]
    return row
