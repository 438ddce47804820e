"""Which slot of the static key/value memory a request gets, and which of its first rows are there already. No torch.

A slot holds one sequence's rows of all layers, from position 0 on. A row is a function of all tokens up to its own:
sequences that begin alike have the same first rows. A request starts behind the longest beginning that any slot holds,
in whole blocks. Tokens themselves are compared, never hashes of them: nothing can be taken for something else.
Rows of exits with keys and values of their own are there only where such an exit was in use: `kept` says which.

Invariant: of every slot, the rows of its known blocks are true in all layers, until the slot is given to a request that
doesn't begin with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a request goes."""

    slot: int
    """Its own until it is released."""
    source: int | None
    """The slot, running or free, whose first `num_reused` rows must be copied before the next `acquire`. None: what can
    be reused is in `slot` already."""
    num_reused: int
    """Rows that needn't be computed; fewer than the request has tokens."""


class _Slot:
    """What is known of one slot."""

    def __init__(self) -> None:
        self.tokens = np.empty(0, np.int64)
        """Of the blocks that are true."""
        self.kept: list[frozenset[int]] = []
        """Of each block, layers of the exits whose own keys and values are there as well."""
        self.is_free = True
        self.last_used = 0


class Slots:
    def __init__(self, num_slots: int, block_size: int = 16) -> None:
        """block_size: rows are reused in multiples of this."""
        assert num_slots >= 1, "an engine serves at least one request"
        assert block_size >= 1, "a block has rows"
        self.block_size = block_size
        self._slots = [_Slot() for _ in range(num_slots)]
        self._clock = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def num_free(self) -> int:
        return sum(slot.is_free for slot in self._slots)

    @property
    def num_known_rows(self) -> int:
        """Rows that can be reused, of all slots."""
        return sum(len(slot.tokens) for slot in self._slots)

    def acquire(self, tokens: Sequence[int], needs: frozenset[int] = frozenset()) -> Placement | None:
        """Takes a slot for a request with this prompt; None: all are in use.

        needs: layers of the exits whose own keys and values the request must find. The last token is never reused: its
        row has to run. A slot is taken whose known rows the request goes on with, the one with most (an empty one is
        such a slot too, with none); if there is none, the least recently used, whose rows are lost.
        """
        free = [index for index, slot in enumerate(self._slots) if slot.is_free]
        if not free:
            return None
        prompt = np.asarray(tokens, np.int64)
        matches = [self._match(slot, prompt, needs) for slot in self._slots]
        target = self._target(free, matches)
        longest = max(matches)
        source = target if matches[target] == longest else matches.index(longest)
        self._take(target, source, longest)
        return Placement(slot=target, source=None if source == target else source, num_reused=longest * self.block_size)

    def commit(self, slot: int, tokens: Sequence[int], kept: frozenset[int] = frozenset()) -> None:
        """Says that the slot's first len(tokens) rows are true in all layers now, and won't be written again.

        kept: layers of the exits that have kept keys and values of their own for the rows which the request ran. Tokens
        that were committed before, or reused, come first again; of the rest, whole blocks can be reused from now on.
        """
        held = self._slots[slot]
        assert not held.is_free, f"slot {slot} belongs to no request"
        num_blocks = len(tokens) // self.block_size
        if num_blocks <= len(held.kept):
            return
        rows = np.asarray(tokens[: num_blocks * self.block_size], np.int64)
        assert np.array_equal(rows[: len(held.tokens)], held.tokens), "rows that were true have changed"
        held.tokens = rows
        held.kept += [kept] * (num_blocks - len(held.kept))

    def release(self, slot: int) -> None:
        """The request is over. What was committed can be reused until another request needs the room."""
        assert not self._slots[slot].is_free, f"slot {slot} belongs to no request"
        self._slots[slot].is_free = True
        self._touch(slot)

    def _match(self, slot: _Slot, prompt: np.ndarray, needs: frozenset[int]) -> int:
        """Blocks that the slot and the prompt begin with, all with what is needed."""
        most = min(len(slot.kept), (len(prompt) - 1) // self.block_size)
        differs = slot.tokens[: most * self.block_size] != prompt[: most * self.block_size]
        equal = int(differs.argmax()) // self.block_size if differs.any() else most
        return next((block for block in range(equal) if not needs <= slot.kept[block]), equal)

    def _target(self, free: Sequence[int], matches: Sequence[int]) -> int:
        """Of the free slots, one that loses nothing, or the least recently used."""
        lossless = [index for index in free if matches[index] == len(self._slots[index].kept)]
        if lossless:
            return max(lossless, key=lambda index: (matches[index], -index))
        return min(free, key=lambda index: self._slots[index].last_used)

    def _take(self, target: int, source: int, num_blocks: int) -> None:
        """The target is the request's, with the source's first blocks."""
        slot, held = self._slots[target], self._slots[source]
        slot.tokens, slot.kept = held.tokens[: num_blocks * self.block_size], held.kept[:num_blocks]
        slot.is_free = False
        for index in (source, target):
            self._touch(index)

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._slots[slot].last_used = self._clock
