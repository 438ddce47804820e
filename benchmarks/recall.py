"""What looking drafts up in finished texts saves: tokens a deep pass, with the engine's recall and without.

    python benchmarks/recall.py [MODEL ...] [--prompts 40] [--tokens 128] [--text english/validation.jsonl]
                                [--threads 2] [--out bench-out/recall.json]

Two engines of one process answer the same prompts in turns, one prompt after the other, by `speculative`; one of them
remembers its answers (`Engine(recall=)`). The prompts are from evenly spaced places of text that the models never
learnt (`python examples/english_text.py` fetches it), all different, so what is recalled are turns of phrase, not
answers. Tokens must be the same. Also measured is time: the ratio of the rates, prompt by prompt.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from decode_rows import PROMPT_TOKENS
from decode_rules import spread
from rich.console import Console
from rich.table import Table

import eellm
from eellm.data.documents import read_documents

ROOT = Path(__file__).parents[1]
CAPACITY = 32768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [ROOT / "models/english", ROOT / "models/english-bytes"]
    parser.add_argument("models", nargs="*", type=Path, default=models, metavar="MODEL")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=128, help="new ones of each prompt")
    parser.add_argument("--text", type=Path, default=ROOT / "english/validation.jsonl", help="held out from training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out/recall.json")
    options = parser.parse_args()
    if not options.text.is_file():
        sys.exit(f"{options.text}: no such file; `python examples/english_text.py` fetches it")
    torch.set_num_threads(options.threads)
    load = os.getloadavg()
    rows = {path.name: measure(path, options.text, options.prompts, options.tokens) for path in options.models}
    versions = {"eellm": eellm.__version__, "torch": torch.__version__}
    settings = {"prompts": options.prompts, "tokens": options.tokens, "threads": options.threads, "capacity": CAPACITY}
    result = {"models": rows, "settings": settings, "versions": versions, "load_average": [load, os.getloadavg()]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    Console(width=120).print(table(rows))


def measure(path: Path, text: Path, num_prompts: int, num_tokens: int) -> dict[str, Any]:
    """Both engines on the same prompts, in turns."""
    model = eellm.load(str(path))
    prompts = prompts_of(model, text, num_prompts)
    runs: dict[int, list[tuple[eellm.Generation, float]]] = {0: [], CAPACITY: []}
    with eellm.Engine(model, max_batch=1, recall=0) as plain, eellm.Engine(model, max_batch=1, recall=CAPACITY) as ours:
        for engine in (plain, ours):
            engine.generate([prompts[0][:1]], method="speculative", max_new_tokens=8)  # costs are measured
        for number, prompt in enumerate(prompts):
            for engine in (plain, ours)[:: 1 if number % 2 else -1]:
                runs[engine.recall.capacity].append(answered(engine, prompt, num_tokens))
    without, with_recall = runs[0], runs[CAPACITY]
    ratios = [before / after for (_, before), (_, after) in zip(without, with_recall, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {
        "tokens_a_deep_pass": {"without": a_deep_pass(without), "with": a_deep_pass(with_recall)},
        "accepted": {"without": accepted(without), "with": accepted(with_recall)},
        "rate_ratio": {"median": median(ratios), "quartiles": [low, high]},
        "same_tokens": all(a.tokens == b.tokens for (a, _), (b, _) in zip(without, with_recall, strict=True)),
    }


def prompts_of(model: eellm.EarlyExitLM, text: Path, num_prompts: int) -> list[list[int]]:
    assert model.tokenizer is not None, "the models of this benchmark have tokenizers"
    tokens = [int(token) for document in read_documents([text], model.tokenizer) for token in document.tokens]
    return spread(tokens, num_prompts=num_prompts, num_tokens=PROMPT_TOKENS)


def answered(engine: eellm.Engine, prompt: list[int], num_tokens: int) -> tuple[eellm.Generation, float]:
    """The answer, and its seconds."""
    start = time.perf_counter()
    (out,) = engine.generate([prompt], method="speculative", max_new_tokens=num_tokens, ignore_eos=True)
    return out, time.perf_counter() - start


def a_deep_pass(runs: Sequence[tuple[eellm.Generation, float]]) -> float:
    return sum(out.stats.new_tokens for out, _ in runs) / sum(out.stats.deep_passes for out, _ in runs)


def accepted(runs: Sequence[tuple[eellm.Generation, float]]) -> float:
    """Share of the drafts that were right."""
    return sum(out.stats.accepted for out, _ in runs) / max(sum(out.stats.drafted for out, _ in runs), 1)


def table(rows: dict[str, dict[str, Any]]) -> Table:
    made = Table("model", "tokens a deep pass", "with recall", "drafts right", "with recall", "rate, ×", "same tokens")
    for name, row in rows.items():
        passes, right, rate = row["tokens_a_deep_pass"], row["accepted"], row["rate_ratio"]
        low, high = rate["quartiles"]
        made.add_row(
            name,
            f"{passes['without']:.2f}",
            f"{passes['with']:.2f}",
            f"{right['without']:.0%}",
            f"{right['with']:.0%}",
            f"{rate['median']:.2f} ({low:.2f} to {high:.2f})",
            "yes" if row["same_tokens"] else "NO",
        )
    return made


if __name__ == "__main__":
    main()
