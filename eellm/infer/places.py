"""Where the sequences of an engine live: a slot of the memory for each, and what is kept of those that left.

waiting Sequence → Slots.acquire → memory grown, rows copied → the sequence has its slot; and back
"""

from collections.abc import Collection

from eellm.infer.memory import Memory
from eellm.infer.pipelined.loop import PipelinedMemory
from eellm.infer.sequence import Sequence
from eellm.infer.slots import Slots


class Places:
    def __init__(
        self, num_slots: int, memory: Memory | PipelinedMemory, own_layer: Collection[int], max_tokens: int
    ) -> None:
        """own_layer: layers of the exits that keep keys and values of their own. max_tokens: of a sequence, at most."""
        self.slots = Slots(num_slots)
        self.memory = memory
        self.own_layer = frozenset(own_layer)
        self.max_tokens = max_tokens

    def give(self, seq: Sequence) -> int | None:
        """Gives a sequence its slot. Returns how many of its rows are there already; None: no slot is free."""
        placement = self.slots.acquire(seq.request.tokens, self._kept(seq))
        if placement is None:
            return None
        self._reserve(placement.slot, seq.request.capacity(self.max_tokens))
        if placement.source is not None and placement.source != placement.slot:
            self.memory.copy(placement.source, placement.slot, placement.num_reused)
        seq.place(placement.slot, placement.num_reused)
        return placement.num_reused

    def share_prompt(self, seq: Sequence) -> None:
        """Once a prompt has gone through every layer, requests that begin alike may use its rows."""
        if not seq.is_shared and seq.failure is None and seq.passed[-1] >= len(seq.request.tokens):
            self._commit(seq, len(seq.request.tokens))
            seq.is_shared = True

    def take_back(self, seq: Sequence) -> None:
        """The slot is free; its rows that are true in every layer stay for requests that begin alike. Those of one that
        has failed are gone."""
        if seq.failure is None:
            self._commit(seq, seq.passed[-1])
        else:
            self.memory.wipe(seq.slot)
        self.slots.release(seq.slot)
        seq.waiting = []

    def forget(self) -> None:
        """No row is known any more; nobody may have a slot."""
        assert self.slots.num_free == len(self.slots), "nobody has a slot"
        self.slots = Slots(len(self.slots))

    def clear(self) -> None:
        """Nobody has a slot and no row is known, after a pass or a copy that was broken off. Memory grows anew."""
        assert isinstance(self.memory, Memory), "an engine with workers has failed then"
        self.slots = Slots(len(self.slots))
        self.memory.clear()

    def _reserve(self, slot: int, num_rows: int) -> None:
        """Grows the memory by doubling."""
        num_slots, capacity = self.memory.num_slots, self.memory.capacity
        if slot >= num_slots:
            num_slots = min(max(slot + 1, 2 * num_slots), len(self.slots))
        if num_rows > capacity:
            capacity = min(max(num_rows, 2 * capacity), self.max_tokens)
        self.memory.reserve(num_slots, capacity)

    def _commit(self, seq: Sequence, num_rows: int) -> None:
        self.slots.commit(seq.slot, seq.tokens[:num_rows], self._kept(seq))

    def _kept(self, seq: Sequence) -> frozenset[int]:
        """Layers of the exits whose own keys and values the sequence needs and leaves."""
        return self.own_layer & seq.decode.exits_in_use
