"""How fast decoding is on this machine: against other decoders, against memory, against its own full depth.

    python benchmarks/decode.py [MODEL] [--english models/english] [--rows NAME ...] [--peers PYTHON] [--tokens 128]
                                [--rounds 5] [--threads 2] [--gguf FILE] [--text FILE] [--out FILE.json]

Every row is one comparison: two decoders in processes of their own take turns (A B A B …), with the same prompts, new
in each round, the same number of new tokens and the same threads. A rate is tokens over the time of whole calls,
prompts included; the ratio is the median of the ratios round by round. Where a side can be set up in several ways,
peers included, all are tried first and the best counts. Greedy full depth and its lossless methods must give the same
tokens.

MODEL is a Hugging Face directory, by default the one that `make quickstart` made; llama.cpp reads the GGUF file that it
was made from. --english, which may be given several times, names models that were trained with exits. Their exit rules
are chosen on one half of the text that was held out (`make english` fetches it), by what they cost when they generate,
and judged on the other half (`decode_rules`). Beside them stands what the exits allow at all: how fast the best rule
could be if nothing but layers took time.

The limit is memory: the time of the fastest of several ways to read as many bytes as the weights have, in the same
turns, on as many threads, against the time from the first new token to the last.

Peers are pinned in requirements.txt and live in environments of their own (`peers.py` makes them); --peers names its
peers.json, or one interpreter that has all of them. One that can't be imported is reported as missing.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from decode_rows import PROMPT_TOKENS, Decoders, Model, Row, rows_of_any, rows_with_exits
from decode_rules import Rule
from decode_turns import SIDES, MissingError, Turns, Work, take_turns
from peers import MODULES, OUT, Peer, read_peers
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


def main() -> None:
    options = parse()
    rows = chosen_rows(options)
    results: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        print(f"{number} of {len(rows)}: {row.name}", file=sys.stderr)
        results.append(measure(row, options.rounds, options.tokens))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report(results, options), indent=2) + "\n")
    Console(width=150).print(table(results, options))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT / "quickstart/SmolLM2-135M-Instruct"))
    parser.add_argument("--english", action="append", metavar="DIR", help="a model trained with exits (models/english)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these; a name after ':' is that of all models")
    parser.add_argument("--peers", type=Path, default=OUT / "peers.json", metavar="PEERS.json|PYTHON")
    parser.add_argument("--gguf", default=str(ROOT / "quickstart/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--text", type=Path, default=ROOT / "english/validation.jsonl", help="held out from training")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out/decode.json")
    return parser.parse_args()


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    """Those of the table that are asked for, of all models."""
    if options.peers.suffix == ".json":
        peers = read_peers(options.peers)
    else:
        peers = {name: Peer(name=name, python=str(options.peers)) for name in MODULES}

    def decoders(path: str) -> Decoders:
        return Decoders(path=path, threads=options.threads, peers=peers)

    rows = rows_of_any(Model(options.model, None), decoders(options.model), options.gguf)
    for path in options.english or [str(ROOT / "models/english")]:
        rows += rows_with_exits(Model(path, options.text), decoders(path))
    if options.rows is None:
        return rows
    wanted = [row for row in rows if {row.name, row.name.split(":")[-1]} & set(options.rows)]
    unknown = set(options.rows) - {name for row in rows for name in (row.name, row.name.split(":")[-1])}
    if unknown:
        sys.exit(f"--rows: no {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in rows)}")
    return wanted


def measure(row: Row, num_rounds: int, num_tokens: int) -> dict[str, Any]:
    """What came of a row, for JSON. A peer that is missing or fails is part of the result."""
    head = {"row": row.name, "goal": row.goal}
    if missing := row.model.missing:
        return head | {"missing": missing}
    rules = row.model.study.rules(row.bound) if row.bound else []
    ours = row.ours
    if row.bound:
        head["limit"] = {f"head {layers}": row.model.study.limit(row.bound, layers) for layers in (0, 1)}
    if rules:
        (way,) = ours.ways
        ours = replace(ours, ways=tuple(way | rule.settings for rule in rules))
    rounds = row.model.rounds(num_rounds, row.batch * row.groups)
    work = Work(batch=row.batch, num_tokens=num_tokens, measure=row.measure)
    head |= {"ours": asdict(ours), "theirs": asdict(row.theirs), "work": asdict(work)}
    try:
        turns = take_turns(ours, row.theirs, rounds, work)
    except MissingError as missing:
        return head | {"missing": str(missing)}
    except RuntimeError as error:
        return head | {"failed": str(error)}
    return head | outcome(
        row, turns, [rule for rule in rules if rule.settings.items() <= turns.ours[0].settings.items()]
    )


def outcome(row: Row, turns: Turns, rules: list[Rule]) -> dict[str, Any]:
    """rules: the one that was fastest, where there are any."""
    same, ratios = turns.same_tokens, turns.ratios
    kept = all(rule.elsewhere.keeps(row.bound) for rule in rules if row.bound)
    exact = not row.same_tokens or same == 1
    return {
        "ours_tokens_per_s": turns.ours[0].rate,
        "theirs_tokens_per_s": turns.theirs[0].rate,
        "ratio": turns.ratio,
        "ratio_range": [min(ratios), max(ratios)],
        "met": None if row.goal is None else turns.ratio >= row.goal and kept and exact,
        "same_tokens": same,
        "must_be_same": row.same_tokens,
        "rule": asdict(rules[0]) if rules else None,
        "keeps_bound": kept,
        "runs": {
            side: [without_tokens(asdict(runs)) for runs in ways]
            for side, ways in zip(SIDES, (turns.ours, turns.theirs), strict=True)
        },
        "tried": turns.tried,
        "versions": turns.versions,
        "load_average": turns.load,
    }


def without_tokens(runs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in runs.items() if name != "tokens"}


def report(results: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "tokens": options.tokens,
        "threads": options.threads,
        "prompt_tokens": PROMPT_TOKENS,
        "num_cpus": os.cpu_count(),
        "rows": results,
    }


def table(results: list[dict[str, Any]], options: argparse.Namespace) -> Table:
    found = Table(title=f"{options.tokens} new tokens, {options.threads} threads, {options.rounds} rounds")
    found.add_column("row", no_wrap=True)
    for name in ("ours, tokens/s", "theirs", "ratio", "range", "goal"):
        found.add_column(name, justify="right", no_wrap=True)
    for name in ("", "load", "remarks"):
        found.add_column(name)
    for result in results:
        found.add_row(result["row"], *cells(result))
    return found


def cells(result: dict[str, Any]) -> list[str]:
    goal = "" if result["goal"] is None else f"{result['goal']:.2f}"
    for word in ("missing", "failed"):
        if word in result:
            why = result[word].strip().splitlines()[-1]
            return ["", "", "", "", goal, word, "", why]
    low, high = result["ratio_range"]
    before, after = (load[0] for load in result["load_average"])
    return [
        f"{result['ours_tokens_per_s']:.1f}",
        f"{result['theirs_tokens_per_s']:.1f}",
        f"{result['ratio']:.2f}",
        f"{low:.2f}–{high:.2f}",
        goal,
        {True: "met", False: "missed", None: ""}[result["met"]],
        f"{before:.1f}, {after:.1f}",
        remarks(result),
    ]


def remarks(result: dict[str, Any]) -> str:
    words = []
    if rule := result["rule"]:
        quality, chosen = rule["elsewhere"], rule["chosen_on"]
        taus = ", ".join(f"{layer}: {tau:.3f}" for layer, tau in rule["threshold"].items())
        words.append(
            f"{rule['policy']} {taus}: agreement {quality['agreement']:.4f} ({chosen['agreement']:.4f} where chosen), "
            f"bits {quality['more_bits']:+.2%} ({chosen['more_bits']:+.2%})"
        )
        for_nothing, as_layers = result["limit"].values()
        words.append(f"these exits allow {for_nothing:.2f}, or {as_layers:.2f} where asking one takes a layer")
    if not result["keeps_bound"]:
        words.append("the rule doesn't keep its bound on other text")
    if result["same_tokens"] is not None and (result["must_be_same"] or not rule):
        words.append(f"{result['same_tokens']:.1%} of the tokens are the same up to the first that differs")
    for side in SIDES:
        settings = result["runs"][side][0]["settings"]
        if len(result[side]["ways"]) > 1 and not (rule and side == "ours"):
            words.append(f"{side}: {', '.join(f'{k} {v}' for k, v in settings.items())}")
    detail = result["runs"]["theirs"][0]["details"][-1]
    if "GB/s" in detail:
        words.append(f"memory at {detail['GB/s']:.1f} GB/s ({detail['way']})")
    return "; ".join(words)


if __name__ == "__main__":
    main()
