"""Seconds that the parts of a training step take on a piece of hardware, before anything is run.

    model, stage, layout, microbatch, hardware → cost of a microbatch on the stage, of a transfer, of a step's end

Three rates make up everything: matrix products at a share of the peak (a whole layer's, so its norms and activations
are in it), what else goes through memory at its bandwidth, and messages at a link's. What goes through memory beside
the layers is large where the vocabulary is: losses pass over float32 logits again and again, and the gradients of
embedding and output matrices are added up with each microbatch. Nothing is taken to overlap but the pipeline's
transfers: collectives of tensor parallelism, sums of gradients and the optimizer all count in full.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eellm.config.model import ExitConfig, ModelConfig
from eellm.config.parallel import ParallelConfig
from eellm.plan.cost import attention_flops, exit_flops, head_flops, layer_flops
from eellm.plan.hardware import Hardware, Link
from eellm.plan.memory import Microbatch, precision
from eellm.plan.parameters import head_parameters, stage_parameters
from eellm.plan.simulate import StageCost
from eellm.schedule.partition import Stage, stages_of_ranks

OPTIMIZER_TRAFFIC = 10
"""Numbers that go through memory per parameter: AdamW reads parameter, gradient and two moments and writes all but the
gradient; its norm before and its clipping make three more."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a program moves through memory beside its products, with each microbatch."""

    logit_bytes: float
    """Per logit, by a head's loss, forward and backward together."""
    matrix_bytes: float
    """Per parameter of a head's matrix: adding its gradient to those before."""
    embedding_bytes: float
    """Per parameter of the embedding: its gradient is as large as the matrix, however few tokens there are."""


def traffic(parallel: ParallelConfig, microbatch: Microbatch) -> Traffic:
    """This program's."""
    number = precision(microbatch.dtype, parallel)
    cast = 2 * (number.product + number.wide) if number.product < number.wide else 0  # logits there, gradient back
    if parallel.exit_mode == "deferred":
        logit_passes, num_chunks = 8, math.ceil(microbatch.num_tokens / microbatch.chunk_size)  # see `CrossEntropy`
    else:  # division and its gradient, log-softmax, its gradient and that of the choice
        logit_passes, num_chunks = 11, 1
    added = number.hidden + 2 * number.wide  # read; read and written
    of_chunk = (2 if number.adds_in_product else 3) * number.hidden  # the sum read and written, and what is added
    return Traffic(
        logit_bytes=logit_passes * number.wide + cast,
        matrix_bytes=added + of_chunk * (num_chunks - 1),
        embedding_bytes=added + number.hidden,  # it is zeroed first
    )


def stage_cost(
    model: ModelConfig,
    stage: Stage,
    parallel: ParallelConfig,
    microbatch: Microbatch,
    hardware: Hardware,
    moves: Traffic | None = None,
) -> StageCost:
    """What a microbatch costs on a stage. moves: another program's than this one's. Raises ConfigError for a dtype
    that the hardware doesn't compute in."""
    moves = moves or traffic(parallel, microbatch)
    rates = _Rates(model, parallel, microbatch, hardware)
    windows = [model.window(n) for n in range(stage.first, stage.last + 1)]
    products = rates.products_s(sum(layer_flops(model, microbatch.seq_len, window) for window in windows))
    collectives = rates.collectives_s(4 * stage.num_layers)
    forward, backward, again = products + collectives, hardware.backward_ratio * products, 0.0
    if parallel.recompute == "full":
        again = forward
    elif parallel.recompute == "selective":
        again = rates.products_s(sum(attention_flops(model, microbatch.seq_len, window) for window in windows))
    embedding_s = 0.0
    if stage.is_first:
        embedding_s = rates.memory_s(moves.embedding_bytes * head_parameters(model)) + rates.collectives_s(1)
        forward += rates.collectives_s(1)
    exits = [_exit_s(model, exit, rates, moves) for exit in model.exits if exit.layer in stage.exits]
    final_forward, final_backward = _head_s(model, rates, moves) if stage.is_last else (0.0, 0.0)
    return StageCost(
        forward_s=forward,
        input_s=backward / 2 + collectives + again,
        weight_s=backward / 2 + embedding_s,
        exit_forward_s=sum(forward for forward, _ in exits),
        exit_backward_s=sum(backward for _, backward in exits),
        final_forward_s=final_forward,
        final_backward_s=final_backward,
        exit_mode=parallel.exit_mode,
    )


def transfer_s(model: ModelConfig, parallel: ParallelConfig, microbatch: Microbatch, hardware: Hardware) -> float:
    """From one stage's devices to the next one's, or back: a hidden state or its gradient."""
    itemsize = precision(microbatch.dtype, parallel).hidden
    num_bytes = microbatch.num_tokens * model.hidden_size * itemsize / parallel.tp
    return hardware.link(parallel.world_size).seconds(num_bytes)


