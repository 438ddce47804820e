"""How fast a model decodes under each method, from what its parts take and where its tokens leave. Without torch.

    costs, shares of the tokens by exit, batch size → tokens per second of full depth, recomputation, pipeline

Tokens leave independently of each other, by fixed shares. Under every method the sequences of a batch make their steps
together, and go through the stages as one; each leaves at an exit of its own, and the step ends when all have a token.

full            every row goes through all stages, one after the other.
recomputation   EE-LLM §4 with rows that resume where they stopped (`eellm.infer.decode.early`): exact, no simulation.
                A sequence's rows in a segment are the new one and those since its last one that came so deep; no more
                than max_deferred may wait. Weights are read once for the rows of all sequences that pass.
pipelined       EE-LLM §4: when the last of the batch's exits has fired, the next step enters the first stage, while
                later stages fill in keys and values. A stage takes steps in order, one at a time, and a step enters
                only when fewer than P are in flight. Simulated, on drawn exits.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eellm.errors import ConfigError
from eellm.plan.decode_cost import DecodeCosts, PartCost

DecodeMethod = Literal["full", "recomputation", "pipelined"]


@dataclass(frozen=True, kw_only=True)
class ExitDistribution:
    """Where tokens leave."""

    shares: dict[int, float]
    """Of the tokens, by the layer of the exit that answers them; the last layer's is the final exit's. These exits are
    in use: one with a share of 0 is tested all the same."""

    def __post_init__(self) -> None:
        for layer, share in self.shares.items():
            if not 0 <= share <= 1:  # NaN fails the comparison
                raise ConfigError(f"exit distribution: layer {layer} has {share!r}; a share lies between 0 and 1")
        total = sum(self.shares.values())
        if abs(total - 1) > 1e-6:
            raise ConfigError(f"exit distribution: the shares add up to {total:.6g}; they must make 1")


@dataclass(frozen=True, kw_only=True)
class DecodeSpeed:
    """One method's, at one layout."""

    step_s: float
    """Between two tokens of a sequence, on average."""
    tokens_per_s: float
    """Of the whole batch."""
    speedup: float
    """Over full depth on the same devices."""


def decode_speeds(
    costs: DecodeCosts,
    exits: ExitDistribution,
    *,
    generator: np.random.Generator,
    batch_size: int = 1,
    max_deferred: int = 16,
    num_steps: int = 4096,
) -> dict[DecodeMethod, DecodeSpeed]:
    """Each method's speed.

    max_deferred: as in `GenerateConfig`. num_steps: that the pipeline is simulated for. Raises ConfigError for a
    distribution over exits that the model doesn't have, and for numbers below 1.
    """
    for name, value in (("batch_size", batch_size), ("max_deferred", max_deferred), ("num_steps", num_steps)):
        if value < 1:
            raise ConfigError(f"{name} = {value}: must be at least 1")
    known = (*sorted(costs.exits), costs.num_layers)
    for layer in exits.shares:
        if layer not in known:
            raise ConfigError(
                f"exit distribution: the model has no exit at layer {layer}; it has {', '.join(map(str, known))}"
            )
    seconds: dict[DecodeMethod, float] = {
        "full": full_step_s(costs, batch_size),
        "recomputation": recomputation_step_s(costs, exits, batch_size, max_deferred),
        "pipelined": pipelined_step_s(costs, exits, batch_size, num_steps, generator),
    }
    return {
        method: DecodeSpeed(step_s=step_s, tokens_per_s=batch_size / step_s, speedup=seconds["full"] / step_s)
        for method, step_s in seconds.items()
    }


def full_step_s(costs: DecodeCosts, batch_size: int) -> float:
    """A step at full depth."""
    everyone = _everyone(batch_size)
    num_hops = len(costs.stages) - 1
    hops_s = num_hops * everyone.seconds(costs.hop) + (num_hops > 0) * costs.hop.overhead_s  # there, and back
    layers_s = _layers_s(costs, 1, costs.num_layers, everyone)
    return costs.step_s + layers_s + everyone.seconds(costs.final_head) + hops_s


