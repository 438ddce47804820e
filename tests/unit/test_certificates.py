"""Certificates: what is measured for them, how they are kept, whom they bind, and when they are refused."""

import dataclasses
import hashlib
import json
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

import eellm
from eellm.checkpoint.exits import store_certificate
from eellm.config.calibrate import CalibrateConfig, Certificate
from eellm.data.units import Unit, Units, documents_of, read_units
from eellm.errors import CertificateError, CheckpointError, ConfigError, DataError
from eellm.evaluate.calibrate import calibrate, choose_thresholds
from eellm.evaluate.losses import AnswerLosses, read_losses
from eellm.evaluate.risk import hoeffding_bentkus
from eellm.evaluate.rouge import rouge_l
from eellm.exits.certified import certified, weights_sha256
from eellm.exits.policy import SCORES
from tests.directories import content, edit_json
from tests.models import agreeing_model, oracle
from tests.worlds import tiny_tokenizer

TEXTS = [text for topic in topics.values() for text in topic.split("\n\n") if 20 < len(text) < 120][:140]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def units_of(texts, **fields):
    return Units(tuple(Unit(f"line {i}", text, **fields) for i, text in enumerate(texts)), "0" * 64)


@cache
def shared_model():
    """Not to be changed."""
    model = agreeing_model()
    model.tokenizer = tiny_tokenizer()
    return model


@cache
def shared_certificate():
    return calibrate(shared_model(), units_of(TEXTS), CalibrateConfig(risk=0.15, confidence=0.9))


def certificate_for(model, **changes):
    """Not measured: as good as any where it is only kept or chosen."""
    fields = {
        "metric": "disagreement",
        "risk": 0.1,
        "confidence": 0.95,
        "policy": "max_prob",
        "thresholds": ((2, 0.5), (4, 0.3)),
        "num_units": 100,
        "measured_risk": 0.01,
        "p_value": 0.02,
        "mean_exit_layer": 3.0,
        "data_sha256": "0" * 64,
        "dtype": "float32",
    } | changes
    layers = dict(fields["thresholds"])
    return Certificate(**({"weights_sha256": weights_sha256(model, layers)} | fields))


# --- what is measured ---


@torch.inference_mode()
def losses_by_hand(model, tokens, thresholds, policy, clip):
    """Share of disagreement and clipped rise in nats of one document: every token by itself."""
    logits = {layer: value[0].float() for layer, value in model(torch.tensor([tokens])).items()}
    wrong, rise = [], []
    for place in range(len(tokens) - 1):
        final = taken = logits[6][place]
        for layer, tau in sorted(thresholds.items()):
            if tau < 1 and float(SCORES[policy](logits[layer][place])) >= tau:
                taken = logits[layer][place]
                break
        wrong.append(int(taken.argmax() != final.argmax()))
        label = tokens[place + 1]
        rise.append(float(final.log_softmax(-1)[label] - taken.log_softmax(-1)[label]))
    return np.mean(wrong), min(max(np.mean(rise), 0), clip) / clip


@pytest.mark.parametrize(("metric", "policy"), [("disagreement", "max_prob"), ("perplexity", "entropy")])
@pytest.mark.parametrize("thresholds", [{2: 0.0, 4: 0.0}, {2: 0.4, 4: 0.2}, {2: 1.0, 4: 0.3}, {2: 1.0, 4: 1.0}])
def test_a_unit_s_loss_is_the_one_of_its_text_read_alone(metric, policy, thresholds):
    model = shared_model()
    documents = documents_of(units_of(TEXTS[:9]), model.tokenizer)
    config = CalibrateConfig(risk=0.1, metric=metric, policy=policy, clip=0.25, batch_size=4)
    losses, mean_layer = read_losses(model, documents, config).of(thresholds, np.arange(9))
    expected = [
        losses_by_hand(model, document.tokens.tolist(), thresholds, policy, 0.25)[metric == "perplexity"]
        for document in documents
    ]
    assert losses == pytest.approx(expected, abs=1e-5)
    if thresholds[4] == 1:
        assert (max(losses), mean_layer) == (0, 6)
    if metric == "disagreement" and thresholds[2] == 0:
        assert (max(losses) > 0, mean_layer) == (True, 2)


