"""Tensor and sequence parallelism as one table: which module of a layer does what with its input, weights and output.

Between layers, each process holds T / tp rows of the hidden state (Shard(1) of (B, T, D)), as a plain local tensor. A
layer's attention and MLP gather all rows, compute with a part of the heads or of the width, and scatter the sum.
Norms work on the local rows. Embedding and output matrices are cut by vocabulary; logits stay cut, and torch's
`loss_parallel` takes the cross entropy over the whole vocabulary without gathering them.
Source: Megatron-LM's tensor (arXiv 1909.08053) and sequence (2205.05198) parallelism.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from eellm.config.model import ModelConfig
from eellm.errors import ConfigError
from eellm.exits.lm import ExitHead
from eellm.model.layers import Layer


class VocabParallel(ParallelStyle):
    """An output matrix cut by vocabulary: all rows, plain, → logits as a DTensor, cut by vocabulary.

    The gradient of the rows is each process's own part of the sum; whoever gathered the rows adds the parts up.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._partition, self._take_rows)  # pyrefly: ignore

    @staticmethod
    def _partition(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        weight = distribute_tensor(module.weight, mesh, [Shard(0)], src_data_rank=None)  # pyrefly: ignore
        module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)  # pyrefly: ignore

    @staticmethod
    def _take_rows(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[DTensor]:
        rows = DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False, grad_placements=[Partial()])
        return (rows,)


def _gathered_input(num_inputs: int = 1) -> PrepareModuleInput:
    """The first input's rows are gathered; the others pass."""
    others: tuple[Placement | None, ...] = (None,) * (num_inputs - 1)
    return PrepareModuleInput(input_layouts=(Shard(1), *others), desired_input_layouts=(Replicate(), *others))


MLP = {
    "mlp": _gathered_input(),
    "mlp.gate": ColwiseParallel(),
    "mlp.up": ColwiseParallel(),
    "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
}
LAYER = {
    "attn_norm": SequenceParallel(),
    "attn": _gathered_input(2),
    "attn.q": ColwiseParallel(),
    "attn.k": ColwiseParallel(),
    "attn.v": ColwiseParallel(),
    "attn.q_norm": SequenceParallel(sequence_dim=2, use_local_output=True),  # (B, T, heads / tp, E): cut by heads
    "attn.k_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
    "attn.out": RowwiseParallel(output_layouts=Shard(1)),
    "mlp_norm": SequenceParallel(),
    **MLP,
}
MLP_BLOCK = {"norm": SequenceParallel(), **MLP}
HEAD = {"norm": SequenceParallel(), "output": VocabParallel()}
EMBEDDING = {"embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))}


def check_tensor_parallel(model: ModelConfig, seq_len: int, tp: int) -> None:
    """Raises ConfigError, with the nearest numbers that work, for sizes that `tp` processes can't share."""
    sizes = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.kv_heads,
        "model.intermediate_size": model.intermediate_size,
        "model.vocab_size": model.vocab_size,
        "data.seq_len": seq_len,
    }
    for name, size in sizes.items():
        if size % tp:
            fits = [n for n in range(1, min(sizes.values()) + 1) if all(s % n == 0 for s in sizes.values())]
            raise ConfigError(
                f"parallel.tp = {tp}: {name} = {size} is not a multiple of it; this recipe takes tp in {fits}; or make "
                f"{name} {' or '.join(str(n) for n in (size // tp * tp, size // tp * tp + tp) if n)}"
            )


def apply_tensor_parallel(root: nn.Module, mesh: DeviceMesh) -> None:
    """Cuts `root`'s parameters over the 1-dimensional `mesh`, in place. `root` holds a `decoder` and `exits`.

    Tied matrices are no longer one afterwards: tie them again.
    """
    decoder, exits = root.get_submodule("decoder"), root.get_submodule("exits")
    parts: list[tuple[nn.Module, dict[str, Any]]] = [(decoder, EMBEDDING | HEAD)]
    parts += [(layer, LAYER) for layer in decoder.get_submodule("layers").children()]
    for exit in exits.children():
        parts.append((exit, HEAD))
        body = getattr(exit, "body", None)
        if isinstance(body, nn.Module):
            parts.append((body, LAYER if isinstance(body, Layer) else MLP_BLOCK))
    for module, table in parts:
        parallelize_module(module, mesh, {name: style for name, style in table.items() if _has(module, name)})


def _has(module: nn.Module, name: str) -> bool:
    """Whether `module` has a submodule `name` with parameters; shared parts and absent ones are None or not there."""
    try:
        return any(True for _ in module.get_submodule(name).parameters())
    except AttributeError:
        return False


def gather_rows(head: ExitHead, mesh: DeviceMesh) -> ExitHead:
    """A head that takes this process's rows of the hidden state and makes logits of all rows, cut by vocabulary."""

    def hidden(h_BTD: Tensor) -> Tensor:
        z_BTD = head.hidden(h_BTD)
        if not isinstance(z_BTD, DTensor):
            z_BTD = DTensor.from_local(z_BTD, mesh, [Shard(1)], run_check=False)
        return z_BTD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    return replace(head, hidden=hidden)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
