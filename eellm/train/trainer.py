"""One optimizer step, under any layout of processes: the same numbers to rounding.

    rows of the global batch → this rank's part → driver (forward, backward) → sums over the mesh → clip → AdamW → a row

Losses are sums over target tokens divided by the global number of them, so neither masks nor layout change what is
minimised. A step depends on the state before it alone: the order of the data and layer dropout are functions of
(seed, step). A step whose loss or gradient isn't finite changes nothing and is counted.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

from eellm.config.train import TrainConfig
from eellm.data.loader import Batch
from eellm.data.stream import open_data
from eellm.exits.loss import IGNORE
from eellm.parallel.gradients import scale_gradients, settle_placements, square_sum, sum_tied
from eellm.parallel.mesh import World
from eellm.parallel.tensor import check_tensor_parallel
from eellm.pipeline.placed import place
from eellm.pipeline.record import Recorder
from eellm.pipeline.stage import StepLosses
from eellm.pipeline.watched import Watch
from eellm.plan.cost import train_flops_per_token
from eellm.train.driver import make_driver
from eellm.train.dropout import keep_mask, layer_dropout_rates
from eellm.train.memory import peak_memory_mb, reset_peak_memory
from eellm.train.metrics import Row
from eellm.train.optim import learning_rate, make_optimizer
from eellm.train.scale import LossScale
from eellm.train.start import start_at_random, start_from
from eellm.train.weights import exit_weights


class Trainer:
    """The state of a run on this process: its part of the model, of the optimizer and of the data."""

    def __init__(self, config: TrainConfig, world: World, watch: Watch) -> None:
        """config: resolved (see `eellm.train.check`), with `init_from`'s exits merged in."""
        self.config, self.world, self.watch = config, world, watch
        model, parallel = config.model, config.parallel
        check_tensor_parallel(model, config.data.seq_len, parallel.tp)
        self.stream, self.validation, self.tokenizer = open_data(
            config.data, vocab_size=model.vocab_size, seed=config.train.seed
        )
        self.placed = place(model, parallel, world, objective=config.objective, dtype=config.train.dtype)
        if config.init_from is None:
            start_at_random(self.placed, seed=config.train.seed)
        else:
            start_from(self.placed, config.init_from, seed=config.train.seed)
        self.parameters = self.placed.trainable()
        self.optimizer = make_optimizer(self.parameters, config.optim)
        self.loss_scale = LossScale() if config.train.dtype == "float16" else LossScale.fixed()
        self.driver, self.stage_times = make_driver(config, self.placed, world, watch)
        self.layers = (*model.exit_layers, model.num_layers)
        self.flops_per_token = train_flops_per_token(model, config.data.seq_len)
        self.num_tokens = 0

    def step(self, step: int, recorder: Recorder | None = None) -> tuple[Row, Batch | None]:
        """One optimizer step, numbered from 1. Returns its metrics, and the batch if the step was skipped.

        recorder: takes down its forward and backward.
        """
        times = _Times()
        reset_peak_memory(self.world.device)
        with self.watch("loading data"):
            batch = self._take_rows()
            keep_BL = self._keep(step)
        num_targets = self._count_targets(batch.part(slice(self._rows_each)))  # without those that fill bubbles
        weights = self._weights(step)
        factor = self.loss_scale.scale / max(num_targets, 1)
        losses = StepLosses({layer: weight * factor for layer, weight in weights.items()}, recorder)
        times.mark("data_s")
        self.optimizer.zero_grad(set_to_none=True)
        if recorder is not None:
            with self.watch("meeting the others before a step is recorded", waits=True):
                recorder.start()
        self.driver.step(batch, losses, keep_BL)
        times.mark("forward_backward_s")
        settle_placements(self.parameters)
        sum_tied(self.placed.tied)
        means, norm = self._reduce(losses, num_targets)
        times.mark("reduce_s")
        loss = sum(weight * means[layer] for layer, weight in weights.items())
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        rate = learning_rate(step, self.config.train.steps, self.config.optim)
        if is_finite:
            self._update(norm, rate)
        self.loss_scale.update(is_finite)
        times.mark("optimizer_s")
        self.num_tokens += self.config.train.global_batch_size * self.config.data.seq_len
        taking_part = {layer: means[layer] for layer in weights}
        row = {"step": step, "loss": loss, **self._named("loss", taking_part), "grad_norm": norm, "lr": rate}
        if self.config.train.dtype == "float16":
            row["loss_scale"] = self.loss_scale.scale
        return row | self._speed(times), None if is_finite else batch

    @property
    def _rows_each(self) -> int:
        """Rows of the global batch on each data-parallel rank."""
        return self.config.train.global_batch_size // self.config.parallel.dp

    @property
    def _rows_taken(self) -> int:
        """Rows of a step over all data-parallel ranks, with those that fill bubbles."""
        num_microbatches = self.config.parallel.num_microbatches or 1
        extra = self._rows_each // num_microbatches * self.driver.num_extra
        return (self._rows_each + extra) * self.config.parallel.dp

    def _take_rows(self) -> Batch:
        return self.stream.take(self._rows_taken, self._part(self._rows_taken)).to(self.world.device)

    def _part(self, num_rows: int) -> slice:
        """This data-parallel rank's rows of a global batch."""
        mine = num_rows // self.config.parallel.dp
        return slice(self.world.dp_index * mine, (self.world.dp_index + 1) * mine)

    def _keep(self, step: int) -> Tensor | None:
        """Which sequence runs which layer; None: all run all."""
        config = self.config
        if config.objective.layer_dropout == 0:
            return None
        rates = layer_dropout_rates(config.objective, config.model.num_layers, step, config.train.steps)
        rows = self._rows_taken
        mask = keep_mask(rates, num_rows=rows, seed=config.train.seed, step=step)[self._part(rows)]
        return torch.from_numpy(mask).to(self.world.device)

    def _count_targets(self, batch: Batch) -> int:
        count = (batch.labels_BT != IGNORE).sum().double()
        return round(float(self.world.sum(count)) / (self.config.parallel.pp * self.config.parallel.tp))

    def _weights(self, step: int) -> dict[int, float]:
        """Weight of each loss that takes part."""
        model = self.config.model
        early = exit_weights(self.config.objective, model.exit_layers, step, self.config.train.steps)
        return {layer: weight for layer, weight in early.items() if weight > 0} | {model.num_layers: 1.0}

    def _reduce(self, losses: StepLosses, num_targets: int) -> tuple[dict[int, float], float]:
        """Mean loss of each exit and the norm of the gradient, of all processes together: one sum."""
        with self.watch("summing losses and the gradient's norm", waits=True):
            values = torch.stack([square_sum(self.placed.counted, self.world), *self._sums(losses)])
            square, *sums = self.world.sum(values).tolist()
        means = {layer: total / max(num_targets, 1) for layer, total in zip(self.layers, sums, strict=True)}
        return means, math.sqrt(square) / self.loss_scale.scale

    def _sums(self, losses: StepLosses) -> list[Tensor]:
        """The losses' sums on this process, so that those of all processes add up."""
        sums, zero = losses.sums(), torch.zeros((), dtype=torch.float64, device=self.world.device)
        return [sums.get(layer, zero) / self.config.parallel.tp for layer in self.layers]

    def _update(self, norm: float, rate: float) -> None:
        clip = self.config.optim.clip
        shrink = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        scale_gradients(self.parameters, shrink / self.loss_scale.scale)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> Row:
        """Mean loss of every exit on the validation rows; empty where there are none."""
        if len(self.validation) == 0:
            return {}
        rows, num_targets = self.config.train.global_batch_size, 0
        totals = torch.zeros(len(self.layers), dtype=torch.float64, device=self.world.device)
        for batch in self.validation.batches(rows):
            batch = batch.padded(rows).part(self._part(rows)).to(self.world.device)
            losses = StepLosses(dict.fromkeys(self.layers, 1.0))
            num_targets += self._count_targets(batch)
            self.driver.evaluate(batch, losses)
            totals += torch.stack(self._sums(losses))
        with self.watch("summing validation losses", waits=True):
            sums = self.world.sum(totals).tolist()
        assert num_targets > 0, "seen when the data was opened"
        means = {layer: total / num_targets for layer, total in zip(self.layers, sums, strict=True)}
        return self._named("val_loss", means)

    def _named(self, name: str, means: dict[int, float]) -> Row:
        *early, final = self.layers
        return {f"{name}/exit_{layer}": means.get(layer) for layer in early} | {f"{name}/final": means[final]}

    def _speed(self, times: "_Times") -> Row:
        config = self.config
        tokens_per_s = config.train.global_batch_size * config.data.seq_len / times.total_s
        tflops_per_s = tokens_per_s * self.flops_per_token / 1e12
        peak = config.train.peak_tflops
        return {
            "tokens": self.num_tokens,
            "tokens_per_s": tokens_per_s,
            "tflops_per_s": tflops_per_s,
            **({"mfu": tflops_per_s / (peak * self.world.size)} if peak else {}),
            "peak_memory_mb": peak_memory_mb(self.world),
            **{f"time/{name}": seconds for name, seconds in times.parts.items()},
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights and the optimizer's moments by name, this process's parts: what a checkpoint saves and loads."""
        tensors: dict[str, Tensor] = {}
        for name, (parameter, *_) in self.placed.parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            if parameter.requires_grad:
                state = self._moments(parameter)
                tensors |= {f"optim.{key}.{name}": value for key, value in state.items()}
        return tensors

    def _moments(self, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's state of a parameter; as it will be before the first step, where there was none yet."""
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=self.world.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    @torch.no_grad()
    def spread_copies(self) -> None:
        """After a load: a process that holds several copies of a parameter has loaded the first."""
        for first, *others in self.placed.parameters.values():
            for other in others:
                other.copy_(first)
                for key, value in self._moments(other).items():
                    value.copy_(self._moments(first)[key])

    def state(self) -> dict[str, Any]:
        """The rest of what a checkpoint holds: plain data, alike on all processes."""
        return {
            "stream": self.stream.state(),
            "loss_scale": self.loss_scale.state(),
            "tokens": self.num_tokens,
            "stage_times": self.stage_times,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up `state`. Raises RunError for one of other data."""
        self.stream.restore(state["stream"])
        self.loss_scale.restore(state["loss_scale"])
        self.num_tokens = state["tokens"]
        times = state.get("stage_times")
        if self.stage_times is not None and times is not None and len(times) == len(self.stage_times):
            # the schedule of before, and with it the same rows in each step
            self.driver, self.stage_times = make_driver(self.config, self.placed, self.world, self.watch, times)


class _Times:
    """Seconds that the parts of a step took."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.parts[name] = now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        return self._last - self._start