def recomputation_step_s(costs: DecodeCosts, exits: ExitDistribution, batch_size: int, max_deferred: int) -> float:
    """A step on average, in the long run."""
    seconds, first, before = costs.step_s, 1, 0.0
    final = exits.shares.get(costs.num_layers, 0.0)
    for stop in _stops(costs, exits):
        passes = passes_of_batch(rows_of_sequence(before, final, max_deferred), batch_size)
        seconds += _layers_s(costs, first, stop, passes)
        begin_here = [stage.index for stage in costs.stages[1:] if first <= stage.first <= stop]
        seconds += len(begin_here) * passes.seconds(costs.hop)
        if 1 in begin_here:  # the token has to come back
            seconds += passes.passing * costs.hop.overhead_s
        seconds += passes_of_batch(np.array([before, 1 - before]), batch_size).seconds(costs.head(stop))
        before = min(before + exits.shares.get(stop, 0.0), 1.0)
        first = stop + 1
    return seconds


def rows_of_sequence(before: float, final: float, max_deferred: int) -> np.ndarray:
    """How likely a step takes 0, 1, …, max_deferred + 1 rows of a sequence through a segment, in the long run.

    before: share of tokens that leave before the segment; final: share that go through all layers. Such a token takes
    all waiting rows to the end, and so does the one that would be the (max_deferred + 1)-th to wait: the sequence
    starts anew. The i-th token since then passes the segment with r rows if the r - 1 before it left earlier and the
    one before those passed, or was the last of the time before. The result is the mean over such a time.
    """
    short_of_end = 1 - final
    passing = max(short_of_end - before, 0.0)  # the segment, but not all layers
    powers = short_of_end ** np.arange(max_deferred + 1)
    sums = np.concatenate([[0.0], np.cumsum(powers)])
    rows = np.arange(1, max_deferred + 2)
    is_forced = rows == max_deferred + 1
    at_once = np.where(is_forced, 1.0, passing + final)  # the r-th token since the start, with all r rows
    left = np.maximum(max_deferred - rows, 0)
    later = np.where(is_forced, 0.0, passing * ((passing + final) * sums[left] + powers[left]))
    some = before ** (rows - 1) * (at_once + later) / sums[-1]
    return np.concatenate([[max(1 - some.sum(), 0.0)], some])


@dataclass(frozen=True)
class Passes:
    """What a step takes through a part: cases that are possible, without that of no rows at all."""

    probability: np.ndarray
    rows: np.ndarray
    sequences: np.ndarray

    @property
    def passing(self) -> float:
        """How likely there are rows."""
        return float(self.probability.sum())

    def seconds(self, part: PartCost) -> float:
        """On average; none where there are no rows."""
        return float(self.probability @ part.seconds(self.rows, self.sequences))


def passes_of_batch(rows: np.ndarray, batch_size: int) -> Passes:
    """Independent sequences at once. rows: how likely 0, 1, … rows of one of them pass."""
    passing = rows[1:].sum()
    if passing == 0:
        return Passes(np.zeros(0), np.zeros(0), np.zeros(0))
    one = rows[1:] / passing
    num_passing = np.ones(1)  # how likely 0, 1, … of the sequences pass
    for _ in range(batch_size):
        num_passing = np.convolve(num_passing, [1 - passing, passing])
    cases, together = [], np.ones(1)
    for sequences in range(1, batch_size + 1):
        together = np.convolve(together, one)  # entry r: r rows beyond one for each sequence
        num_rows = sequences + np.arange(len(together))
        cases.append((num_passing[sequences] * together, num_rows, np.full(len(together), sequences)))
    return Passes(*(np.concatenate(column) for column in zip(*cases, strict=True)))


