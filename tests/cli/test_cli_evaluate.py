"""`eellm evaluate` as a user calls it: what it prints, what it writes, what it refuses."""

import json
import sys
from pydoc_data.topics import topics

import pytest

import eellm
from eellm.cli.main import main
from eellm.evaluate.tables import CURVE_LEGEND
from tests.models import tiny_model
from tests.worlds import tiny_tokenizer

FAST = ("--new-tokens", "4", "--seq-len", "64", "--max-tokens", "300")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluate") / "model"
    tokenizer = tiny_tokenizer()
    exits = (eellm.ExitConfig(layer=2, kind="mlp", gate_size=8), eellm.ExitConfig(layer=4, kind="norm"))
    model = tiny_model(vocab_size=tokenizer.vocab_size, exits=exits, dtype="float32")
    model.tokenizer = tokenizer
    eellm.save(model, directory)
    return str(directory)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text(topics["assert"] + topics["lambda"], encoding="utf-8")
    return str(file)


def files(directory):
    return sorted(file.name for file in directory.iterdir())


def test_a_table_with_a_row_per_exit_goes_to_stdout(model, text, capsys):
    assert main(["evaluate", model, "--text", text, *FAST]) == 0
    out = " ".join(capsys.readouterr().out.split())  # a long path breaks the title's line
    for words in ("perplexity", "agrees with final", "mlp, tied", "norm, tied", "final", "100.0%", "299 tokens"):
        assert words in out
    assert "tok/s" not in out


