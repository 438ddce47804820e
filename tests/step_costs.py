"""Made-up costs of a model's parts: so much for a layer or a head, and so much more for each row beyond the first."""

from eellm.infer.costs import MEASURED_ROWS, Curve, StepCosts


def curve(first_s, row_s=0.0):
    return Curve(MEASURED_ROWS, tuple(first_s + row_s * (rows - 1) for rows in MEASURED_ROWS))


def step_costs(
    stops, *, layer_s=1.0, layer_row_s=0.0, head_s=1.0, head_row_s=0.0, gate_s=0.01, exit_s=None, overhead_s=0.0
):
    """exit_s: heads by layer, where they aren't all `head_s`."""
    heads_s = dict.fromkeys(stops, head_s) | (exit_s or {})
    return StepCosts(
        stops=stops,
        segment_s=tuple(
            curve((stop - before) * layer_s, (stop - before) * layer_row_s)
            for before, stop in zip((0, *stops[:-1]), stops, strict=True)
        ),
        head_s={stop: curve(seconds, head_row_s) for stop, seconds in heads_s.items()},
        gate_s={stop: curve(gate_s) for stop in stops[:-1]},
        overhead_s=overhead_s,
    )