def pipelined_step_s(
    costs: DecodeCosts, exits: ExitDistribution, batch_size: int, num_steps: int, generator: np.random.Generator
) -> float:
    """A step on average, over `num_steps` steps of a pipeline that is warm."""
    stops = _stops(costs, exits)
    answers_NB = draw_exits(exits, stops, num_steps * batch_size, generator).reshape(num_steps, batch_size)
    steps = _pipeline_steps(costs, stops, answers_NB)
    warm_up = [steps[n % num_steps] for n in range(-len(costs.stages), 0)]
    entries = pipeline_entries(
        [*warm_up, *steps],
        hop_s=_everyone(batch_size).seconds(costs.hop),
        back_s=costs.hop.overhead_s,
        between_s=costs.step_s,
    )
    return (entries[-1] - entries[len(warm_up)]) / num_steps


def draw_exits(
    exits: ExitDistribution, stops: Sequence[int], num_tokens: int, generator: np.random.Generator
) -> np.ndarray:
    """Indices into `stops`, in random order. Their shares are exact but for rounding, so that a mean needs few."""
    below = np.cumsum([exits.shares.get(layer, 0.0) for layer in stops])[:-1]
    places = (generator.permutation(num_tokens) + 0.5) / num_tokens
    return np.searchsorted(below, places, side="right")


@dataclass(frozen=True, kw_only=True)
class PipelineStep:
    """One step of a batch in the pipeline."""

    works_s: Sequence[float]
    """On each stage: its layers and the heads tested there."""
    stage: int
    """The one that answers."""
    answer_s: float
    """From its start there until the answer is known."""


def pipeline_entries(steps: Sequence[PipelineStep], *, hop_s: float, back_s: float, between_s: float) -> list[float]:
    """When each step enters the first stage, and when one more could.

    hop_s: to the next stage. back_s: from a later stage to the first. between_s: from an answer to the next step.
    """
    num_stages = len(steps[0].works_s)
    free = [0.0] * num_stages
    in_flight: deque[float] = deque(maxlen=num_stages)  # when the last P steps leave the last stage
    entries, ready = [], 0.0
    for step in steps:
        arrival = max(ready, free[0])
        entries.append(arrival)
        answered = 0.0
        for stage, work_s in enumerate(step.works_s):
            start = max(arrival, free[stage])
            if stage == step.stage:
                answered = start + step.answer_s
            free[stage] = start + work_s
            arrival = free[stage] + hop_s
        in_flight.append(free[-1])
        ready = answered + between_s + back_s * (step.stage > 0)
        if len(in_flight) == num_stages > 1:
            ready = max(ready, in_flight[0] + back_s)
    return [*entries, max(ready, free[0])]


def _pipeline_steps(costs: DecodeCosts, stops: Sequence[int], answers_NB: np.ndarray) -> list[PipelineStep]:
    """answers_NB: which of `stops` answers each sequence, step by step. The step's answer is its last one."""
    num_steps, batch_size = answers_NB.shape
    everyone, num_tested = _everyone(batch_size), np.arange(1, batch_size + 1)
    works_NP = np.empty((num_steps, len(costs.stages)))
    for stage in costs.stages:
        works_NP[:, stage.index] = _layers_s(costs, stage.first, stage.last, everyone)
    places, behind_s = [], []  # of each stop: its stage, and that stage's layers behind it
    for index, layer in enumerate(stops):
        stage = costs.stage_of(layer)
        head_s = np.concatenate([[0.0], costs.head(layer).seconds(num_tested, num_tested)])
        works_NP[:, stage.index] += head_s[(answers_NB >= index).sum(1)]
        places.append(stage.index)
        behind_s.append(_layers_s(costs, layer + 1, stage.last, everyone))
    return [
        PipelineStep(works_s=works_P, stage=places[answer], answer_s=works_P[places[answer]] - behind_s[answer])
        for works_P, answer in zip(works_NP.tolist(), answers_NB.max(1).tolist(), strict=True)
    ]


def _everyone(batch_size: int) -> Passes:
    """One row of each sequence."""
    return Passes(np.ones(1), np.array([batch_size]), np.array([batch_size]))


def _stops(costs: DecodeCosts, exits: ExitDistribution) -> tuple[int, ...]:
    return tuple(sorted({*exits.shares, costs.num_layers}))


def _layers_s(costs: DecodeCosts, first: int, last: int, passes: Passes) -> float:
    return sum(number * passes.seconds(part) for part, number in costs.kinds(first, last).items())
