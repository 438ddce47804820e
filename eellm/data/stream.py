"""The rows of a training run, as one global stream over all sources: nothing in it depends on the number of processes.

Each source's tokens, documents end to end, are cut into rows as `pack` does, but a row is made only when it is taken.
The last rows of a source may be held back for validation. The others come in an order of the source's own that depends
on (seed, source, epoch) alone, every row once an epoch; and which source gives the next row, the shares in the blend
say: always the one that is furthest behind its share. So the stream's place is two numbers a source.

B: rows, T: tokens in a row, S: T + 1.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from eellm.config.train import TextConfig
from eellm.data.loader import Batch, Order
from eellm.data.packing import label_rows
from eellm.data.sources import Source, open_sources
from eellm.errors import DataError, RunError
from eellm.exits.loss import IGNORE
from eellm.text.tokenizer import Tokenizer


class Stream:
    """The endless stream of training rows."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        weights: Sequence[float] = (),
        seq_len: int,
        seed: int,
        held_back: float = 0.0,
    ) -> None:
        """weights: each source's share; unset, by its number of rows. held_back: the share of each source's rows, the
        last ones, that aren't learnt."""
        self._sources = sources
        self._seq_len = seq_len
        self._seed = seed
        self._num_rows = [split(source, seq_len, held_back).start for source in sources]
        self._weights = list(weights or self._num_rows)
        self._orders = [Order(n, (seed, i)) for i, n in enumerate(self._num_rows)]

    def take(self, num_rows: int, part: slice = slice(None)) -> Batch:
        """Goes on by `num_rows`, and gives those of them that `part` says: a data-parallel rank's."""
        chosen = self._choose(num_rows)
        return read_rows([(self._sources[i], row) for i, row in chosen[part]], self._seq_len)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as plain data; `restore` on a stream of the same data goes on from here."""
        places = [{"epoch": order.epoch, "row": order.row} for order in self._orders]
        return {"data": self._identity(), "places": places}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken. Raises RunError for a state of other data, and says what differs."""
        then, now = state["data"], self._identity()
        if then != now:
            differs = [f"{key} was {then[key]}, now it is {now[key]}" for key in now if then[key] != now[key]]
            raise RunError(
                f"the run was started on other data: {'; '.join(differs)}; resume with the same sources and data "
                "options, or start a new run"
            )
        self._orders = [
            Order(n, (self._seed, i), **place)
            for i, (n, place) in enumerate(zip(self._num_rows, state["places"], strict=True))
        ]

    def _choose(self, num_rows: int) -> list[tuple[int, int]]:
        """The next rows: number of the source, number of the row in it."""
        counts = [order.epoch * n + order.row for order, n in zip(self._orders, self._num_rows, strict=True)]
        picks = blend(self._weights, counts, num_rows)
        rows = [iter(order.take(picks.count(i)).tolist()) for i, order in enumerate(self._orders)]
        return [(i, next(rows[i])) for i in picks]

    def _identity(self) -> dict[str, Any]:
        """What makes the stream the one it is."""
        return {
            "seed": self._seed,
            "seq_len": self._seq_len,
            "weights": self._weights,
            "num_rows": self._num_rows,
            "contents": [source.fingerprint[:12] for source in self._sources],
        }


class Validation:
    """The rows on which a run is measured, always the same ones and in the same order."""

    def __init__(self, parts: Sequence[tuple[Source, range]], *, seq_len: int, num_rows: int) -> None:
        """The first `num_rows` rows of all parts, one of each in turn."""
        longest = max((len(rows) for _, rows in parts), default=0)
        in_turn = ((source, rows[i]) for i in range(longest) for source, rows in parts if i < len(rows))
        self._rows = list(islice(in_turn, num_rows))
        self._seq_len = seq_len

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def take(self, part: slice) -> Batch:
        """Some of the rows; there must be one at least."""
        return read_rows(self._rows[part], self._seq_len)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows; the last batch may be short."""
        for start in range(0, len(self), batch_size):
            yield self.take(slice(start, start + batch_size))


def open_data(config: TextConfig, *, vocab_size: int, seed: int) -> tuple[Stream, Validation, Tokenizer]:
    """What a run learns from, what it is measured on, and the tokenizer of both. Raises as `open_sources`,
    and DataError where nothing could be measured."""
    names = (*config.train, *config.validation)
    sources = open_sources(names, tokenizer=config.tokenizer, vocab_size=vocab_size)
    train, others = sources[: len(config.train)], sources[len(config.train) :]
    held_back = 0.0 if others else config.validation_fraction
    stream = Stream(train, weights=config.weights, seq_len=config.seq_len, seed=seed, held_back=held_back)
    parts = [(source, range(count_rows(source, config.seq_len))) for source in others] or [
        (source, split(source, config.seq_len, held_back)) for source in train
    ]
    validation = Validation(parts, seq_len=config.seq_len, num_rows=config.validation_rows)
    _check_can_be_measured(validation)
    return stream, validation, sources[0].tokenizer


def _check_can_be_measured(validation: Validation) -> None:
    """Here, before the run: its end is a bad time to hear of it."""
    has_targets = any(bool((batch.labels_BT != IGNORE).any()) for batch in validation.batches(64))
    if len(validation) > 0 and not has_targets:
        raise DataError(
            "the validation text has no token to be predicted; give more text, a larger data.validation_fraction, or "
            "data.validation_rows = 0"
        )


def count_rows(source: Source, seq_len: int) -> int:
    """Rows of a source; the last one may have padding."""
    return -(-len(source.tokens) // seq_len)


def split(source: Source, seq_len: int, fraction: float) -> range:
    """The last rows, those held back: at least one where fraction > 0 and there are two, and never all of them."""
    num_rows = count_rows(source, seq_len)
    num_held = min(max(1, int(num_rows * fraction)), num_rows - 1) if fraction > 0 else 0
    return range(num_rows - num_held, num_rows)


def blend(weights: Sequence[float], counts: Sequence[int], num: int) -> list[int]:
    """Which source gives each of the next `num` rows, after `counts` of each: the one furthest behind its share.

    No source is ever ahead of its share by a row or more, so that weights that are numbers of rows make every row of
    all sources come once before any comes again.
    """
    counts, total, picks = list(counts), sum(weights), []
    for taken in range(sum(counts) + 1, sum(counts) + num + 1):
        behind = [weight * taken - total * count for weight, count in zip(weights, counts, strict=True)]
        picks.append(behind.index(max(behind)))
        counts[picks[-1]] += 1
    return picks


def read_rows(rows: Sequence[tuple[Source, int]], seq_len: int) -> Batch:
    """Rows by their source and number, at least one."""
    columns = zip(*(_read_row(source, row * seq_len, seq_len + 1) for source, row in rows), strict=True)
    return Batch.of(label_rows(*map(np.stack, columns)))


def _read_row(source: Source, start: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, whether each is to be learnt, and the number of its document, of `length` tokens from `start` on. What
    is behind the end is a document of its own."""
    stop = min(start + length, len(source.tokens))
    tokens_S, is_target_S = np.zeros(length, np.int32), np.zeros(length, bool)
    tokens_S[: stop - start] = source.tokens[start:stop]
    is_target_S[: stop - start] = True if source.is_target is None else source.is_target[start:stop]
    ends = source.document_ends
    first, behind = np.searchsorted(ends, (start, start + length), side="right")
    owner_S = np.searchsorted(ends[first:behind], np.arange(start, start + length), side="right")
    return tokens_S, is_target_S, owner_S
