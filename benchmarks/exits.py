"""The paper's small experiments: what exits of each kind learn and cost the final one, and tuning against training.

    python benchmarks/exits.py [--quick] [--steps 1500] [--seeds 3] [--tune-seconds 300] [--text FILE.jsonl …]
                               [--out bench-out/exits.json]

About 90 minutes on two cores; --quick 4 minutes (150 steps, one seed, 15 s): both estimated. A byte-level model of six
layers is trained by this project's own trainer on Python's help texts, or on --text (a .jsonl file, such as
english/text.jsonl), with exits `embed`, `norm`, `mlp` and `layer` after layers 2 and 4 (EE-LLM, arXiv 2312.04916 §2 and
§5), with output matrices of their own, with one exit and with five. Every run has the recipe, seed and data of the one
without exits; what is held back of the text judges every exit as the run goes on.

Then EE-Tuning (arXiv 2402.00518) against training: the model without exits gets `mlp` exits, which learn for so many
seconds on the frozen backbone, or with all its parameters; as many steps as fit at the speed of the first ones.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import eellm
from eellm.checkpoint.export import load_checkpoint
from eellm.config.model import ExitConfig, ModelConfig
from eellm.config.optim import OptimConfig
from eellm.config.train import CheckpointConfig, TextConfig, TrainConfig, TrainLoopConfig
from eellm.config.tune import BaseConfig, DataConfig, LoopConfig, ObjectiveConfig, TuneConfig
from eellm.evaluate.perplexity import evaluate, text_rows
from eellm.parallel.mesh import World
from eellm.train.loop import train
from eellm.train.tune import tune

ROOT = Path(__file__).parents[1]
PLAIN = "no exits"
SEQ_LEN, ROWS = 128, 8
NUM_TIMED_STEPS = 6
HELD_BACK = 20
"""Every so-many-th document judges, and isn't learnt."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the model and of its training."""

    hidden_size: int = 128
    num_layers: int = 6
    steps: int = 1500
    seeds: int = 3
    tune_seconds: float = 300.0
    validation_rows: int = 64


QUICK = Sizes(steps=150, seeds=1, tune_seconds=15.0, validation_rows=32)


def main() -> None:
    options, sizes = parse()
    load, work = os.getloadavg(), options.out.with_suffix("")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    learnt, held_back = write_text(options.text, work)
    result: dict[str, Any] = {"sizes": asdict(sizes), "torch": torch.__version__, "eellm": eellm.__version__}
    result["variants"] = {name: [] for name in variants(sizes)}
    for seed in range(sizes.seeds):
        for name, exits in variants(sizes).items():
            print(f"seed {seed}: {name}")
            recipe = training(sizes, exits, seed, learnt, held_back, work / f"{name}, {seed}")
            result["variants"][name].append(run(recipe))
    result["tuning"] = tune_or_train(sizes, learnt, held_back, work)
    result["load_average"] = [load, os.getloadavg()]
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    Console(width=120).print(table(result))


def parse() -> tuple[argparse.Namespace, Sizes]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--text", type=Path, help="a .jsonl file; unset, Python's help texts")
    names = ("steps", "seeds", "tune_seconds", "hidden_size", "num_layers", "validation_rows")
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(getattr(Sizes(), name)))
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out/exits.json")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return options, replace(QUICK if options.quick else Sizes(), **given)


def write_text(source: Path | None, work: Path) -> tuple[Path, Path]:
    """The documents to learn, and those that are held back."""
    if source is None:
        documents = [topics[name] for name in sorted(topics)]
    else:
        documents = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    files = work / "learnt.jsonl", work / "held-back.jsonl"
    parts = [doc for i, doc in enumerate(documents) if i % HELD_BACK], documents[::HELD_BACK]
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")
    return files


def variants(sizes: Sizes) -> dict[str, tuple[ExitConfig, ...]]:
    """By name; all but the first are compared with it."""
    third, two_thirds = sizes.num_layers // 3, 2 * sizes.num_layers // 3

    def both(**options: Any) -> tuple[ExitConfig, ...]:
        return tuple(ExitConfig(layer=layer, **options) for layer in (third, two_thirds))

    return {
        PLAIN: (),
        "embed, tied": both(kind="embed"),
        "norm, tied": both(kind="norm"),
        "mlp, tied": both(kind="mlp"),
        "layer, tied": both(kind="layer"),
        "norm, own": both(kind="norm", head="own"),
        "one exit": both(kind="norm")[:1],
        "every layer": tuple(ExitConfig(layer=layer, kind="norm") for layer in range(1, sizes.num_layers)),
    }


