"""Seconds from configs: each part against its formula, on hardware with round numbers."""

from dataclasses import replace

import pytest

from eellm.config.model import ExitConfig
from eellm.config.parallel import ParallelConfig
from eellm.errors import ConfigError
from eellm.plan.cost import attention_flops, forward_flops_per_token, train_flops_per_token
from eellm.plan.hardware import Hardware, Link, PeakFlops
from eellm.plan.memory import Microbatch
from eellm.plan.parameters import model_parameters
from eellm.plan.times import Traffic, stage_cost, step_end_s, transfer_s
from eellm.schedule.partition import partition
from tests.models import tiny_config

HARDWARE = Hardware(
    name="round",
    device="cuda",
    peak_flops=PeakFlops(float32=2e9, bfloat16=4e9),
    efficiency=0.5,
    memory_bytes=10**9,
    memory_bytes_per_s=1e9,
    devices_per_node=4,
    node_link=Link(bytes_per_s=1e6, latency_s=0.1),
    network_link=Link(bytes_per_s=1e5, latency_s=1.0),
)
EXITS = (ExitConfig(layer=2, kind="embed"), ExitConfig(layer=4, kind="mlp", head="own"))
MICROBATCH = Microbatch(num_rows=2, seq_len=64)
NO_TRAFFIC = Traffic(logit_bytes=0, matrix_bytes=0, embedding_bytes=0)


