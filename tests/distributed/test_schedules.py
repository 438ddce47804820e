"""What `eellm.schedule` says of torch's schedules without torch is what torch says."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from eellm.pipeline.run import SCHEDULES
from eellm.schedule.partition import SINGLE, stages_of_ranks, takes
from tests.ranks import run_on_ranks

NUMBERS = range(1, 13)


def what_torch_says() -> tuple[dict[str, dict[int, bool]], dict[str, dict[int, int]]]:
    """By schedule: whether it can be made for each number of microbatches, and the rank of each stage."""
    made, ranks = {}, {}
    for name, schedule in SCHEDULES.items():
        made[name] = {n: _make(name, schedule, n) is not None for n in NUMBERS}
        stages = _make(name, schedule, 8)._stages if name not in SINGLE else []
        ranks[name] = dict(stages[0].stage_index_to_group_rank) if stages else {}
    return made, ranks


def _make(name, schedule, num_microbatches):
    pp, rank, shape = dist.get_world_size(), dist.get_rank(), torch.empty(1, 1, device="meta", requires_grad=True)
    ranks = stages_of_ranks(name, pp)
    num_stages = sum(map(len, ranks))
    stages = [
        PipelineStage(nn.Identity(), i, num_stages, torch.device("cpu"), input_args=(shape,), output_args=(shape,))
        for i in ranks[rank]
    ]
    try:
        return schedule(stages[0] if name in SINGLE else stages, num_microbatches, loss_fn=lambda y, _: y.sum())
    except ValueError:
        return None


@pytest.mark.parametrize("pp", [2, 3, 4])
def test_torch_takes_the_microbatches_that_we_say_and_puts_stages_where_we_do(pp):
    for made, ranks in run_on_ranks(pp, what_torch_says):
        for name in SCHEDULES:
            assert made[name] == {n: takes(name, pp, n) for n in NUMBERS}, name
            ours = {stage: rank for rank, stages in enumerate(stages_of_ranks(name, pp)) for stage in stages}
            assert name in SINGLE or ranks[name] == ours, name
