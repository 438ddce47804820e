"""EE-LLM's Table 1 (arXiv 2312.04916) as the planner predicts it, beside the paper's figures; in a second.

python benchmarks/paper_table.py [--out bench-out/paper_table.json]
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from eellm.plan.paper import paper_table

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out/paper_table.json")
    options = parser.parse_args()
    rows = paper_table()
    for row in rows:
        print(
            f"{row.model:>5} {row.setup:<9} {row.iteration_s:6.2f} s ({row.paper_iteration_s:.2f})  "
            f"{row.memory_gb:6.2f} GiB ({row.paper_memory_gb:.2f})"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"rows": [asdict(row) for row in rows], "load_average": [os.getloadavg()] * 2}
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
