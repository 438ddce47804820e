"""What stands in for CUDA graphs on a CPU, and is as strict: operations on the very tensors that were recorded."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
"""Operations that a GPU can't be told in advance: what follows depends on values."""


class Played:
    """Records operations with the tensors that they read and write, whatever names mean by then, and plays them
    again."""

    def __init__(self) -> None:
        self.num_recorded = self.num_played = self.num_settled = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        watch = Watch()
        with watch:
            work()
        self.num_recorded += 1

        def play() -> None:
            self.num_played += 1
            for operation, args, kwargs, out in watch.operations:
                again = operation(*args, **kwargs)
                for before, now in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(now, torch.Tensor):
                        before.copy_(now)

        return play

    def settle(self) -> None:
        self.num_settled += 1


class Watch(TorchDispatchMode):
    """Sees all operations; refuses those whose values the host reads, and tensors that come from another device."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func not in HOST_READS, f"{func} reads values"
        out = func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == self.device, f"{func} with a tensor on {tensor.device}"
        self.operations.append((func, args, kwargs, out))
        return out
