"""Bytes that a device holds while it trains: this program's, from configs alone.

    model, stage, layout, microbatch → what stands for good, what each microbatch in flight adds, what comes and goes

Parameters, their gradients and AdamW's moments are float32 (float64 in a float64 run). FSDP2 shards them over dp_shard
and adds whole copies: of parameters in the dtype of the computation, and of gradients until the step's last
microbatch. Activations are the tensors that autograd keeps for the backward, counted in `_attention_bytes` and
`_mlp_bytes` as the modules of `eellm.model.layers` make them, for rows of one document. With 16 bits and without FSDP
the computation is autocast: the hidden state stays float32, and each microbatch keeps the weights cast anew.
Sequence parallelism divides what is kept by tp, all but the gathered inputs of the products. Vectors (norms, biases)
are taken to be cut as matrices are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eellm.config.model import ExitConfig, ModelConfig
from eellm.config.parallel import ParallelConfig
from eellm.plan.hardware import Dtype
from eellm.plan.parameters import (
    attention_parameters,
    exit_parameters,
    head_parameters,
    layer_parameters,
    mlp_block_parameters,
    root_parameters,
    stage_parameters,
)
from eellm.schedule.partition import Stage

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What goes through a stage at a time, and how it is computed."""

    num_rows: int
    """Sequences."""
    seq_len: int
    """Tokens in each."""
    dtype: Dtype = "float32"
    """Of the computation."""
    chunk_size: int = 1024
    """Tokens whose logits exist at a time, where heads are deferred."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where: norms are one kernel on a GPU and keep less than on a CPU."""

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bytes of a number, by where it stands."""

    wide: int
    """Parameters, gradients and losses."""
    product: int
    """What matrix products take and give."""
    hidden: int
    """The hidden state between layers."""
    is_autocast: bool
    """Whether weights and inputs are cast at each product."""
    adds_in_product: bool
    """Whether a deferred head's matrix adds its chunks' gradients up in the product (see `eellm.exits.loss`): where it
    is whole and nothing is cast."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on each device of a stage."""

    weights_bytes: float
    """With the whole copies that FSDP keeps."""
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float
    """Of each microbatch in flight, without logits."""
    logits_bytes: float
    """Of each microbatch in flight: what eager exits keep."""
    working_bytes: float
    """The most that comes and goes within a backward: logits, gradients of one part."""

    def peak_bytes(self, in_flight: int) -> float:
        """With so many microbatches in flight: forward done, backward not."""
        standing = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return standing + in_flight * (self.activations_bytes + self.logits_bytes) + self.working_bytes


def rank_bytes(stages: Sequence[StageMemory], in_flight: int) -> float:
    """The peak of a device that holds several stages; in_flight: microbatches on any of them, added up (as
    `eellm.schedule.check.peak_in_flight` counts), each taken for the largest."""
    kept = max(stage.activations_bytes + stage.logits_bytes for stage in stages)
    return sum(stage.peak_bytes(0) - stage.working_bytes for stage in stages) + (
        in_flight * kept + max(stage.working_bytes for stage in stages)
    )


def precision(dtype: Dtype, parallel: ParallelConfig) -> Precision:
    """How a run computes in `dtype`: FSDP casts whole modules, autocast each product."""
    product, wide = ITEMSIZE[dtype], max(4, ITEMSIZE[dtype])
    is_autocast = product == 2 and parallel.dp == 1
    return Precision(
        wide=wide,
        product=product,
        hidden=wide if is_autocast else product,
        is_autocast=is_autocast,
        adds_in_product=parallel.tp == 1 and not is_autocast,
    )


def stage_memory(model: ModelConfig, stage: Stage, parallel: ParallelConfig, microbatch: Microbatch) -> StageMemory:
    """What each device of a stage holds."""
    number = precision(microbatch.dtype, parallel)
    weights, gradients = _standing_bytes(model, stage, parallel, number)
    states = 2 * number.wide * stage_parameters(model, stage) / (parallel.tp * parallel.dp_shard)
    return StageMemory(
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=states,
        activations_bytes=_kept_layers_bytes(model, stage, parallel, microbatch),
        logits_bytes=_kept_exits_bytes(model, stage, parallel, microbatch),
        working_bytes=_working_bytes(model, stage, parallel, microbatch),
    )


def kv_cache_bytes(model: ModelConfig, num_tokens: int, dtype: Dtype) -> int:
    """Keys and values of so many tokens in every layer; a `layer` exit has its own."""
    num_caches = model.num_layers + sum(exit.kind == "layer" for exit in model.exits)
    return 2 * model.kv_heads * model.head_size * num_caches * num_tokens * ITEMSIZE[dtype]


