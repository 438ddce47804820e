"""Slots against a memory that is written for real: whatever is said to be reusable must be there, and nothing more."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from eellm.infer.slots import Placement, Slots

NONE = frozenset()


def served(slots, tokens, needs=NONE, kept=None):
    """A request that comes and goes; its placement."""
    placement = slots.acquire(tokens, needs)
    slots.commit(placement.slot, tokens, needs if kept is None else kept)
    slots.release(placement.slot)
    return placement


def test_the_first_requests_get_empty_slots_and_one_too_many_gets_none():
    slots = Slots(2, block_size=4)
    assert [slots.acquire([1, 2, 3]).slot for _ in range(2)] == [0, 1]
    assert slots.acquire([1, 2, 3]) is None
    slots.release(1)
    assert slots.num_free == 1
    assert slots.acquire([1, 2, 3]).slot == 1


def test_a_request_that_goes_on_with_a_finished_one_gets_its_slot_and_rows():
    slots = Slots(3, block_size=4)
    empty = slots.acquire([9] * 8).slot
    served(slots, list(range(8)))
    slots.release(empty)
    assert slots.acquire(list(range(12))) == Placement(slot=1, source=None, num_reused=8)


def test_the_last_token_always_runs():
    slots = Slots(2, block_size=4)
    served(slots, list(range(8)))
    assert slots.acquire(list(range(8))).num_reused == 4
    assert slots.acquire(list(range(9))).num_reused == 8
    one_token_blocks = Slots(1, block_size=1)
    served(one_token_blocks, [5])
    assert one_token_blocks.acquire([5]).num_reused == 0


def test_only_whole_blocks_are_reused():
    slots = Slots(1, block_size=4)
    served(slots, list(range(7)))
    assert slots.acquire(list(range(20))).num_reused == 4


def test_rows_of_a_running_request_are_copied():
    slots = Slots(2, block_size=4)
    running = slots.acquire(list(range(8))).slot
    assert slots.acquire(list(range(20))).num_reused == 0, "nothing is committed yet"
    slots.release(1)
    slots.commit(running, list(range(8)))
    assert slots.acquire(list(range(20))) == Placement(slot=1, source=running, num_reused=8)


def test_a_short_match_does_not_take_over_a_long_cached_text_while_others_are_free():
    slots = Slots(3, block_size=4)
    served(slots, list(range(40)))
    served(slots, [7] * 8)
    short = served(slots, [0, 1, 2, 3, 50, 51])
    assert short == Placement(slot=2, source=0, num_reused=4)
    # now none is empty: the least recently used that isn't the source goes
    served(slots, [0, 1, 2, 3, 60, 61])  # goes on with slot 2's only block
    other = served(slots, [0, 1, 2, 3, 70, 71, 72, 73, 74])
    assert (other.slot, other.num_reused) == (2, 4)
    assert served(slots, [0, 1, 2, 3, 80, 81, 82, 83, 84]).slot == 1
    assert slots.acquire(list(range(41))).num_reused == 40, "the long text is still there"


def test_the_least_recently_used_slot_goes_first():
    slots = Slots(3, block_size=2)
    for first in (10, 20, 30):
        served(slots, [first, first + 1, 0])
    served(slots, [10, 11, 5])
    assert slots.acquire([1, 2, 3]).slot == 1
    assert slots.acquire([1, 2, 3]).slot == 2
    assert slots.acquire([10, 11, 3]) == Placement(slot=0, source=None, num_reused=2)


def test_a_slot_counts_as_used_until_it_is_released():
    slots = Slots(2, block_size=2)
    for first in (10, 20):
        slots.commit(slots.acquire([first, first + 1]).slot, [first, first + 1])
    for slot in (1, 0):
        slots.release(slot)
    assert slots.acquire([1, 2, 3]).slot == 1


def test_rows_without_an_exits_own_keys_are_not_for_requests_that_test_it():
    slots = Slots(1, block_size=2)
    text = list(range(9))
    placement = slots.acquire(text)
    slots.commit(placement.slot, text[:4], frozenset({3, 5}))
    slots.commit(placement.slot, text, frozenset({3}))
    slots.release(placement.slot)
    for needs, num_reused in ((frozenset({5}), 4), (frozenset({4}), 0)):
        copy = Slots(2, block_size=2)
        first = copy.acquire(text).slot
        copy.commit(first, text[:4], frozenset({3, 5}))
        copy.commit(first, text, frozenset({3}))
        assert copy.acquire(text, needs).num_reused == num_reused
    assert slots.acquire(text, frozenset({3})).num_reused == 8


def test_copied_rows_keep_what_they_held():
    slots = Slots(2, block_size=2)
    text = list(range(9))
    slots.commit(slots.acquire(text).slot, text, frozenset({3}))
    copied = slots.acquire([*text[:4], 90, 91])
    slots.commit(copied.slot, [*text[:4], 90, 91], NONE)
    slots.release(copied.slot)
    assert slots.acquire([*text[:4], 90, 91, 92], frozenset({3})).num_reused == 4


class Served:
    """A request as an engine would run it."""

    def __init__(self, tokens, needs):
        self.tokens, self.needs = tokens, needs
        self.num_true = 0


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
NEEDS = st.frozensets(st.integers(1, 2))


class SlotsAgainstMemory(RuleBasedStateMachine):
    """A row in memory is what a model would make of it: all tokens up to its own, and the exits that kept it."""

    NUM_SLOTS, CAPACITY, BLOCK = 3, 24, 3

    def __init__(self):
        super().__init__()
        self.slots = Slots(self.NUM_SLOTS, self.BLOCK)
        self.memory = [[None] * self.CAPACITY for _ in range(self.NUM_SLOTS)]
        self.true = [0] * self.NUM_SLOTS
        """Of each slot, its first rows that no request has written since they were committed."""
        self.running = {}

    @rule(tokens=TOKENS, needs=NEEDS)
    def acquire(self, tokens, needs):
        placement = self.slots.acquire(tokens, needs)
        if placement is None:
            assert len(self.running) == self.NUM_SLOTS
            return
        slot, num = placement.slot, placement.num_reused
        assert slot not in self.running, "given twice"
        assert num == max(self.reusable(source, tokens, needs) for source in range(self.NUM_SLOTS))
        source = slot if placement.source is None else placement.source
        assert num <= self.true[source]
        assert num <= len(tokens) - 1
        self.memory[slot][:num] = self.memory[source][:num]
        for row in range(num):
            prefix, kept = self.memory[slot][row]
            assert prefix == tuple(tokens[: row + 1])
            assert needs <= kept
        self.true[slot] = num
        request = self.running[slot] = Served(tokens, needs)
        request.num_true = num

    def reusable(self, slot, tokens, needs):
        """The most that could be reused of a slot, row by row."""
        rows = 0
        for row in range(min(self.true[slot], len(tokens) - 1)):
            prefix, kept = self.memory[slot][row]
            if prefix != tuple(tokens[: row + 1]) or not needs <= kept:
                break
            rows = row + 1
        return rows // self.BLOCK * self.BLOCK

    def one_running(self, data):
        return data.draw(st.sampled_from(sorted(self.running)))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=4), wrong=st.integers(0, 3))
    def run_and_commit(self, data, more, wrong):
        """Some rows run, with drafts behind them that turn out wrong; what is true is committed."""
        slot = self.one_running(data)
        request = self.running[slot]
        request.tokens = [*request.tokens, *more][: self.CAPACITY - 3]
        end = data.draw(st.integers(request.num_true, len(request.tokens)))
        for row in range(request.num_true, end):
            self.memory[slot][row] = tuple(request.tokens[: row + 1]), request.needs
        for row in range(end, end + wrong):
            self.memory[slot][row] = "a draft", NONE
        request.num_true = end
        self.slots.commit(slot, request.tokens[:end], request.needs)
        self.true[slot] = max(self.true[slot], end // self.BLOCK * self.BLOCK)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data):
        slot = self.one_running(data)
        self.slots.release(slot)
        del self.running[slot]

    @invariant()
    def all_slots_are_accounted_for(self):
        assert self.slots.num_free == self.NUM_SLOTS - len(self.running)
        assert self.slots.num_known_rows == sum(self.true)
        assert self.slots.num_known_rows <= self.NUM_SLOTS * self.CAPACITY


SlotsAgainstMemory.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_slots_agree_with_a_memory_that_is_written = SlotsAgainstMemory.TestCase


def test_after_ten_thousand_requests_all_slots_are_back_and_nothing_has_grown():
    slots, generator = Slots(4, block_size=4), np.random.default_rng(0)
    running = []
    for _ in range(10_000):
        tokens = generator.integers(0, 2, generator.integers(1, 40)).tolist()
        placement = slots.acquire(tokens)
        if placement is None:
            slots.release(running.pop(int(generator.integers(len(running)))))
            continue
        slots.commit(placement.slot, tokens)
        running.append(placement.slot)
        assert slots.num_known_rows <= 4 * 40
    for slot in running:
        slots.release(slot)
    assert slots.num_free == len(slots) == 4
