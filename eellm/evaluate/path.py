"""A path of thresholds, one vector a step, from safe to risky; learnt from scores and hits. No torch.

    each exit's (score, is it wrong) → how likely it is wrong at each score → at level α: leave where that is at most α

The same α for all exits means that each is used as far as its last token is as likely to be wrong as any other's: an
exit that is better, or whose scores mean more, gets a lower threshold. How likely an exit is wrong at a score is the
isotonic regression of its mistakes on its scores: the best fit that never rises with the score.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

DECIMALS = 6
"""Of a threshold; rounded up, so that it is no riskier."""
OFF = 1.0


@dataclass(frozen=True)
class Block:
    """Neighbouring scores at which an exit is taken to be wrong equally often."""

    mean: float
    """Score of its tokens."""
    lowest: float
    risk: float
    """How often it is wrong."""


def threshold_path(
    scores: Mapping[int, np.ndarray], is_wrong: Mapping[int, np.ndarray], num_levels: int
) -> list[dict[int, float]]:
    """Thresholds by layer, from the safest step to the riskiest; no two neighbours are the same.

    scores, is_wrong: of each exit by layer, about the same N tokens: how sure it is, and whether its choice isn't the
    final exit's. Levels α grow as squares, so that most are small.
    """
    blocks = {layer: risk_by_score(scores[layer], is_wrong[layer]) for layer in scores}
    levels = np.linspace(0, 1, num_levels) ** 2 if num_levels > 1 else np.zeros(1)
    steps = [{layer: _threshold(each, level) for layer, each in blocks.items()} for level in levels.tolist()]
    return [step for step, _ in groupby(steps)]


def risk_by_score(scores: np.ndarray, is_wrong: np.ndarray) -> list[Block]:
    """From the surest block down.

    Pools adjacent violators: neighbours are one block while the surer is the more often wrong.
    """
    values, place = np.unique(-np.asarray(scores, np.float64), return_inverse=True)  # equal scores can't be told apart
    counts = np.bincount(place).tolist()
    wrongs = np.bincount(place, weights=np.asarray(is_wrong, np.float64)).tolist()
    pools: list[tuple[float, float, float, int]] = []  # lowest score, sum of scores, wrong, all
    for value, wrong, count in zip((-values).tolist(), wrongs, counts, strict=True):
        pool = (value, value * count, wrong, count)
        while pools and pools[-1][2] * pool[3] >= pool[2] * pools[-1][3]:
            surer = pools.pop()
            pool = (pool[0], surer[1] + pool[1], surer[2] + pool[2], surer[3] + pool[3])
        pools.append(pool)
    return [Block(total / count, lowest, wrong / count) for lowest, total, wrong, count in pools]


def _threshold(blocks: Sequence[Block], level: float) -> float:
    """The lowest score at which the exit is wrong at most so often; between the means of two blocks, by the line
    through them."""
    if level < blocks[0].risk:
        return OFF
    if level >= blocks[-1].risk:
        score = blocks[-1].lowest
    else:
        score = float(np.interp(level, [block.risk for block in blocks], [block.mean for block in blocks]))
    scale = 10**DECIMALS
    return min(OFF, math.ceil(score * scale) / scale)
