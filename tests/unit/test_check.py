"""What doesn't fit is refused before anything starts: the option, its value, and values that then indeed work."""

import re
from dataclasses import replace

import pytest

from eellm.config.load import from_dict, to_dict
from eellm.config.parallel import ParallelConfig
from eellm.config.train import TrainConfig
from eellm.errors import ConfigError
from eellm.parallel.mesh import check_world_size
from eellm.parallel.tensor import check_tensor_parallel
from eellm.plan.layout import plan_stages
from eellm.train.check import resolve
from tests.models import tiny_config

SIZES = {"num_heads": 4, "num_kv_heads": 2, "vocab_size": 32, "num_layers": 8, "max_seq_len": 64}


def recipe(changes=None, **more) -> TrainConfig:
    """A small recipe, with some options by their dotted names."""
    base = {
        "model": to_dict(tiny_config(exits=(), **SIZES)),
        "data": {"train": ["pydoc_data.topics"], "seq_len": 32},
        "train": {"out_dir": "unused", "global_batch_size": 16},
    }
    for name, value in ((changes or {}) | more).items():
        table, key = name.split(".")
        base.setdefault(table, {})[key] = value
    return from_dict(TrainConfig, base)


def refusal(check, *args) -> str:
    with pytest.raises(ConfigError) as error:
        check(*args)
    return str(error.value)


def numbers(pattern: str, message: str) -> list[int]:
    """All numbers in the part of the message that the pattern's group catches."""
    return [int(n) for n in re.findall(r"\d+", re.search(pattern, message).group(1))]


@pytest.mark.parametrize("rows", [1, 2, 10, 63])
def test_a_batch_that_does_not_divide_among_data_parallel_ranks(rows):
    layout = {"parallel.dp_shard": 2, "parallel.dp_replicate": 2}
    message = refusal(resolve, recipe(layout, **{"train.global_batch_size": rows}))
    assert message.startswith(f"train.global_batch_size = {rows}:")
    better = numbers("the nearest are (.*)", message)
    assert all(abs(n - rows) < 4 for n in better)
    for n in better:
        resolve(recipe(layout, **{"train.global_batch_size": n}))


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("microbatches", [3, 5, 16])
def test_microbatches_that_do_not_divide_a_rank_s_rows(microbatches, pp):
    layout = {"parallel.dp_shard": 2, "parallel.pp": pp}
    message = refusal(resolve, recipe(layout, **{"parallel.num_microbatches": microbatches}))
    assert message.startswith(f"parallel.num_microbatches = {microbatches}: the 8 rows")
    for n in numbers(r"use one of \[(.*?)\]", message):
        resolve(recipe(layout, **{"parallel.num_microbatches": n}))
    for n in numbers(r"global_batch_size of (.*)", message):
        resolve(recipe(layout, **{"parallel.num_microbatches": microbatches, "train.global_batch_size": n}))


@pytest.mark.parametrize(
    ("schedule", "pp", "microbatches", "rows"),
    [("1f1b", 4, 2, 16), ("1f1b", 4, 1, 97), ("dualpipev", 4, 4, 16), ("interleaved_1f1b", 2, 5, 20)],
)
def test_microbatches_that_the_schedule_can_not_run(schedule, pp, microbatches, rows):
    layout = {"parallel.schedule": schedule, "parallel.pp": pp, "train.global_batch_size": rows}
    message = refusal(resolve, recipe(layout, **{"parallel.num_microbatches": microbatches}))
    assert message.startswith(f"parallel.num_microbatches = {microbatches}: schedule {schedule} with pp = {pp}")
    better = numbers("the nearest that work: (.*)", message)
    assert better
    for n in better:
        resolve(recipe(layout, **{"parallel.num_microbatches": n}))


@pytest.mark.parametrize("microbatches", [None, 3])
@pytest.mark.parametrize(("schedule", "pp"), [("1f1b", 4), ("dualpipev", 2)])
def test_too_few_rows_for_a_pipeline(schedule, pp, microbatches):
    layout = {"parallel.schedule": schedule, "parallel.pp": pp, "parallel.dp_shard": 2}
    layout |= {"parallel.num_microbatches": microbatches, "train.global_batch_size": 6}
    message = refusal(resolve, recipe(layout))
    assert message.startswith("train.global_batch_size = 6:")
    (step,) = numbers("use a multiple of (.*)", message)
    for n in (step, 2 * step):
        resolve(recipe(layout | {"train.global_batch_size": n, "parallel.num_microbatches": None}))


def test_the_number_of_microbatches_keeps_a_pipeline_busy_where_the_rows_allow_it():
    def chosen(**changes):
        return resolve(recipe({f"parallel.{name}": value for name, value in changes.items()})).parallel.num_microbatches

    assert chosen() == 1
    assert chosen(dp_shard=4) == 1
    assert chosen(pp=2) == 8
    assert chosen(pp=2, dp_shard=4) == 4, "as many as there are rows"
    assert chosen(pp=8) == 16
    assert chosen(num_microbatches=4) == 4


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv", "dualpipev"])
@pytest.mark.parametrize(("option", "value"), [("recompute", "selective"), ("compile", True)])
def test_what_a_backward_in_two_parts_can_not_do(schedule, option, value):
    layout = {"parallel.pp": 2, "parallel.schedule": schedule}
    message = refusal(resolve, recipe(layout, **{f"parallel.{option}": value}))
    assert message.startswith(f"parallel.{option} = {str(value).lower() if value is True else repr(value)}:")
    assert schedule in message
    if option == "recompute":
        assert "use full or none" in message
        for other in ("full", "none"):
            resolve(recipe(layout, **{"parallel.recompute": other}))
    else:
        assert "use 1f1b or interleaved_1f1b, or don't compile" in message
        for other in ("1f1b", "interleaved_1f1b"):
            resolve(recipe(layout, **{"parallel.schedule": other, "parallel.compile": True}))
    resolve(recipe(layout))
    resolve(recipe(**{"parallel.schedule": schedule, f"parallel.{option}": value}))  # no pipeline: nothing is in parts


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
def test_a_v_has_two_stages_on_each_rank(schedule):
    layout = {"parallel.pp": 2, "parallel.schedule": schedule}
    message = refusal(resolve, recipe(layout, **{"parallel.stages_per_rank": 3}))
    assert message.startswith("parallel.stages_per_rank = 3:")
    (right,) = numbers(f"{schedule} has (.*)", message)
    resolve(recipe(layout, **{"parallel.stages_per_rank": right}))


