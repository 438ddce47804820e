"""`eellm prepare`: what it writes and says, and what it refuses in one line."""

import json
import subprocess
import sys
from pydoc_data.topics import topics

import pytest

from eellm.cli.main import main
from eellm.data.shards import Shards
from eellm.text.bytes import byte_tokenizer
from tests.directories import content
from tests.worlds import tiny_tokenizer


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Runs `eellm prepare` in a folder with two files of text; gives its exit code and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(topics["if"])
    lines = [json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)[:9]]
    (tmp_path / "b.jsonl").write_text("".join(lines))

    def call(*args):
        code = main(["prepare", *args])
        out, err = capfd.readouterr()
        assert out == ""
        return code, err

    return call


def test_a_tokenizer_is_trained_and_the_text_written_with_it(run, tmp_path):
    code, err = run("--input", "a.txt", "b.jsonl", "--train-tokenizer", "400", "--out", "data", "--workers", "1")
    shards = Shards(tmp_path / "data")
    assert (code, err) == (0, f"data: 10 documents, {len(shards.tokens)} tokens of a vocabulary of 400\n")
    assert shards.tokenizer.decode(shards.tokens[0 : shards.document_ends[0]].tolist()) == topics["if"]


def test_a_directory_s_tokenizer_is_taken_or_that_of_bytes(run, tmp_path):
    (tmp_path / "model").mkdir()
    for name, data in tiny_tokenizer().files().items():
        (tmp_path / "model" / name).write_bytes(data)
    for name, tokenizer in (("model", tiny_tokenizer()), ("bytes", byte_tokenizer())):
        assert run("--input", "a.txt", "--tokenizer", name, "--out", f"of-{name}", "--workers", "1")[0] == 0
        assert Shards(tmp_path / f"of-{name}").tokenizer.files() == tokenizer.files()


def test_the_same_command_again_keeps_what_is_there(run, tmp_path):
    args = ("--input", ".", "--tokenizer", "bytes", "--out", "data", "--workers", "2")
    run(*args)
    before = (tmp_path / "data" / "index.json").stat().st_mtime_ns
    code, err = run(*args)
    assert (code, err.splitlines()[0]) == (0, "data: is there already, made from the same inputs")
    assert (tmp_path / "data" / "index.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--input a.txt --out data", "give one of --tokenizer DIR (a model's) and --train-tokenizer SIZE"),
        ("--input a.txt --out data --tokenizer bytes --train-tokenizer 300", "give one of --tokenizer DIR"),
        ("--input a.txt --out data --tokenizer nowhere", "nowhere: no tokenizer.json there"),
        ("--input a.txt --out data --train-tokenizer 100", "a vocabulary of 100: must be at least 257"),
        ("--input a.txt --out data --tokenizer bytes --workers 0", "workers = 0: must be at least 1"),
        ("--input nowhere.txt --out data --tokenizer bytes", "nowhere.txt: no such file or directory"),
        ("--input a.txt --out . --tokenizer bytes", ". has other files in it and no index.json of 'eellm prepare'"),
        ("--input a.txt --out b.jsonl --tokenizer bytes", "b.jsonl is a file; name a directory"),
        ("--input a.txt --out data --tokens bytes", "unknown option '--tokens' (did you mean '--tokenizer'?)"),
        ("--out data --tokenizer bytes", "--input"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line_and_changes_nothing(run, tmp_path, args, message):
    before = content(tmp_path)
    code, err = run(*args.split())
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err
    assert content(tmp_path) == before


def test_the_command_runs_its_own_processes_and_needs_no_torch(run, tmp_path):
    code = "import sys\nfrom eellm.cli.main import main\nsys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    args = ["prepare", "--input", "a.txt", "--tokenizer", "bytes", "--out", "one", "--workers", "1"]
    subprocess.run([sys.executable, "-c", code, *args], check=True)
    args[-3:] = ["two", "--workers", "2"]
    subprocess.run([sys.executable, "-m", "eellm", *args], check=True)
    assert content(tmp_path / "one") == content(tmp_path / "two")
