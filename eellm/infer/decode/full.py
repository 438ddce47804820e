"""Full depth: every row through every layer. The plain loop that the other methods are held against."""

from collections.abc import Callable

import torch
from torch import Tensor

from eellm.exits.lm import EarlyExitLM
from eellm.exits.policy import SCORES
from eellm.infer.decode.base import Choice, Work
from eellm.model.cache import KVCache


class Full:
    def __init__(self, model: EarlyExitLM, *, policy: str, capacity: int) -> None:
        self.model = model
        self.score = SCORES.get(policy)
        self.work = Work()
        self.length = 0
        weight = model.decoder.embed.weight
        numbers = tuple(range(1, model.config.num_layers + 1))
        self.cache = KVCache(model.config, numbers, capacity=capacity, dtype=weight.dtype, device=weight.device)

    def step(self, tokens: list[int]) -> Choice:
        decoder, last = self.model.decoder, self.model.config.num_layers
        h_1TD = decoder.embed(torch.tensor([tokens], device=decoder.embed.weight.device))
        rows = decoder.rows(self.length, len(tokens))
        h_1TD = decoder.run(h_1TD, 1, last, rows, self.cache)
        self.length += len(tokens)
        self.work.layers += last
        self.work.deep_passes += 1
        self.work.count_head(last)
        return final_choice(self.model, h_1TD[:, -1], self.score)


def final_choice(model: EarlyExitLM, h_1D: Tensor, score: Callable[[Tensor], Tensor] | None) -> Choice:
    """What the final exit says of a row; under the gate policy (no score) it is sure."""
    logits_V = model.decoder.output(model.decoder.norm(h_1D))[0].float()
    return Choice(model.config.num_layers, 1.0 if score is None else float(score(logits_V)), logits_V)