def layer_bytes_per_token(model: ModelConfig, parallel: ParallelConfig, microbatch: Microbatch) -> float:
    """What one layer keeps of a token until its backward, with the weights that autocast casts for it."""
    number, tp = precision(microbatch.dtype, parallel), parallel.tp
    if parallel.recompute == "full":
        return number.hidden * model.hidden_size / tp
    if parallel.recompute == "selective":
        outputs = _widths(model)[0] + 2 * _widths(model)[1] + 2 * model.intermediate_size + 2 * model.hidden_size
        return (number.hidden * model.hidden_size + number.product * outputs) / tp
    return _layer_bytes(model, microbatch, number, tp)


def _layer_bytes(model: ModelConfig, microbatch: Microbatch, number: Precision, tp: int) -> float:
    """Without recomputation."""
    return _attention_bytes(model, microbatch, number, tp) + _mlp_bytes(model, microbatch, number, tp)


def _attention_bytes(model: ModelConfig, microbatch: Microbatch, number: Precision, tp: int) -> float:
    """Norm, its output for the products (autocast: cast for each), q, k, v, what attention puts out and its sums."""
    query, key_value = _widths(model)
    inputs = number.product * model.hidden_size * (3 if number.is_autocast else 1)
    attention = number.product * (2 * query + 2 * key_value) + 4 * model.num_heads
    if microbatch.device == "cpu":
        attention += number.product * query  # heads are put side by side by a copy
    if model.qk_norm:
        heads = model.num_heads + model.kv_heads
        attention += _norm_bytes(query + key_value, microbatch, number.product, num_rows=heads)
    norm = _norm_bytes(model.hidden_size, microbatch, number.hidden)
    cast = number.product * attention_parameters(model) / microbatch.num_tokens if number.is_autocast else 0.0
    return inputs + (norm + attention + cast) / tp


def _mlp_bytes(model: ModelConfig, microbatch: Microbatch, number: Precision, tp: int) -> float:
    """Norm, its output for the products, gate, its activation, up, and the product of the two."""
    inputs = number.product * model.hidden_size * (2 if number.is_autocast else 1)
    inner = 4 * number.product * model.intermediate_size
    norm = _norm_bytes(model.hidden_size, microbatch, number.hidden)
    cast = number.product * mlp_block_parameters(model) / microbatch.num_tokens if number.is_autocast else 0.0
    return inputs + (norm + inner + cast) / tp


def _norm_bytes(width: int, microbatch: Microbatch, itemsize: int, num_rows: int = 1) -> float:
    """An RMSNorm's input and root mean square; on a CPU the input in at least float32, and the normed one too."""
    wide = max(4, itemsize)
    return wide * num_rows + (2 * wide * width if microbatch.device == "cpu" else itemsize * width)


def _widths(model: ModelConfig) -> tuple[int, int]:
    """Of all queries, and of all keys."""
    return model.num_heads * model.head_size, model.kv_heads * model.head_size


def _kept_layers_bytes(model: ModelConfig, stage: Stage, parallel: ParallelConfig, microbatch: Microbatch) -> float:
    """What the layers keep of a microbatch, and what the stage puts out."""
    number = precision(microbatch.dtype, parallel)
    angles = number.hidden * model.head_size  # cos and sin, alike in all layers
    output = number.hidden * model.hidden_size / parallel.tp
    layers = stage.num_layers * layer_bytes_per_token(model, parallel, microbatch)
    return microbatch.num_tokens * (layers + angles + output)


def _kept_exits_bytes(model: ModelConfig, stage: Stage, parallel: ParallelConfig, microbatch: Microbatch) -> float:
    """What heads keep of a microbatch that run in the forward: their way from the hidden state to log-probabilities,
    or, with a checkpoint, the hidden state."""
    number, tp, heads = precision(microbatch.dtype, parallel), parallel.tp, _heads(model, stage)
    if parallel.exit_mode == "deferred":
        return 0.0
    if parallel.exit_mode == "checkpoint":
        return len(heads) * microbatch.num_tokens * number.hidden * model.hidden_size / tp
    ways = sum(_way_to_logits_bytes(model, exit, microbatch, number, tp) for exit in heads)
    logits = len(heads) * number.wide * model.vocab_size / tp
    num_matrices = sum(exit.head == "own" for exit in heads) + any(exit.head == "tied" for exit in heads)
    cast = num_matrices * number.product * head_parameters(model) / tp if number.is_autocast else 0.0
    return microbatch.num_tokens * (ways + logits) + cast


