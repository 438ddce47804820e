"""How well every exit predicts a text: perplexity, agreement with the final exit, accuracy.

file → `text_rows` → packed rows → `evaluate` → Evaluation: one ExitQuality per exit, and the table for `curve`
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eellm.data.documents import Document, read_documents
from eellm.data.loader import batches
from eellm.data.packing import Rows, pack
from eellm.errors import ConfigError, DataError
from eellm.exits.lm import EarlyExitLM
from eellm.exits.loss import IGNORE
from eellm.exits.metrics import POLICIES, ExitTable, exit_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitQuality:
    """One exit on a text, every token of which it is asked to predict from the true ones before it."""

    layer: int
    kind: str
    """`mlp, tied`: what stands before which output matrix; `final` for the final exit."""
    nll: float
    """Mean negative log-likelihood, nats a token."""
    perplexity: float
    bits_per_byte: float | None
    """Of the UTF-8 text; comparable between tokenizers. None without tokenizer."""
    agreement: float
    """Share of tokens where its choice is the final exit's."""
    accuracy: float
    """Share of tokens where its choice is the text's."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    num_tokens: int
    """Tokens predicted."""
    num_bytes: int | None
    """Of their text, in UTF-8."""
    exits: tuple[ExitQuality, ...]
    """From early to late; the last is the final one."""
    table: ExitTable

    def as_json(self) -> dict[str, Any]:
        """Plain data; a number that isn't finite becomes None."""
        exits = [finite(dataclasses.asdict(exit)) for exit in self.exits]
        return {"num_tokens": self.num_tokens, "num_bytes": self.num_bytes, "exits": exits}


def text_rows(path: Path, model: EarlyExitLM, *, seq_len: int, max_tokens: int) -> Rows:
    """The first `max_tokens` tokens of a .txt or .jsonl file, packed. Raises DataError, ConfigError."""
    if model.tokenizer is None:
        raise DataError("the model has no tokenizer, which turns text into tokens; add its tokenizer.json")
    if seq_len > model.config.max_seq_len:
        raise ConfigError(f"seq_len = {seq_len}: the model's context is {model.config.max_seq_len}")
    return pack(_first(read_documents([path], model.tokenizer), max_tokens), seq_len)


def _first(documents: Iterable[Document], num_tokens: int) -> Iterator[Document]:
    """Documents up to `num_tokens` in all, the last one cut."""
    for document in documents:
        yield Document(tokens=document.tokens[:num_tokens], is_target=document.is_target[:num_tokens])
        num_tokens -= len(document.tokens)
        if num_tokens <= 0:
            return


def evaluate(model: EarlyExitLM, rows: Rows, *, batch_size: int = 4, policies: Sequence[str] = POLICIES) -> Evaluation:
    """Asks every exit about every target token of `rows`, in one pass over the backbone.

    policies: the scores that the table keeps for the curve.
    """
    device = model.decoder.embed.weight.device
    table = exit_table(model, (batch.to(device) for batch in batches(rows, batch_size)), policies=policies)
    num_bytes = None
    if model.tokenizer is not None:
        num_bytes = len(model.tokenizer.decode(rows.labels_NT[rows.labels_NT != IGNORE].tolist()).encode())
    qualities = tuple(_quality(model, layer, table, num_bytes) for layer in table.exits)
    return Evaluation(num_tokens=len(table.labels_N), num_bytes=num_bytes, exits=qualities, table=table)


def _quality(model: EarlyExitLM, layer: int, table: ExitTable, num_bytes: int | None) -> ExitQuality:
    nll = table.nll(layer)
    bits = nll * len(table.labels_N) / math.log(2)
    config = None if layer == table.final else model.exit(layer).config
    return ExitQuality(
        layer=layer,
        kind="final" if config is None else f"{config.kind}, {config.head}",
        nll=nll,
        perplexity=table.perplexity(layer),
        bits_per_byte=bits / num_bytes if num_bytes else None,
        agreement=table.agreement(layer),
        accuracy=table.accuracy(layer),
    )


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """`values` for JSON, which has no word for inf and NaN: None in their place."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def num_text_tokens(rows: Rows) -> int:
    """Tokens of `rows` up to the last that is a target: without the padding."""
    return int(np.flatnonzero(rows.labels_NT != IGNORE)[-1]) + 2
