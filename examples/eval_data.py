"""What the tasks of `eellm tasks` ask: SQuAD, XSum and two multiple-choice sets, as small files in evaluation/.

    fetch (pip) → the few JSON files → evaluation/squad.jsonl, xsum.jsonl, social_iqa.jsonl, wikihow_goals.jsonl

They come out of BIG-bench's package, 358 MB of which 14 are read. The sets are for evaluation alone: nobody may train
on them, and this repository has no copy. Lines are in an order that has nothing to do with what they say, so that the
first hundred of a file are a fair sample of it.
"""

import argparse
import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from english_text import ROOT, Package, fetch, write

BIG_BENCH = Package(
    package="bigbench",
    version="1.0.0",
    archive="bigbench-1.0.0.tar.gz",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
)
FOLDER = "bigbench-1.0.0/bigbench/benchmark_tasks/"
Line = dict[str, Any]


def squad(data: Any) -> Iterator[Line]:
    """A line per question, with all that people answered."""
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {
                    "title": article["title"].replace("_", " "),
                    "context": paragraph["context"].strip(),
                    "question": question["question"].strip(),
                    "answers": sorted({answer["text"].strip() for answer in question["answers"]}),
                }


def xsum(data: Any) -> Iterator[Line]:
    """A line per article."""
    for example in data["examples"]:
        yield {"document": example["input"].strip(), "summary": example["target"].strip()}


def choices(data: Any) -> Iterator[Line]:
    """A line per question, with the number of the right choice."""
    for example in data["examples"]:
        scores = example["target_scores"]
        (right,) = [number for number, score in enumerate(scores.values()) if score > 0]
        yield {"question": example["input"].strip(), "choices": list(scores), "answer": right}


@dataclass(frozen=True)
class DataSet:
    """One of the files."""

    name: str
    file: str
    """In the package."""
    read: Callable[[Any], Iterator[Line]]
    origin: str


SETS = (
    DataSet("squad", "squad_shifts/squaddev_v1.1.json", squad, "SQuAD 1.1, development set (CC BY-SA 4.0)"),
    DataSet("xsum", "gem/xsum/task.json", xsum, "XSum, test articles of the GEM benchmark"),
    DataSet("social_iqa", "social_iqa/task.json", choices, "Social IQa, development set"),
    DataSet("wikihow_goals", "goal_step_wikihow/goal_inference/task.json", choices, "goals of wikiHow articles"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "evaluation", help="directory to write to")
    out = parser.parse_args().out
    packages = out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    contents = read_members(fetch(BIG_BENCH, packages), {FOLDER + data_set.file for data_set in SETS})
    rows = []
    for data_set in SETS:
        lines = mixed(data_set.read(contents[FOLDER + data_set.file]))
        write(out / f"{data_set.name}.jsonl", "".join(lines))
        rows.append(f"| {data_set.name}.jsonl | {len(lines)} | {data_set.origin} |")
        print(rows[-1])
    canary = contents[FOLDER + SETS[0].file]["canary"]
    write(out / "SOURCES.md", sources_page(rows, canary))


def read_members(archive: Path, names: set[str]) -> dict[str, Any]:
    """Some of an archive's JSON files, by name. It is read once, up to the last of them."""
    found: dict[str, Any] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in names:
                found[member.name] = json.load(tar.extractfile(member))
                if len(found) == len(names):
                    return found
    raise SystemExit(f"{archive} has no {', '.join(sorted(names - found.keys()))}")


def mixed(lines: Iterator[Line]) -> list[str]:
    """As JSON, each once, in the order of their checksums."""
    texts = {json.dumps(line, ensure_ascii=False) + "\n" for line in lines}
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())


def sources_page(rows: list[str], canary: str) -> str:
    table = "\n".join(["| file | lines | from |", "|---|---|---|", *rows])
    return (
        f"# Sources of the evaluation's data\n\nMade by `examples/eval_data.py` out of `{BIG_BENCH.package}` "
        f"{BIG_BENCH.version}. For evaluation only: never train on it.\n\n{table}\n\n{canary}\n"
    )


if __name__ == "__main__":
    main()
