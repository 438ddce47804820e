"""What units lose under thresholds: their text read with the true tokens before each, or their prompts answered.

Either gives for any thresholds one loss in [0, 1] a unit, and tells of some units how sure and how wrong each exit was
about each token, which is what a path of thresholds is learnt from.
Shapes: U units, N tokens of all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from eellm.config.calibrate import CalibrateConfig
from eellm.data.documents import Document, naming
from eellm.data.loader import Batch
from eellm.data.packing import Rows, pack
from eellm.data.units import Unit
from eellm.errors import DataError
from eellm.evaluate.rouge import rouge_l
from eellm.exits.lm import EarlyExitLM
from eellm.exits.metrics import ExitTable, exit_table
from eellm.infer.engine import Engine
from eellm.infer.request import prompt_tokens
from eellm.infer.result import Generation

Scores = dict[int, np.ndarray]


class Losses(Protocol):
    """Of some units."""

    num_units: int

    def evidence(self, units: np.ndarray) -> tuple[Scores, Scores]:
        """Of all tokens of these units, by the layer of each exit: how sure it is, and whether it chooses another
        token than the final exit."""
        ...

    def of(self, thresholds: Mapping[int, float], units: np.ndarray) -> tuple[list[float], float]:
        """Each one's loss, and the mean layer after which their tokens leave."""
        ...


class ReadLosses:
    """`disagreement` and `perplexity`: of documents, every token of which is asked about given the true ones before."""

    def __init__(self, table: ExitTable, unit_N: np.ndarray, config: CalibrateConfig) -> None:
        """unit_N: the unit of each of the table's rows; every unit has some."""
        self.table, self.unit_N, self.config = table, unit_N, config
        self.counts_U = np.bincount(unit_N)
        self.num_units = len(self.counts_U)

    def evidence(self, units: np.ndarray) -> tuple[Scores, Scores]:
        layers = self.config.exits or tuple(self.table.exits)[:-1]
        final_N = self.table.exits[self.table.final].choice_N
        is_theirs_N = np.isin(self.unit_N, units)
        rows = {layer: self.table.exits[layer] for layer in layers}
        return (
            {layer: exit.scores[self.config.policy].double().numpy()[is_theirs_N] for layer, exit in rows.items()},
            {layer: (exit.choice_N != final_N).numpy()[is_theirs_N] for layer, exit in rows.items()},
        )

    def of(self, thresholds: Mapping[int, float], units: np.ndarray) -> tuple[list[float], float]:
        final = self.table.exits[self.table.final]
        taken_N = self.table.exit_taken(thresholds, self.config.policy)
        choice_N, nll_N = self.table.answers(taken_N)
        if self.config.metric == "disagreement":
            loss_U = self._mean((choice_N != final.choice_N).double())
        else:
            loss_U = np.clip(self._mean(nll_N - final.nll_N.double()), 0, self.config.clip) / self.config.clip
        layer_N = taken_N.double().numpy()[np.isin(self.unit_N, units)]
        return loss_U[units].tolist(), float(layer_N.mean())

    def _mean(self, values_N: torch.Tensor) -> np.ndarray:
        """Over each unit's tokens."""
        return np.bincount(self.unit_N, weights=values_N.numpy(), minlength=self.num_units) / self.counts_U


def read_losses(model: EarlyExitLM, documents: Sequence[Document], config: CalibrateConfig) -> ReadLosses:
    """Reads them once. documents: each has a token to be predicted."""
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].tokens))  # alike ones, with little padding
    device = model.decoder.embed.weight.device
    seq_len = min(config.seq_len, model.config.max_seq_len)
    batches = (batch.to(device) for batch in _batches([documents[i] for i in order], config.batch_size, seq_len))
    table = exit_table(model, batches, policies=(config.policy,))
    counts = [documents[i].is_target[1:].sum() for i in order]
    return ReadLosses(table, np.repeat(order, counts), config)


