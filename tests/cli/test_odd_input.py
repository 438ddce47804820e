"""What nobody means to give: each gets one line, whatever is wrong with it, and readers that leave get none."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import eellm
from eellm.cli.options import parse
from eellm.cli.serve import ServeConfig
from eellm.errors import ConfigError
from eellm.serve.run import bound
from tests.models import tiny_model

CALL = "import sys; sys.argv[0] = 'eellm'; from eellm.cli.main import main; sys.exit(main())"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    eellm.save(tiny_model(), path / "m")
    return path / "m"


def process(*args, **options):
    return subprocess.Popen([sys.executable, "-c", CALL, *args], stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("args", [("--help",), ("--version",), ("plan", "--help")])
def test_a_reader_that_leaves_is_told_nothing(args, request):
    running = process(*args, stdout=subprocess.PIPE, cwd=request.config.rootpath)
    running.stdout.close()
    assert running.stderr.read() == ""
    assert running.wait(60) == 0


@pytest.mark.parametrize("args", [("--help",), ("plan", "--help"), ("plan", "recipes/paper-7b.toml")])
def test_a_full_disk_behind_stdout_is_said_on_one_line(args, request):
    with Path("/dev/full").open("w") as full:
        running = process(*args, stdout=full, cwd=request.config.rootpath)
    assert running.stderr.read() == "eellm: input/output: No space left on device\n"
    assert running.wait(60) == 2


def test_json_without_end_is_refused(command, tmp_path, directory):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    code, _, err = command(
        "prepare", "--input", tmp_path / "deep.jsonl", "--out", tmp_path / "d", "--tokenizer", "bytes"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "deep.jsonl:1: not JSON" in err
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text("[" * 100_000)
    code, _, err = command("generate", model, "--prompt", "x")
    assert (code, err.count("\n")) == (2, 1)
    assert "config.json is not JSON" in err


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"rope_parameters": 5}, "config.json"),
        ("config.json", {"quantization_config": 5}, "config.json"),
        ("config.json", {"num_hidden_layers": None}, "num_layers"),
        ("model.safetensors.index.json", {"weight_map": {"a": 5}}, "no 'weight_map' of tensors' names"),
    ],
)
def test_a_value_of_another_kind_is_refused(command, tmp_path, directory, file, change, words):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    known = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps(known | change))
    code, _, err = command("generate", tmp_path, "--prompt", "x")
    assert (code, err.count("\n")) == (2, 1)
    assert words in err


@pytest.mark.parametrize("host", ["a..b", "a" * 300])
def test_a_host_that_is_no_name_is_refused(host):
    with pytest.raises(ConfigError, match="host = "), bound(host, 0):
        pass


def test_an_address_of_another_machine_is_the_host_s_fault():
    with (
        pytest.raises(ConfigError, match=r"host = '192\.0\.2\.1': .*no address of this machine"),
        bound("192.0.2.1", 0),
    ):
        pass


@pytest.mark.parametrize(("content", "words"), [(b"a = [", "not a TOML file"), (b"a = '\xff'", "not a TOML file")])
def test_a_recipe_beside_init_from_is_refused_like_others(command, tmp_path, directory, content, words):
    (tmp_path / "bad.toml").write_bytes(content)
    code, _, err = command("train", tmp_path / "bad.toml", "--init-from", directory)
    assert (code, err.count("\n")) == (2, 1)
    assert f"bad.toml: {words}" in err


def test_an_error_in_a_recipe_beside_init_from_names_the_recipe(command, tmp_path, directory):
    (tmp_path / "r.toml").write_text('[data]\ntrain = ["pydoc_data.topics"]\n[train]\nout_dri = "x"\n')
    code, _, err = command("train", tmp_path / "r.toml", "--init-from", directory)
    assert code == 2
    assert "r.toml: unknown key 'train.out_dri' (did you mean 'out_dir'?)" in err


def test_a_recipe_may_begin_with_a_byte_order_mark(command, tmp_path):
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbfprot = 1\n")
    assert "unknown key 'prot'" in command("serve", tmp_path / "r.toml")[2]


def test_only_switches_can_be_switched_off(command):
    code, _, err = command("serve", "m", "--no-port")
    assert code == 2
    assert "unknown option '--no-port' (did you mean '--port'?); see 'eellm serve --help'" in err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_message_is_the_same_whatever_the_terminal_can_show(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(ConfigError) as refused:
        parse(ServeConfig, ["--port", "x"], verb="serve")
    assert str(refused.value) == "Error parsing --port: 'x' is not a whole number; see 'eellm serve --help'"


def test_a_bad_number_that_may_be_left_out_is_refused_in_the_same_words(command, tmp_path):
    code, _, err = command("prepare", "--input", "x", "--out", tmp_path / "d", "--tokenizer", "bytes", "--workers", "x")
    assert code == 2
    assert "--workers: 'x' is not a whole number; see" in err


def test_half_a_surrogate_pair_is_refused_where_a_tokenizer_is_trained(command, tmp_path):
    (tmp_path / "half.jsonl").write_text('{"text": "whole"}\n{"text": "\\ud83d"}\n')
    code, _, err = command(
        "prepare", "--input", tmp_path / "half.jsonl", "--out", tmp_path / "d", "--train-tokenizer", 300
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "half.jsonl:2: the text holds half of a surrogate pair" in err