def test_a_document_longer_than_the_rows_is_one_unit_all_the_same():
    model = shared_model()
    documents = documents_of(units_of([" ".join(TEXTS[:8]), TEXTS[9]]), model.tokenizer)
    config = CalibrateConfig(risk=0.1, seq_len=16, batch_size=1)
    losses = read_losses(model, documents, config)
    assert losses.num_units == 2
    assert losses.counts_U.tolist() == [len(document.tokens) - 1 for document in documents]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batches_have_so_many_rows_at_the_most_however_long_documents_are_and_change_no_loss(batch_size, monkeypatch):
    model, sizes = shared_model(), []
    documents = documents_of(units_of([" ".join(TEXTS[:20]), *TEXTS[20:26], " ".join(TEXTS[:5])]), model.tokenizer)
    config = CalibrateConfig(risk=0.1, metric="perplexity", seq_len=16, batch_size=batch_size)
    hiddens = model.hiddens
    monkeypatch.setattr(
        model, "hiddens", lambda tokens_BT, rows: sizes.append(len(tokens_BT)) or hiddens(tokens_BT, rows)
    )
    losses, _ = read_losses(model, documents, config).of({2: 0.4, 4: 0.2}, np.arange(8))
    assert max(sizes) <= batch_size
    monkeypatch.undo()
    alone = [read_losses(model, [document], config).of({2: 0.4, 4: 0.2}, np.arange(1)) for document in documents]
    assert losses == pytest.approx([loss for (loss,), _ in alone], abs=1e-5)


def test_what_an_answer_loses_is_rouge_l_to_full_depth_s_or_what_full_depth_is_nearer_to_the_reference():
    model = shared_model()
    config = CalibrateConfig(risk=0.1, metric="rouge_l", max_new_tokens=6)
    thresholds, prompts = {2: 0.0, 4: 0.0}, TEXTS[:5]
    options = {"max_new_tokens": 6, "ignore_eos": False}
    full = eellm.generate(model, prompts, method="full", **options)
    early = eellm.generate(model, prompts, threshold=0.0, **options)
    losses, layer = AnswerLosses(model, units_of(prompts).units, config, cache_dir=None).of(thresholds, np.arange(5))
    assert losses == pytest.approx([1 - rouge_l(e.text, f.text) for e, f in zip(early, full, strict=True)])
    assert (max(losses) > 0, layer) == (True, 2)
    units = [Unit("here", p, reference=f.text) for p, f in zip(prompts, full, strict=True)]
    units[0] = Unit("here", prompts[0], reference=early[0].text)
    found, _ = AnswerLosses(model, units, config, cache_dir=None).of(thresholds, np.array([0, 1]))
    assert found == pytest.approx([0, 1 - rouge_l(early[1].text, full[1].text)])


def test_a_certificate_says_what_was_tested_and_its_figures_are_those_of_the_units():
    certificate, model = shared_certificate(), shared_model()
    assert 1 <= certificate.num_units == len(TEXTS) - round(0.2 * len(TEXTS))
    assert certificate.p_value <= 0.1 + 1e-9
    assert certificate.mean_exit_layer < 6
    assert min(tau for _, tau in certificate.thresholds) < 1
    config = CalibrateConfig(risk=0.15, confidence=0.9)
    losses = read_losses(model, documents_of(units_of(TEXTS), model.tokenizer), config)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    found, mean_layer = losses.of(certificate.by_layer, order[-certificate.num_units :])
    assert np.mean(found) == pytest.approx(certificate.measured_risk)
    assert mean_layer == pytest.approx(certificate.mean_exit_layer)
    assert hoeffding_bentkus(found, 0.15) == pytest.approx(certificate.p_value)


@pytest.mark.parametrize("metric", ["perplexity", "rouge_l"])
def test_the_other_metrics_are_certified_too(metric):
    config = CalibrateConfig(risk=0.5, confidence=0.9, metric=metric, max_new_tokens=4, num_levels=6)
    certificate = calibrate(shared_model(), units_of(TEXTS[:40]), config)
    assert (certificate.metric, certificate.num_units) == (metric, 32)
    assert certificate.clip == (1.0 if metric == "perplexity" else None)
    assert certificate.max_new_tokens == (4 if metric == "rouge_l" else None)
    assert certificate.against == "full"


