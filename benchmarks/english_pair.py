"""What its exits cost the English model's final one: the same recipe without them, judged on the same text.

    python benchmarks/english_pair.py [--with-exits models/english] [--steps N] [--out bench-out/english_pair.json]

Trains `recipes/english.toml` without exits on two processes: about two hours on two cores. A run that was stopped goes
on where it was. Its text must be there (`python examples/english_text.py`); tokens are made of it as `make english`
does. --with-exits is the model of that recipe, by default the one in this repository; `train` trains it here too.
--steps, for a try: of both runs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import eellm
from eellm.checkpoint.export import load_checkpoint
from eellm.evaluate.perplexity import evaluate, text_rows

ROOT = Path(__file__).parents[1]
WORK = ROOT / "bench-out/english_pair"
RECIPE = ROOT / "recipes/english.toml"
EXITS = re.compile(r"^exits = \[.*?^\]\n|^exit_weights = .*?\n", re.MULTILINE | re.DOTALL)
"""In the recipe."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with-exits", default=str(ROOT / "models/english"), metavar="DIR|train")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out/english_pair.json")
    options = parser.parse_args()
    text = ROOT / "english/validation.jsonl"
    if not text.is_file():
        sys.exit(f"{text}: no such file; `python examples/english_text.py` fetches it")
    load = os.getloadavg()
    prepare()
    plain = train("plain", without_exits(RECIPE.read_text(encoding="utf-8")), options.steps)
    if options.with_exits == "train":
        exits = train("exits", RECIPE.read_text(encoding="utf-8"), options.steps)
    else:
        exits = eellm.load(options.with_exits)
    result = {"with_exits": options.with_exits, "losses": {"plain": judge(plain, text), "exits": judge(exits, text)}}
    result |= {"versions": {"eellm": eellm.__version__, "torch": torch.__version__}}
    result |= {"load_average": [load, os.getloadavg()]}
    print(json.dumps(result["losses"], indent=2))
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def without_exits(recipe: str) -> str:
    plain, found = EXITS.subn("", recipe)
    assert found == 2, f"{RECIPE} has its exits and their weights in another form"
    return plain


def prepare() -> None:
    """Token shards of what is learnt and of what is held out."""
    data, validation = ROOT / "english/data", ROOT / "english/validation"
    if not (data / "index.json").is_file():
        call("eellm", "prepare", "--input", "english/text.jsonl", "--train-tokenizer", "4096", "--out", data)
    if not (validation / "index.json").is_file():
        call("eellm", "prepare", "--input", "english/validation.jsonl", "--tokenizer", data, "--out", validation)


def train(name: str, recipe: str, steps: int | None) -> eellm.EarlyExitLM:
    WORK.mkdir(parents=True, exist_ok=True)
    file, run = WORK / f"{name}.toml", WORK / name
    file.write_text(recipe, encoding="utf-8")
    options = ["--train.steps", steps] if steps else []
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "eellm", "train"]
    call(*launcher, file, "--train.out_dir", run, *options)
    return load_checkpoint(run)


def judge(model: eellm.EarlyExitLM, text: Path) -> dict[str, float]:
    """Loss of each exit on all that is held out, in nats a token."""
    rows = text_rows(text, model, seq_len=512, max_tokens=10**9)
    *early, final = evaluate(model, rows, batch_size=8).exits
    return {f"exit_{exit.layer}": exit.nll for exit in early} | {"final": final.nll}


def call(*words: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True, cwd=ROOT, env=environment)


if __name__ == "__main__":
    main()
