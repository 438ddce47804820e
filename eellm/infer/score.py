"""Log-likelihood of given text: at full depth, at one exit, or under the exit policy.

    tokens, thresholds → rows through all layers, a chunk at a time → per token: the exit that it would take, its
    score there

Decoding feeds each token's true keys and values to those after it, so where a token would leave, and with which
logits, is known from one pass over the text. The first token has nothing before it and isn't scored.
Shapes: N rows of a chunk, D hidden, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eellm.exits.policy import SCORES
from eellm.infer.attention import PassRows, Span
from eellm.infer.memory import Memory
from eellm.infer.network import Network
from eellm.infer.readout import likeliest

CHUNK = 128
"""Rows that have their logits at a time, and for which others wait at the most."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of one text. The lists have one value per token scored."""

    tokens: list[int]
    logprobs: list[float]
    """Under the raw logits of the exit that the token would be drawn from."""
    exits: list[int]
    """That exit's layer."""
    confidences: list[float]
    """The policy's score there."""
    is_likeliest: list[bool]
    """Whether greedy decoding would have said this token."""
    top: list[tuple[tuple[int, float], ...]]
    """The likeliest tokens in its place, with their log-probabilities, likeliest first: as many as were asked for."""

    @property
    def logprob(self) -> float:
        """Of the whole, in nats."""
        return sum(self.logprobs)


class Scoring:
    """One text on its way: `advance` until it is over, then `result`."""

    def __init__(
        self,
        network: Network,
        tokens: Sequence[int],
        first: int,
        thresholds: Mapping[int, float],
        policy: str,
        *,
        top_logprobs: int = 0,
    ) -> None:
        """To score `tokens[first:]`, each given all before it.

        first: at least 1. thresholds: by the layers of the exits in use; a threshold of 0 always takes the exit.
        top_logprobs: how many of the likeliest tokens are told in each place.
        """
        assert 1 <= first < len(tokens), "a token is scored given those before it"
        self._network, self._tokens, self._first = network, tokens, first
        memory = network.new_memory()
        memory.reserve(1, len(tokens))
        self._reader = _Reader(network, memory, thresholds, policy, top_logprobs)
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._start = 0

    @torch.inference_mode()
    def advance(self) -> bool:
        """Takes at most CHUNK tokens through the model. Returns whether there are more."""
        start, tokens = self._start, self._tokens
        end = self._start = min(start + CHUNK, len(tokens) - 1)
        rows = self._network.rows([Span(0, start, end - start)])
        skipped = min(max(0, self._first - 1 - start), end - start)
        self._parts.append(self._reader.read(tokens[start:end], tokens[start + 1 : end + 1], rows, skipped))
        return end < len(tokens) - 1

    def result(self) -> Score:
        tokens, first = self._tokens, self._first
        assert self._start == len(tokens) - 1, "it is over"
        logprobs, exits, confidences, likeliest = (
            torch.cat(column).tolist() for column in zip(*self._parts, strict=True)
        )
        return Score(
            tokens=list(tokens[first:]),
            logprobs=logprobs,
            exits=exits,
            confidences=confidences,
            is_likeliest=likeliest,
            top=[self._reader.top.get(i, ()) for i in range(first - 1, len(tokens) - 1)],
        )


class _Reader:
    """Takes chunks of one text through the model."""

    def __init__(
        self, network: Network, memory: Memory, thresholds: Mapping[int, float], policy: str, top_logprobs: int
    ) -> None:
        self.network = network
        self.memory = memory
        self.thresholds = thresholds
        self.policy = policy
        self.top_logprobs = top_logprobs
        self.top: dict[int, tuple[tuple[int, float], ...]] = {}
        """By row of the text."""
        self.stops = (*sorted(thresholds), network.config.num_layers)

    def read(
        self, tokens: Sequence[int], targets: Sequence[int], rows: PassRows, skipped: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probability, exit, confidence, and whether it is the likeliest, of each target but the first ones."""
        h_ND = self.network.embed(tokens)
        target_N = torch.tensor(targets, device=h_ND.device)
        logprob_N, score_N = torch.zeros(2, len(tokens), dtype=torch.float64, device=h_ND.device)
        exit_N = torch.zeros(len(tokens), dtype=torch.int64, device=h_ND.device)
        likeliest_N = torch.zeros(len(tokens), dtype=torch.bool, device=h_ND.device)
        open_n = torch.arange(skipped, len(tokens), device=h_ND.device)  # rows without an answer
        done = 0
        for stop in self.stops:
            h_ND = self.network.run(h_ND, done + 1, stop, rows, self.memory)
            done = stop
            attended_ND = self.network.attended(stop, h_ND, rows, self.memory)
            if len(open_n) == 0:
                continue
            z_nD = self.network.normed(stop, attended_ND[open_n])
            logits_nV = self.network.logits(stop, z_nD)
            sure_n = self._scores(stop, z_nD, logits_nV)
            takes_n = sure_n >= self.thresholds.get(stop, -1.0)
            taken = open_n[takes_n]
            logits_nV = logits_nV[takes_n]
            logprobs_nV = logits_nV.log_softmax(-1)
            if self.top_logprobs:
                start = rows.spans[0].before
                for row, logprobs_V in zip(taken.tolist(), logprobs_nV, strict=True):
                    self.top[start + row] = likeliest(logprobs_V, self.top_logprobs)
            picked_n = logprobs_nV.gather(-1, target_N[taken, None])[:, 0]
            logprob_N[taken], score_N[taken] = picked_n.double(), sure_n[takes_n].double()
            likeliest_N[taken] = logits_nV.argmax(-1) == target_N[taken]
            exit_N[taken] = stop
            open_n = open_n[~takes_n]
        return logprob_N[skipped:], exit_N[skipped:], score_N[skipped:], likeliest_N[skipped:]

    def _scores(self, layer: int, z_nD: Tensor, logits_nV: Tensor) -> Tensor:
        if self.policy != "gate":
            return SCORES[self.policy](logits_nV)
        return torch.ones_like(logits_nV[:, 0]) if layer == self.stops[-1] else self.network.gate(layer, z_nD)
