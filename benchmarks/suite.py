"""All benchmarks, one after the other, in one report: bench-out/report.json, report.md and pictures.

    python benchmarks/suite.py [--full] [--only PART ...] [--anew] [--python PYTHON] [--out bench-out] [--list]

`make bench` is the short form, about 20 minutes on two idle cores, `make bench-full` the long one, about six hours;
both are estimates, and what each part took stands in the report. Beforehand the peers are installed into environments
of their own (`peers.py`), some minutes at the first time; --python names one interpreter to use instead, as far as it
has them.

Each part is a script of this directory that runs alone. One that fails or takes too long is a row of the report, with
its last lines; so is a peer that can't be installed. Parts that are done by the same command aren't run again but with
--anew: they are in bench-out/short and bench-out/full. After each part the report is written.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from peers import MODULES, OUT, given, make_peers
from processes import leave_on_sigterm
from rich.console import Console
from rich.table import Table
from suite_parts import PARTS, ROOT, Length, Part
from suite_plots import draw
from suite_report import Report, cells, machine, write
from suite_run import rows_of, run_part

SHOWN = 8
"""Columns of the report that fit into a terminal."""


def main() -> None:
    options = parse()
    length: Length = "full" if options.full else "short"
    parts = chosen(options.only, length)
    if options.list:
        for part in parts:
            print(f"{part.name}: {part.shows}\n    {part.command(length)}")
        return
    leave_on_sigterm()
    report = run(parts, length, options)
    table = Table(title=f"eellm, {length} form", caption=f"{options.out}/report.md")
    for name in ("row", "ours", "theirs", "ratio", "range", "goal", "", "load"):
        table.add_column(name)
    for row in report.rows:
        table.add_row(*cells(row)[:SHOWN])
    Console(width=170).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the long form")
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--anew", action="store_true", help="run parts that are done, too")
    parser.add_argument("--python", metavar="PYTHON", help="has the peers; nothing is installed then")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out")
    parser.add_argument("--list", action="store_true", help="what would run")
    options = parser.parse_args()
    options.out = options.out.resolve()
    return options


def chosen(only: list[str] | None, length: Length) -> list[Part]:
    parts = [part for part in PARTS if part.command(length) is not None]
    if only is None:
        return parts
    if unknown := set(only) - {part.name for part in parts}:
        sys.exit(f"--only: no {', '.join(sorted(unknown))} here; there are {', '.join(part.name for part in parts)}")
    return [part for part in parts if part.name in only]


def run(parts: list[Part], length: Length, options: argparse.Namespace) -> Report:
    """Runs what isn't done yet, and writes the report after each part."""
    directory = options.out / length
    peers_file = options.out / "peers.json" if options.python else OUT / "peers.json"
    directory.mkdir(parents=True, exist_ok=True)
    names = [name for name in MODULES if any(name in part.peers for part in parts)]
    peers = given(names, options.python, peers_file) if options.python else make_peers(names)
    report = Report(head=machine(length), peers=peers, parts=[])
    for number, part in enumerate(parts, start=1):
        print(f"{number} of {len(parts)}: {part.name}", file=sys.stderr)
        outcome = run_part(part, length, directory, peers_file, peers, anew=options.anew)
        rows = rows_of(part, outcome, directory, peers)
        report = replace(report, parts=[*report.parts, (part, outcome, rows)])
        done = {each.name: directory / f"{each.name}.json" for each, how, _ in report.parts if how.status == "done"}
        write(replace(report, pictures=draw(report.rows, options.out, done)), options.out)
    return report


if __name__ == "__main__":
    main()
