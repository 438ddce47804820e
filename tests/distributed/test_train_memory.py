"""What exits cost in memory on each of four stages, small: `benchmarks/train_memory.py` in seconds."""

from itertools import pairwise

import pytest

from benchmarks.train_memory import NUM_STAGES, Sizes, growth, measure, variants
from tests.ranks import run_on_ranks

SIZES = Sizes(vocab_size=4096, hidden_size=32, seq_len=64, rows=4, chunk_size=128)


@pytest.fixture(scope="module")
def peaks():
    recipes = variants(SIZES)
    by_rank = run_on_ranks(NUM_STAGES, measure, list(recipes.values()))
    return dict(zip(recipes, zip(*by_rank, strict=True), strict=True))


def test_without_exits_the_last_stage_peaks_highest_and_with_them_none_peaks_above_it(peaks):
    plain = peaks["no exits"]
    highest = plain[-1].held + plain[-1].step
    assert highest == max(peak.held + peak.step for peak in plain)
    more = growth(peaks["deferred, chunked"], plain)
    assert max(peak.held + peak.step + extra for peak, extra in zip(plain, more, strict=True)) <= highest


@pytest.mark.parametrize("name", ["deferred, chunked", "next stage, chunked"])
def test_an_exit_adds_one_chunk_of_logits_and_its_head_s_gradient(peaks, name):
    one_of_each = SIZES.chunk_bytes + 2 * SIZES.head_bytes + 2 * SIZES.hidden_bytes
    more = growth(peaks[name], peaks["no exits"])
    assert max(more) > 0.5 * SIZES.chunk_bytes, "the measure sees the logits"
    assert max(more) <= one_of_each


def test_without_chunks_a_whole_microbatch_s_logits_exist_at_a_time(peaks):
    more = growth(peaks["deferred, whole"], peaks["no exits"])
    assert min(more[:-1]) > SIZES.microbatch_bytes


def test_eager_exits_hold_the_logits_of_every_microbatch_in_flight(peaks):
    more = growth(peaks["eager"], peaks["no exits"])
    for stage, extra in enumerate(more[:-1], 1):
        in_flight = NUM_STAGES - stage + 1
        assert extra >= in_flight * SIZES.microbatch_bytes, f"stage {stage}"
    steps = [one - other for one, other in pairwise(more[:-1])]
    assert steps == pytest.approx([SIZES.microbatch_bytes] * len(steps), rel=0.05), "one microbatch more per stage"