def test_too_few_units_are_refused_with_the_number_that_is_needed():
    config = CalibrateConfig(risk=0.2, confidence=0.9)
    with pytest.raises(
        DataError, match=r"10 units: a risk of 0\.2 at a confidence of 0\.9 needs 14 at the least .11 to"
    ):
        calibrate(shared_model(), units_of(TEXTS[:10]), config)
    with pytest.raises(DataError, match="13 units"):
        calibrate(shared_model(), units_of(TEXTS[:13]), config)
    with pytest.raises(DataError, match="1 units"):  # the others hold nothing to be predicted
        calibrate(shared_model(), units_of(["", *TEXTS[:1], *[""] * 20]), config)
    try:
        calibrate(shared_model(), units_of(TEXTS[:14]), config)
    except DataError as error:
        assert "no thresholds can be shown to keep" in str(error)  # noqa: PT017


class Misled:
    """Units whose exits seem always right, and then lose much."""

    num_units = 100

    def __init__(self, seem_right, loss=0.4):
        self.seem_right, self.loss = seem_right, loss
        self.on_path, self.tested = [], []

    def evidence(self, units):
        self.on_path += units.tolist()
        return {2: np.linspace(0.5, 0.6, len(units))}, {2: np.full(len(units), not self.seem_right)}

    def of(self, thresholds, units):
        self.tested.append(units.tolist())
        return [self.loss if thresholds[2] < 1 else 0.0] * len(units), 2.0


@pytest.mark.parametrize("seem_right", [True, False])
def test_where_no_thresholds_pass_none_are_certified(seem_right):
    with pytest.raises(DataError, match=r"to keep disagreement below 0\.05: the safest .* lose 0\.4000 on 80 units"):
        choose_thresholds(Misled(seem_right), CalibrateConfig(risk=0.05))


def test_the_units_that_choose_the_path_are_not_among_those_tested():
    losses = Misled(seem_right=True, loss=0.0)
    assert choose_thresholds(losses, CalibrateConfig(risk=0.05)).num_units == 80
    for tested in losses.tested:
        assert len(tested) == 80
        assert sorted([*losses.on_path, *tested]) == list(range(100))


def test_what_can_t_be_calibrated_is_refused():
    units, config = units_of(TEXTS), CalibrateConfig(risk=0.15)
    without = agreeing_model()
    with pytest.raises(DataError, match="no tokenizer"):
        calibrate(without, units, config)
    without = agreeing_model(exits=())
    with pytest.raises(ConfigError, match="no exits to find thresholds for"):
        calibrate(without, units, config)
    with pytest.raises(ConfigError, match="no exit at layer 3; it has 2, 4"):
        calibrate(shared_model(), units, dataclasses.replace(config, exits=(3,)))
    with pytest.raises(DataError, match="line 0: a prompt with a reference is for the metric rouge_l"):
        calibrate(shared_model(), units_of(TEXTS, reference="x"), config)
    mixed = Units((Unit("line 1", "a b"), *units_of(TEXTS, reference="x").units), "")
    with pytest.raises(DataError, match="line 1 has no reference and others have one"):
        calibrate(shared_model(), mixed, dataclasses.replace(config, metric="rouge_l"))


# --- units in files ---


