"""Which vocabulary and width give the English model the fewest bits per byte in a given time: short runs of each.

    python benchmarks/english_sweep.py --minutes 8 --candidate 2048:192 --candidate bytes:192 --candidate 1024:160

Each candidate is `recipes/english.toml` with that vocabulary (tokenizer trained on the text; `bytes` is none) and that
width, as many steps as fit into the time at the speed of its first ones, on two processes. Prints the validation bits
per byte of each exit, and writes them to bench-out/english-sweep.json. The text must be there:
`python examples/english_text.py`.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
OUT = ROOT / "bench-out"
NUM_TIMED_STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="training time of each candidate")
    parser.add_argument("--candidate", action="append", required=True, metavar="VOCABULARY:WIDTH")
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    results = []
    for candidate in args.candidate:
        vocabulary, width = candidate.split(":")
        results.append(try_candidate(vocabulary, int(width), args.minutes, args.lr))
        OUT.mkdir(exist_ok=True)
        (OUT / "english-sweep.json").write_text(json.dumps(results, indent=2))
        show(results)


def try_candidate(vocabulary: str, width: int, minutes: float, lr: float) -> dict[str, object]:
    """Trains one candidate; bits per byte of each exit, and what it took."""
    work = OUT / f"english-{vocabulary}-{width}"
    shutil.rmtree(work, ignore_errors=True)
    train, validation = prepare(vocabulary)
    size = json.loads((train / "index.json").read_text())["vocab_size"]
    options = {
        "model.vocab_size": -(-size // 8) * 8,
        "model.hidden_size": width,
        "model.intermediate_size": round(width * 8 / 3 / 32) * 32,
        "model.num_heads": max(1, width // 64),
        "data.train": train,
        "data.validation": validation,
        "data.validation_rows": 1_000_000,
        "optim.lr": lr,
        "optim.min_lr": lr / 20,
        "train.log_every": 1,
        "train.evaluate_every": 0,
        "checkpoint.every": 0,
    }
    # the time of a step without the last one's validation, and without the first ones
    timed = run(work / "timing", options | {"train.steps": NUM_TIMED_STEPS, "data.validation_rows": 2})
    seconds = median(sum(v for k, v in row.items() if k.startswith("time/")) for row in timed[4:])
    steps = max(NUM_TIMED_STEPS, int(minutes * 60 / seconds))
    last = run(work / "run", options | {"train.steps": steps})[-1]
    index, num_bytes = (
        json.loads((validation / "index.json").read_text()),
        text_bytes(ROOT / "english/validation.jsonl"),
    )
    per_byte = index["num_tokens"] / num_bytes / math.log(2)
    bits = {k.removeprefix("val_loss/"): v * per_byte for k, v in last.items() if k.startswith("val_loss/")}
    seen = last["tokens"] * num_bytes / index["num_tokens"]
    return {
        "vocabulary": vocabulary,
        "width": width,
        "steps": steps,
        "seconds_per_step": seconds,
        "megabytes_seen": seen / 1e6,
        "bits_per_byte": bits,
        "load": os.getloadavg()[0],
    }


def prepare(vocabulary: str) -> tuple[Path, Path]:
    """Token shards of the text and of what is held out."""
    train, validation = OUT / f"english-data-{vocabulary}", OUT / f"english-validation-{vocabulary}"
    how = ["--tokenizer", "bytes"] if vocabulary == "bytes" else ["--train-tokenizer", vocabulary]
    eellm("prepare", "--input", ROOT / "english/text.jsonl", *how, "--out", train)
    eellm("prepare", "--input", ROOT / "english/validation.jsonl", "--tokenizer", train, "--out", validation)
    return train, validation


def run(out_dir: Path, options: dict[str, object]) -> list[dict[str, float]]:
    """Rows of a training run on two processes."""
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "eellm"]
    call(*launcher, "train", ROOT / "recipes/english.toml", "--train.out_dir", out_dir, *words)
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def eellm(*words: object) -> None:
    call("-m", "eellm", *words)


def call(*words: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def text_bytes(path: Path) -> int:
    """Bytes of the documents' text."""
    return sum(len(json.loads(line)["text"].encode()) for line in path.read_text(encoding="utf-8").splitlines())


def show(results: list[dict[str, object]]) -> None:
    table = Table("vocabulary", "width", "steps", "s/step", "MB seen", "bits per byte: exits, final", "load")
    for row in results:
        bits = ", ".join(f"{value:.3f}" for value in row["bits_per_byte"].values())
        numbers = (f"{row['seconds_per_step']:.2f}", f"{row['megabytes_seen']:.1f}", bits, f"{row['load']:.1f}")
        table.add_row(str(row["vocabulary"]), str(row["width"]), str(row["steps"]), *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
