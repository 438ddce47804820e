"""Whether a model is one for early exits, and where they would go: from tables alone, without torch.

    what each layer would say of each token, what parts cost here → ideal depths, bounds, Advice

Three speeds are told apart. `by_layers`: every token leaves at the first layer that needn't go on, tests are free, and
nothing is left to be caught up. `bound`: the best few exits, each of which knows without fail when it is right, but
costs what it costs here, and deferred rows too. `expected`: the same exits as sure as their largest probability makes
them, at thresholds that keep a given share of right choices among those that leave.
Shapes: L layers, N tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eellm.infer.costs import Curve, StepCosts
from eellm.infer.guard import early_pays
from eellm.plan.decode import ExitDistribution

MAX_EXITS = 3
GAIN = 1.02
"""One more exit must make decoding faster by this factor."""
WORTH = 1.1
"""Below this bound, nothing that could be tuned would be worth it."""
PAYS = 1.05
"""From this expected speed-up on, exits pay."""
Shares = dict[int, float]
Verdict = Literal["put", "do not"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerChoices:
    """What exits after some layers would say of each token of a text."""

    layers: tuple[int, ...]
    """Ascending, without the last layer."""
    num_layers: int
    agrees_LN: np.ndarray
    """Whether a layer's choice is the final one, bool."""
    scores_LN: np.ndarray
    """How sure it is: its largest probability."""

    def agreement(self) -> Shares:
        """Share of tokens, by layer."""
        return {layer: float(row_N.mean()) for layer, row_N in zip(self.layers, self.agrees_LN, strict=True)}

    def ideal_depths(self, *, stays: bool) -> np.ndarray:
        """Of each token the first layer whose choice is the final one, (N,); `stays`: and from which on it is at every
        layer. The last layer's number where there is none."""
        right_LN = np.logical_and.accumulate(self.agrees_LN[::-1])[::-1] if stays else self.agrees_LN
        depths = np.array([*self.layers, self.num_layers])
        return depths[np.vstack([right_LN, np.ones_like(right_LN[:1])]).argmax(0)]

    def known_shares(self, exits: Sequence[int]) -> Shares:
        """Where tokens leave if each exit knows without fail when it is right."""
        return self._leave(exits, lambda right_N, _: right_N)

    def sure_shares(self, exits: Sequence[int], precision: float) -> Shares:
        """Where they leave if the largest probability says so, at the lowest thresholds at which this share of those
        that leave at each exit is right. The thresholds are chosen on these very tokens: a little too well."""
        return self._leave(exits, lambda right_N, scores_N: surest(right_N, scores_N, precision))

    def _leave(self, exits: Sequence[int], rule: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Shares:
        open_N, shares = np.ones(self.agrees_LN.shape[1], bool), {}
        for layer in exits:
            at = self.layers.index(layer)
            leaves_n = rule(self.agrees_LN[at, open_N], self.scores_LN[at, open_N])
            shares[layer] = float(leaves_n.sum() / len(open_N))
            open_N[open_N] = ~leaves_n
        return shares | {self.num_layers: float(open_N.mean())}


def surest(right_N: np.ndarray, scores_N: np.ndarray, precision: float) -> np.ndarray:
    """The most tokens that a threshold can take so that this share of them is right, as a mask."""
    order = np.argsort(-scores_N, kind="stable")
    shares = right_N[order].cumsum() / np.arange(1, len(order) + 1)
    sorted_N = scores_N[order]
    ends = np.append(sorted_N[:-1] != sorted_N[1:], True)[: len(order)]  # equal scores leave together
    fit = np.flatnonzero((shares >= precision) & ends)
    return scores_N >= sorted_N[fit[-1]] if len(fit) else np.zeros(len(scores_N), bool)


@dataclass(frozen=True, kw_only=True)
class PartCosts:
    """Seconds of a model's parts on a machine, by rows."""

    num_layers: int
    layer_s: Curve
    head_s: Curve
    """The final one."""
    exit_s: Curve
    """An early exit's answers."""
    gate_s: Curve
    """Its gate alone."""
    overhead_s: float
    """Of each pass."""

    def with_exits(self, exits: Sequence[int]) -> StepCosts:
        """Of the model with such exits after these layers."""
        stops = (*exits, self.num_layers)
        rows = self.layer_s.rows
        return StepCosts(
            stops=stops,
            segment_s=tuple(
                Curve(rows, tuple((stop - before) * seconds for seconds in self.layer_s.seconds))
                for before, stop in zip((0, *exits), stops, strict=True)
            ),
            head_s={**dict.fromkeys(exits, self.exit_s), self.num_layers: self.head_s},
            gate_s=dict.fromkeys(exits, self.gate_s),
            overhead_s=self.overhead_s,
        )


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Some exits and what they give."""

    exits: tuple[int, ...]
    speedup: float
    """Over full depth; 1 with no exits."""


def best_exits(costs: PartCosts, layers: Sequence[int], shares_of: Callable[[Sequence[int]], Shares]) -> Placed:
    """Up to MAX_EXITS exits that make decoding fastest, one sequence at a time; the next is added only where it pays.

    shares_of: where tokens leave, given the exits. Each exit tests with its head or, where that is cheaper, its gate.
    """
    best = Placed(exits=(), speedup=1.0)
    while len(best.exits) < MAX_EXITS:
        tried = [tuple(sorted((*best.exits, layer))) for layer in layers if layer not in best.exits]
        found = [Placed(exits=exits, speedup=speedup(costs, exits, shares_of(exits))) for exits in tried]
        fastest = max(found, key=lambda placed: placed.speedup, default=best)
        if fastest.speedup < GAIN * best.speedup:
            break
        best = fastest
    return best


def speedup(costs: PartCosts, exits: Sequence[int], shares: Shares) -> float:
    """Over full depth, one sequence at a time; exits that don't pay aren't used."""
    step = costs.with_exits(exits)
    plans = [early_pays(ExitDistribution(shares=shares), step, margin=0.0, gated=gated) for gated in (False, True)]
    return step.full_s(1) / min(plan.seconds_per_token for plan in plans)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to do."""

    verdict: Verdict
    exits: tuple[int, ...]
    """After which layers; none where the verdict is `do not`."""
    by_layers: float
    bound: Placed
    expected: Placed
    text: str


def advise(choices: LayerChoices, costs: PartCosts, *, precision: float = 0.98, is_tuned: bool = False) -> Advice:
    """A recommendation. is_tuned: whether the choices are of exits that were tuned, or only of the final head on each
    layer (the logit lens), which tuning improves a lot."""
    by_layers = choices.num_layers / float(choices.ideal_depths(stays=False).mean())
    bound = best_exits(costs, choices.layers, choices.known_shares)
    expected = best_exits(costs, choices.layers, lambda exits: choices.sure_shares(exits, precision))
    verdict, text = _verdict(bound, expected, precision, is_tuned)
    return Advice(
        verdict=verdict,
        exits=expected.exits if verdict == "put" else (),
        by_layers=by_layers,
        bound=bound,
        expected=expected,
        text=text,
    )


def _verdict(bound: Placed, expected: Placed, precision: float, is_tuned: bool) -> tuple[Verdict, str]:
    most = f"{bound.speedup:.2f} times as fast"
    if bound.speedup < WORTH:
        return "do not", (
            "Do not give this model exits on this machine: even exits that always knew when they are right would make "
            f"it no more than {most} as full depth."
        )
    if expected.speedup >= PAYS:
        more = "" if is_tuned else " These are untuned: tuned exits answer more tokens."
        return "put", (
            f"Put {_layers(expected.exits)}: expect {expected.speedup:.2f} times full depth's speed at {precision:.0%} "
            f"agreement, and never more than {bound.speedup:.2f} times.{more}"
        )
    short = (
        f"exits that always knew when they are right ({_layers(bound.exits)}) would make it {most}, but those that go "
        f"by their own sureness, at {precision:.0%} agreement, {expected.speedup:.2f} times"
    )
    if is_tuned:
        return "do not", f"Do not, unless exits can be tuned for far longer: {short}."
    return (
        "do not",
        f"Do not, as it is: {short}. Tuned exits may know more: --tune-steps shows what a little tuning does.",
    )


def _layers(exits: Sequence[int]) -> str:
    if not exits:
        return "no exit"
    if len(exits) == 1:
        return f"one exit after layer {exits[0]}"
    return f"{len(exits)} exits after layers {', '.join(map(str, exits[:-1]))} and {exits[-1]}"
