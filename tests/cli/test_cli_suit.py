"""`eellm suit` as a user calls it, with times of this machine: what it prints, writes and refuses."""

import json
import sys
from pydoc_data.topics import topics

import pytest

import eellm
from eellm.cli.main import main
from tests.models import tiny_model
from tests.worlds import tiny_tokenizer

FAST = ("--seq-len", "32", "--max-tokens", "128")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("suit") / "model"
    exits = (eellm.ExitConfig(layer=2, kind="norm"),)
    model = tiny_model(vocab_size=tiny_tokenizer().vocab_size, exits=exits, dtype="float32")
    model.tokenizer = tiny_tokenizer()
    eellm.save(model, directory)
    return str(directory)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text(topics["assert"] + topics["lambda"], encoding="utf-8")
    return str(file)


def test_tables_and_a_plain_recommendation_go_to_stdout(model, text, capsys):
    assert main(["suit", model, "--text", text, *FAST]) == 0
    out = capsys.readouterr().out
    for words in ("logit lens, 127 tokens", "agrees", "settled", "by layers", "expected", "100.0%"):
        assert words in out
    advice = " ".join(out.split()).split("chosen on this text.")[-1]
    assert advice.startswith((" Put ", " Do not"))
    assert "…" not in out


def test_out_holds_the_figures_the_page_and_the_picture(model, text, tmp_path, capsys):
    options = ["--out", str(tmp_path / "out"), "--json", "--tune-steps", "2", "--batch-size", "2"]
    assert main(["suit", model, "--text", text, *FAST, *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["suit.json", "suit.md", "suit.svg"]
    kept = json.loads((tmp_path / "out" / "suit.json").read_text())
    assert kept["probes"] == printed["probes"]
    assert [probe["name"] for probe in kept["probes"]] == ["logit lens", "own exits", "tuned"]
    assert kept["probes"][1]["layers"] == [2, 6]
    assert kept["probes"][0]["agreement"][-1] == 1
    assert all(seconds > 0 for seconds in kept["probes"][0]["costs_s"].values())
    page = (tmp_path / "out" / "suit.md").read_text()
    assert "# Does model suit early exits?" in page
    assert kept["advice"]["text"] in page
    assert "(suit.svg)" in page
    assert "<svg" in (tmp_path / "out" / "suit.svg").read_text()


def test_without_matplotlib_all_but_the_picture_is_written(model, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["suit", model, "--text", text, *FAST, "--out", str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["suit.json", "suit.md"]
    assert "suit.svg" not in (tmp_path / "out" / "suit.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "1.5"], "precision = 1.5"),
        (["--tune-steps", "3", "--max-tokens", "100000"], "nothing is left to tune on"),
        (["--seq-len", "1000"], "seq_len = 1000: the model's context is 128"),
        (["--batch-size", "0"], "batch_size = 0"),
    ],
)
def test_mistakes_get_one_line(model, text, options, message, capsys):
    assert main(["suit", model, "--text", text, *options]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert message in err[0]