def test_units_are_lines_of_jsonl_or_stand_between_blank_lines(tmp_path):
    lines = [{"text": "one"}, {"messages": [{"role": "user", "content": "hi"}]}, {"prompt": "p", "reference": "r"}]
    file = tmp_path / "units.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    read = read_units(file)
    assert read.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert [unit.content for unit in read.units] == ["one", lines[1]["messages"], "p"]
    assert [unit.reference for unit in read.units] == [None, None, "r"]
    assert [unit.where for unit in read.units] == [f"{file}:{n}" for n in (1, 3, 5)]
    text = tmp_path / "units.txt"
    text.write_bytes(b"\xef\xbb\xbfone\ntwo\n \t\n\n\nthree\r\n\r\nfour\n\n")
    assert [(unit.content, unit.where) for unit in read_units(text).units] == [
        ("one\ntwo", f"{text}:1"),
        ("three", f"{text}:6"),
        ("four", f"{text}:8"),
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "p"}', "a.jsonl:2: a prompt and its reference are two strings, alone"),
        ("a.jsonl", b'{"prompt": "p", "reference": "r", "text": "x"}', "two strings, alone"),
        ("a.jsonl", b"{", "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"txt": "a"}', "a.jsonl:1: keys 'txt'"),
        ("a.txt", b"\n \n", "the file is empty"),
        ("a.txt", b"\xff", "not UTF-8"),
    ],
)
def test_files_that_hold_no_units_are_refused_with_the_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_units(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_units(tmp_path / "none.txt")


# --- kept beside the exits ---


@pytest.fixture
def directory(tmp_path):
    """A model directory; each test may change it."""
    model = agreeing_model()
    model.tokenizer = tiny_tokenizer()
    eellm.save(model, tmp_path / "model")
    return tmp_path / "model"


def test_certificates_of_several_risks_and_metrics_lie_side_by_side_and_a_new_one_replaces_its_elder(directory):
    before, model = content(directory), eellm.load(directory)
    assert model.certificates == ()
    first = certificate_for(model)
    others = [certificate_for(model, risk=0.2), certificate_for(model, metric="perplexity", clip=0.5)]
    for certificate in (first, *others, newer := dataclasses.replace(first, thresholds=((2, 1.0), (4, 0.5)))):
        store_certificate(directory, certificate)
    assert eellm.load(directory).certificates == (*others, newer)
    after = content(directory)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"exits.json"}
    stored = json.loads(after["exits.json"])
    del stored["certificates"]
    assert stored == json.loads(before["exits.json"])
    eellm.save(eellm.load(directory), directory.parent / "copy")
    assert content(directory.parent / "copy") == after


def test_an_adapter_keeps_its_own_certificates_and_its_base_keeps_the_base_s(directory):
    model = eellm.load(directory)
    store_certificate(directory, certificate_for(model))
    model = eellm.load(directory)
    eellm.add_exits(model, [eellm.ExitConfig(layer=3, kind="norm")])
    mine = certificate_for(model, risk=0.05, thresholds=((3, 0.5), (4, 0.5)))
    model.certificates += (mine,)
    adapter = directory.parent / "adapter"
    eellm.save_adapter(model, adapter, base=directory)
    stored = json.loads((adapter / "exits.json").read_text())["certificates"]
    assert [entry["risk"] for entry in stored] == [0.05]
    both = eellm.load(adapter)
    assert [c.risk for c in both.certificates] == [0.1, 0.05]
    assert certified(both, 0.5, "disagreement").risk == 0.1
    assert certified(both, 0.07, "disagreement") == mine
    store_certificate(adapter, certificate_for(both, risk=0.3))
    assert [c.risk for c in eellm.load(adapter).certificates] == [0.1, 0.05, 0.3]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"risk": 2.0}, r"certificates\[0\].risk = 2\.0: must lie between 0 and 1"),
        ({"metric": "luck"}, r"certificates\[0\].metric = 'luck'"),
        ({"thresholds": [[2, "x"]]}, r"certificates\[0\].thresholds\[0\]\[1\] = 'x': must be a number"),
        ({"surprise": 1}, r"unknown key 'certificates\[0\].surprise'"),
    ],
)
def test_a_spoilt_certificate_is_refused_by_name(directory, entry, message):
    store_certificate(directory, certificate_for(eellm.load(directory)))
    (stored,) = json.loads((directory / "exits.json").read_text())["certificates"]
    edit_json(directory / "exits.json", certificates=[stored | entry])
    with pytest.raises(CheckpointError, match=message):
        eellm.load(directory)


def test_a_full_disk_leaves_the_old_certificates(directory, monkeypatch):
    store_certificate(directory, certificate_for(eellm.load(directory)))
    before = content(directory)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CheckpointError, match=r"can't write .*exits\.json: No space left on device; nothing was"):
        store_certificate(directory, certificate_for(eellm.load(directory), risk=0.01))
    assert content(directory) == before


# --- whom they bind ---


