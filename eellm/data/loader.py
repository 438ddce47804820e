"""Rows → batches of tensors: an endless shuffled stream for training, one pass in order for validation.

The stream is all rows in the order of epoch 0, then all in that of epoch 1, and so on; batches are cut from it, so a
batch may hold the end of one epoch and the beginning of the next, and every row comes once an epoch. An epoch's order
depends on (seed, epoch) alone, so two numbers say where the stream stands. B: rows in a batch, T: tokens in a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch

from eellm.data.packing import Rows
from eellm.errors import DataError, RunError


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some rows as int64 tensors. See `Rows`."""

    tokens_BT: torch.Tensor
    """Token ids."""
    labels_BT: torch.Tensor
    """The token to be said next, or IGNORE."""
    positions_BT: torch.Tensor
    """Position within the piece."""
    documents_BT: torch.Tensor
    """Number of the piece within its row."""

    def to(self, device: torch.device | str) -> Self:
        """This batch on another device."""
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class Loader:
    """The endless stream of training batches. Its state is a plain dict."""

    def __init__(self, rows: Rows, *, batch_size: int, seed: int) -> None:
        """Raises DataError where there are fewer rows than a batch takes."""
        if len(rows) < batch_size:
            raise DataError(
                f"{len(rows)} rows of {rows.tokens_NT.shape[1]} tokens: a batch needs {batch_size}; give more text, "
                "or lower batch_size or seq_len"
            )
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._start_epoch(0)

    def next(self) -> Batch:
        """The next batch."""
        chosen = self._order[self._row : self._row + self._batch_size]
        self._row += len(chosen)
        if (missing := self._batch_size - len(chosen)) > 0:
            self._start_epoch(self._epoch + 1)
            chosen = np.concatenate([chosen, self._order[:missing]])
            self._row = missing
        return _batch(self._rows, chosen)

    def state(self) -> dict[str, int]:
        """Where the stream stands; `restore` on a loader of the same rows goes on from here."""
        return {"num_rows": len(self._rows), "seed": self._seed, "epoch": self._epoch, "row": self._row}

    def restore(self, state: dict[str, int]) -> None:
        """Goes to where `state` was taken, its seed included. Raises RunError for a state of other data."""
        if state["num_rows"] != len(self._rows):
            raise RunError(
                f"the run was started on {state['num_rows']} rows of data, and now there are {len(self._rows)}; "
                "resume with the same files and seq_len, or start a new run"
            )
        self._seed = state["seed"]
        self._start_epoch(state["epoch"])
        self._row = state["row"]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._row = epoch, 0
        self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))


def batches(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """All rows once and in order, for validation. The last batch may be short."""
    for start in range(0, len(rows), batch_size):
        yield _batch(rows, np.arange(start, min(start + batch_size, len(rows))))


def _batch(rows: Rows, chosen: np.ndarray) -> Batch:
    def tensor(values_NT: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values_NT[chosen].astype(np.int64))

    return Batch(
        tokens_BT=tensor(rows.tokens_NT),
        labels_BT=tensor(rows.labels_NT),
        positions_BT=tensor(rows.positions_NT),
        documents_BT=tensor(rows.documents_NT),
    )
