"""Quality against speed over thresholds, by recomputation and by the pipeline (EE-LLM, arXiv 2312.04916 §4 and §5).

    python benchmarks/curves.py [MODEL ...] [--quick] [--text english/validation.jsonl] [--out bench-out/curves.json]

Both methods have one thread for each process, `pipelined` two processes; every run stands between two at full depth of
one process and one thread (`eellm.evaluate.curve`). Quality is of what the model never learnt (`python
examples/english_text.py` fetches it), teacher-forced, and the same for both: they give the same tokens.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import eellm
from eellm.evaluate.curve import CurveConfig, measure_curve
from eellm.evaluate.perplexity import evaluate, text_rows
from eellm.evaluate.tables import CURVE_LEGEND, curve_cells

ROOT = Path(__file__).parents[1]
METHODS = {
    "early": CurveConfig(num_prompts=6, new_tokens=96),
    "pipelined": CurveConfig(num_prompts=6, new_tokens=96, method="pipelined", workers=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, default=[ROOT / "models/english"])
    parser.add_argument("--text", type=Path, default=ROOT / "english/validation.jsonl", help="held out from training")
    parser.add_argument("--max-tokens", type=int, default=20_000, help="of the text")
    parser.add_argument("--quick", action="store_true", help="two prompts, five thresholds")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out/curves.json")
    options = parser.parse_args()
    if not options.text.is_file():
        sys.exit(f"{options.text}: no such file; `python examples/english_text.py` fetches it")
    torch.set_num_threads(1)
    load, curves, console = os.getloadavg(), {}, Console(width=100)
    for path in options.models:
        model = eellm.load(str(path))
        rows = text_rows(options.text, model, seq_len=512, max_tokens=options.max_tokens)
        table = evaluate(model, rows, batch_size=4).table
        for name, config in METHODS.items():
            if options.quick:
                config = replace(config, num_prompts=2, thresholds=(1.0, 0.8, 0.6, 0.4, 0.2))
            curve = measure_curve(model, rows, table, config).as_json()
            curves[f"{path.name}: {name}"] = curve
            console.print(curve_cells(curve).as_rich(f"{path.name}, {name}"))
    console.print(CURVE_LEGEND, highlight=False)
    versions = {"eellm": eellm.__version__, "torch": torch.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"curves": curves, "versions": versions, "load_average": [load, os.getloadavg()]}
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
