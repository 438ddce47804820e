"""Early exit that uses only the exits that pay: by where tokens leave when all are asked, and by measured costs.

Now and then a token asks every exit, to know where it would leave. From these, `early_pays` says which exits make
tokens fastest; with none of them a sequence decodes at full depth and loses nothing but those few tokens' tests.
"""

from collections.abc import Mapping

from eellm.infer.costs import StepCosts
from eellm.infer.decode.early import Early
from eellm.infer.guard import early_pays
from eellm.infer.readout import Reading
from eellm.infer.sequence import Sequence as Served
from eellm.infer.shadow import Shadow
from eellm.plan.decode import ExitDistribution

ASK_ALL_EVERY = 32
"""Tokens of a sequence between two that ask every exit."""
FIRST_TOKENS = 16
"""Tokens that ask every exit before anything is known."""
MEMORY = 512
"""Tokens after which one has lost most of its weight."""


class ExitShares:
    """Where tokens leave when all exits are asked, over all sequences of an engine with the same exits and
    thresholds."""

    def __init__(
        self, costs: StepCosts, thresholds: Mapping[int, float], max_deferred: int, *, gated: bool, whole: bool = False
    ) -> None:
        """whole: all exits are used or none, since only all of them together have a certificate."""
        self.costs = costs
        self.whole = whole
        self.max_deferred = max_deferred
        self.gated = gated
        self.batch_size = 1
        """Sequences that are running."""
        self.in_use: Mapping[int, float] = thresholds
        self._thresholds = thresholds
        self._seen = dict.fromkeys((*thresholds, costs.num_layers), 0.0)
        self._num_seen = 0

    @property
    def is_known(self) -> bool:
        return self._num_seen >= FIRST_TOKENS

    def saw(self, layer: int) -> None:
        """A token that asked every exit left here."""
        for known in self._seen:
            self._seen[known] *= 1 - 1 / MEMORY
        self._seen[layer] += 1
        self._num_seen += 1
        if self._num_seen % FIRST_TOKENS == 0:
            total = sum(self._seen.values())
            shares = ExitDistribution(shares={at: seen / total for at, seen in self._seen.items()})
            plan = early_pays(
                shares,
                self.costs,
                batch_size=self.batch_size,
                max_deferred=self.max_deferred,
                gated=self.gated,
                whole=self.whole,
            )
            self.in_use = {at: self._thresholds[at] for at in plan.exits}


class GuardedEarly(Early):
    """As `Early`, with the exits that pay."""

    def __init__(
        self, thresholds: Mapping[int, float], shares: ExitShares, *, max_deferred: int, shadow: Shadow | None = None
    ) -> None:
        super().__init__(thresholds, max_deferred=max_deferred, shadow=shadow)
        self.shares = shares
        self.num_tokens = 0
        self._begin()

    def _begin(self) -> None:
        """The next token's exits; they stay as they are until it has left."""
        self.asks_all = not self.shares.is_known or self.num_tokens % ASK_ALL_EVERY == 0
        self.asked = self.thresholds if self.asks_all else self.shares.in_use

    def exits(self, seq: Served) -> Mapping[int, float]:
        return {} if seq.answered else self.asked

    def answer(self, seq: Served, reading: Reading) -> None:
        if self.asks_all or len(self.asked) == len(self.thresholds):
            self.shares.saw(reading.layer)
        super().answer(seq, reading)
        self.num_tokens += 1
        self._begin()
