"""The optimizer's groups and kernels, and the learning rate over a run."""

import pytest
import torch
from torch import nn

import eellm
from eellm.config.optim import OptimConfig
from eellm.errors import ConfigError
from eellm.train.optim import learning_rate, make_optimizer
from tests.models import tiny_config

SCHEDULES = ("cosine", "linear", "wsd")


def config(**changes):
    return OptimConfig(**({"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4} | changes))


def rates(num_steps=20, **changes):
    return [learning_rate(step, num_steps, config(**changes)) for step in range(1, num_steps + 1)]


def test_matrices_decay_embeddings_and_heads_too_and_norms_and_biases_do_not():
    model = eellm.build(tiny_config(qkv_bias=True, exits=(eellm.ExitConfig(layer=2, kind="mlp", head="own"),)))
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model.parameters(), config(weight_decay=0.1))
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == set(names.values())
    for name in ("decoder.embed.weight", "decoder.output.weight", "exits.2.output.weight"):
        assert decays.pop(name) == 0.1
    for name, decay in decays.items():
        assert decay == (0.0 if name.endswith("bias") or "norm" in name else 0.1), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_fused_kernel_is_used_and_gives_what_the_plain_formula_gives(dtype):
    torch.manual_seed(0)
    start = [torch.randn(5, 4, dtype=dtype), torch.randn(4, dtype=dtype)]
    grads = [[torch.randn_like(p) for p in start] for _ in range(5)]
    options = config(weight_decay=0.1, lr=0.01, min_lr=0.001)
    found = [nn.Parameter(p.clone()) for p in start]
    optimizer = make_optimizer(found, options)
    assert all(group["fused"] for group in optimizer.param_groups)
    expected = [p.double() for p in start]
    means, squares = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    for step, step_grads in enumerate(grads, start=1):
        for p, grad in zip(found, step_grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        for p, grad, mean, square in zip(expected, step_grads, means, squares, strict=True):
            p *= 1 - options.lr * (options.weight_decay if p.dim() > 1 else 0)
            mean.lerp_(grad.double(), 1 - options.beta1)
            square.lerp_(grad.double() ** 2, 1 - options.beta2)
            scaled = (square / (1 - options.beta2**step)).sqrt() + 1e-8
            p -= options.lr * mean / (1 - options.beta1**step) / scaled
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.05}[dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach().double(), other, rtol=tolerance, atol=tolerance)


def test_parameters_without_a_fused_kernel_have_an_optimizer_all_the_same():
    optimizer = make_optimizer([nn.Parameter(torch.empty(3, 3, device="meta"))], config())
    assert not optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up_never_rises_again_and_ends_at_the_lowest_rate(schedule):
    found = rates(schedule=schedule)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[3:] == sorted(found[3:], reverse=True)
    assert found[-1] == pytest.approx(0.1)


def test_a_linear_schedule_is_a_line():
    assert rates(schedule="linear")[11] == pytest.approx(0.55)
    assert rates(schedule="linear")[7] == pytest.approx(0.775)


def test_wsd_is_flat_until_the_last_fifth_and_then_a_line():
    found = rates(schedule="wsd", decay_fraction=0.2)
    assert found[3:16] == [1.0] * 13
    assert found[16:] == pytest.approx([0.775, 0.55, 0.325, 0.1])


def test_a_warm_up_that_reaches_into_the_decay_of_wsd_comes_first():
    found = rates(schedule="wsd", decay_fraction=1.0)
    assert found == pytest.approx(rates(schedule="linear"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_is_all_warm_up_or_has_none_has_a_rate_at_every_step(schedule):
    assert rates(num_steps=4, schedule=schedule) == [0.25, 0.5, 0.75, 1.0]
    assert rates(num_steps=1, schedule=schedule, warmup_steps=0) == pytest.approx([0.1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_where_no_lowest_rate_is_given_the_rate_falls_to_a_tenth_of_the_peak(schedule):
    for lr in (1e-5, 1e-3, 1.0):
        options = OptimConfig(lr=lr, schedule=schedule, warmup_steps=2)
        found = [learning_rate(step, 20, options) for step in range(2, 21)]
        assert found == sorted(found, reverse=True), lr
        assert found[0] == lr
        assert found[-1] == pytest.approx(lr / 10)


def test_a_lowest_rate_above_the_peak_is_refused():
    with pytest.raises(ConfigError, match=r"min_lr = 0\.0003: must be at most lr = 0\.0001"):
        OptimConfig(lr=1e-4, min_lr=3e-4)
    assert learning_rate(20, 20, OptimConfig(lr=1e-4, min_lr=1e-4)) == 1e-4
    assert learning_rate(20, 20, OptimConfig(lr=1e-4, min_lr=0)) == 0


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_rate_without_bound_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} = inf: must be finite"):
        OptimConfig(**{name: float("inf")})
