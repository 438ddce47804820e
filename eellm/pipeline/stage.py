"""A part of a model as one module with one forward: what a pipeline schedule runs, or the whole model in one piece.

    tokens or hidden state → layers, and behind each exit's layer a loss node → hidden state

Every loss is a node on the hidden state, the final one included, so whoever drives the stage (a loop, one of torch's
schedules) needs no loss: it starts the backward from `nothing(h)`, a zero. Parameter names are those of the whole
model. Shapes: B sequences of a microbatch, T rows, D hidden, L layers.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from eellm.config.model import ModelConfig
from eellm.config.train import LossConfig
from eellm.exits.eager import eager_exit_loss
from eellm.exits.lm import EarlyExitLM, ExitHead
from eellm.exits.loss import CrossEntropy, chunked_loss, exit_loss_node
from eellm.model.layers import Rows
from eellm.parallel.tensor import local
from eellm.pipeline.record import Recorder
from eellm.pipeline.split import Edges, join_at_start
from eellm.schedule.partition import Stage


class StepLosses:
    """What the stages of one step share: the losses' weights, where their sums go, and who records the step.

    NOTE a plain class: FSDP casts what a forward gets, and hands on a copy of a dataclass, a dict or a list.
    """

    def __init__(self, weights: Mapping[int, float], recorder: Recorder | None = None) -> None:
        """weights: by exit layer, the final one included; an exit that is absent takes no part. Each is multiplied
        with the sum of the exit's losses, so it holds the division by the number of targets, and the loss scale."""
        self.weights = weights
        self.recorder = recorder
        self.reported: list[tuple[int, list[Tensor]]] = []
        """Per forward and exit: the layer, and a cell for the detached sum, which the backward fills."""

    def cell(self, layer: int) -> Callable[[Tensor], None]:
        """Where one microbatch's sum at one exit goes. A split backward reports the same sum twice; one is kept."""
        values: list[Tensor] = []
        self.reported.append((layer, values))

        def report(value: Tensor) -> None:
            values[:] = [value]

        return report

    def scaled(self, factor: float, *, is_reported: bool) -> "StepLosses":
        """For one microbatch: losses whose weights are `factor` times these, none at 0. is_reported: whether its sums
        count among these."""
        weights = {layer: weight * factor for layer, weight in self.weights.items() if factor > 0}
        losses = StepLosses(weights, self.recorder)
        if is_reported:
            losses.reported = self.reported
        return losses

    def sums(self) -> dict[int, Tensor]:
        """Sum of the losses at each exit over the step's microbatches on this process, float64 scalars."""
        totals: dict[int, Tensor] = {}
        for layer, values in self.reported:
            for value in values:
                totals[layer] = totals.get(layer, 0) + local(value).double()
        return totals


