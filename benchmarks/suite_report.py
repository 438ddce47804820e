"""What the suite found, in words: `report.json` with everything, `report.md` to be read.

The Markdown has a table for each part, with its command above and each row's versions and load in it; the JSON has all
of that in every row.
"""

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peers import Peer, describe
from suite_parts import Length, Part
from suite_rows import Row
from suite_run import Outcome, code_version

import eellm

COLUMNS = ("", "ours", "theirs", "ratio", "range", "goal", "", "load", "remarks", "versions")
ORDER = ("met", "missed", "measured", "missing", "failed")
LONG = 32
"""Characters of a version (llama.cpp's names its instruction sets) that only the JSON has."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of one run of the suite."""

    head: dict[str, Any]
    """The machine, the code, the time."""
    peers: Mapping[str, Peer]
    parts: Sequence[tuple[Part, Outcome, list[Row]]]
    pictures: Sequence[str] = ()
    """File names, beside the report."""

    @property
    def rows(self) -> list[Row]:
        return [row for _, _, rows in self.parts for row in rows]

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(row.status for row in self.rows)
        return {status: found[status] for status in ORDER if found[status]}

    def as_json(self) -> dict[str, Any]:
        return {
            "head": self.head,
            "counts": self.counts,
            "peers": {name: asdict(peer) for name, peer in self.peers.items()},
            "parts": [asdict(outcome) | {"shows": part.shows} for part, outcome, _ in self.parts],
            "rows": [asdict(row) | {"versions": {"eellm": eellm.__version__} | row.versions} for row in self.rows],
            "pictures": list(self.pictures),
        }


def machine(length: Length) -> dict[str, Any]:
    """Of this machine and this checkout."""
    import torch

    return {
        "length": length,
        "code": code_version(),
        "eellm": eellm.__version__,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "time": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()


def write(report: Report, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    (directory / "report.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: Report) -> str:
    head = report.head
    lines = [
        f"# Benchmarks of eellm, {head['length']} form",
        "",
        f"{head['cpu']}, {head['cores']} cores, {head['memory_gib']} GiB; Python {head['python']}, "
        f"torch {head['torch']}; code {head['code']}; {head['time']}.",
        "",
        f"{len(report.rows)} rows: "
        + ", ".join(f"{number} {status}" for status, number in report.counts.items())
        + ". "
        "A ratio is ours over theirs, the median of those round by round, beside how far they reach; the load is the "
        "average over a minute, before and after. Without a goal a row is measured, not judged. docs/benchmarks.md "
        "says what each row is.",
        "",
        *_table(("peer", "versions"), ((name, _peer(peer)) for name, peer in report.peers.items())),
        "",
    ]
    for part, outcome, rows in report.parts:
        lines += [f"## {part.shows}", ""]
        if outcome.command:
            lines += [f"`{outcome.command}`: {outcome.status} in {outcome.seconds:.0f} s, code {outcome.code}", ""]
        lines += [*_table(COLUMNS, map(cells, rows)), ""]
    for name in report.pictures:
        lines += [f"![{Path(name).stem}]({name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _peer(peer: Peer) -> str:
    return f"missing: {peer.missing}" if peer.python is None else describe(peer.versions)


def cells(row: Row) -> tuple[str, ...]:
    """In the order of COLUMNS."""
    versions = {"eellm": eellm.__version__} | row.versions
    return (
        row.name,
        _value(row.ours, row.unit),
        _value(row.theirs, row.unit),
        "" if row.ratio is None else f"{row.ratio:.3g}",
        "" if row.ratio_range is None else f"{row.ratio_range[0]:.3g} to {row.ratio_range[1]:.3g}",
        row.goal or "",
        row.status,
        "" if row.load is None else f"{row.load[0]:.1f}, {row.load[1]:.1f}",
        row.remarks,
        describe({name: version for name, version in versions.items() if len(version) <= LONG}),
    )


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown's; what would break out of a cell is written so that it can't."""
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    for row in rows:
        cells = [cell.replace("|", "\\|").replace("\n", "<br>") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
