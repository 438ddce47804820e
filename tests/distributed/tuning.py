"""Tuning recipes for one process or several: a tiny base, a text, and exits of several kinds, in fp64."""

import json
from pydoc_data.topics import topics

import eellm
from eellm.config.load import from_dict
from eellm.config.tune import TuneConfig
from tests.models import tiny_config
from tests.worlds import tiny_tokenizer

EXITS = (
    {"layer": 1, "kind": "mlp", "gate_size": 4},
    {"layer": 2, "kind": "norm", "norm": "final", "head": "own"},
    {"layer": 5, "kind": "layer", "gate_size": 4},
)
"""None at layers 3 and 4. What the exits at 1 and 5 lack is the final head's."""
OBJECTIVES = {
    "text": {"beta": 0.0, "gate": False},
    "distilled": {"beta": 0.5, "gate": False, "temperature": 2.0},
    "gated": {"beta": 0.0, "gate": True},
    "both": {"beta": 0.5, "gate": True},
}


def make_world(directory):
    """A base with tied embeddings, one without, and a text."""
    tokenizer = tiny_tokenizer()
    for tied in (False, True):
        sizes = {"vocab_size": tokenizer.vocab_size, "exits": (), "init_std": 0.2, "tie_embeddings": tied}
        model = eellm.build(tiny_config(**sizes), seed=1)
        model.tokenizer = tokenizer
        eellm.save(model, directory / ("tied" if tied else "base"))
    (directory / "text.jsonl").write_text(
        "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)[:8])
    )
    return directory


def recipe(world, objective="text", parallel=(), *, base="base", out_dir="run", **tables):
    data = {
        "model": {"base": str(world / base), "exits": list(EXITS), "dtype": "float64"},
        "data": {"train": [str(world / "text.jsonl")], "seq_len": 24, "validation_rows": 10},
        "train": {"out_dir": str(world / out_dir), "steps": 3, "batch_size": 4, "accumulate": 2},
        "objective": OBJECTIVES[objective] | {"chunk_size": 37},
        "optim": {"lr": 3e-3, "warmup_steps": 1, "clip": 0.05},
        "parallel": layout_of(objective, dict(parallel)),
    }
    for table, values in tables.items():
        data[table] |= values
    return from_dict(TuneConfig, data)


def layout_of(objective, parallel):
    """The last of `layers_per_stage` is what is left of the layers that run."""
    if "layers_per_stage" in parallel:
        counts = list(parallel["layers_per_stage"])
        parallel["layers_per_stage"] = [*counts, (5 if objective == "text" else 6) - sum(counts)]
    return parallel


def without_clock(row):
    return {key: value for key, value in row.items() if key != "tokens_per_s"}


def rows_of(out_dir):
    return [without_clock(json.loads(line)) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