def _way_to_logits_bytes(
    model: ModelConfig, exit: ExitConfig, microbatch: Microbatch, number: Precision, tp: int
) -> float:
    """What stands between a hidden state and its logits, per token."""
    kept = number.product * model.hidden_size  # the output matrix's input
    if exit.kind in ("mlp", "layer"):
        kept += _mlp_bytes(model, microbatch, number, tp)
    if exit.kind == "layer":
        kept += _attention_bytes(model, microbatch, number, tp)
    if exit.kind != "embed":
        kept += _norm_bytes(model.hidden_size, microbatch, number.hidden) / tp
    return kept


def _heads(model: ModelConfig, stage: Stage) -> list[ExitConfig]:
    """The exits that run on a stage; the final one is a norm and a matrix."""
    early = [exit for exit in model.exits if exit.layer in stage.exits]
    return [*early, ExitConfig(layer=model.num_layers)] if stage.is_last else early


def _standing_bytes(
    model: ModelConfig, stage: Stage, parallel: ParallelConfig, number: Precision
) -> tuple[float, float]:
    """Parameters and gradients, with the whole copies that FSDP keeps."""
    whole = stage_parameters(model, stage) / parallel.tp
    part = number.wide * whole / parallel.dp_shard
    if parallel.dp == 1:
        return part, part
    if parallel.pp > 1 or (parallel.num_microbatches or 1) > 1:  # gathered and summed up until the last microbatch
        return part + number.product * whole, part + number.wide * whole
    gathered = (root_parameters(model, stage) + 2 * layer_parameters(model)) / parallel.tp  # one ahead
    return part + number.product * gathered, part + (number.wide + number.product) * gathered


def _working_bytes(model: ModelConfig, stage: Stage, parallel: ParallelConfig, microbatch: Microbatch) -> float:
    """Heads and layers run one after the other, and what was behind them is gone by then: the largest."""
    number = precision(microbatch.dtype, parallel)
    layer = microbatch.num_tokens * layer_bytes_per_token(model, parallel, microbatch)
    peaks = [_layer_working_bytes(model, parallel, microbatch, number)]
    for exit in _heads(model, stage):
        gone = layer * (stage.last - exit.layer)
        peaks.append(_head_working_bytes(model, exit, parallel, microbatch, number) - gone)
    if stage.is_first:
        peaks.append(number.hidden * head_parameters(model) / parallel.tp - layer * stage.num_layers)
    return max(peaks)


def _head_working_bytes(
    model: ModelConfig, exit: ExitConfig, parallel: ParallelConfig, microbatch: Microbatch, number: Precision
) -> float:
    """Logits, what stands before them, and the output matrix's gradient."""
    num_tokens, num_logits = microbatch.num_tokens, model.vocab_size / parallel.tp
    matrix, is_cast = head_parameters(model) / parallel.tp, number.product < number.wide
    cast = 2 * number.product * matrix if number.is_autocast else 0.0  # the matrix and its gradient
    way = _way_to_logits_bytes(model, exit, microbatch, number, parallel.tp)
    if parallel.exit_mode == "eager":  # beside what is kept: two made of it, or one and the matrix's gradient
        logits = num_tokens * num_logits * number.wide
        return logits + max(logits + num_tokens * num_logits * number.product * is_cast, number.hidden * matrix)
    if parallel.exit_mode == "checkpoint":
        return num_tokens * (num_logits * (3 * number.wide + number.product * is_cast) + way) + cast
    num_rows = min(microbatch.chunk_size, num_tokens)
    per_logit = number.wide + 2 * number.product * is_cast  # in place, but for the cast ones of the product
    if parallel.tp > 1:  # cut by vocabulary: autograd makes log-probabilities and their gradient
        per_logit += 2 * number.wide
    num_gradients = 1 if number.adds_in_product or num_rows == num_tokens else 2  # the sum, and a chunk's
    body = exit_parameters(model, exit) / parallel.tp - matrix * (exit.head == "own")
    gradients = number.hidden * (num_gradients * matrix + body) + cast
    return num_rows * num_logits * per_logit + num_tokens * (way + 2 * number.hidden * model.hidden_size) + gradients


def _layer_working_bytes(
    model: ModelConfig, parallel: ParallelConfig, microbatch: Microbatch, number: Precision
) -> float:
    """Gradients of the MLP's inside and of the hidden state, and what was dropped and is computed again."""
    inner = 2 * number.product * model.intermediate_size + 2 * number.hidden * model.hidden_size
    kept = layer_bytes_per_token(model, parallel, microbatch)
    again = _layer_bytes(model, microbatch, number, parallel.tp) - kept
    return microbatch.num_tokens * (inner / parallel.tp + again)
