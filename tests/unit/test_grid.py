"""Which grid a pass has, without torch."""

from hypothesis import given
from hypothesis import strategies as st

from eellm.infer.attention import Span
from eellm.infer.grid import MOST_CELLS, bucket, fit


@st.composite
def passes(draw):
    """Spans of some slots, the memory's slots and capacity."""
    num_slots, capacity = draw(st.integers(1, 20)), draw(st.integers(1, 300))
    slots = draw(st.lists(st.integers(0, num_slots - 1), min_size=1, max_size=num_slots, unique=True))
    spans = []
    for slot in slots:
        before = draw(st.integers(0, capacity - 1))
        spans.append(Span(slot, before, draw(st.integers(1, min(9, capacity - before)))))
    return spans, num_slots, capacity


@given(passes())
def test_every_row_has_a_cell_of_its_own_in_its_slot_and_all_its_keys(drawn):
    spans, num_slots, capacity = drawn
    grid = fit(spans, num_slots=num_slots, capacity=capacity, most_idle_keys=10**9)
    if grid is None:
        smallest = max(span.count for span in spans) * len(spans)
        assert 4 * smallest * num_slots > MOST_CELLS, "there was room"
        return
    cells, positions = grid.cells(spans), grid.positions(spans, -1)
    rows = [(span.slot, position) for span in spans for position in range(span.before, span.end)]
    assert len(set(cells)) == len(rows)
    assert [(grid.first + cell // grid.num_rows, positions[cell]) for cell in cells] == rows
    assert positions.count(-1) == grid.num_cells - len(rows)
    assert 0 <= grid.first < grid.first + grid.num_slots <= num_slots
    assert max(span.end for span in spans) <= grid.num_keys <= capacity
    assert grid.num_cells <= MOST_CELLS


@given(passes())
def test_slots_that_nobody_needs_are_read_only_up_to_the_bound(drawn):
    spans, num_slots, capacity = drawn
    grid = fit(spans, num_slots=num_slots, capacity=capacity, most_idle_keys=10**9)
    if grid is None:
        return
    idle_keys = (grid.num_slots - len(spans)) * grid.num_keys
    assert fit(spans, num_slots=num_slots, capacity=capacity, most_idle_keys=idle_keys) == grid
    if idle_keys:
        assert fit(spans, num_slots=num_slots, capacity=capacity, most_idle_keys=idle_keys - 1) is None


def test_a_single_sequence_reads_its_own_slot_and_everyone_together_all_and_grids_are_few():
    sizes = {"num_slots": 16, "capacity": 4096, "most_idle_keys": 10**9}
    for slot in range(16):
        grid = fit([Span(slot, 99, 1)], **sizes)
        assert (grid.first, grid.num_slots, grid.num_rows, grid.num_keys) == (slot, 1, 1, 128)
    everyone = fit([Span(slot, 40 * slot, 1) for slot in range(16)], **sizes)
    assert (everyone.first, everyone.num_slots, everyone.num_keys) == (0, 16, 1024)
    found = {fit([Span(a, 0, 1), Span(b, 0, 1)], **sizes) for a in range(16) for b in range(a)}
    assert len(found) == 8 + 4 + 2 + 1


def test_rows_of_one_slot_that_come_apart_and_passes_of_many_rows_have_no_grid():
    sizes = {"num_slots": 4, "capacity": 300, "most_idle_keys": 10**9}
    assert fit([Span(1, 0, 2), Span(1, 5, 2)], **sizes) is None
    assert fit([Span(1, 0, MOST_CELLS)], **sizes) is not None
    assert fit([Span(1, 0, MOST_CELLS + 1)], **sizes) is None


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 64)] == [1, 2, 4, 4, 8, 8, 16, 64]