def step_end_s(
    model: ModelConfig,
    stages: Sequence[Stage],
    parallel: ParallelConfig,
    microbatch: Microbatch,
    hardware: Hardware,
) -> float:
    """What comes after the last microbatch: sums of gradients, the optimizer, and gathering the new parameters.

    stages: those of the whole pipeline; the slowest rank counts, with all the stages that it holds.
    """
    number = precision(microbatch.dtype, parallel)
    per_rank = [0.0] * parallel.pp
    ranks = ranks_of_stages(parallel, len(stages))
    for stage, rank in zip(stages, ranks, strict=True):
        part = stage_parameters(model, stage) / (parallel.tp * parallel.dp_shard)
        rate = hardware.optimizer_bytes_per_s or hardware.memory_bytes_per_s
        per_rank[rank] += OPTIMIZER_TRAFFIC * number.wide * part / rate
        shard = hardware.link(parallel.tp * parallel.dp_shard)
        per_rank[rank] += _ring_s(shard, parallel.dp_shard, (number.wide + number.product) * part * parallel.dp_shard)
        replica = hardware.link(parallel.tp * parallel.dp)
        per_rank[rank] += 2 * _ring_s(replica, parallel.dp_replicate, number.wide * part)
    tied = number.wide * head_parameters(model) / (parallel.tp * parallel.dp_shard)
    num_holders = len({rank for stage, rank in zip(stages, ranks, strict=True) if _holds_tied(model, stage)})
    return max(per_rank) + 2 * _ring_s(hardware.link(parallel.world_size), num_holders, tied)


def ranks_of_stages(parallel: ParallelConfig, num_stages: int) -> tuple[int, ...]:
    """The rank of each stage, by its index."""
    if parallel.pp == 1:
        return (0,) * num_stages
    held = stages_of_ranks(parallel.schedule, parallel.pp, parallel.stages_per_rank)
    rank_of = {index: rank for rank, indices in enumerate(held) for index in indices}
    return tuple(rank_of[index] for index in range(num_stages))


@dataclass(frozen=True)
class _Rates:
    """What a device of a stage does in how many seconds."""

    model: ModelConfig
    parallel: ParallelConfig
    microbatch: Microbatch
    hardware: Hardware

    def products_s(self, flops_per_token: float) -> float:
        """A device's share of products."""
        flops = flops_per_token * self.microbatch.num_tokens / self.parallel.tp
        return flops / self.hardware.flops_per_s(self.microbatch.dtype)

    def memory_s(self, num_bytes: float) -> float:
        """A device's share of what goes through memory."""
        return num_bytes / self.parallel.tp / self.hardware.memory_bytes_per_s

    def collectives_s(self, count: int) -> float:
        """Gathers or scatters of the hidden state among the devices that share a layer."""
        number = precision(self.microbatch.dtype, self.parallel)
        num_bytes = self.microbatch.num_tokens * self.model.hidden_size * number.hidden
        return count * _ring_s(self.hardware.link(self.parallel.tp), self.parallel.tp, num_bytes)


def _ring_s(link: Link, num_devices: int, num_bytes: float) -> float:
    """A gather or a scatter with a sum of so many bytes, whole, around a ring; a sum on all devices is both."""
    return 0.0 if num_devices == 1 else (num_devices - 1) * link.seconds(num_bytes / num_devices)


def _head_s(model: ModelConfig, rates: _Rates, moves: Traffic) -> tuple[float, float]:
    """An output matrix and its loss: forward, backward."""
    products = rates.products_s(head_flops(model))
    loss = rates.memory_s(moves.logit_bytes * rates.microbatch.num_tokens * model.vocab_size)
    gradient = rates.memory_s(moves.matrix_bytes * head_parameters(model))
    gather = rates.collectives_s(1)  # of its rows; back, a scatter of their gradients
    return products + loss / 2 + gather, rates.hardware.backward_ratio * products + loss / 2 + gradient + gather


def _exit_s(model: ModelConfig, exit: ExitConfig, rates: _Rates, moves: Traffic) -> tuple[float, float]:
    """An early exit: forward, backward."""
    body = rates.products_s(exit_flops(model, exit, rates.microbatch.seq_len) - head_flops(model))
    collectives = rates.collectives_s({"mlp": 2, "layer": 4}.get(exit.kind, 0))
    forward, backward = _head_s(model, rates, moves)
    return forward + body + collectives, backward + rates.hardware.backward_ratio * body + collectives


def _holds_tied(model: ModelConfig, stage: Stage) -> bool:
    """Whether the stage holds the final head's output matrix, which other stages may hold too."""
    is_embedding = stage.is_first and model.tie_embeddings
    return stage.is_last or is_embedding or any(e.head == "tied" and e.layer in stage.exits for e in model.exits)
