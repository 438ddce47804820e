"""Exit rules chosen on text: the fastest whose tokens are nearly those of full depth, or say nearly as much.

A held-out file's documents are divided in two. On one half every exit is asked about every token (teacher forcing), and
a grid of thresholds, one an exit, under each policy is judged; on the other half what was chosen is judged again, and
prompts are cut from it. What an exit costs beside a layer is for the clock to say: of the rules that are allowed, the
cheapest at each of several such costs are handed on, to be timed by generating.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from eellm.data.documents import Document, read_documents
from eellm.data.loader import batches
from eellm.data.packing import pack
from eellm.exits.lm import EarlyExitLM
from eellm.exits.metrics import POLICIES, ExitTable, exit_table

AGREEMENT, MORE_BITS = 0.98, 0.01
MARGIN = 0.05
"""Part of what is allowed that isn't used, so that it is enough on other text too."""
GRID_SIZE = 1600
"""Combinations of thresholds, about."""
HEADS_IN_LAYERS = (0.5, 1.0, 2.0, 4.0)
"""What testing an exit may cost."""
Bound = Literal["agreement", "bits"]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of a rule on one half."""

    agreement: float
    """Share of tokens at which the exit taken makes the final one's choice."""
    more_bits: float
    """Bits per byte over full depth's, minus 1."""
    bits_per_byte: float
    taken: dict[int, float]
    """Share of tokens by exit."""

    def keeps(self, bound: Bound, margin: float = 0.0) -> bool:
        if bound == "agreement":
            return self.agreement >= 1 - (1 - AGREEMENT) * (1 - margin)
        return self.more_bits <= MORE_BITS * (1 - margin)


@dataclass(frozen=True, kw_only=True)
class Rule:
    policy: str
    threshold: dict[int, float]
    """By layer; 1 or more: the exit is off."""
    chosen_on: Quality
    elsewhere: Quality

    @property
    def settings(self) -> dict[str, Any]:
        """As `generate` takes them, through JSON."""
        return {"policy": self.policy, "threshold": {str(layer): tau for layer, tau in self.threshold.items()}}


class Study:
    """A model with exits on its held-out text."""

    def __init__(self, model: EarlyExitLM, text: Path) -> None:
        assert model.config.exits, "the model has no exits"
        assert model.tokenizer is not None, "the model has no tokenizer"
        first, second = _halves(list(read_documents([text], model.tokenizer)))
        self.tables = (_ask(model, first), _ask(model, second))
        self.bytes_per_token = tuple(_bytes_per_token(model, half) for half in (first, second))
        self.prompt_tokens = np.concatenate([document.tokens for document in second]).tolist()
        """Tokens of the other half, for prompts."""

    def rules(self, bound: Bound) -> list[Rule]:
        """Those that keep the bound on the first half: the cheapest at each cost of a head, under any policy."""
        allowed = [point for point in self._judged if point[2].keeps(bound, MARGIN)]  # exits off is always among them
        chosen: dict[str, Rule] = {}
        for head in HEADS_IN_LAYERS:
            policy, threshold, quality = min(allowed, key=lambda point: _cost(point[1], point[2], head))
            elsewhere = self._judge(1, policy, threshold)
            rule = Rule(policy=policy, threshold=threshold, chosen_on=quality, elsewhere=elsewhere)
            chosen[str(rule.settings)] = rule
        return list(chosen.values())

    def limit(self, bound: Bound, head: float = 0.0) -> float:
        """How many times as fast as full depth the best rule that keeps the bound could be, whatever runs it.

        head: what asking an exit takes, in layers. Passes for rows that waited count for nothing.
        """
        final = self.tables[0].final
        allowed = [point for point in self._judged if point[2].keeps(bound)]
        return (final + head) / min(_cost(threshold, quality, head) for _, threshold, quality in allowed)

    @cached_property
    def _judged(self) -> list[tuple[str, dict[int, float], Quality]]:
        """A grid of rules on the first half, for every policy that all exits have."""
        exits = self.tables[0].exits.values()
        policies = [policy for policy in POLICIES if all(policy in rows.scores for rows in exits)]
        rules = [(policy, threshold) for policy in policies for threshold in _grid(self.tables[0], policy)]
        return [(*rule, self._judge(0, *rule)) for rule in rules]

    def _judge(self, half: int, policy: str, threshold: dict[int, float]) -> Quality:
        table = self.tables[half]
        point = table.at_threshold(threshold, policy)
        return Quality(
            agreement=point.agreement,
            more_bits=point.nll / table.nll(table.final) - 1,
            bits_per_byte=point.nll / math.log(2) / self.bytes_per_token[half],
            taken=point.taken,
        )


def _halves(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Whole documents, about as many tokens in each half."""
    halves: tuple[list[Document], list[Document]] = ([], [])
    sizes = [0, 0]
    for document in sorted(documents, key=lambda document: -len(document.tokens)):
        half = sizes.index(min(sizes))
        halves[half].append(document)
        sizes[half] += len(document.tokens)
    return halves


def _ask(model: EarlyExitLM, documents: list[Document]) -> ExitTable:
    return exit_table(model, batches(pack(documents, model.config.max_seq_len), 4))


def _bytes_per_token(model: EarlyExitLM, documents: list[Document]) -> float:
    assert model.tokenizer is not None
    num_bytes = sum(len(model.tokenizer.decode(document.tokens.tolist()).encode()) for document in documents)
    return num_bytes / sum(len(document.tokens) for document in documents)


def _grid(table: ExitTable, policy: str) -> list[dict[int, float]]:
    """Thresholds between which equal shares of the rows lie, and 1 (off), for each exit."""
    layers = [layer for layer in table.exits if layer != table.final]
    size = max(2, round(GRID_SIZE ** (1 / len(layers))))
    shares = torch.linspace(0, 1, size, dtype=torch.float64)[:-1]
    values = []
    for layer in layers:
        score_N = table.exits[layer].scores[policy].double().sort().values
        values.append([*score_N[(shares * len(score_N)).long()].tolist(), 1.0])
    return [dict(zip(layers, taus, strict=True)) for taus in itertools.product(*values)]


def _cost(threshold: dict[int, float], quality: Quality, head: float) -> float:
    """Of a token, in layers. A deep pass takes the rows that wait along, which costs next to nothing."""
    in_use = [layer for layer, tau in threshold.items() if tau < 1]
    cost, passed, reaching = 0.0, 0, 1.0
    for layer in (*in_use, max(quality.taken)):
        cost += reaching * (layer - passed + head)
        passed, reaching = layer, reaching - quality.taken[layer]
    return cost


def spread(tokens: Sequence[int], *, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Prompts of equal length from evenly spaced places."""
    starts = np.linspace(0, len(tokens) - num_tokens, num_prompts).astype(int)
    return [list(tokens[start : start + num_tokens]) for start in starts]