def costs(parallel, *, moves=NO_TRAFFIC, exits=EXITS, num_stages=3, microbatch=MICROBATCH, hardware=HARDWARE):
    config = tiny_config(exits=exits)
    stages = partition(6, num_stages, config.exit_layers, layers_per_stage=[6 // num_stages] * num_stages)
    return [stage_cost(config, stage, parallel, microbatch, hardware, moves) for stage in stages]


def test_all_stages_together_do_the_flops_of_a_training_step():
    flops = train_flops_per_token(tiny_config(exits=EXITS), 64) * MICROBATCH.num_tokens
    assert sum(cost.total_s for cost in costs(ParallelConfig(pp=3))) == pytest.approx(flops / 1e9)


def test_a_faster_dtype_is_faster_and_one_that_is_not_there_is_refused():
    one = costs(ParallelConfig(pp=3))[1]
    half = costs(ParallelConfig(pp=3), microbatch=replace(MICROBATCH, dtype="bfloat16"))[1]
    assert half.total_s == pytest.approx(one.total_s / 2)
    with pytest.raises(ConfigError, match=r"no peak_flops\.float64"):
        costs(ParallelConfig(pp=3), microbatch=replace(MICROBATCH, dtype="float64"))


def test_the_backward_is_half_for_inputs_and_half_for_weights_and_takes_the_measured_ratio():
    plain = costs(ParallelConfig(pp=3))[1]
    assert plain.input_s == plain.weight_s == pytest.approx(plain.forward_s)
    slow = costs(ParallelConfig(pp=3), hardware=replace(HARDWARE, backward_ratio=3.0))[1]
    assert slow.input_s + slow.weight_s == pytest.approx(3 * slow.forward_s)
    assert slow.exit_backward_s == pytest.approx(3 * slow.exit_forward_s)


def test_recomputation_adds_a_forward_or_its_attention_to_the_backward_for_inputs():
    plain, full, selective = (costs(ParallelConfig(pp=3, recompute=r))[1] for r in ("none", "full", "selective"))
    assert full.input_s - plain.input_s == pytest.approx(plain.forward_s)
    attention = 2 * attention_flops(tiny_config(), 64, None) * MICROBATCH.num_tokens / 1e9
    assert selective.input_s - plain.input_s == pytest.approx(attention)
    assert plain.weight_s == full.weight_s == selective.weight_s


def test_losses_and_gradients_of_large_matrices_go_through_memory():
    config = tiny_config(exits=EXITS)
    matrix, logits = config.vocab_size * config.hidden_size, config.vocab_size * MICROBATCH.num_tokens
    moves = Traffic(logit_bytes=10, matrix_bytes=3, embedding_bytes=7)
    found, without = costs(ParallelConfig(pp=3), moves=moves), costs(ParallelConfig(pp=3))
    more = [one.total_s - other.total_s for one, other in zip(found, without, strict=True)]
    head = (10 * logits + 3 * matrix) / 1e9
    assert more == pytest.approx([7 * matrix / 1e9 + head, head, head])
    assert found[0].weight_s - without[0].weight_s == pytest.approx(7 * matrix / 1e9)


def test_smaller_chunks_add_up_more_gradients_of_the_matrix():
    coarse, fine = (replace(MICROBATCH, chunk_size=size) for size in (128, 16))
    one, other = (costs(ParallelConfig(pp=3), moves=None, microbatch=m)[2] for m in (coarse, fine))
    assert other.final_backward_s > one.final_backward_s
    assert other.final_forward_s == one.final_forward_s


def test_an_exit_is_a_head_and_what_stands_before_it():
    found = costs(ParallelConfig(pp=3))
    flops = forward_flops_per_token(tiny_config(exits=EXITS), 64)
    seconds = MICROBATCH.num_tokens / 1e9
    assert found[0].exit_forward_s == found[2].final_forward_s == pytest.approx(flops.final_head * seconds)
    assert found[1].exit_forward_s == pytest.approx(flops.exits[4] * seconds)
    assert found[0].exit_backward_s == pytest.approx(2 * found[0].exit_forward_s)
    assert found[2].exit_forward_s == found[0].final_forward_s == 0


def test_tensor_parallelism_divides_products_and_pays_for_four_collectives_a_layer_each_way():
    alone, shared = costs(ParallelConfig(pp=3))[1], costs(ParallelConfig(pp=3, tp=2))[1]
    hidden_bytes = 4 * MICROBATCH.num_tokens * 32
    collective = 0.1 + hidden_bytes / 2 / 1e6  # one hop with half of it
    assert shared.forward_s == pytest.approx(alone.forward_s / 2 + 2 * 4 * collective)
    assert shared.input_s == pytest.approx(alone.input_s / 2 + 2 * 4 * collective)
    assert shared.weight_s == pytest.approx(alone.weight_s / 2)


def test_a_transfer_takes_the_link_of_a_node_or_the_network_between_nodes():
    config, num_bytes = tiny_config(), 4 * MICROBATCH.num_tokens * 32
    assert transfer_s(config, ParallelConfig(pp=4), MICROBATCH, HARDWARE) == pytest.approx(0.1 + num_bytes / 1e6)
    assert transfer_s(config, ParallelConfig(pp=8), MICROBATCH, HARDWARE) == pytest.approx(1 + num_bytes / 1e5)
    shared = ParallelConfig(pp=2, tp=2)
    assert transfer_s(config, shared, MICROBATCH, HARDWARE) == pytest.approx(0.1 + num_bytes / 2 / 1e6)
    sharded = replace(MICROBATCH, dtype="bfloat16")
    found = transfer_s(config, ParallelConfig(pp=2, dp_shard=2), sharded, HARDWARE)
    assert found == pytest.approx(0.1 + num_bytes / 2 / 1e6), "under FSDP the hidden state has 16 bits"


def test_a_step_ends_with_the_optimizer_and_the_sums_of_gradients():
    config = tiny_config(exits=())
    stages, n = partition(6, 1), model_parameters(config)

    def end_s(**layout):
        return step_end_s(config, stages, ParallelConfig(**layout), MICROBATCH, HARDWARE)

    assert end_s() == pytest.approx(40 * n / 1e9)
    assert end_s(dp_shard=2) == pytest.approx(20 * n / 1e9 + 0.1 + 8 * n / 2 / 1e6), "gradients there, weights back"
    assert end_s(dp_replicate=2) == pytest.approx(40 * n / 1e9 + 2 * (0.1 + 4 * n / 2 / 1e6))
    assert end_s(dp_replicate=8) > end_s(dp_replicate=4) + 2, "the network between nodes is slower"


def test_a_tied_matrix_is_summed_over_the_stages_that_hold_it():
    def end_s(config, layers):
        stages = partition(6, 2, config.exit_layers, layers_per_stage=layers)
        return step_end_s(config, stages, ParallelConfig(pp=2), MICROBATCH, HARDWARE)

    tied, own = tiny_config(exits=(), tie_embeddings=True), tiny_config(exits=())
    matrix = tied.vocab_size * tied.hidden_size
    assert end_s(tied, [3, 3]) - end_s(own, [3, 3]) == pytest.approx(2 * (0.1 + 4 * matrix / 2 / 1e6))
