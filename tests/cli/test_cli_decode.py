"""`eellm generate` with every method, and `eellm bench`."""

import json

import pytest

import eellm
from eellm.cli import bench, generate
from tests.models import tiny_model
from tests.worlds import tiny_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A saved tiny model with exits and a tokenizer."""
    model = tiny_model(dtype="float32", vocab_size=512)
    model.tokenizer = tiny_tokenizer()
    path = tmp_path_factory.mktemp("decode") / "model"
    eellm.save(model, path)
    return path


@pytest.fixture
def run(command, monkeypatch, tmp_path):
    for module in (bench, generate):
        monkeypatch.setattr(module, "CACHE_DIR", tmp_path / "cache")
    return command


def test_lossless_methods_write_full_depth_s_tokens_and_keep_what_was_measured(directory, run, tmp_path):
    common = ("generate", directory, "--prompt", "for x in", "--max-new-tokens", 12, "--ignore-eos", "--json")
    texts = {}
    for method in ("full", "speculative", "auto"):
        code, out, _ = run(*common, "--method", method)
        assert code == 0
        texts[method] = [token["id"] for token in json.loads(out)["tokens"]]
    assert texts["speculative"] == texts["auto"] == texts["full"]
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["costs"]
    code, out, _ = run(
        *common, "--method", "speculative", "--always-draft", "--no-lookup", "--max-draft", 2, "--threshold", 0.1
    )
    assert [token["id"] for token in json.loads(out)["tokens"]] == texts["full"]
    assert json.loads(out)["stats"]["drafted"] > 0


def test_processes_that_share_each_matrix_write_the_same(directory, run):
    common = ("generate", directory, "--prompt", "for x in", "--max-new-tokens", 6, "--ignore-eos", "--json")
    tokens = []
    for layout in ((), ("--workers", 2, "--tp", 2)):
        code, out, _ = run(*common, *layout)
        assert code == 0
        tokens.append([(token["id"], token["exit"]) for token in json.loads(out)["tokens"]])
    assert tokens[0] == tokens[1]


def test_quantised_weights_are_kept_and_write_nearly_the_same(directory, run, tmp_path):
    common = ("generate", directory, "--prompt", "for x in", "--max-new-tokens", 8, "--method", "full", "--json")
    logprobs = []
    for quantize in ((), ("--quantize", "int8"), ("--quantize", "int4"), ("--quantize", "int4")):
        code, out, _ = run(*common, *quantize)
        assert code == 0
        logprobs.append(json.loads(out)["tokens"][0]["logprob"])
    assert logprobs[1] == pytest.approx(logprobs[0], abs=0.1)
    assert logprobs[2] == logprobs[3] != logprobs[0]
    assert list((tmp_path / "cache" / "rounded").glob("*.safetensors"))


def test_bench_prints_a_row_for_each_method_and_batch_and_writes_them(directory, run, tmp_path):
    out_file = tmp_path / "speed.json"
    code, out, err = run(
        "bench", directory, "--tokens", 6, "--rounds", 2, "--batch", "1,3", "--threshold", 0.3, "--out", out_file
    )
    assert code == 0, err
    data = json.loads(out_file.read_text())
    rows = [(row["name"], row["batch_size"]) for row in data["speeds"]]
    methods = ["full", "early 0.3", "speculative", "auto"]
    assert rows == [(m, b) for b in (1, 3) for m in methods] + [
        (f"full {kind}", b) for b in (1, 3) for kind in ("int8", "int4")
    ]
    for row in data["speeds"]:
        assert row["tokens_per_s"] > 0
        assert row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1]
        if row["name"] in ("full", "speculative", "auto"):
            assert row["same_tokens"] == 1
        assert row["name"] in out
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["speed.json"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tokens", "0"], "tokens = 0: must be at least 1"),
        (["--batch", "0,2"], "batch = 0,2: must be at least 1"),
        (["--rounds", "x"], "rounds"),
        (["--methods", "full"], "unknown option '--methods'"),
    ],
)
def test_bench_refuses_what_makes_no_sense_on_one_line(directory, run, args, message):
    code, out, err = run("bench", directory, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
