"""The shadow sample: it changes no token, counts what the final exit says, and rings when a certificate is broken."""

import random

import pytest
import torch

import eellm
from eellm.errors import ConfigError
from eellm.evaluate.risk import binomial_cdf
from eellm.infer.shadow import WINDOW, Alarm, Shadow
from tests.models import agreeing_model, tiny_model
from tests.unit.test_certificates import certificate_for

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7, 8], list(range(1, 25))]


@torch.inference_mode()
def wrong_by_hand(model, prompt, out):
    """Of the tokens but the last: how many left early, and for how many of these the model's end says another."""
    tokens = torch.tensor([[*prompt, *out.tokens]])
    final = model(tokens)[model.config.num_layers][0].argmax(-1).tolist()
    early = [i for i, layer in enumerate(out.exits[:-1]) if layer < model.config.num_layers]
    return len(early), sum(final[len(prompt) - 1 + i] != out.tokens[i] for i in early)


@pytest.mark.parametrize("policy", ["max_prob", "gate"])
@pytest.mark.parametrize("max_deferred", [1, 4, 16])
def test_every_token_that_left_early_is_held_against_the_final_exit_and_none_changes(policy, max_deferred):
    model = tiny_model(seed=1)
    options = {"threshold": 0.3, "policy": policy, "max_new_tokens": 25, "max_deferred": max_deferred}
    expected = eellm.generate(model, PROMPTS, **options)
    with eellm.Engine(model, shadow=1.0) as engine:
        found = engine.generate(PROMPTS, **options)
        report = engine.stats().shadow
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.exits) == (other.tokens, other.exits)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)
    by_hand = [wrong_by_hand(model, prompt, out) for prompt, out in zip(PROMPTS, found, strict=True)]
    assert (report.num_checked, report.num_wrong) == tuple(map(sum, zip(*by_hand, strict=True)))
    assert 0 < report.num_wrong < report.num_checked
    assert report.broken == ()


def test_a_part_of_the_tokens_is_drawn_and_costs_a_deep_pass_each_at_the_most():
    model = tiny_model(seed=1)
    options = {"threshold": 0.0, "max_new_tokens": 100, "max_deferred": 16}
    (plain,) = eellm.generate(model, PROMPTS[:1], **options)
    with eellm.Engine(model, shadow=0.1) as engine:
        (out,) = engine.generate(PROMPTS[:1], **options)
        report = engine.stats().shadow
    assert out.tokens == plain.tokens
    assert 3 <= report.num_checked <= 20
    assert plain.stats.deep_passes < out.stats.deep_passes <= plain.stats.deep_passes + report.num_checked


def test_methods_that_lose_nothing_have_nothing_to_be_checked():
    with eellm.Engine(tiny_model(seed=1), shadow=1.0) as engine:
        for method in ("full", "speculative", "auto"):
            engine.generate(PROMPTS, method=method, max_new_tokens=8)
        assert engine.stats().shadow.num_checked == 0


def test_a_share_that_is_none_and_workers_beside_it_are_refused():
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"shadow = .*: must lie between 0 and 1"):
            Shadow(share)
    with pytest.raises(ConfigError, match="tokens can't be checked across workers"):
        eellm.Engine(tiny_model(seed=1), shadow=0.1, workers=2)


# --- the alarm ---


def ringing_after(alarm, share, num_tokens, generator):
    """Tokens heard until it rings; None: it doesn't."""
    for number in range(1, num_tokens + 1):
        alarm.hear(generator.random() < share)
        if alarm.is_ringing:
            return number
    return None


def test_at_the_bound_an_alarm_is_false_no_more_often_than_the_confidence_says():
    generator = random.Random(0)
    rung = [ringing_after(Alarm(0.05, 0.9), 0.05, 3_000, generator) for _ in range(200)]
    num_false = sum(number is not None for number in rung)
    assert binomial_cdf(num_false - 1, 200, 0.1) < 1 - 1e-4


@pytest.mark.parametrize(("times", "most"), [(1.5, 6_000), (3, 800), (20, 60)])
def test_more_wrong_tokens_ring_the_sooner_the_more_they_are(times, most):
    generator = random.Random(1)
    for _ in range(10):
        assert ringing_after(Alarm(0.02, 0.95), times * 0.02, most, generator)


def test_good_tokens_of_long_ago_do_not_hide_that_it_has_changed():
    alarm, generator = Alarm(0.02, 0.95), random.Random(2)
    assert ringing_after(alarm, 0.005, 3 * WINDOW + WINDOW // 10, generator) is None
    assert ringing_after(alarm, 0.06, 2_000 + WINDOW, generator)


def test_an_alarm_goes_on_ringing():
    alarm = Alarm(0.02, 0.95)
    for _ in range(10):
        alarm.hear(True)
    assert alarm.is_ringing
    for _ in range(WINDOW + 1):
        alarm.hear(False)
    assert alarm.is_ringing


def test_large_risks_have_an_alarm_too():
    alarm = Alarm(0.9, 0.95)
    assert ringing_after(alarm, 1.0, 200, random.Random(3))


def served_under_risk(model, risk=0.15):
    certificate = certificate_for(model, risk=risk, thresholds=((2, 0.02), (4, 0.02)))
    model.certificates = (certificate,)
    with eellm.Engine(model, shadow=1.0) as engine:
        engine.generate([[i, i + 1] for i in range(1, 13)], risk=risk, max_new_tokens=40, ignore_eos=True)
        report = engine.stats().shadow
    ((found, is_broken),) = report.broken
    assert found == certificate
    return report, is_broken


def test_exits_that_got_worse_after_they_were_certified_ring_and_good_ones_are_silent(caplog):
    model = agreeing_model(change=0.02)
    report, is_broken = served_under_risk(model)
    assert report.num_wrong < 0.1 * report.num_checked
    assert not is_broken
    assert "certificate" not in caplog.text
    with torch.no_grad():
        for layer in (2, 4):
            model.exit(layer).norm.weight.copy_(model.exit(layer).norm.weight.flip(0) * torch.tensor([1.0, -1.0] * 16))
    report, is_broken = served_under_risk(model)
    assert report.num_wrong > 0.3 * report.num_checked
    assert is_broken
    assert caplog.text.count("the certificate of disagreement 0.15 doesn't hold for what is served") == 1


def test_tokens_of_the_final_exit_count_as_right():
    """Half of the early ones are wrong, but most tokens aren't early: the certificate is about all of them."""
    shadow, model = Shadow(1.0), agreeing_model()
    certificate = certificate_for(model, risk=0.15)
    for number in range(1000):
        if number % 10 == 0:
            shadow.checked(certificate, is_wrong=number % 20 == 0)
        else:
            shadow.went_through(certificate)
    report = shadow.report()
    assert (report.num_checked, report.num_wrong, report.broken) == (100, 50, ((certificate, False),))


def test_only_certificates_of_disagreement_can_be_seen_to_break():
    model = agreeing_model()
    shadow = Shadow(1.0)
    certificate = certificate_for(model, metric="perplexity", clip=1.0)
    for _ in range(200):
        shadow.checked(certificate, is_wrong=True)
        shadow.checked(None, is_wrong=True)
    assert shadow.report().broken == ()
    assert shadow.report().num_wrong == 400
