"""What the parts of decoding take on this machine, as measured, for any number of rows. Without torch.

A pass runs the rows of all its sequences through the layers between two *stops* (the exits' layers, and the last one);
then a head reads some of them. Between the numbers of rows that were measured times are interpolated, beyond the last
they go on as steeply as before. Nothing is assumed of their form: few rows can be slower than more.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np

from eellm.errors import ConfigError

MEASURED_ROWS = (1, 2, 4, 8, 16, 32, 64)
_FAR = 1_000_000


@dataclass(frozen=True)
class Curve:
    """Seconds by rows."""

    rows: tuple[int, ...]
    """Where it was measured, ascending."""
    seconds: tuple[float, ...]
    """Above 0, one for each."""

    def __post_init__(self) -> None:
        if not self.rows or len(self.rows) != len(self.seconds):
            raise ConfigError(f"step costs: {len(self.rows)} numbers of rows with {len(self.seconds)} times")
        if self.rows[0] < 1 or any(more <= rows for rows, more in zip(self.rows, self.rows[1:], strict=False)):
            raise ConfigError(f"step costs: rows {self.rows} must ascend from at least 1")
        if not all(seconds > 0 for seconds in self.seconds):  # NaN fails the comparison
            raise ConfigError(f"step costs: seconds {self.seconds} must be above 0")

    def at(self, rows: float) -> float:
        """Seconds for so many rows; as for the fewest measured where there are fewer."""
        known, seconds = self._points
        right = bisect_right(known, rows)
        if right == 0:
            return seconds[0]
        left, right = right - 1, min(right, len(known) - 1)
        share = (rows - known[left]) / max(known[right] - known[left], 1)
        return seconds[left] + share * (seconds[right] - seconds[left])

    def at_each(self, rows: np.ndarray) -> np.ndarray:
        """`at` for many numbers of rows at once."""
        return np.interp(rows, *self._points)

    @cached_property
    def _points(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """What was measured, and a point far beyond on the same line."""
        slope = 0.0
        if len(self.rows) > 1:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.rows[-1] - self.rows[-2])
        far = self.rows[-1] + _FAR
        return (*self.rows, far), (*self.seconds, self.seconds[-1] + max(slope, 0.0) * _FAR)  # NOTE slopes have noise


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Of one model on one machine."""

    stops: tuple[int, ...]
    """Layers of the exits in order, and the last layer."""
    segment_s: tuple[Curve, ...]
    """Up to each stop from the one before; all measured for the same numbers of rows."""
    head_s: Mapping[int, Curve]
    """By stop: from hidden states to the answers and their scores, an exit's own layers included."""
    gate_s: Mapping[int, Curve] = field(default_factory=dict)
    """By layer, of the exits with a gate: from hidden states to scores, without answers."""
    overhead_s: float
    """Of each pass, whatever its layers and rows. A single row goes on from stop to stop in the same pass."""

    def __post_init__(self) -> None:
        if len(self.segment_s) != len(self.stops) or set(self.head_s) != set(self.stops):
            raise ConfigError(
                f"step costs: stops {self.stops} with {len(self.segment_s)} segments and heads {sorted(self.head_s)}"
            )
        if len({curve.rows for curve in self.segment_s}) != 1:
            raise ConfigError("step costs: the segments were measured for different numbers of rows")
        if not self.overhead_s >= 0:
            raise ConfigError(f"step costs: overhead_s = {self.overhead_s!r} must be at least 0")

    @property
    def num_layers(self) -> int:
        return self.stops[-1]

    def range_s(self, start: int, end: int) -> Curve:
        """One pass from stop `start` (0: the embedding) to stop `end`."""
        return self._ranges[start, end]

    def pass_s(self, start: int, end: int, rows: float) -> float:
        """Rows from stop `start` (0: the embedding) to stop `end`, in one pass."""
        return self._ranges[start, end].at(rows)

    def test_s(self, layer: int, tested: float, sure: float, *, gated: bool = False) -> float:
        """Testing an exit on some rows, of which some are answered; `gated`: only these see the head."""
        if not gated:
            return self.head_s[layer].at(tested) if tested > 0 else 0.0
        return (self.gate_s[layer].at(tested) if tested > 0 else 0.0) + (
            self.head_s[layer].at(sure) if sure > 0 else 0.0
        )

    def full_s(self, batch_size: int, num_rows: int = 1) -> float:
        """A pass through all layers with `num_rows` rows of each sequence, all of which the final head reads."""
        rows = batch_size * num_rows
        return self.pass_s(0, self.num_layers, rows) + self.head_s[self.num_layers].at(rows)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "StepCosts":
        """Raises ConfigError for what `to_json` didn't write."""
        try:
            fields = json.loads(text)
            return cls(
                stops=tuple(fields["stops"]),
                segment_s=tuple(map(_curve, fields["segment_s"])),
                head_s={int(layer): _curve(curve) for layer, curve in fields["head_s"].items()},
                gate_s={int(layer): _curve(curve) for layer, curve in fields["gate_s"].items()},
                overhead_s=fields["overhead_s"],
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"step costs can't be read ({error!r}); delete the file to have them measured anew"
            ) from error

    @cached_property
    def _ranges(self) -> dict[tuple[int, int], Curve]:
        """By the stops in front and at the end."""
        ranges, rows = {}, self.segment_s[0].rows
        for first, start in enumerate((0, *self.stops[:-1])):
            seconds = [self.overhead_s if start == 0 or n > 1 else 0.0 for n in rows]
            for segment in range(first, len(self.stops)):
                seconds = [s + more for s, more in zip(seconds, self.segment_s[segment].seconds, strict=True)]
                ranges[start, self.stops[segment]] = Curve(rows, tuple(seconds))
        return ranges


def _curve(fields: Mapping[str, list[float]]) -> Curve:
    return Curve(tuple(map(int, fields["rows"])), tuple(map(float, fields["seconds"])))
