"""Log-likelihood of given text: at full depth, at one exit, or under the exit policy.

    texts, thresholds → rows through all layers, a chunk of one or more texts at a time → per token: the exit that it
    would take, its score there

Decoding feeds each token's true keys and values to those after it, so where a token would leave, and with which
logits, is known from one pass over the text. The first token has nothing before it and isn't scored.
Shapes: N rows of a chunk, n of them, D hidden, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from eellm.errors import ModelError
from eellm.exits.policy import SCORES
from eellm.infer.attention import PassRows, Span
from eellm.infer.memory import Memory
from eellm.infer.network import Network
from eellm.infer.readout import likeliest

CHUNK = 128
"""Rows that have their logits at a time, and for which others wait at the most."""
MAX_TEXTS = 16
"""Texts in a chunk, at most."""
ROOM = 4096
"""Rows whose keys and values are kept at a time, but for a text that is longer than that by itself."""


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
    """Texts on their way through the model: `advance` until they are over, then `result`."""

    def __init__(
        self,
        network: Network,
        texts: Sequence[tuple[Sequence[int], int]],
        thresholds: Mapping[int, float],
        policy: str,
        *,
        top_logprobs: int = 0,
    ) -> None:
        """To score `tokens[first:]` of each text (tokens, first), each token given all before it.

        first: at least 1. thresholds: by the layers of the exits in use; a threshold of 0 always takes the exit.
        top_logprobs: how many of the likeliest tokens are told in each place.
        """
        assert all(1 <= first < len(tokens) for tokens, first in texts), "a token is scored given those before it"
        lengths = [len(tokens) - 1 for tokens, _ in texts]
        self._network, self._texts = network, texts
        self._num_slots = min(MAX_TEXTS, max(1, ROOM // max(lengths, default=1)), max(len(texts), 1))
        memory = network.new_memory()
        memory.reserve(self._num_slots, max(lengths, default=1))
        self._reader = _Reader(network, memory, thresholds, policy, top_logprobs)
        self._found = [_Found() for _ in texts]
        self._chunks = deque(_chunks(lengths, self._num_slots))

    @torch.inference_mode()
    def advance(self) -> bool:
        """Takes at most CHUNK tokens through the model. Returns whether there are more."""
        if self._chunks:
            self._take(self._chunks.popleft())
        return bool(self._chunks)

    def _take(self, parts: "list[_Part]") -> None:
        texts = self._texts
        # NOTE a slot is taken again by a later text: what it held behind that text's rows is under the mask
        spans = [Span(part.text % self._num_slots, part.start, part.end - part.start) for part in parts]
        tokens = [token for part in parts for token in texts[part.text][0][part.start : part.end]]
        targets = [token for part in parts for token in texts[part.text][0][part.start + 1 : part.end + 1]]
        owners = [part.text for part in parts for _ in range(part.start, part.end)]
        places = [row for part in parts for row in range(part.start, part.end)]
        asked = [i for i, (text, row) in enumerate(zip(owners, places, strict=True)) if row >= texts[text][1] - 1]
        found = [self._found[owners[i]] for i in asked]
        self._reader.read(tokens, targets, self._network.rows(spans), asked, found)

    def result(self) -> list[Score]:
        """One score for each text."""
        assert not self._chunks, "they are over"
        return [
            Score(
                tokens=list(tokens[first:]),
                logprobs=one.logprobs,
                exits=one.exits,
                confidences=one.confidences,
                is_likeliest=one.is_likeliest,
                top=one.top,
            )
            for (tokens, first), one in zip(self._texts, self._found, strict=True)
        ]


class _Part(NamedTuple):
    """Rows of one text in a chunk."""

    text: int
    start: int
    end: int


def _chunks(lengths: Sequence[int], num_slots: int) -> Iterator[list[_Part]]:
    """The rows of all texts in order: at most CHUNK, and of at most `num_slots` texts, at a time."""
    parts: list[_Part] = []
    room = CHUNK
    for text, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0 or len(parts) == num_slots:
                yield parts
                parts, room = [], CHUNK
            end = min(start + room, length)
            parts.append(_Part(text, start, end))
            room -= end - start
            start = end
    if parts:
        yield parts


@dataclass
class _Found:
    """What is known of a text so far."""

    logprobs: list[float] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    is_likeliest: list[bool] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)


class _Reader:
    """Takes chunks of texts through the model."""

    def __init__(
        self, network: Network, memory: Memory, thresholds: Mapping[int, float], policy: str, top_logprobs: int
    ) -> None:
        self.network = network
        self.memory = memory
        self.thresholds = thresholds
        self.policy = policy
        self.top_logprobs = top_logprobs
        self.stops = (*sorted(thresholds), network.config.num_layers)

    def read(
        self,
        tokens: Sequence[int],
        targets: Sequence[int],
        rows: PassRows,
        asked: Sequence[int],
        found: Sequence[_Found],
    ) -> None:
        """Adds to `found` what is said of the rows that are asked about, one each."""
        h_ND = self.network.embed(tokens)
        target_N = torch.tensor(targets, device=h_ND.device)
        logprob_N, score_N = torch.zeros(2, len(tokens), dtype=torch.float64, device=h_ND.device)
        exit_N = torch.zeros(len(tokens), dtype=torch.int64, device=h_ND.device)
        likeliest_N = torch.zeros(len(tokens), dtype=torch.bool, device=h_ND.device)
        top: dict[int, tuple[tuple[int, float], ...]] = {}
        open_n = torch.tensor(asked, dtype=torch.int64, device=h_ND.device)  # rows without an answer
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
            if sure_n.isnan().any():  # NaN would be below every threshold: nobody would answer
                raise ModelError.no_numbers(stop)
            takes_n = sure_n >= self.thresholds.get(stop, -1.0)
            taken = open_n[takes_n]
            logits_nV = logits_nV[takes_n]
            logprobs_nV = logits_nV.log_softmax(-1)
            if self.top_logprobs:
                for row, logprobs_V in zip(taken.tolist(), logprobs_nV, strict=True):
                    top[row] = likeliest(logprobs_V, self.top_logprobs)
            picked_n = logprobs_nV.gather(-1, target_N[taken, None])[:, 0]
            if picked_n.isnan().any():  # a gate is sure of what isn't there
                raise ModelError.no_numbers(stop)
            logprob_N[taken], score_N[taken] = picked_n.double(), sure_n[takes_n].double()
            likeliest_N[taken] = logits_nV.argmax(-1) == target_N[taken]
            exit_N[taken] = stop
            open_n = open_n[~takes_n]
        columns = (column[asked].tolist() for column in (logprob_N, exit_N, score_N, likeliest_N))
        for row, one, logprob, exit, confidence, is_likeliest in zip(asked, found, *columns, strict=True):
            one.logprobs.append(logprob)
            one.exits.append(exit)
            one.confidences.append(confidence)
            one.is_likeliest.append(is_likeliest)
            one.top.append(top.get(row, ()))

    def _scores(self, layer: int, z_nD: Tensor, logits_nV: Tensor) -> Tensor:
        if self.policy != "gate":
            return SCORES[self.policy](logits_nV)
        return torch.ones_like(logits_nV[:, 0]) if layer == self.stops[-1] else self.network.gate(layer, z_nD)
