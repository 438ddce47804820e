"""A frozen backbone over a row of processes: hidden states go forward only, and each stage's exits read theirs.

    tokens or the hidden state from the stage before → this stage's layers, without gradients → the stage behind
                                                        └→ the hidden state at each of its exits
    last stage: the final normed hidden state → every stage with exits, where the final exit teaches

Without a teacher the stages end at the deepest exit, and what is behind it is on no process. With one, the last stage's
normed hidden state is all that comes back: whoever needs the teacher's logits makes them a chunk at a time. A stage
takes its microbatches in order and runs ahead of its exits by as many as are on their way to the last stage and back.
Source: EE-Tuning (arXiv 2402.00518). Shapes: B sequences, T rows, D hidden.
"""

from collections import deque
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eellm.config.model import ModelConfig
from eellm.config.parallel import ParallelConfig
from eellm.errors import ConfigError
from eellm.exits.lm import EarlyExitLM
from eellm.exits.metrics import PackedBatch
from eellm.model.layers import RMSNorm, Rows
from eellm.parallel.mesh import World, new_group
from eellm.pipeline.stage import stage_part
from eellm.pipeline.watched import Watch
from eellm.plan.cost import exit_flops, head_flops, layer_flops
from eellm.schedule.partition import Stage, partition


def plan_frozen_stages(
    model: ModelConfig, parallel: ParallelConfig, seq_len: int, *, is_taught: bool
) -> tuple[Stage, ...]:
    """The stages that a tuning run needs. is_taught: whether the final exit teaches. Raises ConfigError."""
    depth = model.num_layers if is_taught else max(model.exit_layers)
    if parallel.pp > depth:
        what = f"there are {depth} layers" if is_taught else f"no layer behind the deepest exit, at {depth}, runs"
        raise ConfigError(
            f"parallel.pp = {parallel.pp}: {what}, and each stage needs one; use pp up to {depth}, and the other "
            "processes as dp_replicate"
        )
    layer, head = layer_flops(model, seq_len, model.window(1)), head_flops(model)
    # layers run forward, exits forward and backward, and beside each the teacher's head
    costs = {e.layer: (3 * exit_flops(model, e, seq_len) + is_taught * head) / layer for e in model.exits}
    return partition(
        depth, parallel.pp, model.exit_layers, layers_per_stage=parallel.layers_per_stage, exit_costs=costs
    )


def frozen_part(config: ModelConfig, stage: Stage, *, is_taught: bool) -> EarlyExitLM:
    """What `stage` needs of a model, without weights (on the meta device); only its exits take gradients.

    With a teacher that is the output matrix where there are exits, and the final norm on the last stage.
    """
    part = stage_part(config, replace(stage, num_stages=stage.num_stages + 1))  # the final head is on no stage
    with torch.device("meta"):
        if is_taught and stage.exits and not hasattr(part.decoder, "output"):
            part.decoder.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if is_taught and stage.is_last and not hasattr(part.decoder, "norm"):
            part.decoder.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    part.decoder.tie()
    part.requires_grad_(False)
    part.exits.requires_grad_(True)
    return part


@dataclass(frozen=True, eq=False)
class Passed:
    """A microbatch that has been through this stage's layers."""

    rows: Rows
    exits: dict[int, Tensor]
    """The hidden state (B, T, D) at each exit of the stage, by layer."""
    h_BTD: Tensor
    """Behind the stage's last layer."""


class FrozenStage:
    """This process's stage among the others'. All stages take the same microbatches in the same order."""

    def __init__(
        self,
        model: EarlyExitLM,
        stages: tuple[Stage, ...],
        world: World,
        watch: Watch,
        *,
        dtype: torch.dtype,
        is_taught: bool,
    ) -> None:
        """model: the stage's part (see `frozen_part`), with weights. dtype: of hidden states."""
        self.model, self.watch, self.dtype, self.device = model, watch, dtype, world.device
        self.stage = stages[world.index("pp")]
        self.pupils = [stage.index for stage in stages if stage.exits and is_taught]
        """Stages that want the final normed hidden state."""
        self.num_ahead = self.stage.num_stages - 1 - self.stage.index if is_taught else 0
        """Microbatches that must have passed before the first one's can be here."""
        self._forward = self._back = None
        if self.stage.num_stages > 1:
            self._forward = world.submesh("pp").get_group()
            # NOTE a group of its own: NCCL takes a group's messages between two processes in one order
            self._back = new_group(dist.get_process_group_ranks(self._forward))
        self._sent: deque[dist.Work] = deque()

    @torch.no_grad()
    def forward(self, batch: PackedBatch, number: int) -> Passed:
        """Takes the microbatch `number` through this stage and hands it on."""
        stage, decoder, name = self.stage, self.model.decoder, f"microbatch {number}"
        h_BTD = batch.tokens_BT if stage.is_first else self._receive(batch, stage.index - 1, self._forward, name)
        exits = {}
        with self.watch(f"forward of stage {stage.index}, {name}"):
            if stage.is_first:
                h_BTD = decoder.embed(h_BTD)
            rows = decoder.packed_rows(batch.positions_BT, batch.documents_BT, self.dtype)
            for n in range(stage.first, stage.last + 1):
                h_BTD = decoder.layer(n)(h_BTD, rows)
                if n in stage.exits:
                    exits[n] = h_BTD
        if not stage.is_last:
            self._send(h_BTD, stage.index + 1, self._forward, name)
        return Passed(rows, exits, h_BTD)

    @torch.no_grad()
    def final_hidden(self, batch: PackedBatch, passed: Passed, number: int) -> Tensor | None:
        """The final normed hidden state (B, T, D) of a microbatch; None where no exit here wants it.

        Called on every stage and for each microbatch in order, `num_ahead` behind `forward`.
        """
        stage, name = self.stage, f"the teacher's hidden state of microbatch {number}"
        if not stage.is_last:
            is_pupil = stage.index in self.pupils
            return self._receive(batch, stage.num_stages - 1, self._back, name) if is_pupil else None
        if not self.pupils:
            return None
        z_BTD = self.model.decoder.norm(passed.h_BTD)
        for index in self.pupils:
            if index != stage.index:
                self._send(z_BTD, index, self._back, name)
        return z_BTD

    def finish(self) -> None:
        """Waits until all that was sent has arrived."""
        while self._sent:
            self._wait_for_oldest()

    def _receive(self, batch: PackedBatch, source: int, group: dist.ProcessGroup | None, name: str) -> Tensor:
        h_BTD = torch.empty(*batch.tokens_BT.shape, self.model.config.hidden_size, dtype=self.dtype, device=self.device)
        with self.watch(f"waiting for {name} from stage {source}", waits=True):
            dist.recv(h_BTD, group=group, group_src=source)
        return h_BTD

    def _send(self, h_BTD: Tensor, target: int, group: dist.ProcessGroup | None, name: str) -> None:
        assert h_BTD.dtype == self.dtype, h_BTD.dtype
        if len(self._sent) >= 2 * self.stage.num_stages:  # so many hidden states are kept at most
            self._wait_for_oldest()
        with self.watch(f"sending {name} to stage {target}", waits=True):
            work = dist.isend(h_BTD.contiguous(), group=group, group_dst=target)
        assert work is not None, "we are in the group"
        self._sent.append(work)

    def _wait_for_oldest(self) -> None:
        with self.watch("waiting until what was sent has arrived", waits=True):
            self._sent.popleft().wait()
