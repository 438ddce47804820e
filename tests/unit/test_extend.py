"""The examples of extending do what they say, against a decoder without a cache and the schedules that there are."""

import pytest
import torch

import eellm
from eellm.errors import ConfigError, ScheduleError
from eellm.exits.policy import max_prob
from eellm.plan.simulate import StageCost, simulate
from eellm.schedule.check import check, peak_in_flight
from eellm.schedule.generate import make_schedule
from examples.extend_decoding import WithPatience
from examples.extend_exit_kind import add_bottleneck, train
from examples.extend_policy import WithScore, lead, precision
from examples.extend_schedule import eager_1f1b
from tests.models import tiny_model


def without_cache(model, prompt, num_tokens, leaves):
    """Tokens and exits by `model(tokens)` anew for each. leaves: of the logits so far, whether the last is sure."""
    tokens, out = list(prompt), []
    last = model.config.num_layers
    for _ in range(num_tokens):
        with torch.inference_mode():
            logits = {layer: value[0, -1].float() for layer, value in model(torch.tensor([tokens])).items()}
        seen = []
        for layer in sorted(logits):
            seen.append(logits[layer])
            if layer == last or leaves(seen):
                break
        tokens.append(int(logits[layer].argmax()))
        out.append((tokens[-1], layer))
    return out


def assert_equal_to(model, methods, leaves, **options):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    with eellm.Engine(model) as engine:
        engine.methods = methods(engine.methods)
        outs = engine.generate(prompts, method="early", max_new_tokens=12, **options)
    exits = set()
    for prompt, out in zip(prompts, outs, strict=True):
        assert list(zip(out.tokens, out.exits, strict=True)) == without_cache(model, prompt, 12, leaves)
        exits |= set(out.exits)
    assert len(exits) > 1, "some leave early, some don't"


@pytest.mark.parametrize("max_deferred", [1, 16])
def test_patience_leaves_where_two_exits_agree(max_deferred):
    def agree(seen):
        return len(seen) > 1 and int(seen[-1].argmax()) == int(seen[-2].argmax())

    assert_equal_to(tiny_model(seed=3, sureness=3.0), WithPatience, agree, max_deferred=max_deferred)


def test_a_score_of_one_s_own_decides():
    assert_equal_to(
        tiny_model(seed=3),
        lambda methods: WithScore(methods, lead),
        lambda seen: float(lead(seen[-1])) >= 0.7,
        threshold=0.7,
    )


def test_a_known_score_as_one_s_own_gives_what_the_policy_gives():
    model, prompt = tiny_model(seed=1), [1, 2, 3]
    with eellm.Engine(model) as engine:
        (expected,) = engine.generate([prompt], method="early", threshold=0.6, max_new_tokens=16)
        engine.methods = WithScore(engine.methods, max_prob)
        (out,) = engine.generate([prompt], method="early", threshold=0.6, max_new_tokens=16)
    assert (out.tokens, out.exits) == (expected.tokens, expected.exits)


def test_the_lead_is_0_for_a_tie_and_near_1_where_one_stands_out():
    assert lead(torch.tensor([[2.0, 2.0, 1.0], [20.0, 0.0, 0.0]])).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    shares = precision(tiny_model(dtype="float32"), list(range(20)), 0.0)
    assert [share for share, _ in shares.values()] == [1.0] * 4


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 3), (2, 2), (4, 8), (4, 3)])
def test_the_eager_schedule_can_be_run_and_hides_transfers(num_ranks, num_microbatches):
    schedule, plain = eager_1f1b(num_ranks, num_microbatches), make_schedule("gpipe", num_ranks, num_microbatches)
    check(schedule)
    assert sorted(a for order in schedule.orders for a in order) == sorted(a for order in plain.orders for a in order)


def test_the_eager_schedule_is_faster_where_transfers_take_long_and_holds_more():
    costs, plain = [StageCost(forward_s=1.0, input_s=1.0, weight_s=1.0)] * 4, make_schedule("1f1b", 4, 8)
    assert simulate(eager_1f1b(4, 8), costs, 0.5).end_s < simulate(plain, costs, 0.5).end_s
    assert peak_in_flight(eager_1f1b(4, 8))[0] > peak_in_flight(plain)[0]


def test_a_schedule_whose_ranks_wait_for_each_other_is_refused():
    schedule = eager_1f1b(2, 2)
    backwards_first = schedule.orders[1][::-1]
    with pytest.raises(ScheduleError):
        check(type(schedule)(**{**vars(schedule), "orders": (schedule.orders[0], backwards_first)}))


def test_a_new_body_learns_alone():
    model = tiny_model(dtype="float32", exits=())
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    add_bottleneck(model, 3)
    rows = torch.arange(29).repeat(8)[: 29 * 8].view(8, 29)
    losses = train(model, 3, rows, num_steps=30)
    assert losses[-1] < losses[0] - 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("options", [{"compile": False}, {"compile": None}, {"workers": 2}])
def test_decoding_refuses_a_body_that_it_would_leave_out(options):
    model = tiny_model(dtype="float32", exits=())
    add_bottleneck(model, 3)
    with pytest.raises(ConfigError, match=r"exit after layer 3 .* Bottleneck: .*docs/how-to/extend.md"):
        eellm.Engine(model, **options)
