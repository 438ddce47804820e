"""Predicted parameters and bytes against the model's own, and against what torch allocates on this machine."""

import gc
from dataclasses import replace

import pytest
import torch

import eellm
from eellm.config.model import ExitConfig
from eellm.config.parallel import ParallelConfig
from eellm.config.train import LossConfig
from eellm.exits.lm import EarlyExitLM
from eellm.exits.loss import nothing
from eellm.infer.memory import Memory
from eellm.parallel.recompute import recompute_layers
from eellm.pipeline.stage import StageModule, StepLosses, shared_names, stage_part
from eellm.plan.memory import Microbatch, kv_cache_bytes, rank_bytes, stage_memory
from eellm.plan.parameters import model_parameters, stage_parameters
from eellm.schedule.partition import Stage, partition
from tests.models import EXITS, tiny_config

SIZES = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 344, "num_layers": 4, "num_heads": 8}
MICROBATCH = Microbatch(num_rows=2, seq_len=96, chunk_size=64, device="cpu")
VARIANTS = {
    "grouped": {},
    "tied": {"tie_embeddings": True},
    "biases": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "norms of q and k": {"qk_norm": True, "head_dim": 24},
    "shared norm": {"exits": (ExitConfig(layer=2, norm="final"), ExitConfig(layer=3, norm="final", head="own"))},
    "no exits": {"exits": (), "tie_embeddings": True},
}


def whole(config):
    return Stage(index=0, num_stages=1, first=1, last=config.num_layers, exits=config.exit_layers)


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def larger_config(*exits):
    return tiny_config(**SIZES, num_kv_heads=4, exits=exits)


# --- parameters ---


@pytest.mark.parametrize("placement", ["stay", "next_stage"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 6])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_stage_has_the_parameters_of_its_part_of_the_model(changes, num_stages, placement):
    config = tiny_config(**changes)
    for stage in partition(config.num_layers, num_stages, config.exit_layers, placement=placement):
        assert stage_parameters(config, stage) == num_parameters(stage_part(config, stage))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_stages_parameters_add_up_to_the_model_s_and_the_copies_of_what_is_tied(changes):
    config = tiny_config(**changes)
    with torch.device("meta"):
        model = EarlyExitLM(config)
    assert model_parameters(config) == num_parameters(model)
    stages = partition(config.num_layers, 3, config.exit_layers)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    copies = sum((len(holders) - 1) * sizes[name] for name, holders in shared_names(config, stages).items())
    assert sum(stage_parameters(config, stage) for stage in stages) == num_parameters(model) + copies


# --- activations and logits, as torch allocates them ---


def allocated(run):
    """Bytes that are alive after `run` beside those before, and the peak of them."""
    gc.collect()  # what was garbage before must not be freed within
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del result
    return live, peak


def measured(config, parallel, microbatch):
    """Bytes that a microbatch keeps until its backward, and the peak of its forward and backward."""
    model = eellm.build(config).train()
    if parallel.recompute != "none":
        recompute_layers(model.decoder.layers, parallel.recompute)
    autocast = torch.bfloat16 if microbatch.dtype == "bfloat16" else None
    objective = LossConfig(chunk_size=microbatch.chunk_size)
    module = StageModule(model, whole(config), objective=objective, mode=parallel.exit_mode, autocast=autocast)
    shape = (microbatch.num_rows, microbatch.seq_len)
    tokens = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    inputs = {"labels_BT": tokens, "positions_BT": torch.arange(shape[1]).repeat(shape[0], 1)}
    weights = dict.fromkeys((*config.exit_layers, config.num_layers), 1.0)

    def forward():
        return module(tokens, step_losses=StepLosses(weights), **inputs)

    nothing(forward()).backward()  # now every parameter has its gradient
    kept, _ = allocated(forward)
    _, peak = allocated(lambda: nothing(forward()).backward())
    return kept, peak


def predicted(config, parallel, microbatch):
    memory = stage_memory(config, whole(config), parallel, microbatch)
    kept = memory.activations_bytes + memory.logits_bytes
    return kept, kept + memory.working_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_layers_keep_what_torch_allocates(recompute, dtype):
    config, parallel = larger_config(), ParallelConfig(recompute=recompute)
    microbatch = replace(MICROBATCH, dtype=dtype)
    kept, peak = measured(config, parallel, microbatch)
    found_kept, found_peak = predicted(config, parallel, microbatch)
    assert found_kept == pytest.approx(kept, rel=0.01)
    assert found_peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("exits", [("embed", "tied"), ("mlp", "own"), ("layer", "tied")], ids=lambda e: e[0])
@pytest.mark.parametrize("mode", ["deferred", "eager", "checkpoint"])
def test_exits_keep_what_torch_allocates(mode, exits):
    kind, head = exits
    config = larger_config(ExitConfig(layer=1, kind="norm"), ExitConfig(layer=3, kind=kind, head=head))
    kept, peak = measured(config, ParallelConfig(exit_mode=mode), MICROBATCH)
    found_kept, found_peak = predicted(config, ParallelConfig(exit_mode=mode), MICROBATCH)
    assert found_kept == pytest.approx(kept, rel=0.01)
    assert found_peak == pytest.approx(peak, rel=0.1)


