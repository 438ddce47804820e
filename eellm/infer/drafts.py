"""The arithmetic of speculation: how many tokens to draft, by whom, and when not to. Without torch.

    accepted so far → Acceptance → probability;  probability, measured costs → DraftPlan

A round drafts d tokens, each right with the same probability α as long as those before were, and judges them in one
pass. Rows of the last token and of the drafts before the last suffice to judge all d; the last draft's own row, the
*bonus row*, brings one token more if all are right. Plans minimise seconds per token over whole rounds, and what isn't
faster than plain decoding by a margin isn't drafted at all.
Sources: the expected tokens are Leviathan et al.'s (arXiv 2211.17192); that the length follows what acceptance and
costs say, and so does the exit, is DEL's (arXiv 2504.05598).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from eellm.infer.costs import StepCosts


class Acceptance:
    """How likely a draft of one drafter is right, given that those before it were. What is newest counts most."""

    def __init__(self, prior: float = 0.6, *, weight: float = 4.0, memory: float = 64.0) -> None:
        """prior: the estimate before any observation, which counts as much as `weight` of them. memory: observations
        after which one has lost most of its weight."""
        assert 0 <= prior <= 1, f"a probability of {prior}"
        assert weight > 0, "the prior counts for something"
        assert memory > 1, "more than the newest observation is remembered"
        self._keep = 1 - 1 / memory
        self._right = prior * weight
        self._seen = weight

    @property
    def probability(self) -> float:
        return self._right / self._seen

    def update(self, num_drafted: int, num_accepted: int) -> None:
        """A round's result. The first wrong draft is an observation too; those behind it say nothing."""
        assert 0 <= num_accepted <= num_drafted, f"{num_accepted} of {num_drafted} drafts accepted"
        for is_right in [1.0] * num_accepted + [0.0] * (num_accepted < num_drafted):
            self._right = self._keep * self._right + is_right
            self._seen = self._keep * self._seen + 1


def expected_tokens(alpha: float, num_drafts: int, bonus: bool) -> float:
    """Tokens that a round brings on average: the right drafts, and one of the final exit's own in place of the first
    wrong draft, or from the bonus row: (1 - α^(d+1)) / (1 - α), less α^d without that row."""
    return sum(alpha**i for i in range(num_drafts + bonus))


@dataclass(frozen=True, kw_only=True)
class DraftPlan:
    """How the next rounds go."""

    num_drafts: int
    """Of each sequence in a round; 0: plain decoding."""
    bonus: bool
    """Whether the last draft's own row goes along."""
    layer: int
    """Of the exit that drafts; the last layer where none does."""
    seconds_per_token: float
    """That all sequences together take for one token."""


def best_draft(
    alpha: float,
    costs: StepCosts,
    layer: int,
    max_draft: int,
    *,
    sure: float = 1.0,
    batch_size: int = 1,
    margin: float = 0.03,
    gated: bool = False,
) -> DraftPlan:
    """How many tokens the exit at `layer` drafts.

    sure: how likely the exit is sure enough of a row to draft. A round's first row that it isn't sure of ends the
    drafting, and brings the final exit's token as a bonus row does. batch_size: sequences that make their rounds
    together. gated: the exit's gate says whether it is sure. margin: how much faster than plain decoding it must be.
    """
    plans = (
        DraftPlan(num_drafts=num, bonus=bonus, layer=layer, seconds_per_token=seconds / (batch_size * tokens))
        for num, bonus, tokens, seconds in _rounds(alpha, costs, layer, max_draft, sure, batch_size, gated)
    )
    return _guarded(plans, costs, batch_size, margin)


def best_lookup(
    alpha: float, costs: StepCosts, max_draft: int, *, batch_size: int = 1, margin: float = 0.03
) -> DraftPlan:
    """How many looked-up tokens go along. They cost nothing but their rows, which go through all layers in one pass."""
    plans = (
        DraftPlan(
            num_drafts=num,
            bonus=True,
            layer=costs.num_layers,
            seconds_per_token=costs.full_s(batch_size, num + 1) / (batch_size * expected_tokens(alpha, num, True)),
        )
        for num in range(1, max_draft + 1)
    )
    return _guarded(plans, costs, batch_size, margin)


def plain(costs: StepCosts, batch_size: int = 1) -> DraftPlan:
    """Decoding without drafts."""
    seconds = costs.full_s(batch_size) / batch_size
    return DraftPlan(num_drafts=0, bonus=False, layer=costs.num_layers, seconds_per_token=seconds)


def _guarded(plans: Iterator[DraftPlan], costs: StepCosts, batch_size: int, margin: float) -> DraftPlan:
    """The fastest plan, if it is faster than plain decoding by the margin."""
    no_drafts = plain(costs, batch_size)
    best = min(plans, key=lambda plan: plan.seconds_per_token, default=no_drafts)
    return best if best.seconds_per_token * (1 + margin) <= no_drafts.seconds_per_token else no_drafts


def _rounds(
    alpha: float, costs: StepCosts, layer: int, max_draft: int, sure: float, batch_size: int, gated: bool
) -> Iterator[tuple[int, bool, float, float]]:
    """Every number of drafts, with and without the bonus row: a sequence's tokens in a round, and the round's seconds,
    on average."""
    shallow_s = costs.pass_s(0, layer, batch_size)
    draft_s = shallow_s + costs.test_s(layer, batch_size, batch_size, gated=gated)
    unsure_s = shallow_s + costs.test_s(layer, batch_size, 0, gated=gated)

    def judge_s(num_rows: int) -> float:
        rows = batch_size * num_rows
        return costs.pass_s(layer, costs.num_layers, rows) + costs.head_s[costs.num_layers].at(rows)

    tokens = seconds = 0.0  # of rounds that end early, times how likely they are
    reached = 1.0  # how likely the next row is tested
    for num in range(1, max_draft + 1):
        ends = reached * (1 - sure)
        judged_s = judge_s(num)  # num - 1 drafts and an unsure row, or num drafts without the bonus row
        tokens += ends * expected_tokens(alpha, num - 1, True)
        seconds += ends * ((num - 1) * draft_s + unsure_s + judged_s)
        reached *= sure
        drafted_s = num * draft_s
        yield (
            num,
            False,
            tokens + reached * expected_tokens(alpha, num, False),
            seconds + reached * (drafted_s + judged_s),
        )
        bonus_s = drafted_s + shallow_s + judge_s(num + 1)
        yield num, True, tokens + reached * expected_tokens(alpha, num, True), seconds + reached * bonus_s
