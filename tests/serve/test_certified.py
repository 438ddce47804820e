"""Risks that clients ask for: the certificate's thresholds, refusals, and the alarm in the metrics."""

import openai
import pytest
import torch

import eellm
from eellm.errors import ConfigError
from tests.models import agreeing_model
from tests.serve.servers import serving
from tests.unit.test_certificates import certificate_for
from tests.worlds import tiny_tokenizer

THRESHOLDS = {2: 0.3, 4: 0.1}


def certified_model(**changes):
    model = agreeing_model(max_seq_len=256, **changes)
    model.tokenizer = tiny_tokenizer()
    model.certificates = (
        certificate_for(model, policy="margin", risk=0.15, thresholds=tuple(THRESHOLDS.items())),
        certificate_for(model, metric="perplexity", clip=1.0, risk=0.05, thresholds=((4, 0.05),)),
    )
    return model


@pytest.fixture(scope="module")
def model():
    return certified_model()


@pytest.fixture(scope="module")
def server(model):
    with serving({"tiny": model, "plain": agreeing_model(exits=())}) as running:
        yield running


LONG = {"max_new_tokens": 12, "ignore_eos": True}


def ask(server, **fields):
    body = {"model": "tiny", "prompt": [3, 1, 4, 1, 5], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = server.post(**(body | fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("method", [None, "early", "auto"])
def test_a_risk_takes_the_certificate_s_thresholds(server, model, method):
    asked = {"risk": 0.2} if method is None else {"risk": 0.2, "method": method}
    made = ask(server, early_exit=asked | {"report": True})
    (out,) = eellm.generate(model, [[3, 1, 4, 1, 5]], policy="margin", threshold=THRESHOLDS, **LONG)
    (full,) = eellm.generate(model, [[3, 1, 4, 1, 5]], method="full", **LONG)
    assert set(out.exits) & {2, 4}
    assert made["choices"][0]["text"] in ((out.text, full.text) if method == "auto" else (out.text,))


def test_a_metric_is_named_with_the_risk(server, model):
    made = ask(server, early_exit={"risk": 0.05, "risk_metric": "perplexity"})
    (out,) = eellm.generate(model, [[3, 1, 4, 1, 5]], threshold={4: 0.05}, **LONG)
    assert made["choices"][0]["text"] == out.text


def test_a_prompt_is_scored_under_the_risk(server, model):
    made = ask(server, early_exit={"risk": 0.15}, echo=True, logprobs=0, max_tokens=0)
    with eellm.Engine(model) as engine:
        (score,) = engine.score([[3, 1, 4, 1, 5]], risk=0.15)
    assert made["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(score.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("early_exit", "words"),
    [
        (
            {"risk": 0.1},
            "the model has no certificate of disagreement up to that (it has: disagreement 0.15, perplexity",
        ),
        ({"risk": 0.15, "threshold": 0.5}, "leave threshold out"),
        ({"risk": 0.15, "policy": "margin"}, "leave policy out"),
        ({"risk": 0.15, "exits": [2]}, "leave exits out"),
        ({"risk": 0.15, "method": "full"}, "'full' loses nothing"),
        ({"risk": 0}, "greater than 0"),
        ({"risk": 1}, "less than 1"),
        ({"risk": True}, "valid number"),
        ({"risk": 0.15, "risk_metric": "luck"}, "'disagreement'"),
    ],
)
def test_what_no_certificate_covers_is_refused(server, early_exit, words):
    with server.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt=[3], max_tokens=2, extra_body={"early_exit": early_exit})
    assert words in refused.value.body["message"]


def value(server, name):
    lines = server.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)}


def test_without_a_shadow_nothing_is_checked(server):
    ask(server, early_exit={"risk": 0.15})
    assert set(value(server, "eellm_shadow_checked_total").values()) == {0}
    assert value(server, "eellm_certificate_broken") == {}


@pytest.mark.parametrize("is_worse", [False, True])
def test_the_alarm_is_in_the_metrics_when_exits_got_worse(is_worse):
    model = certified_model(change=0.02)
    if is_worse:
        with torch.no_grad():
            for layer in (2, 4):
                norm = model.exit(layer).norm.weight
                norm.copy_(norm.flip(0) * torch.tensor([1.0, -1.0] * 16))
    model.certificates = (certificate_for(model, risk=0.15, thresholds=((2, 0.02), (4, 0.02))),)
    with serving({"tiny": model}, shadow=1.0) as server:
        for start in range(10):
            ask(server, prompt=[start + 1, 2], max_tokens=40, early_exit={"risk": 0.15})
        checked = value(server, "eellm_shadow_checked_total")['eellm_shadow_checked_total{model="tiny"}']
        wrong = value(server, "eellm_shadow_wrong_total")['eellm_shadow_wrong_total{model="tiny"}']
        again = value(server, "eellm_shadow_checked_total")['eellm_shadow_checked_total{model="tiny"}']
        broken = value(server, "eellm_certificate_broken")
    assert checked == again > 200
    assert (wrong > 0.3 * checked) == is_worse
    assert broken == {'eellm_certificate_broken{model="tiny",risk="0.15"}': float(is_worse)}


def test_a_shadow_is_refused_where_it_can_t_be():
    with pytest.raises(ConfigError, match=r"shadow = 2: must lie between 0 and 1"), serving({}, shadow=2):
        pass
