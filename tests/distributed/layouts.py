"""One set of named tensors as different layouts of processes hold it."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

SHAPES = {"model.embed": (12, 6), "model.norm": (6,), "model.layers.1.w": (8, 7), "model.layers.2.w": (7, 8)}
ROWS, COLUMNS = {"model.embed", "model.layers.1.w"}, {"model.layers.2.w"}
STAGES = ({"model.embed", "model.norm", "model.layers.1.w"}, {"model.embed", "model.norm", "model.layers.2.w"})
"""What each of two stages holds: a tied matrix and a norm are on both."""


def whole(seed=0, shapes=SHAPES):
    """Every tensor, each value another; one is a scalar, one of whole numbers, one in half precision."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    more = {"optim.step": torch.tensor(7.0 + seed), "rng": torch.arange(5) + seed, "half": torch.ones(3).bfloat16()}
    return tensors | more


def single(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def tensor_parallel(tensors, mesh=None):
    """Matrices cut by rows or columns, the rest replicated; what is no parameter stays plain."""
    mesh = mesh or init_device_mesh("cpu", (2,))
    places = {name: Shard(0) if name in ROWS else Shard(1) if name in COLUMNS else Replicate() for name in tensors}
    return {
        name: distribute_tensor(tensor.clone(), mesh, [places[name]]) if name.startswith("model.") else tensor.clone()
        for name, tensor in tensors.items()
    } | {"optim.step": distribute_tensor(tensors["optim.step"].clone(), mesh, [Replicate()])}


def fully_sharded(tensors, mesh=None):
    """The parameters of an FSDP2 module."""
    mesh = mesh or init_device_mesh("cpu", (2,))
    module, names = nn.Module(), [name for name in tensors if name.startswith("model.")]
    for name in names:
        module.register_parameter(name.replace(".", "/"), nn.Parameter(tensors[name].clone()))
    fully_shard(module, mesh=mesh)
    return tensors | {name: module.get_parameter(name.replace(".", "/")) for name in names}


def staged(tensors):
    """Two stages with plain tensors."""
    names = STAGES[dist.get_rank()]
    return {name: tensor.clone() for name, tensor in tensors.items() if name in names or "model." not in name}


def data_and_tensor_parallel(tensors):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return fully_sharded(tensor_parallel(tensors, mesh["tp"]), mesh["dp"])


def staged_and_tensor_parallel(tensors):
    """Two stages, each with a mesh of its own: the same names on different meshes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    names = STAGES[mesh["pp"].get_local_rank()]
    mine = {name: tensor for name, tensor in tensors.items() if name in names or "model." not in name}
    return tensor_parallel(mine, mesh["tp"])


LAYOUTS = {
    1: (single,),
    2: (tensor_parallel, fully_sharded, staged),
    4: (data_and_tensor_parallel, staged_and_tensor_parallel),
}


def full(tensor):
    """The whole tensor, plain; asks the other processes of its mesh."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def blank(tensors):
    """Tensors of the same shapes and dtypes, none with the right value."""
    return {name: torch.full_like(tensor, -1) for name, tensor in tensors.items()}


def assert_equal(found, expected):
    for name, tensor in found.items():
        assert full(tensor).dtype == expected[name].dtype, name
        assert torch.equal(full(tensor), expected[name]), name
