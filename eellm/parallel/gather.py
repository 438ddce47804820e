"""Named tensors that are spread over the stages of a pipeline, brought together on rank 0."""

import torch
import torch.distributed as dist
from torch import Tensor

from eellm.parallel.mesh import World


def gather_stages(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors of all stages, on rank 0 and on the CPU; nothing elsewhere.

    All processes call it. Each holds plain tensors that are alike on the stage's processes; no two stages have a name
    in common.
    """
    if world.dp_index > 0 or world.index("tp") > 0:
        return {}
    found = {name: tensor.detach().cpu() for name, tensor in tensors.items()} if world.is_main else {}
    if world.axis_size("pp") == 1:
        return found
    group = world.submesh("pp").get_group()
    mine = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    lists = [mine] * group.size() if world.is_main else None
    dist.gather_object(mine, lists, group=group, group_dst=0)
    if not world.is_main:
        for tensor in tensors.values():  # one by one: rank 0 need not have room on its device for all
            dist.send(tensor.detach().contiguous(), group=group, group_dst=0)
        return {}
    for stage, entries in enumerate(lists or []):
        for name, shape, dtype in entries if stage > 0 else ():
            tensor = torch.empty(shape, dtype=dtype, device=world.device)
            dist.recv(tensor, group=group, group_src=stage)
            found[name] = tensor.cpu()
    return found
