"""`eellm tasks` as a user calls it, on task files made here: nothing is fetched."""

import json
import sys

import pytest

import eellm
from eellm.cli.main import main
from tests.models import tiny_model
from tests.worlds import tiny_tokenizer

QUESTIONS = [
    {"question": "for x in", "choices": ["range", "import", "while"], "answer": 0},
    {"question": "The lambda", "choices": ["expression", "class"], "answer": 1},
    {"question": "if x", "choices": ["is", "not"], "answer": 0},
    {"question": "def f", "choices": ["(x)", "while"], "answer": 1},
]
CHOICE_TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks") / "model"
    exits = (eellm.ExitConfig(layer=2, kind="mlp"), eellm.ExitConfig(layer=4, kind="norm"))
    model = tiny_model(vocab_size=tiny_tokenizer().vocab_size, exits=exits, dtype="float32", max_seq_len=256)
    model.tokenizer = tiny_tokenizer()
    eellm.save(model, directory)
    return str(directory)


@pytest.fixture
def folder(tmp_path):
    """Data for two of our tasks, and a task file of the user's."""
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    (tmp_path / "tiny_choices.yaml").write_text(CHOICE_TASK.format(folder=tmp_path))
    squad = [
        {"title": "T", "context": f"The number is {i}.", "question": "Which?", "answers": [str(i), "none"]}
        for i in range(5)
    ]
    (tmp_path / "squad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in squad))
    news = [{"document": f"There are {i} of them.", "summary": "Some."} for i in range(4)]
    (tmp_path / "xsum.jsonl").write_text("".join(json.dumps(line) + "\n" for line in news))
    return tmp_path


def test_tasks_from_files_are_answered_under_each_rule_and_compared(model, folder, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval isn't installed: pip install 'eellm[eval]'")
    names = "tiny_choices,eellm_squad,eellm_news,eellm_xsum"
    options = ["--tasks", names, "--data", str(folder), "--include", str(folder), "--limit", "3"]
    rules = ["--exit", "2", "--threshold", "0.6,0.3", "--out", str(tmp_path / "out"), "--json"]
    assert main(["tasks", model, *options, *rules]) == 0
    out = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert kept["scores"] == out["scores"]
    assert (kept["exits"], kept["limit"]) == ([2, 4], 3)
    rows = {(row["task"], row["metric"], row["rule"]): row for row in out["scores"]}
    rule_names = ["full depth", "exit 2", "max_prob 0.6", "max_prob 0.3"]
    measures = {
        "tiny_choices": ["acc"],
        "eellm_squad": ["exact_match", "f1"],
        "eellm_news": ["bits_per_byte", "word_perplexity"],
        "eellm_xsum": ["rouge_l"],
    }
    assert set(rows) == {(task, m, rule) for task, metrics in measures.items() for m in metrics for rule in rule_names}
    assert all(row["num_docs"] == 3 for row in rows.values())
    assert all(row["interval"][0] <= row["value"] <= row["interval"][1] for row in rows.values())
    assert rows["eellm_news", "bits_per_byte", "full depth"]["difference"] == 0
    assert rows["eellm_news", "bits_per_byte", "exit 2"]["difference"] != 0
    assert [cost["rule"] for cost in out["costs"]] == rule_names
    assert set(out["costs"][1]["exits"]) == {"2"}
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 4 * 3
    right = [sample["acc"] for sample in samples if (sample["task"], sample["rule"]) == ("tiny_choices", "exit 2")]
    assert sum(right) / 3 == rows["tiny_choices", "acc", "exit 2"]["value"]
    assert "| f1 | exit 2 |" in (tmp_path / "out" / "tasks.md").read_text()
    expected = eellm.Engine(model).score([("if x", " is"), ("if x", " not")], exit=2)
    (said,) = [s for s in samples if s["task"] == "tiny_choices" and s["rule"] == "exit 2" and s["doc"] == 2]
    assert [logprob for logprob, _ in said["said"]] == pytest.approx([one.logprob for one in expected], abs=1e-3)


def test_no_examples_are_asked_for_and_none_stand_in_front_whatever_the_task_says(model, folder, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval isn't installed: pip install 'eellm[eval]'")
    task = (folder / "tiny_choices.yaml").read_text().replace("task: tiny_choices", "task: tiny_with_examples")
    include = tmp_path / "include"
    include.mkdir()
    (include / "tiny_with_examples.yaml").write_text(task + "num_fewshot: 2\n")
    said = {}
    for number, asked in enumerate((["--fewshot", "0"], ["--fewshot", "2"], [])):
        out = tmp_path / f"out{number}"
        options = ["--tasks", "tiny_with_examples", "--include", str(include), "--out", str(out), *asked]
        assert main(["tasks", model, *options]) == 0
        said[number] = (out / "samples.jsonl").read_text()
    capsys.readouterr()
    assert said[0] != said[1] == said[2]


def test_the_table_goes_to_stdout_and_chats_and_examples_can_stand_in_front(model, folder, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval isn't installed: pip install 'eellm[eval]'")
    options = ["--tasks", "tiny_choices", "--include", str(folder), "--fewshot", "1", "--chat"]
    assert main(["tasks", model, *options]) == 0
    out = capsys.readouterr().out
    assert "tiny_choices, documents: 4" in out
    assert "full depth" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "eellm_squat"], "no task 'eellm_squat' (did you mean 'eellm_squad'?)"),
        (
            ["--tasks", "eellm_squad", "--data", "nowhere"],
            "nowhere/squad.jsonl: no such file; python examples/eval_data",
        ),
        (["--tasks", "eellm_squad", "--exit", "3"], "the model has no exit at layer 3; it has 2, 4"),
        (["--tasks", "eellm_squad", "--exit", "2.5"], "exit = 2.5: a layer is a whole number"),
        (["--tasks", "eellm_squad", "--exits", "2"], "exits: give a threshold too"),
        (["--tasks", "eellm_squad", "--limit", "0"], "limit = 0"),
    ],
)
def test_mistakes_get_one_line(model, options, message, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval isn't installed: pip install 'eellm[eval]'")
    assert main(["tasks", model, *options]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert message in err[0]


def test_without_lm_eval_it_says_what_to_install(model, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, "eellm.evaluate.harness", raising=False)
    assert main(["tasks", model, "--tasks", "eellm_squad", "--data", str(folder)]) == 2
    assert "pip install 'eellm[eval]'" in capsys.readouterr().err
