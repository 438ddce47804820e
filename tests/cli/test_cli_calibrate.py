"""`eellm calibrate` as a user calls it, and what is asked under a risk afterwards."""

import json
from pydoc_data.topics import topics

import pytest
import torch

import eellm
from eellm.cli import calibrate, generate
from tests.directories import content
from tests.models import agreeing_model
from tests.worlds import tiny_tokenizer

PARAGRAPHS = [text for topic in topics.values() for text in topic.split("\n\n") if 20 < len(text) < 120][:60]
GENERATE = ("--prompt", "for x in", "--max-new-tokens", 12, "--ignore-eos", "--json")


@pytest.fixture
def directory(tmp_path):
    model = agreeing_model()
    model.tokenizer = tiny_tokenizer()
    eellm.save(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "units.txt"
    file.write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    return file


@pytest.fixture
def run(command, monkeypatch, tmp_path):
    for module in (calibrate, generate):
        monkeypatch.setattr(module, "CACHE_DIR", tmp_path / "cache")
    return command


def test_a_certificate_is_made_told_stored_and_used(directory, text, run):
    code, out, err = run("calibrate", directory, "--text", text, "--risk", 0.3, "--confidence", 0.9)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("disagreement is at most 0.3, with a confidence of 0.9: 0.")
    assert [line.split(":")[0].strip() for line in lines[1:3]] == ["exit 2", "exit 4"]
    assert err == f"{directory}: the certificate is stored; ask with --risk 0.3\n"
    (stored,) = json.loads((directory / "exits.json").read_text())["certificates"]
    code, out, _ = run("generate", directory, "--risk", 0.35, *GENERATE)
    by_risk = json.loads(out)
    pairs = ",".join(f"{layer}={threshold}" for layer, threshold in stored["thresholds"])
    code, out, _ = run("generate", directory, "--threshold", pairs, *GENERATE)
    assert by_risk["tokens"] == json.loads(out)["tokens"]


def test_json_is_the_certificate_as_it_is_stored(directory, text, run):
    args = ("--risk", 0.5, "--confidence", 0.9, "--metric", "perplexity", "--clip", 2, "--exits", 4, "--json")
    code, out, err = run("calibrate", directory, "--text", text, *args)
    assert code == 0, err
    (stored,) = json.loads((directory / "exits.json").read_text())["certificates"]
    assert json.loads(out) == stored
    assert (stored["metric"], stored["clip"], [layer for layer, _ in stored["thresholds"]]) == ("perplexity", 2.0, [4])


def test_an_adapter_gets_the_certificate_and_its_base_stays_as_it_is(tmp_path, text, run):
    model = agreeing_model(exits=())
    model.tokenizer = tiny_tokenizer()
    eellm.save(model, tmp_path / "base")
    eellm.add_exits(model, [eellm.ExitConfig(layer=4, kind="norm")])
    eellm.save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    before = content(tmp_path / "base")
    code, _, err = run("calibrate", tmp_path / "base", "--adapter", tmp_path / "adapter", "--text", text, "--risk", 0.3)
    assert code == 0, err
    assert content(tmp_path / "base") == before
    code, _, err = run("generate", tmp_path / "adapter", "--risk", 0.3, *GENERATE)
    assert code == 0, err


def test_exits_that_were_trained_on_since_are_refused(directory, text, run):
    assert run("calibrate", directory, "--text", text, "--risk", 0.3, "--confidence", 0.9)[0] == 0
    model = eellm.load(directory)
    with torch.no_grad():
        model.exit(2).norm.weight.add_(0.01)
    eellm.save(model, directory)
    code, out, err = run("generate", directory, "--risk", 0.3, *GENERATE)
    assert (code, out) == (2, "")
    assert "was made for other weights than the model's" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--risk", 0), "risk = 0.0: must lie between 0 and 1"),
        (("--risk", 0.01), "60 units: a risk of 0.01 at a confidence of 0.95 needs 374 at the least (299 to be tested"),
        (("--risk", 0.3, "--metric", "blue"), "blue"),
        (("--risk", 0.3, "--exits", "3"), "no exit at layer 3; it has 2, 4"),
        (("--risk", 0.3, "--path-share", 1), "path_share = 1.0: must lie between 0 and 1"),
        (("--risk", 0.3, "--confidence", 1), "confidence = 1.0: must lie between 0 and 1"),
        (("--risk", 0.3, "--metric", "perplexity", "--clip", 0), "clip = 0.0: must be above 0"),
        ((), "risk"),
    ],
)
def test_what_can_t_be_calibrated_is_refused_on_one_line_and_nothing_is_stored(directory, text, run, args, message):
    before = content(directory)
    code, out, err = run("calibrate", directory, "--text", text, *args)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert content(directory) == before


def test_a_model_without_exits_has_nowhere_to_keep_a_certificate(tmp_path, text, run):
    eellm.save(agreeing_model(exits=()), tmp_path / "plain")
    code, _, err = run("calibrate", tmp_path / "plain", "--text", text, "--risk", 0.3)
    assert code == 2
    assert "has no exits.json: there are no exits" in err


def test_a_risk_beside_a_threshold_or_without_a_certificate_is_refused(directory, run):
    code, _, err = run("generate", directory, "--risk", 0.1, "--threshold", 0.5, *GENERATE)
    assert code == 2
    assert "the certificate says which threshold to use; leave threshold out" in err
    code, _, err = run("generate", directory, "--risk", 0.1, *GENERATE)
    assert code == 2
    assert (
        "the model has no certificate of disagreement up to that (it has: none); make one with 'eellm calibrate" in err
    )
