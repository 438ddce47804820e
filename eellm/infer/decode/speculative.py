"""Lossless self-speculation: early exits draft, the rest of the model judges the drafts in one pass.

A round starts with the last token emitted. Its row, and those of the drafts after it, wait at the exit that drafted;
when an exit isn't sure, or enough is drafted, all of them go on together, and the final exit judges each. Accepted
drafts are emitted, and so is one token of the final exit's own: in place of the first wrong draft or, where the last
row drafted nothing, after it. Rows behind the first wrong draft are cropped. Drafts that repeat what followed the
same words earlier, here or in a finished text, cost no exit: their rows enter together and go straight to the end.

Tokens are those of full depth, sampled ones too: a draft is right where it is the token that the final exit chooses by
itself. At a place of the answer both choose with the same luck, which is why they mostly agree (`eellm.infer.luck`;
drafter-invariant speculation, arXiv 2408.07978). So no token depends on what was drafted, by whom, or how much; with
min(1, p / q) (arXiv 2211.17192) only its distribution would not. With `typical` = ε above 0, a draft is right where
p(t) >= ε · max p as well: not lossless, longer runs.
Sources: LayerSkip (arXiv 2404.16710) drafts with an exit; that rows are kept where they stopped is EE-LLM §4.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eellm.infer.decode.drafting import Drafting
from eellm.infer.readout import Reading
from eellm.infer.sequence import Sequence as Served


@dataclass(frozen=True)
class Draft:
    """A token that waits to be judged."""

    token: int
    layer: int
    """Of the exit that drafted it; the last layer for one that was looked up."""


class Speculative:
    def __init__(
        self, thresholds: Mapping[int, float], drafting: Drafting, *, max_deferred: int, typical: float
    ) -> None:
        """thresholds: by the layers of the exits that may draft. drafting: how many tokens, and by whom."""
        self.thresholds = thresholds
        self.exits_in_use = frozenset(thresholds)
        self.max_deferred = max_deferred
        self.typical = typical
        self.drafting = drafting
        self.drafts: list[Draft] = []
        self.num_rows = 1
        """Of this round so far: the last token's, and its drafts'."""

    def exits(self, seq: Served) -> Mapping[int, float]:
        """The newest row is tested until enough is drafted. The prompt's rows and looked up ones draft nothing."""
        layer = self.drafting.layer
        if seq.is_prompt or layer == 0 or len(self.drafts) >= self.drafting.num_drafts:
            return {}
        return {layer: self.thresholds[layer]}

    def at_exit(self, seq: Served, reading: Reading) -> bool:
        draft = Draft(self._choice(seq, reading, len(self.drafts)), reading.layer)
        self.drafts.append(draft)
        if len(self.drafts) == self.drafting.num_drafts and not self.drafting.bonus:
            return False  # the row goes on to be judged; the last draft's own row would only bring a token more
        seq.pending = [draft.token]
        self.num_rows += 1
        return True

    def num_readings(self, seq: Served) -> int:
        return self.num_rows

    def at_end(self, seq: Served, readings: Sequence[Reading]) -> None:
        num_right, own = 0, None
        for index, reading in enumerate(readings):
            own = self._choice(seq, reading, index)
            if index == len(self.drafts) or not self._is_right(self.drafts[index], own, reading):
                break  # the last row drafted nothing, or its draft is wrong: the final exit's own token comes there
            num_right, own = num_right + 1, None
        seq.unsure = []
        if not seq.is_prompt:
            self._record(seq, num_right)
        seq.crop(seq.passed[0] - len(readings) + min(num_right + 1, len(readings)))
        for draft, reading in zip(self.drafts[:num_right], readings, strict=False):
            seq.sampler.accept(draft.token)
            seq.emit(draft.token, draft.layer, reading)
        if own is not None:
            reading = readings[num_right]
            seq.sampler.accept(own)
            seq.emit(own, reading.layer, reading)
        self._begin(seq)

    def _choice(self, seq: Served, reading: Reading, index: int) -> int:
        """What an exit chooses behind the first `index` drafts."""
        if seq.sampler.takes_likeliest:
            return reading.token
        return seq.sampler.token(reading.logits_V, [draft.token for draft in self.drafts[:index]])

    def _is_right(self, draft: Draft, own: int, reading: Reading) -> bool:
        """own: the final exit's choice in its place."""
        if self.typical > 0:
            p_V = reading.logits_V.softmax(-1)
            if p_V[draft.token] >= self.typical * p_V.max():
                return True
        return draft.token == own

    def _record(self, seq: Served, num_right: int) -> None:
        """What the round says of its drafter."""
        seq.work.drafted += len(self.drafts)
        seq.work.accepted += num_right
        self.drafting.judged(len(self.drafts), num_right)
        if self.drafting.layer:
            for _ in self.drafts:
                self.drafting.tested(self.drafting.layer, True)
            if len(self.drafts) < self.drafting.num_drafts:  # the last row could have drafted
                self.drafting.tested(self.drafting.layer, False)

    def _begin(self, seq: Served) -> None:
        """Starts a round with the last token emitted."""
        if seq.finish_reason is not None:
            return
        most = min(seq.room - 1, self.max_deferred - 1)
        looked_up = self.drafting.begin(seq.tokens, most, self.thresholds)
        self.drafts = [Draft(token, seq.stops[-1]) for token in looked_up]
        self.num_rows = 1 + len(looked_up)
        seq.pending = [seq.tokens[-1], *looked_up]
