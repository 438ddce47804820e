"""Rows → batches of tensors: an endless shuffled stream for training, one pass in order for validation.

The stream is all rows in the order of epoch 0, then all in that of epoch 1, and so on; batches are cut from it, so a
batch may hold the end of one epoch and the beginning of the next, and every row comes once an epoch. An epoch's order
depends on (seed, epoch) alone, so two numbers say where the stream stands. B: rows in a batch, T: tokens in a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch

from eellm.data.packing import Rows
from eellm.errors import DataError, RunError
from eellm.exits.loss import IGNORE


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
    is_packed: bool = True
    """Whether some row holds several pieces, so that attention must be kept within each."""

    @classmethod
    def of(cls, rows: Rows) -> Self:
        """All of `rows`."""

        def tensor(values_NT: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values_NT.astype(np.int64))

        return cls(
            tokens_BT=tensor(rows.tokens_NT),
            labels_BT=tensor(rows.labels_NT),
            positions_BT=tensor(rows.positions_NT),
            documents_BT=tensor(rows.documents_NT),
            is_packed=bool(rows.documents_NT.any()),
        )

    def to(self, device: torch.device | str) -> Self:
        """This batch on another device."""
        return self._each(lambda values: values.to(device))

    def part(self, rows: slice) -> Self:
        """Some of the rows."""
        return self._each(lambda values: values[rows])

    def padded(self, num_rows: int) -> Self:
        """`num_rows` rows: these, and copies of the first one without targets."""
        missing = num_rows - len(self.labels_BT)
        padded = self._each(lambda values: torch.cat([values, values[:1].expand(missing, -1)]))
        padded.labels_BT[num_rows - missing :] = IGNORE
        return padded

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return replace(self, **{name: change(values) for name, values in self.tensors().items()})


class Order:
    """The endless order of rows: all of them in the order of epoch 0, then in that of epoch 1, and so on."""

    def __init__(self, num_rows: int, seed: tuple[int, ...], *, epoch: int = 0, row: int = 0) -> None:
        self._num_rows = num_rows
        self._seed = seed
        self.epoch = epoch
        """Epochs begun before this one."""
        self.row = row
        """Rows of this epoch that were taken."""
        self._order = self._shuffled()

    def take(self, num: int) -> np.ndarray:
        """The numbers of the next `num` rows."""
        taken = [self._order[self.row : self.row + num]]
        self.row += len(taken[0])
        while (missing := num - sum(map(len, taken))) > 0:
            self.epoch += 1
            self._order = self._shuffled()
            taken.append(self._order[:missing])
            self.row = len(taken[-1])
        return np.concatenate(taken)

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng([*self._seed, self.epoch]).permutation(self._num_rows)


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
        self._order = Order(len(rows), (seed,))

    def next(self) -> Batch:
        """The next batch."""
        return self.take(self._batch_size)

    def take(self, num_rows: int) -> Batch:
        """The next `num_rows` rows, as one batch."""
        return _batch(self._rows, self._order.take(num_rows))

    def state(self) -> dict[str, int]:
        """Where the stream stands; `restore` on a loader of the same rows goes on from here."""
        return {
            "num_rows": len(self._rows),
            "seed": self._seed,
            "epoch": self._order.epoch,
            "row": self._order.row,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Goes to where `state` was taken, its seed included. Raises RunError for a state of other data."""
        if state["num_rows"] != len(self._rows):
            raise RunError(
                f"the run was started on {state['num_rows']} rows of data, and now there are {len(self._rows)}; "
                "resume with the same files and seq_len, or start a new run"
            )
        self._seed = state["seed"]
        self._order = Order(len(self._rows), (self._seed,), epoch=state["epoch"], row=state["row"])


def batches(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """All rows once and in order, for validation. The last batch may be short."""
    for start in range(0, len(rows), batch_size):
        yield _batch(rows, np.arange(start, min(start + batch_size, len(rows))))


def _batch(rows: Rows, chosen: np.ndarray) -> Batch:
    return Batch.of(Rows(**{field.name: getattr(rows, field.name)[chosen] for field in fields(rows)}))
