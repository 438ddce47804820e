"""The rows of training, planning and the paper's experiments: from a script's JSON to `Row`s."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from suite_rows import Peers, Row, compared, judged, load_of

POINTS = 3.0
"""By which a measured overhead may miss its prediction."""
MOST_AT_64 = 1.02
"""An exit's most at the end of stage 0, at 64 microbatches."""
TIME, MEMORY = 0.01, 0.05
"""By which the planner may miss the paper's table."""
MORE_LOSS = 1.01
"""What exits may cost the final one."""
PLAIN, REFERENCE = "no exits", "norm, tied"
"""Of `exits.py`: the run that all are compared with, and the one whose exits are the English model's."""


def table_rows(data: Any, peers: Peers) -> list[Row]:
    """Of `paper_table.py`: ours is predicted, theirs is printed."""
    rows = []
    for row in data["rows"]:
        for column, unit, most in (("iteration_s", "s", TIME), ("memory_gb", "GiB", MEMORY)):
            ours, theirs = row[column], row[f"paper_{column}"]
            what = "an iteration" if unit == "s" else "memory"
            rows.append(
                Row(
                    name=f"Table 1: {row['model']} {row['setup']}, {what}",
                    status=judged(abs(ours / theirs - 1) <= most),
                    ours=ours,
                    theirs=theirs,
                    unit=unit,
                    ratio=ours / theirs,
                    goal=f"1 ± {most:g}",
                )
            )
    return rows


def overhead_rows(data: Any, peers: Peers) -> list[Row]:
    """Of `train_overhead.py`, P = 2, whole iterations in turns."""
    rows = []
    for result in data["results"]:
        number, predicted = result["num_microbatches"], result["predicted"]
        row = compared(
            f"training: an exit on stage 0 of 2, {number} microbatches",
            result["exit_s"],
            result["plain_s"],
            unit="s",
            remarks=f"with the exit against without; predicted {1 + predicted:.3f}",
            load=load_of(data),
        )
        assert row.ratio is not None
        met, goal = abs(row.ratio - 1 - predicted) <= POINTS / 100, f"{1 + predicted:.3f} ± {POINTS / 100:g}"
        if number == 64:
            met, goal = row.ratio <= MOST_AT_64, f"≤ {MOST_AT_64:g}"
        rows.append(replace(row, status=judged(met), goal=goal))
    return rows


def memory_rows(data: Any, peers: Peers) -> list[Row]:
    """Of `train_memory.py`: what deferred exits add to the stage that holds most, in chunks of logits."""
    plain = data["peaks"][PLAIN]
    rows = []
    for name, stages in data["peaks"].items():
        if name == PLAIN:
            continue
        added = [growth / data["chunk_bytes"] for growth in data["growth"][name]]
        ours, theirs = (max(peak["step"] + peak["held"] for peak in each) / 1e6 for each in (stages, plain))
        met = max(added) <= 1.2 if name == "deferred, chunked" else None
        rows.append(
            Row(
                name=f"training: memory, exits {name}",
                status=judged(met),
                ours=ours,
                theirs=theirs,
                unit="MB",
                ratio=ours / theirs,
                goal=None if met is None else "at most 1.2 chunks more on a stage",
                remarks="the highest stage, with the exits' own parameters; grows by "
                + ", ".join(f"{chunks:.2f}" for chunks in added)
                + " chunks of logits, by stage",
            )
        )
    return rows


def peer_rows(data: Any, peers: Peers) -> list[Row]:
    """Of `train_peers.py`: tokens per second of whole steps."""
    tokens = data["seq_len"] * data["batch_size"]
    ours = [tokens / seconds for seconds in data["seconds"]["eellm"]]
    rows = []
    for name in ("transformers", "torchtitan"):
        row_name = f"training: against {name}, {data['seq_len']} tokens"
        if name not in data["seconds"]:
            why = peers["torchtitan"].missing or "it can't be imported where the others run"
            rows.append(Row(name=row_name, status="missing", unit="tokens/s", remarks=why))
            continue
        theirs = [tokens / seconds for seconds in data["seconds"][name]]
        versions = {"torch": data["torch"], "transformers": data["transformers"]}
        if name == "torchtitan":
            versions = peers["torchtitan"].versions
        rows.append(compared(row_name, ours, theirs, unit="tokens/s", load=load_of(data), versions=versions))
    return rows


def filled_rows(data: Any, peers: Peers) -> list[Row]:
    return [
        compared(
            f"training: filled bubbles, {result['num_microbatches']} microbatches and {result['num_extra']} more",
            result["filled_s"],
            result["plain_s"],
            unit="s",
            remarks="filled_1f1b against 1f1b",
            load=load_of(data),
        )
        for result in data["results"]
    ]


def plan_rows(data: Any, peers: Peers) -> list[Row]:
    """Of `plan_accuracy.py`: what an exit adds, measured and simulated."""
    return [
        Row(
            name=f"planning: what an exit adds, {result['num_microbatches']} microbatches",
            status=judged(abs(result["points"]) <= POINTS),
            ours=result["predicted"],
            theirs=result["ratio"],
            unit="×",
            ratio=result["predicted"] / result["ratio"],
            goal=f"within {POINTS:g} points",
            remarks=f"simulated against measured, {min(result['ratios']):.3f} to {max(result['ratios']):.3f}",
            load=load_of(data),
        )
        for result in data["results"]
    ]