def test_the_certificate_with_the_largest_risk_up_to_the_one_asked_for_is_chosen():
    model = agreeing_model()
    made = {risk: certificate_for(model, risk=risk) for risk in (0.01, 0.05, 0.2)}
    surer = certificate_for(model, risk=0.05, confidence=0.99)
    rouge = certificate_for(model, risk=0.04, metric="rouge_l")
    model.certificates = (*made.values(), surer, rouge)
    for risk, expected in [(0.01, made[0.01]), (0.049, made[0.01]), (0.05, surer), (0.19, surer), (0.9, made[0.2])]:
        assert certified(model, risk, "disagreement") == expected
    assert certified(model, 0.05, "rouge_l") == rouge
    words = (
        "no certificate of disagreement up to that .it has: disagreement 0.01, .* 'eellm calibrate MODEL .*--risk 0.005"
    )
    with pytest.raises(CertificateError, match=words):
        certified(model, 0.005, "disagreement")
    with pytest.raises(CertificateError, match="no certificate of perplexity"):
        certified(model, 0.5, "perplexity")


@pytest.mark.parametrize("change", ["exit", "backbone", "dtype", "removed"])
def test_a_certificate_of_other_weights_is_refused(directory, change):
    store_certificate(directory, certificate_for(eellm.load(directory)))
    model = eellm.load(directory)
    assert certified(model, 0.1, "disagreement")
    message = r"disagreement 0\.1 was made for other weights than the model's .* run 'eellm calibrate' again"
    with torch.no_grad():
        if change == "exit":
            model.exit(4).norm.weight[3] += 1e-3
        elif change == "backbone":
            model.decoder.layer(1).mlp.up.weight[0, 0] += 1e-3
        elif change == "dtype":
            model, message = (
                eellm.load(directory, dtype="bfloat16"),
                "made in float32, and the model is loaded in bfloat16",
            )
        else:
            without = agreeing_model(exits=(eellm.ExitConfig(layer=4, kind="norm", gate_size=8),))
            without.certificates, model = model.certificates, without
    with pytest.raises(CertificateError, match=message):
        eellm.generate(model, [PROMPT], risk=0.1)
    if change == "exit":
        eellm.save(model, directory)
        with pytest.raises(CertificateError, match="other weights"):
            eellm.generate(eellm.load(directory), [PROMPT], risk=0.1)


def test_an_exit_that_the_certificate_does_not_name_may_change():
    model = agreeing_model()
    model.certificates = (certificate_for(model, thresholds=((4, 0.5),)),)
    with torch.no_grad():
        model.exit(2).norm.weight.mul_(2)
    assert certified(model, 0.1, "disagreement").by_layer == {4: 0.5}


@pytest.mark.parametrize("policy", ["max_prob", "margin", "gate"])
@pytest.mark.parametrize("thresholds", [((2, 0.3), (4, 0.2)), ((2, 1.0), (4, 0.4)), ((4, 0.3),)])
def test_what_is_generated_under_a_risk_equals_the_decoder_without_a_cache_with_the_certificate_s_thresholds(
    policy, thresholds
):
    model = agreeing_model(vocab_size=29, change=0.6)
    model.certificates = (certificate_for(model, policy=policy, thresholds=thresholds),)
    expected = oracle(model, PROMPT, num_tokens=30, policy=policy, thresholds=dict(thresholds))
    if policy != "gate":
        assert len({row[1] for row in expected}) > 1
    for max_deferred in (1, 3, 16):
        (out,) = eellm.generate(model, [PROMPT], max_new_tokens=30, risk=0.2, max_deferred=max_deferred)
        assert list(zip(out.tokens, out.exits, strict=True)) == [row[:2] for row in expected]
        assert out.confidences == pytest.approx([row[3] for row in expected], abs=1e-4)


def test_a_text_is_scored_under_the_certificate_s_thresholds():
    model = agreeing_model()
    model.certificates = (certificate_for(model, policy="margin", thresholds=((2, 0.2), (4, 0.1))),)
    with eellm.Engine(model) as engine:
        (found,) = engine.score([PROMPT], risk=0.1)
        (expected,) = engine.score([PROMPT], policy="margin", threshold={2: 0.2, 4: 0.1})
        assert found == expected
        assert len(set(found.exits)) > 1


def test_rounded_weights_have_no_certificate():
    model = agreeing_model()
    model.certificates = (certificate_for(model),)
    with eellm.Engine(model, quantize="int8") as engine:
        for ask in (lambda: engine.submit(PROMPT, risk=0.1), lambda: engine.score([PROMPT], risk=0.1)):
            with pytest.raises(CertificateError, match="not for those rounded to int8; leave quantize out"):
                ask()