def training(
    sizes: Sizes, exits: tuple[ExitConfig, ...], seed: int, learnt: Path, held_back: Path, out_dir: Path
) -> TrainConfig:
    model = ModelConfig(
        vocab_size=264,
        hidden_size=sizes.hidden_size,
        intermediate_size=3 * sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=4,
        max_seq_len=SEQ_LEN,
        tie_embeddings=True,
        eos_token_ids=(0,),
        exits=exits,
    )
    text = TextConfig(
        train=(str(learnt),), validation=(str(held_back),), validation_rows=sizes.validation_rows, seq_len=SEQ_LEN
    )
    loop = TrainLoopConfig(
        out_dir=out_dir,
        steps=sizes.steps,
        global_batch_size=ROWS,
        seed=seed,
        evaluate_every=max(1, sizes.steps // 10),
    )
    optim = OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=max(1, sizes.steps // 20))
    return TrainConfig(model=model, data=text, train=loop, optim=optim, checkpoint=CheckpointConfig(every=0))


def run(recipe: TrainConfig) -> dict[str, Any]:
    """What came of it: losses (nats a token) by step and exit, of what is held back."""
    start = time.perf_counter()
    train(recipe, World())
    rows = read_metrics(recipe.train.out_dir)
    curve = [
        {"step": row["step"]} | {name.removeprefix("val_loss/"): row[name] for name in row if "val_loss/" in name}
        for row in rows
        if "val_loss/final" in row
    ]
    losses = {name: value for name, value in curve[-1].items() if name != "step"}
    return {"losses": losses, "curve": curve, "seconds": time.perf_counter() - start}


def read_metrics(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def tune_or_train(sizes: Sizes, learnt: Path, held_back: Path, work: Path) -> dict[str, Any]:
    """Losses after as many seconds of either, judged alike, and of the model that both began with."""
    base = work / "base"
    eellm.save(load_checkpoint(work / f"{PLAIN}, 0"), base)
    exits = variants(sizes)["mlp, tied"]
    recipe = training(sizes, exits, 0, learnt, held_back, work / "trained")
    recipe = replace(recipe, init_from=base, optim=replace(recipe.optim, lr=1e-3, min_lr=1e-4))
    tuning = TuneConfig(
        model=BaseConfig(base=base, exits=exits),
        data=DataConfig(
            train=(learnt,), validation=(held_back,), validation_rows=sizes.validation_rows, seq_len=SEQ_LEN
        ),
        objective=ObjectiveConfig(gate=False),
        optim=recipe.optim,
        train=LoopConfig(out_dir=work / "tuned", batch_size=ROWS, evaluate_every=0, save_every=0),
    )
    judged = {"base": judge(eellm.load(str(base)), held_back, sizes)}
    steps, seconds = {}, {}
    ways: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "tuned": (tuning, tune),
        "trained": (recipe, lambda config: train(config, World())),
    }
    for name, (config, learn) in ways.items():
        steps[name], seconds[name] = learn_for(sizes.tune_seconds, config, learn)
    judged["tuned"] = judge(eellm.load(str(base), str(work / "tuned/adapter")), held_back, sizes)
    judged["trained"] = judge(load_checkpoint(work / "trained"), held_back, sizes)
    return {"losses": judged, "steps": steps, "seconds": seconds}


def learn_for(wanted_s: float, config: Any, learn: Callable[[Any], Any]) -> tuple[int, float]:
    """Steps, and their seconds without what else a run does."""
    loop = config.train
    timing = replace(loop, out_dir=loop.out_dir.with_name(f"{loop.out_dir.name}-timing"), steps=NUM_TIMED_STEPS)
    learn(replace(config, train=replace(timing, evaluate_every=0)))
    steps = max(NUM_TIMED_STEPS, round(wanted_s / median(step_seconds(timing.out_dir)[1:])))
    warmup = replace(config.optim, warmup_steps=max(1, steps // 20))
    learn(replace(config, optim=warmup, train=replace(loop, steps=steps, evaluate_every=0)))
    return steps, sum(step_seconds(loop.out_dir))


def step_seconds(out_dir: Path) -> list[float]:
    return [ROWS * SEQ_LEN / row["tokens_per_s"] for row in read_metrics(out_dir)]


def judge(model: eellm.EarlyExitLM, held_back: Path, sizes: Sizes) -> dict[str, float]:
    """Loss of each exit, in nats a token."""
    rows = text_rows(held_back, model, seq_len=SEQ_LEN, max_tokens=sizes.validation_rows * SEQ_LEN)
    *early, final = evaluate(model, rows, batch_size=ROWS).exits
    return {f"exit_{exit.layer}": exit.nll for exit in early} | {"final": final.nll}


def table(result: dict[str, Any]) -> Table:
    found = Table(title="Loss of what is held back, nats a byte; medians over seeds")
    for name in ("run", "final", "against none", "exits"):
        found.add_column(name, justify="left" if name in ("run", "exits") else "right")
    plain = finals(result["variants"][PLAIN])
    for name, runs in result["variants"].items():
        ratio = median(a / b for a, b in zip(finals(runs), plain, strict=True))
        losses = {exit: median(run["losses"][exit] for run in runs) for exit in runs[0]["losses"]}
        found.add_row(name, f"{losses['final']:.4f}", f"{ratio - 1:+.2%}", words(losses))
    for name, losses in result["tuning"]["losses"].items():
        found.add_row(
            f"{name}: {result['tuning']['seconds'].get(name, 0):.0f} s", f"{losses['final']:.4f}", "", words(losses)
        )
    return found


def finals(runs: Sequence[dict[str, Any]]) -> list[float]:
    return [run["losses"]["final"] for run in runs]


def words(losses: dict[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('exit_')}: {loss:.4f}" for name, loss in losses.items() if name != "final")


if __name__ == "__main__":
    main()