class StageModule(nn.Module):
    """The layers and exits of one stage."""

    def __init__(
        self,
        model: EarlyExitLM,
        stage: Stage,
        *,
        objective: LossConfig,
        mode: str = "deferred",
        autocast: torch.dtype | None = None,
        is_split: bool = False,
        wrap_head: Callable[[ExitHead], ExitHead] = lambda head: head,
    ) -> None:
        """model: holds the stage's part of the whole (see `stage_part`). mode: `parallel.exit_mode`. autocast: to what
        the forward casts what it computes with, if to anything. is_split: whether the backward for inputs and for
        weights are taken apart. wrap_head: what parallelism makes of a head."""
        super().__init__()
        self.model = model
        self.stage = stage
        self.objective = objective
        self.mode = mode
        self.autocast = autocast
        self.is_split = is_split and not stage.is_first  # torch doesn't take the first stage's apart
        self.wrap_head = wrap_head

    def forward(
        self,
        x: Tensor,
        *,
        step_losses: StepLosses,
        labels_BT: Tensor,
        positions_BT: Tensor,
        documents_BT: Tensor | None = None,
        keep_BL: Tensor | None = None,
    ) -> Tensor:
        """Hidden state (B, T, D) behind the stage's last layer.

        x: tokens (B, T) on the first stage, the hidden state on others. documents_BT: None where each sequence is one
        document. keep_BL: False where a sequence skips a layer.
        """
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self._forward(x, step_losses, labels_BT, positions_BT, documents_BT, keep_BL)

    def _forward(
        self,
        x: Tensor,
        losses: StepLosses,
        labels_BT: Tensor,
        positions_BT: Tensor,
        documents_BT: Tensor | None,
        keep_BL: Tensor | None,
    ) -> Tensor:
        decoder, stage = self.model.decoder, self.stage
        h_BTD = decoder.embed(x) if stage.is_first else x
        rows = decoder.packed_rows(positions_BT, documents_BT, h_BTD.dtype)
        labels_N = labels_BT.flatten()
        h_BTD, edges = self._join(h_BTD, rows, losses)
        h_BTD = self._exit(stage.first - 1, h_BTD, rows, labels_N, losses, edges)
        for n in range(stage.first, stage.last + 1):
            y_BTD = decoder.layer(n)(h_BTD, rows)
            h_BTD = y_BTD if keep_BL is None else torch.where(keep_BL[:, n - 1, None, None], y_BTD, h_BTD)
            h_BTD = self._exit(n, h_BTD, rows, labels_N, losses, edges)
        return h_BTD

    @property
    def exits(self) -> tuple[int, ...]:
        """Layers of the exits that run here, the final one included."""
        final = (self.stage.last,) if self.stage.is_last else ()
        return (*self.stage.exits, *final)

    def _join(self, h_BTD: Tensor, rows: Rows, losses: StepLosses) -> tuple[Tensor, Edges]:
        """Where the backward is taken apart: the heads' parameters join it here."""
        if not (self.is_split and torch.is_grad_enabled()):
            return h_BTD, {}
        heads = [self.model.head(layer, rows) for layer in self.exits if layer in losses.weights]
        return join_at_start(h_BTD, list(dict.fromkeys(p for head in heads for p in head.parameters)))

    def _exit(
        self, layer: int, h_BTD: Tensor, rows: Rows, labels_N: Tensor, losses: StepLosses, edges: Edges
    ) -> Tensor:
        """The hidden state, with the loss of the exit at `layer` behind it if there is one."""
        if layer not in self.exits or layer not in losses.weights:
            return h_BTD
        head, report = self.wrap_head(self.model.head(layer, rows)), losses.cell(layer)
        if not torch.is_grad_enabled():
            report(chunked_loss(h_BTD, head, CrossEntropy(labels_N), chunk_size=self.objective.chunk_size))
            return h_BTD
        is_final = layer == self.model.config.num_layers
        objective = CrossEntropy(labels_N) if is_final else self._objective(labels_N)
        what = {"head": head, "objective": objective, "weight": losses.weights[layer], "report": report}
        if self.mode == "deferred":
            run = partial(exit_loss_node, **what, chunk_size=self.objective.chunk_size, edges=edges)
        else:
            run = partial(eager_exit_loss, **what, mode=self.mode)
        if losses.recorder is None:
            return run(h_BTD)
        return losses.recorder.head(run, h_BTD, is_final=is_final, is_deferred=self.mode == "deferred")

    def _objective(self, labels_N: Tensor) -> CrossEntropy:
        config = self.objective
        return CrossEntropy(labels_N, config.temperature, config.confidence_weighting)


def stage_part(config: ModelConfig, stage: Stage) -> EarlyExitLM:
    """The modules of a model that run on `stage`, without weights (on the meta device).

    An exit that shares the final head's matrix or norm brings a copy of it; `shared_names` lists those.
    """
    with torch.device("meta"):
        model = EarlyExitLM(config)
    decoder = model.decoder
    for n in range(1, config.num_layers + 1):
        if not stage.first <= n <= stage.last:
            del decoder.layers[str(n)]
    exits = [exit for exit in config.exits if exit.layer in stage.exits]
    for exit in config.exits:
        if exit not in exits:
            del model.exits[str(exit.layer)]
    if not stage.is_first:
        del decoder.embed
    if not stage.is_last and all(exit.norm == "own" or exit.kind == "embed" for exit in exits):
        del decoder.norm
    if not stage.is_last and all(exit.head == "own" for exit in exits):
        del decoder.output
    for gate in (model.exit(exit.layer).gate for exit in exits):
        if gate is not None:  # gates learn from a trained model: see tuning
            gate.requires_grad_(False)
    return model


def canonical_name(name: str, config: ModelConfig) -> str:
    """The one name of a parameter that has two: a tied output matrix is the embedding matrix."""
    if config.tie_embeddings and name == "decoder.output.weight":
        return "decoder.embed.weight"
    return name


def shared_names(config: ModelConfig, stages: tuple[Stage, ...]) -> dict[str, tuple[int, ...]]:
    """Canonical names of parameters that several stages hold, and the stages' indices."""
    holders: dict[str, list[int]] = {}
    for stage in stages:
        names = {canonical_name(name, config) for name, _ in stage_part(config, stage).named_parameters()}
        for name in names:
            holders.setdefault(name, []).append(stage.index)
    return {name: tuple(found) for name, found in sorted(holders.items()) if len(found) > 1}