def exit_rows(data: Any, peers: Peers) -> list[Row]:
    """Of `exits.py`: the final exit's loss against that of the run without exits, and tuning against training."""
    variants, load = data["variants"], load_of(data)
    plain = [run["losses"]["final"] for run in variants[PLAIN]]
    rows = []
    for name, runs in variants.items():
        if name != PLAIN:
            finals = [run["losses"]["final"] for run in runs]
            goal = MORE_LOSS if name == REFERENCE else None
            words = f"exits: {_losses(runs)}; {len(runs)} seed{'s' if len(runs) > 1 else ''}"
            fields = {"unit": "nats", "at_most": goal, "remarks": words, "load": load}
            rows.append(compared(f"exits: {name}, the final one's loss", finals, plain, **fields))
    return rows + _tuning_rows(data["tuning"], load)


def _losses(runs: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in runs[0]["losses"] if name != "final"]
    values = {name.removeprefix("exit_"): median(run["losses"][name] for run in runs) for name in names}
    return ", ".join(f"{layer}: {value:.3f}" for layer, value in values.items())


def _tuning_rows(tuning: Mapping[str, Any], load: Any) -> list[Row]:
    losses, seconds = tuning["losses"], tuning["seconds"]
    words = ", ".join(f"{name} {tuning['steps'][name]} steps in {seconds[name]:.0f} s" for name in seconds)
    rows = []
    for name, theirs in losses["trained"].items():
        remarks = words
        if name == "final":
            remarks += f"; before both {losses['base']['final']:.3f}: tuning leaves it as it was"
        fields = {"unit": "nats", "load": load, "remarks": remarks}
        title = f"EE-Tuning against full-parameter training: {name.replace('_', ' ')}"
        rows.append(compared(title, [losses["tuned"][name]], [theirs], **fields))
    return rows


def curve_rows(data: Any, peers: Peers) -> list[Row]:
    """Of `curves.py`: the fastest point of each curve that keeps 98% agreement."""
    rows = []
    for name, curve in data["curves"].items():
        kept = [point for point in curve["points"] if point["agreement"] >= 0.98]
        best = max(kept or curve["points"], key=lambda point: point["measured"]["speedup"])
        measured = best["measured"]
        low, high = measured["speedup_range"]
        remarks = f"τ {best['threshold']:g}, mean exit layer {measured['mean_exit_layer']:.1f} of {curve['num_layers']}"
        if not kept:
            remarks += "; no point of the curve keeps 98%"
        rows.append(
            Row(
                name=f"quality–speed: {name}, at {best['agreement']:.1%} agreement",
                status="measured",
                ours=measured["tokens_per_s"],
                theirs=curve["full_tokens_per_s"],
                unit="tokens/s",
                ratio=measured["speedup"],
                ratio_range=(low, high),
                remarks=remarks,
                load=load_of(data),
                versions=data["versions"],
            )
        )
    return rows


def english_rows(data: Any, peers: Peers) -> list[Row]:
    """Of `english_pair.py`."""
    plain, exits = data["losses"]["plain"], data["losses"]["exits"]
    words = ", ".join(f"{name.removeprefix('exit_')}: {loss:.3f}" for name, loss in exits.items() if name != "final")
    return [
        compared(
            "exits: the English model, the final one's loss",
            [exits["final"]],
            [plain["final"]],
            unit="nats",
            at_most=MORE_LOSS,
            remarks=f"with exits against the same recipe without; its exits: {words}",
            load=load_of(data),
            versions=data["versions"],
        )
    ]


def quality_rows(data: Any, peers: Peers) -> list[Row]:
    """Of `quality.py`: the fastest threshold without a measurable loss, and what that was judged by."""
    best, name = data["no_loss"], data["model"].rstrip("/").split("/")[-1]
    fields: dict[str, Any] = {"load": load_of(data), "versions": data["versions"], "unit": "tokens/s"}
    title, theirs = f"quality: {name}, speed-up at no measurable loss", data["full_tokens_per_s"]
    if best is None:
        words = "at full depth: no threshold was shown to be without a loss"
        return [Row(name=title, status="measured", ours=theirs, theirs=theirs, ratio=1.0, remarks=words, **fields)]
    changes = [_change(measure) for measure in best["measures"]]
    words = f"{data['policy']}, τ {best['threshold']:g}, {best['early']:.0%} leave early; " + "; ".join(changes)
    low, high = best["speedup_range"]
    ours, ratio = theirs * best["speedup"], best["speedup"]
    more = {"ratio": ratio, "ratio_range": (low, high), "remarks": words}
    return [Row(name=title, status="measured", ours=ours, theirs=theirs, **more, **fields)]


def _change(measure: Mapping[str, Any]) -> str:
    low, high = measure["change_interval"]
    return f"{measure['measure']} {measure['value']:.3g}, {measure['change']:+.2g} ({low:+.2g} to {high:+.2g})"
