"""Early exit with true keys and values: KV recomputation (EE-LLM §4.1) that computes nothing twice.

The first exit that is sure enough answers, and its row is deferred there. When more than `max_deferred` rows would
wait, the pass goes on to the last layer; its answer is still the exit's. The prompt goes through every layer. Tokens,
exits and logits are those of a model without any cache, whatever `max_deferred` is. With no exits it is plain
decoding. A token that the shadow sample draws is the exit's all the same, and its row goes on to be held against the
final exit.
"""

from collections.abc import Mapping, Sequence

from eellm.infer.readout import Reading
from eellm.infer.sequence import Sequence as Served
from eellm.infer.shadow import Shadow


class Early:
    def __init__(self, thresholds: Mapping[int, float], *, max_deferred: int, shadow: Shadow | None = None) -> None:
        """thresholds: by the layers of the exits in use; all below 1 (an exit at 1 or above is not in use)."""
        self.thresholds = thresholds
        self.exits_in_use = frozenset(thresholds)
        self.max_deferred = max_deferred
        self.shadow = shadow
        self.checked: int | None = None
        """What an exit chose for the newest row, while that is on its way to be checked."""

    def exits(self, seq: Served) -> Mapping[int, float]:
        return {} if seq.answered else self.thresholds

    def at_exit(self, seq: Served, reading: Reading) -> bool:
        self.answer(seq, reading)
        if self._is_drawn(seq):
            self.checked = reading.token
        return self.checked is None

    def num_readings(self, seq: Served) -> int:
        return 0 if seq.answered and self.checked is None else 1

    def at_end(self, seq: Served, readings: Sequence[Reading]) -> None:
        certificate = seq.request.certificate
        if self.checked is not None:
            assert self.shadow is not None, "it drew the token"
            self.shadow.checked(certificate, is_wrong=readings[0].token != self.checked)
            self.checked = None
            return
        self.answer(seq, readings[0])
        if self.shadow is not None and self._is_drawn(seq):
            self.shadow.went_through(certificate)

    def _is_drawn(self, seq: Served) -> bool:
        return self.shadow is not None and self.shadow.draws() and seq.finish_reason is None

    def answer(self, seq: Served, reading: Reading) -> None:
        """The exit that answers the newest row."""
        seq.answer(reading)