def test_the_curve_s_table_has_a_whole_row_per_threshold_and_explains_its_columns(model, text, capsys):
    assert main(["evaluate", model, "--text", text, *FAST, "--curve"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert len([line for line in out.splitlines() if "×" in line]) == 10
    assert " ".join(CURVE_LEGEND.split()) in " ".join(out.split())


def test_json_is_one_object_with_the_figures_of_every_exit_and_threshold(model, text, capsys):
    assert main(["evaluate", model, "--text", text, *FAST, "--curve", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [exit["layer"] for exit in data["evaluation"]["exits"]] == [2, 4, 6]
    assert set(data["evaluation"]["exits"][0]) == {
        "layer", "kind", "nll", "perplexity", "bits_per_byte", "agreement", "accuracy",
    }  # fmt: skip
    assert [point["threshold"] for point in data["curve"]["points"]] == [
        1,
        0.95,
        0.9,
        0.8,
        0.7,
        0.6,
        0.5,
        0.4,
        0.3,
        0.2,
    ]
    assert data["curve"]["points"][0]["measured"]["same_prefix"] == 1
    assert data["curve"]["new_tokens"] == 4
    assert main(["evaluate", model, "--text", text, *FAST, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["curve"] is None


def test_out_holds_the_figures_the_picture_and_the_report(model, text, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["evaluate", model, "--text", text, *FAST, "--curve", "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert files(out) == ["curve.json", "curve.svg", "evaluation.json", "report.html"]
    assert json.loads((out / "evaluation.json").read_text()) == printed["evaluation"]
    assert json.loads((out / "curve.json").read_text()) == printed["curve"]
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "Early exits of model" in page
    assert "load average" in page
    assert files(tmp_path / "new") == ["out"]


def test_a_later_run_leaves_nothing_of_an_earlier_one_but_what_it_did_not_make(model, text, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["evaluate", model, "--text", text, *FAST, "--curve", "--out", str(tmp_path)]) == 0
    assert main(["evaluate", model, "--text", text, *FAST, "--out", str(tmp_path)]) == 0
    assert files(tmp_path) == ["evaluation.json", "notes.txt", "report.html"]


def test_policy_and_exits_are_those_of_the_curve(model, text, capsys):
    options = ["--curve", "--policy", "gate", "--exits", "2", "--json"]
    assert main(["evaluate", model, "--text", text, *FAST, *options]) == 0
    curve = json.loads(capsys.readouterr().out)["curve"]
    assert (curve["policy"], curve["exits"]) == ("gate", [2])
    assert all(point["taken"]["4"] == 0 for point in curve["points"])


def test_an_adapter_s_exits_are_measured(model, text, tmp_path, capsys):
    base = eellm.load(model)
    eellm.add_exits(base, [eellm.ExitConfig(layer=3, kind="norm")])
    eellm.save_adapter(base, tmp_path / "adapter", base=model, layers=[3])
    arguments = ["--adapter", str(tmp_path / "adapter"), "--text", text, *FAST, "--json"]
    assert main(["evaluate", model, *arguments]) == 0
    assert [exit["layer"] for exit in json.loads(capsys.readouterr().out)["evaluation"]["exits"]] == [2, 3, 4, 6]


def test_jsonl_files_are_read_as_documents(model, tmp_path, capsys):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in ("assert", "lambda")))
    assert main(["evaluate", model, "--text", str(file), *FAST, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["evaluation"]["num_tokens"] < 300


def test_a_model_without_exits_is_evaluated_but_has_no_curve(text, tmp_path, capsys):
    plain = tiny_model(vocab_size=tiny_tokenizer().vocab_size, exits=(), dtype="float32")
    plain.tokenizer = tiny_tokenizer()
    eellm.save(plain, tmp_path / "plain")
    arguments = ["evaluate", str(tmp_path / "plain"), "--text", text, *FAST]
    assert main([*arguments, "--json", "--out", str(tmp_path / "out")]) == 0
    assert len(json.loads(capsys.readouterr().out)["evaluation"]["exits"]) == 1
    assert main([*arguments, "--curve", "--out", str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no exits to draw a curve of" in err
    assert len(err.splitlines()) == 1
    assert files(tmp_path) == ["out", "plain"]


def test_without_matplotlib_all_but_the_picture_is_written(model, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["evaluate", model, "--text", text, *FAST, "--curve", "--out", str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == ["curve.json", "evaluation.json", "report.html"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--curve", "--policy", "gate"], "the exit at layer 4 has no gate"),
        (["--curve", "--exits", "3"], "no exit at layer 3"),
        (["--curve", "--new-tokens", "1"], "new_tokens = 1: must be at least 2"),
        (["--curve", "--new-tokens", "500"], "new_tokens = 500: the model's context is 128"),
        (["--seq-len", "200"], "seq_len = 200: the model's context is 128"),
        (["--max-tokens", "1"], "max_tokens = 1: must be at least 2"),
        (["--batch-size", "0"], "batch_size = 0: must be at least 1"),
        (["--policy", "maxprob"], "max_prob"),
        (["--thresholds", "0.5"], "unknown option '--thresholds'"),
    ],
)
def test_bad_options_get_one_line_and_exit_code_2_and_write_nothing(model, text, tmp_path, capsys, options, message):
    assert main(["evaluate", model, "--text", text, "--out", str(tmp_path / "out"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert files(tmp_path) == []


def test_a_missing_or_empty_file_and_a_model_without_a_tokenizer_are_named(model, text, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    for file, message in (("nowhere.txt", "nowhere.txt: no such file"), (str(tmp_path / "empty.txt"), "empty.txt")):
        assert main(["evaluate", model, "--text", file, "--curve", "--out", str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert len(err.splitlines()) == 1
        assert files(tmp_path) == ["empty.txt"]
    bare = tiny_model(dtype="float32")
    eellm.save(bare, tmp_path / "bare")
    assert main(["evaluate", str(tmp_path / "bare"), "--text", text]) == 2
    assert "the model has no tokenizer" in capsys.readouterr().err


def test_rows_are_as_long_as_a_short_context_unless_told_otherwise(model, text, tmp_path):
    assert main(["evaluate", model, "--text", text, "--max-tokens", "300", "--out", str(tmp_path)]) == 0
    assert "tokens in rows of 128" in (tmp_path / "report.html").read_text()


def test_a_curve_that_can_not_be_drawn_is_refused_before_the_work(model, text, capsys, monkeypatch):
    monkeypatch.setattr("eellm.cli.evaluate.evaluate", lambda *_, **__: pytest.fail("the work was started"))
    assert main(["evaluate", model, "--text", text, "--curve", "--exits", "3"]) == 2
    assert "no exit at layer 3" in capsys.readouterr().err


def test_a_place_that_can_not_be_written_is_found_before_the_work(model, text, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("eellm.cli.evaluate.evaluate", lambda *_, **__: pytest.fail("the work was started"))
    assert main(["evaluate", model, "--text", text, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "can't write" in capsys.readouterr().err