def test_norms_of_q_and_k_are_counted():
    config = replace(larger_config(), qk_norm=True)
    assert predicted(config, ParallelConfig(), MICROBATCH)[0] == pytest.approx(
        measured(config, ParallelConfig(), MICROBATCH)[0], rel=0.01
    )


# --- exits and stages ---


def test_an_eager_exit_adds_its_logits_for_each_microbatch_in_flight_and_a_deferred_one_does_not():
    config = larger_config(ExitConfig(layer=1, kind="embed"))
    stage = partition(config.num_layers, 4, config.exit_layers, layers_per_stage=[1, 1, 1, 1])[0]
    logits = 4 * MICROBATCH.num_tokens * config.vocab_size
    eager = stage_memory(config, stage, ParallelConfig(pp=4, exit_mode="eager"), MICROBATCH)
    deferred = stage_memory(config, stage, ParallelConfig(pp=4), MICROBATCH)
    without = stage_memory(config, replace(stage, exits=()), ParallelConfig(pp=4), MICROBATCH)
    step = eager.peak_bytes(4) - eager.peak_bytes(3)
    plain = without.peak_bytes(4) - without.peak_bytes(3)
    assert step - plain == pytest.approx(logits, rel=0.1)
    assert deferred.peak_bytes(4) - deferred.peak_bytes(3) == plain


def test_moving_an_exit_to_the_next_stage_moves_its_bytes():
    config = larger_config(ExitConfig(layer=1, kind="embed", head="own"))
    parallel = ParallelConfig(pp=4, exit_mode="eager")
    peaks = {}
    for placement in ("stay", "next_stage"):
        stages = partition(4, 4, (1,), layers_per_stage=[1] * 4, placement=placement)
        peaks[placement] = [
            stage_memory(config, stage, parallel, MICROBATCH).peak_bytes(4 - stage.index) for stage in stages
        ]
    stay, moved = peaks["stay"], peaks["next_stage"]
    assert stay[0] > moved[0]
    assert stay[1] < moved[1]
    assert stay[2:] == moved[2:]
    assert moved[1] - stay[1] < stay[0] - moved[0], "one microbatch less is in flight there"


def test_deferred_heads_hold_the_logits_of_one_chunk():
    config = replace(larger_config(), vocab_size=16384)
    long = replace(MICROBATCH, seq_len=4096, chunk_size=512)
    chunked = stage_memory(config, whole(config), ParallelConfig(), long)
    in_one = stage_memory(config, whole(config), ParallelConfig(), replace(long, chunk_size=8192))
    more = 4 * config.vocab_size * (8192 - 512)
    assert in_one.working_bytes - chunked.working_bytes == pytest.approx(more, rel=0.1)


# --- layouts ---


def test_without_sharding_a_parameter_takes_16_bytes():
    config = larger_config()
    memory = stage_memory(config, whole(config), ParallelConfig(), MICROBATCH)
    standing = memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes
    assert standing == 16 * model_parameters(config)


def test_fsdp_shards_the_optimizer_and_keeps_whole_copies_while_microbatches_add_up():
    config, microbatch = replace(larger_config(), num_layers=24), replace(MICROBATCH, dtype="bfloat16")
    n = model_parameters(config)
    memory = stage_memory(config, whole(config), ParallelConfig(dp_shard=4, num_microbatches=2), microbatch)
    assert memory.optimizer_bytes == 8 * n / 4
    assert memory.weights_bytes == 4 * n / 4 + 2 * n, "a gathered copy in bfloat16"
    assert memory.gradients_bytes == 4 * n / 4 + 4 * n, "summed up in float32"
    at_once = stage_memory(config, whole(config), ParallelConfig(dp_shard=4), microbatch)
    assert at_once.weights_bytes < memory.weights_bytes
    assert at_once.gradients_bytes < memory.gradients_bytes


def test_tensor_parallelism_divides_all_but_the_gathered_inputs():
    config = larger_config()
    one, two = (stage_memory(config, whole(config), ParallelConfig(tp=tp), MICROBATCH) for tp in (1, 2))
    assert two.optimizer_bytes == one.optimizer_bytes / 2
    inputs = 4 * 2 * config.hidden_size * config.num_layers * MICROBATCH.num_tokens
    angles = 4 * config.head_size * MICROBATCH.num_tokens
    divided = one.activations_bytes - inputs - angles
    assert two.activations_bytes == pytest.approx(divided / 2 + inputs + angles)


def test_a_rank_with_two_stages_holds_both_and_works_on_one_at_a_time():
    config = larger_config()
    memories = [stage_memory(config, s, ParallelConfig(pp=2), MICROBATCH) for s in partition(4, 2)]
    assert rank_bytes(memories[:1], 3) == memories[0].peak_bytes(3)
    both = rank_bytes(memories, 3)
    assert max(m.peak_bytes(3) for m in memories) < both < sum(m.peak_bytes(3) for m in memories)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_kv_cache_takes_what_the_model_s_takes(dtype):
    config = tiny_config(exits=EXITS)
    own_layer = [e.layer for e in EXITS if e.kind == "layer"]
    memory = Memory(config, own_layer, dtype=getattr(torch, dtype), device=torch.device("cpu"))
    memory.reserve(3, 50)
    assert kv_cache_bytes(config, 3 * 50, dtype) == memory.num_bytes
