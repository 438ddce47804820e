"""The exit loss on logits that are sharded over the vocabulary, against one process: fp64, and nothing is gathered."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel

from eellm.exits.lm import ExitHead
from eellm.exits.loss import IGNORE, CrossEntropy, exit_loss_node
from tests.ranks import run_on_ranks

NUM_ROWS, WIDTH, VOCAB, CHUNK, WEIGHT = 13, 8, 10, 5, 0.3
OBJECTIVES = [
    {},
    {"temperature": 2.5},
    {"confidence_weighting": True},
    {"temperature": 0.7, "confidence_weighting": True},
]


def world():
    """Hidden states, output matrix, labels. Both ranks have the largest logit of some row, and some row's label."""
    generator = torch.Generator().manual_seed(3)
    x_BTD = torch.randn(1, NUM_ROWS, WIDTH, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    labels_N = torch.randint(VOCAB, (NUM_ROWS,), generator=generator)
    labels_N[[0, 6]] = IGNORE
    return x_BTD, weight_VD, labels_N


def run_node(logits, weight, options, matrix=None):
    """The loss, and its gradients for hidden states and `weight`, by the node's own backward. matrix: the whole one,
    where `weight` is a part."""
    x_BTD, _, labels_N = world()
    x_BTD.requires_grad_()
    weight.requires_grad_()
    head = ExitHead(
        hidden=lambda h_BTD: h_BTD,
        logits=lambda z_ND: logits(z_ND, weight),
        matrix=weight if matrix is None else matrix,
        parameters=(weight,),
    )
    reports = []
    y = exit_loss_node(
        x_BTD,
        head,
        CrossEntropy(labels_N, **options),
        weight=torch.tensor(WEIGHT, dtype=torch.float64),
        chunk_size=CHUNK,
        report=reports.append,
    )
    y.backward(torch.zeros_like(y))
    return reports[0], x_BTD.grad, weight.grad


def run_sharded(options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    _, weight_VD, _ = world()
    shard = weight_VD.chunk(mesh.size())[mesh.get_local_rank()].clone()

    def logits(z_ND, weight):
        return DTensor.from_local(F.linear(z_ND, weight), mesh, [Shard(-1)])

    with loss_parallel(), CommDebugMode() as communication:
        matrix = DTensor.from_local(shard, mesh, [Shard(0)])
        loss, grad_x, grad_shard = run_node(logits, shard, options, matrix)
    assert isinstance(loss, DTensor)
    kinds = {str(kind).rsplit(".", 1)[-1] for kind in communication.get_comm_counts()}
    return float(loss.full_tensor()), grad_x.numpy(), grad_shard.numpy(), kinds


def reference(options):
    """One process, without the node: the loss row by row."""
    x_BTD, weight_VD, labels_N = world()
    x_BTD.requires_grad_()
    weight_VD.requires_grad_()
    temperature, is_weighted = options.get("temperature", 1.0), options.get("confidence_weighting", False)
    loss = torch.zeros((), dtype=torch.float64)
    for z, label in zip(x_BTD[0], labels_N, strict=True):
        if label != IGNORE:
            logits = weight_VD @ z
            row = -(logits / temperature).log_softmax(-1)[label]
            loss = loss + row * (logits.detach().softmax(-1).max() if is_weighted else 1)
    return loss.detach(), *torch.autograd.grad(WEIGHT * loss, (x_BTD, weight_VD))


@pytest.mark.parametrize("options", OBJECTIVES)
def test_loss_and_gradients_equal_those_of_one_process_and_no_logits_are_gathered(options):
    loss, grad_x, grad_weight = reference(options)
    ranks = run_on_ranks(2, run_sharded, options)
    for found, _, _, kinds in ranks:
        assert found == pytest.approx(float(loss), rel=1e-12)
        assert kinds == {"all_reduce"}, "the only exchange is of numbers per row"
    # Each rank has the part of the gradient that comes through its own share of the vocabulary.
    np.testing.assert_allclose(sum(rank[1] for rank in ranks), grad_x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([rank[2] for rank in ranks]), grad_weight, rtol=0, atol=1e-12)


def test_both_shards_hold_labels_and_largest_logits():
    x_BTD, weight_VD, labels_N = world()
    half = VOCAB // 2
    for ids in (labels_N[labels_N != IGNORE], (x_BTD[0] @ weight_VD.T).argmax(-1)):
        assert {int(i) // half for i in ids} == {0, 1}, "otherwise a loss over one shard alone would pass"
