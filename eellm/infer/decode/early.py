"""Early exit with true keys and values: KV recomputation (EE-LLM §4.1) that computes nothing twice.

A pass carries the new row from exit to exit. Where an exit is sure enough it answers, and the row, with those that it
took along, is deferred there. The next pass that goes deeper takes them on. When more than `max_deferred` rows would
wait, the pass goes on to the last layer; its answer is still the exit's. The prompt goes through every layer.
Tokens, exits and logits are those of a model without any cache, whatever `max_deferred` is.
Shapes: T rows, D hidden, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from eellm.exits.lm import EarlyExitLM
from eellm.exits.policy import SCORES
from eellm.infer.decode.base import Choice, Work
from eellm.infer.decode.full import final_choice
from eellm.infer.rows import DeferredRows
from eellm.model.cache import KVCache
from eellm.model.layers import Rows


class Early:
    def __init__(
        self, model: EarlyExitLM, thresholds: Mapping[int, float], *, policy: str, max_deferred: int, capacity: int
    ) -> None:
        """thresholds: by the layers of the exits in use; all below 1 (an exit at 1 or above is not in use)."""
        self.model = model
        self.thresholds = thresholds
        self.score = SCORES.get(policy)  # None: each exit's gate
        self.max_deferred = max_deferred
        self.work = Work()
        self.length = 0  # rows that have entered layer 1
        self.deferred = DeferredRows()
        self.stops = (*sorted(thresholds), model.config.num_layers)
        weight = model.decoder.embed.weight
        numbers = tuple(range(1, model.config.num_layers + 1))
        memory = {"capacity": capacity, "dtype": weight.dtype, "device": weight.device}
        self.cache = KVCache(model.config, numbers, **memory)
        own_layer = tuple(n for n in thresholds if model.exit(n).config.kind == "layer")
        self.exit_cache = KVCache(model.config, own_layer, **memory)

    def step(self, tokens: list[int]) -> Choice:
        decoder = self.model.decoder
        h_1TD = decoder.embed(torch.tensor([tokens], device=decoder.embed.weight.device))
        is_prompt = self.length == 0
        self.length += len(tokens)
        choice, done = None, 0
        for layer in self.stops:
            h_1TD = self.deferred.resume(done, h_1TD)
            rows = decoder.rows(self.length - h_1TD.shape[1], h_1TD.shape[1])
            h_1TD = decoder.run(h_1TD, done + 1, layer, rows, self.cache)
            self.work.layers += layer - done
            done = layer
            if layer in self.thresholds:
                choice = self._pass_exit(layer, h_1TD, rows, choice)
                waiting = len(self.deferred) + h_1TD.shape[1]
                if choice is not None and not is_prompt and waiting <= self.max_deferred:
                    self.deferred.stop(layer, h_1TD)
                    return choice
        self.work.deep_passes += 1
        if choice is None:
            self.work.count_head(done)
            choice = final_choice(self.model, h_1TD[:, -1], self.score)
        return choice

    def _pass_exit(self, layer: int, h_1TD: Tensor, rows: Rows, choice: Choice | None) -> Choice | None:
        """Tests the exit at `layer` on the last row, unless an earlier one has answered already."""
        exit = self.model.exit(layer)
        has_layer = exit.config.kind == "layer"
        cache = self.exit_cache[layer] if has_layer else None
        if choice is not None:
            if cache is not None:
                exit.remember(h_1TD, rows, cache)
            return choice
        if not has_layer:
            h_1TD = h_1TD[:, -1:]
        z_D = self.model.normed(layer, h_1TD, rows, cache)[0, -1]
        threshold = self.thresholds[layer]
        if self.score is None:
            assert exit.gate is not None, "the engine refuses the gate policy for exits without one"
            score = float(exit.gate(z_D).float().sigmoid())
            if score < threshold:
                return None
            return Choice(layer, score, self._logits(layer, z_D))
        logits_V = self._logits(layer, z_D)
        score = float(self.score(logits_V))
        return Choice(layer, score, logits_V) if score >= threshold else None

    def _logits(self, layer: int, z_D: Tensor) -> Tensor:
        self.work.count_head(layer)
        return self.model.logits(layer, z_D).float()