def _batches(documents: Sequence[Document], batch_size: int, seq_len: int) -> Iterator[Batch]:
    """Every document in rows of its own, so that nothing about it depends on the others; as long as the longest of
    `batch_size` documents needs. A batch has as many rows at the most, however long documents are."""
    for start in range(0, len(documents), batch_size):
        some = documents[start : start + batch_size]
        width = min(seq_len, max(len(document.tokens) for document in some))
        packed = [pack([document], width) for document in some]
        rows = {field.name: np.concatenate([getattr(p, field.name) for p in packed]) for field in fields(Rows)}
        for first in range(0, len(rows["tokens_NT"]), batch_size):
            yield Batch.of(Rows(**{name: values[first : first + batch_size] for name, values in rows.items()}))


class AnswerLosses:
    """`rouge_l`: of prompts, answered greedily at full depth and under the thresholds.

    Without references the loss is 1 - ROUGE-L of the two answers; with them it is what full depth's ROUGE-L to the
    reference is higher by, if at all.
    """

    def __init__(
        self, model: EarlyExitLM, units: Sequence[Unit], config: CalibrateConfig, *, cache_dir: Path | None
    ) -> None:
        """Raises DataError for a prompt that can't be answered, or where only some have a reference."""
        if model.tokenizer is None:
            raise DataError("the model has no tokenizer; ROUGE-L compares words")
        without = [unit.where for unit in units if unit.reference is None]
        if 0 < len(without) < len(units):
            raise DataError(f"{without[0]} has no reference and others have one; give all of them one, or none")
        self.prompts = []
        for unit in units:
            with naming(unit.where):
                self.prompts.append(_answerable(prompt_tokens(model, unit.content), model.config.max_seq_len))
        self.references = [unit.reference for unit in units]
        self.num_units = len(units)
        self.model, self.config, self.cache_dir = model, config, cache_dir
        self.full = self._answers(range(len(units)), {})

    def evidence(self, units: np.ndarray) -> tuple[Scores, Scores]:
        """Of full depth's answers, read."""
        documents = []
        for i in units:
            prompt, answer = self.prompts[i], self.full[i].tokens
            is_target = np.repeat([False, True], [len(prompt), len(answer)])
            documents.append(Document(tokens=np.array([*prompt, *answer], np.int32), is_target=is_target))
        return read_losses(self.model, documents, self.config).evidence(np.arange(len(documents)))

    def of(self, thresholds: Mapping[int, float], units: np.ndarray) -> tuple[list[float], float]:
        answers = self._answers(units.tolist(), thresholds)
        losses = [self._loss(i, answer) for i, answer in zip(units.tolist(), answers, strict=True)]
        return losses, float(np.mean([layer for answer in answers for layer in answer.exits]))

    def _loss(self, unit: int, answer: Generation) -> float:
        full, early, reference = self.full[unit].text or "", answer.text or "", self.references[unit]
        if reference is None:
            return 1 - rouge_l(early, full)
        return max(0.0, rouge_l(full, reference) - rouge_l(early, reference))

    def _answers(self, units: Sequence[int], thresholds: Mapping[int, float]) -> list[Generation]:
        config, limit = self.config, self.model.config.max_seq_len
        longest = max(len(prompt) for prompt in self.prompts)
        room = min(limit, longest + config.max_new_tokens)
        with Engine(self.model, max_batch=config.batch_size, max_tokens=room, cache_dir=self.cache_dir) as engine:
            return engine.generate(
                [self.prompts[i] for i in units],
                threshold=dict(thresholds),
                policy=config.policy,
                max_new_tokens=config.max_new_tokens,
            )


def _answerable(prompt: list[int], max_seq_len: int) -> list[int]:
    if len(prompt) >= max_seq_len:
        raise DataError(f"the prompt has {len(prompt)} tokens, and the model's context is {max_seq_len}; shorten it")
    return prompt
