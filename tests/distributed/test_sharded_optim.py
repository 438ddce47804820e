"""AdamW on sharded parameters, next to plain ones, against one process."""

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from eellm.config.optim import OptimConfig
from eellm.train.optim import make_optimizer
from tests.ranks import run_on_ranks

CONFIG = OptimConfig(lr=0.01, weight_decay=0.1)
SIZES = [(5, 4), (4,), (3, 3), (1,)]
"""The last leaves one of two ranks without an element."""


def train(place):
    """Five steps on parameters that `place(index, tensor)` has laid out; returns whole tensors."""
    generator = torch.Generator().manual_seed(1)

    def draw(index):
        return place(index, torch.randn(SIZES[index], generator=generator, dtype=torch.float64))

    parameters = [nn.Parameter(draw(index)) for index in range(len(SIZES))]
    optimizer = make_optimizer(parameters, CONFIG)
    for _ in range(5):
        for index, parameter in enumerate(parameters):
            parameter.grad = draw(index)
        optimizer.step()
    assert all(group["fused"] for group in optimizer.param_groups)
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    return [p.detach().numpy() for p in whole]


def train_sharded():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    # The third stays plain, so that sharded and plain matrices meet in one optimizer.
    return train(lambda index, tensor: tensor if index == 2 else distribute_tensor(tensor, mesh, [Shard(0)]))


def test_sharded_and_plain_parameters_side_by_side_move_as_in_one_process():
    expected = train(lambda index, tensor: tensor)
    for found in run_on_ranks(2, train_sharded):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=0)