def test_rows_longer_than_the_model_s_context():
    message = refusal(resolve, recipe(**{"data.seq_len": 65}))
    assert message.startswith("data.seq_len = 65:")
    (longest,) = numbers("context is (.*)", message)
    resolve(recipe(**{"data.seq_len": longest}))


@pytest.mark.parametrize("name", ["exit_weights", "initial_weights"])
def test_weights_that_do_not_fit_the_exits(name):
    message = refusal(resolve, with_exits(**{name: (0.1, 0.2)}))
    assert message.startswith(f"objective.{name} = [0.1, 0.2]:")
    (count,) = numbers("has (.*?) early", message)
    resolve(with_exits(**{name: (0.1,) * count}))
    assert "finite" in refusal(resolve, with_exits(**{name: (0.1, -1.0, 0.1, 0.1)}))


def with_exits(**objective) -> TrainConfig:
    config = recipe()
    return replace(config, model=tiny_config(**SIZES), objective=replace(config.objective, **objective))


def test_a_layout_for_another_number_of_processes():
    layout = ParallelConfig(pp=2, tp=2)
    check_world_size(layout, 4)
    message = refusal(check_world_size, layout, 8)
    assert "pp 2 × dp_replicate 1 × dp_shard 1 × tp 2 = 4 processes, and 8 are running" in message
    assert numbers("--nproc_per_node (.*?),", message) == [layout.world_size]
    (dp_shard,) = numbers("parallel.dp_shard = (.*)", message)
    check_world_size(replace(layout, dp_shard=dp_shard), 8)
    message = refusal(check_world_size, layout, 6)
    assert "dp_shard =" not in message, "none would fit"
    assert message.endswith("torchrun --nproc_per_node 4")
    assert "1 is running" in refusal(check_world_size, layout, 1)


TP_SIZES = {"num_heads": 8, "num_kv_heads": 8, "intermediate_size": 48, "vocab_size": 32}


@pytest.mark.parametrize(
    ("name", "changes", "tp"),
    [
        ("model.num_heads", {"num_heads": 6, "num_kv_heads": None, "head_dim": 8}, 4),
        ("model.num_kv_heads", {"num_kv_heads": 2}, 4),
        ("model.intermediate_size", {"intermediate_size": 50}, 4),
        ("model.vocab_size", {"vocab_size": 29}, 2),
        ("data.seq_len", {}, 8),
    ],
)
def test_sizes_that_tensor_parallel_processes_can_not_share(name, changes, tp):
    model, seq_len = tiny_config(exits=(), **TP_SIZES | changes), 36
    message = refusal(check_tensor_parallel, model, seq_len, tp)
    size = seq_len if name == "data.seq_len" else getattr(model, name.removeprefix("model."))
    assert message.startswith(f"parallel.tp = {tp}: {name} = {size} ")
    fitting = numbers(r"takes tp in \[(.*?)\]", message)
    assert 1 in fitting
    assert tp not in fitting
    for n in fitting:
        check_tensor_parallel(model, seq_len, n)
    for n in numbers(f"make {re.escape(name)} (.*)", message):
        assert n > 0
        if name == "data.seq_len":
            check_tensor_parallel(model, n, tp)
        else:
            check_tensor_parallel(replace(model, **{name.removeprefix("model."): n}), 32, tp)


@pytest.mark.parametrize("mode", ["eager", "checkpoint"])
def test_exits_in_the_forward_and_a_backward_in_two_parts(mode):
    model, layout = tiny_config(**SIZES), ParallelConfig(pp=2, schedule="zbv", exit_mode=mode)
    message = refusal(plan_stages, model, layout)
    assert message.startswith(f"parallel.exit_mode = {mode!r}: schedule zbv")
    assert message.endswith("use exit_mode = 'deferred'")
    plan_stages(model, replace(layout, exit_mode="deferred"))


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved_1f1b"])
def test_more_stages_than_layers(schedule):
    model, layout = tiny_config(**SIZES), ParallelConfig(pp=16, schedule=schedule)
    message = refusal(plan_stages, model, layout)
    assert message.startswith("parallel.pp ")
    (most,) = numbers("at most (.*) stages", message)
    per_rank = 1 if schedule == "1f1b" else 2
    assert len(plan_stages(model, replace(layout, pp=most // per_rank))) == most == 8


def test_numbers_of_layers_that_do_not_add_up():
    model, layout = tiny_config(**SIZES), ParallelConfig(pp=2, layers_per_stage=(4, 5))
    message = refusal(plan_stages, model, layout)
    assert message.startswith("parallel.layers_per_stage = [4, 5]: must be 2 numbers")
    plan_stages(model, replace(layout, layers_per_stage=(3, 5)))
