"""Early exit with true keys and values: KV recomputation (EE-LLM §4.1) that computes nothing twice.

The first exit that is sure enough answers, and its row is deferred there. When more than `max_deferred` rows would
wait, the pass goes on to the last layer; its answer is still the exit's. The prompt goes through every layer. Tokens,
exits and logits are those of a model without any cache, whatever `max_deferred` is. With no exits it is plain
decoding.
"""

from collections.abc import Mapping, Sequence

from eellm.infer.readout import Reading
from eellm.infer.sequence import Sequence as Served


class Early:
    def __init__(self, thresholds: Mapping[int, float], *, max_deferred: int) -> None:
        """thresholds: by the layers of the exits in use; all below 1 (an exit at 1 or above is not in use)."""
        self.thresholds = thresholds
        self.exits_in_use = frozenset(thresholds)
        self.max_deferred = max_deferred

    def exits(self, seq: Served) -> Mapping[int, float]:
        return {} if seq.answered else self.thresholds

    def at_exit(self, seq: Served, reading: Reading) -> bool:
        self.answer(seq, reading)
        return True

    def num_readings(self, seq: Served) -> int:
        return 0 if seq.answered else 1

    def at_end(self, seq: Served, readings: Sequence[Reading]) -> None:
        self.answer(seq, readings[0])

    def answer(self, seq: Served, reading: Reading) -> None:
        """The exit that answers the newest row."""
        seq.answer(reading)
