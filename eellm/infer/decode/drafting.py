"""How much a sequence drafts in its next round, and by whom: what was right so far, against what it costs.

Every drafter, an exit or looking up, has a running estimate of how likely its drafts are right; of looking up, each
length of match has one, since short matches are right much less often. Each round takes the drafter that makes tokens
fastest by the measured costs, with the length that does; none, where plain decoding is as fast. Then a round is drafted
all the same now and then, so that the estimates don't go stale (field notes C2).
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from eellm.infer.costs import StepCosts
from eellm.infer.drafts import Acceptance, DraftPlan, best_draft, best_lookup
from eellm.infer.lookup import LENGTHS, NOTHING, Found, Lookup, Recall

MARGIN = 0.03
"""How much faster than plain decoding drafting must be, under the guard."""
PROBE_EVERY = 48
"""Rounds without a draft, after which one is drafted to see."""
HOPE = 0.85
"""How likely a drafter's first drafts are taken to be right: more than they are, so that each is tried."""
GRID = 32
"""Probabilities are rounded to multiples of a thirty-second, so that plans are worked out once."""


class Drafters:
    """What all sequences of an engine have found out about drafting: where a new one starts from."""

    def __init__(self, costs: StepCosts, recall: Recall) -> None:
        """recall: of the texts that are finished."""
        self.costs = costs
        self.recall = recall
        self.batch_size = 1
        """Sequences that are running: they share a pass."""
        self.right = {layer: Acceptance(HOPE, weight=2.0) for layer in costs.stops[:-1]}
        """By the exit that drafts."""
        self.matched = {length: Acceptance(HOPE, weight=2.0) for length in LENGTHS}
        """Of what was looked up, by the length of the match."""
        self.sure = {layer: Acceptance(prior=0.5) for layer in costs.stops[:-1]}
        """How often an exit is sure enough of a row to draft."""
        self.plan_exit = lru_cache(maxsize=4096)(self._plan_exit)
        self.plan_lookup = lru_cache(maxsize=4096)(self._plan_lookup)

    def _plan_exit(
        self, layer: int, right: int, sure: int, max_draft: int, batch_size: int, margin: float
    ) -> DraftPlan:
        return best_draft(
            right / GRID,
            self.costs,
            layer,
            max_draft,
            sure=max(sure, 1) / GRID,
            batch_size=batch_size,
            margin=margin,
        )

    def _plan_lookup(self, right: int, max_draft: int, batch_size: int, margin: float) -> DraftPlan:
        return best_lookup(right / GRID, self.costs, max_draft, batch_size=batch_size, margin=margin)


class Drafting:
    """One sequence's."""

    def __init__(
        self, drafters: Drafters, prompt: Sequence[int], *, max_draft: int, lookup: bool, is_guarded: bool
    ) -> None:
        """is_guarded: whether to decode plainly where drafts don't pay."""
        self.drafters = drafters
        self.margin = MARGIN if is_guarded else -1.0
        self.max_draft = max_draft
        self.right = {layer: Acceptance(known.probability) for layer, known in drafters.right.items()}
        self.matched = {length: Acceptance(known.probability) for length, known in drafters.matched.items()}
        self.sure = {layer: Acceptance(known.probability) for layer, known in drafters.sure.items()}
        self.lookup = Lookup(prompt) if lookup else None
        self.num_known = len(prompt)
        self.idle_rounds = 0
        self.num_drafts = 0
        """Of this round, at the most."""
        self.bonus = False
        """Whether the last draft's own row goes along, for a token more if all are right."""
        self.layer = 0
        """Of the exit that drafts in this round; 0: none."""
        self.length = 0
        """Of the match behind this round's drafts; 0: they aren't looked up."""

    def begin(self, tokens: Sequence[int], most: int, exits: Mapping[int, float]) -> list[int]:
        """Starts a round of at most `most` drafts by one of the exits; returns those that are looked up instead."""
        most = min(self.max_draft, most)
        self.num_drafts, self.bonus, self.layer, self.length = 0, False, 0, 0
        found = self._look_up(tokens, most)
        if most < 1 or not (found.tokens or exits):
            return []
        best = min(self._plans(most, exits, found), key=lambda plan: plan.seconds_per_token)
        if best.num_drafts == 0:
            self.idle_rounds += 1
            if self.idle_rounds < PROBE_EVERY:
                return []
            best = self._probe(exits, found)
        self.idle_rounds = 0
        self.num_drafts = best.num_drafts
        if best.layer == self.drafters.costs.num_layers:
            self.length = found.length
            return found.tokens[: best.num_drafts]
        self.layer, self.bonus = best.layer, best.bonus
        return []

    def _look_up(self, tokens: Sequence[int], most: int) -> Found:
        """In the sequence's own text, or in a finished one where more tokens match."""
        if self.lookup is None:
            return NOTHING
        for token in tokens[self.num_known :]:
            self.lookup.append(token)
        self.num_known = len(tokens)
        if most < 1:
            return NOTHING
        own = self.lookup.draft(most)
        recalled = self.drafters.recall.draft(tokens[-LENGTHS[0] :], most, longer_than=own.length)
        return recalled if recalled.tokens else own

    def _plans(self, most: int, exits: Mapping[int, float], found: Found) -> list[DraftPlan]:
        drafters, size = self.drafters, self.drafters.batch_size
        plans = [
            drafters.plan_exit(layer, _rounded(self.right[layer]), _rounded(self.sure[layer]), most, size, self.margin)
            for layer in exits
        ]
        if found.tokens:
            right = _rounded(self.matched[found.length])
            plans.append(drafters.plan_lookup(right, len(found.tokens), size, self.margin))
        return plans

    def _probe(self, exits: Mapping[int, float], found: Found) -> DraftPlan:
        """One draft, by whoever has been right most often."""
        last = self.drafters.costs.num_layers
        right = {layer: self.right[layer].probability for layer in exits}
        if found.tokens:
            right[last] = self.matched[found.length].probability
        layer = max(right, key=lambda layer: right[layer])
        return DraftPlan(num_drafts=1, bonus=layer == last, layer=layer, seconds_per_token=0.0)

    def tested(self, layer: int, is_sure: bool) -> None:
        """Whether the exit was sure enough of a row to draft."""
        for known in (self.sure[layer], self.drafters.sure[layer]):
            known.update(1, int(is_sure))

    def judged(self, num_drafted: int, num_right: int) -> None:
        """How the round ended."""
        if self.length:
            estimates = (self.matched[self.length], self.drafters.matched[self.length])
        elif self.layer:
            estimates = (self.right[self.layer], self.drafters.right[self.layer])
        else:
            return
        for known in estimates:
            known.update(num_drafted, num_right)


def _rounded(known: Acceptance) -> int:
    return round(known.probability * GRID)
