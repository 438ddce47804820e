"""The global stream of rows: packed as `pack` does, blended by shares, split, and resumed under any layout."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.config.train import TextConfig
from eellm.data.documents import Document
from eellm.data.loader import Batch, Order
from eellm.data.packing import pack
from eellm.data.prepare import prepare
from eellm.data.shards import Shards, writing
from eellm.data.sources import Source
from eellm.data.stream import Stream, Validation, blend, open_data, read_rows, split
from eellm.errors import DataError, RunError
from eellm.text.bytes import byte_tokenizer

FIELDS = ("tokens", "labels", "positions", "documents")
T = 4


def source_of(lengths, *, first=1, name="a", targets=None):
    """Documents of these lengths whose tokens count up from `first`."""
    tokens = np.arange(first, first + sum(lengths), dtype=np.int32)
    is_target = None if targets is None else np.array(targets, bool)
    return Source(
        name=name,
        tokens=tokens,
        is_target=is_target,
        document_ends=np.cumsum(lengths, dtype=np.int64),
        tokenizer=byte_tokenizer(),
        fingerprint=f"{name}{first}",
    )


def rows_source(num_rows, number=0):
    """One document of `num_rows` whole rows; a row is known by its first token."""
    return source_of([num_rows * T], first=1000 * number, name=f"s{number}")


def names(batch):
    """Of each row, the number of its source and its number there."""
    return [(token // 1000, token % 1000 // T) for token in batch.tokens_BT[:, 0].tolist()]


def assert_equal(one: Batch, other: Batch):
    for field in FIELDS:
        assert torch.equal(getattr(one, f"{field}_BT"), getattr(other, f"{field}_BT")), field


def joined(batches):
    return Batch(**{f"{f}_BT": torch.cat([getattr(batch, f"{f}_BT") for batch in batches]) for f in FIELDS})


# --- rows ---


@st.composite
def worlds(draw):
    lengths = [*draw(st.lists(st.integers(0, 12), max_size=8)), draw(st.integers(2, 12))]
    targets = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths))))
    if targets is not None:
        targets[-1] = True
    return lengths, targets, draw(st.integers(1, 10))


@settings(deadline=None)
@given(worlds(), st.integers(1, 9))
def test_every_row_is_that_of_pack(tmp_path_factory, world, shard_tokens):
    lengths, targets, seq_len = world
    source = source_of(lengths, targets=targets)
    ends = source.document_ends.tolist()
    is_target = np.ones(sum(lengths), bool) if targets is None else source.is_target
    documents = [
        Document(tokens=source.tokens[start:end], is_target=is_target[start:end])
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    expected = Batch.of(pack(documents, seq_len))
    num_rows = len(expected.tokens_BT)
    assert_equal(read_rows([(source, row) for row in range(num_rows)], seq_len), expected)

    directory = tmp_path_factory.mktemp("rows") / "data"
    with writing(directory, byte_tokenizer(), shard_tokens=shard_tokens) as writer:
        writer.add(source.tokens, source.is_target, source.document_ends)
    shards = Shards(directory)
    mapped = replace(source, tokens=shards.tokens, is_target=shards.is_target, document_ends=shards.document_ends)
    assert_equal(joined([read_rows([(mapped, row)], seq_len) for row in range(num_rows)]), expected)


def test_a_row_reads_no_more_than_itself_and_the_token_behind_it():
    asked = []

    class Watched:
        def __len__(self):
            return 10**12

        def __getitem__(self, span):
            asked.append((span.start, span.stop))
            return np.zeros(span.stop - span.start, np.int32)

    source = replace(source_of([1]), tokens=Watched(), document_ends=np.array([5, 10**12], np.int64))
    batch = read_rows([(source, 10**9), (source, 0)], 8)
    assert asked == [(8 * 10**9, 8 * 10**9 + 9), (0, 9)]
    assert batch.documents_BT.tolist() == [[0] * 8, [0] * 5 + [1] * 3]


# --- order ---


def test_every_row_comes_once_an_epoch_in_an_order_of_the_seed_s_own():
    def epochs(seed):
        stream = Stream([rows_source(7, 0), rows_source(3, 1)], seq_len=T, seed=seed)
        rows = [name for _ in range(10) for name in names(stream.take(4))]
        return [rows[i : i + 10] for i in range(0, 40, 10)]

    everything = sorted([(0, i) for i in range(7)] + [(1, i) for i in range(3)])
    assert all(sorted(epoch) == everything for epoch in epochs(5))
    assert len(set(map(tuple, epochs(5)))) == 4
    assert epochs(5) == epochs(5) != epochs(6)


def test_a_source_s_order_depends_on_its_place_and_the_epoch_alone():
    def order_of(number, stream, num_rows):
        return [row for source, row in names(stream.take(num_rows)) if source == number]

    sources = [rows_source(9, 0), rows_source(9, 1)]
    alone = order_of(0, Stream(sources[:1], seq_len=T, seed=3), 18)
    assert order_of(0, Stream(sources, seq_len=T, seed=3), 36) == alone
    assert order_of(0, Stream(sources, weights=(2, 1), seq_len=T, seed=3), 27) == alone
    assert order_of(1, Stream(sources, seq_len=T, seed=3), 36) != alone
    assert alone[:9] == Order(9, (3, 0)).take(9).tolist()


def test_more_rows_can_be_taken_at_once_than_there_are():
    rows = names(Stream([rows_source(3)], seq_len=T, seed=0).take(8))
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [(0, 0), (0, 1), (0, 2)]
    assert len(set(rows[6:])) == 2


# --- blend ---


@settings(deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=5).filter(lambda w: sum(w) > 0.1), st.integers(1, 200))
def test_no_source_is_ever_ahead_of_its_share_by_a_row(weights, num):
    picks = blend(weights, [0] * len(weights), num)
    for taken in range(1, num + 1):
        for i, weight in enumerate(weights):
            ahead = picks[:taken].count(i) - taken * weight / sum(weights)
            assert -len(weights) < ahead < 1 + 1e-9
    assert all(weight > 0 for i, weight in enumerate(weights) if i in picks)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_without_weights_every_row_of_all_sources_comes_once_before_any_comes_again(sizes):
    picks = blend(sizes, [0] * len(sizes), 2 * sum(sizes))
    for half in (picks[: sum(sizes)], picks[sum(sizes) :]):
        assert [half.count(i) for i in range(len(sizes))] == sizes


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 30))
def test_the_blend_goes_on_as_if_it_had_not_been_asked_in_parts(first, second):
    weights = (0.5, 0.2, 0.3)
    picks = blend(weights, [0] * 3, first)
    counts = [picks.count(i) for i in range(3)]
    assert picks + blend(weights, counts, second) == blend(weights, [0] * 3, first + second)


def test_weights_are_the_shares_of_the_stream():
    stream = Stream([rows_source(5, 0), rows_source(50, 1)], weights=(3, 1), seq_len=T, seed=0)
    assert Counter(source for source, _ in names(stream.take(40))) == {0: 30, 1: 10}
    stream = Stream([rows_source(5, 0), rows_source(50, 1)], weights=(0, 1), seq_len=T, seed=0)
    assert {source for source, _ in names(stream.take(60))} == {1}


# --- parts and state ---


@pytest.mark.parametrize("dp", [1, 2, 3, 4, 6, 12])
def test_the_ranks_parts_are_the_whole_whatever_their_number(dp):
    sources = [rows_source(7, 0), rows_source(10, 1)]
    whole = Stream(sources, seq_len=T, seed=1)
    ranks = [Stream(sources, seq_len=T, seed=1) for _ in range(dp)]
    for _ in range(5):
        share = 12 // dp
        parts = [stream.take(12, slice(d * share, (d + 1) * share)) for d, stream in enumerate(ranks)]
        assert_equal(joined(parts), whole.take(12))
        assert all(stream.state() == whole.state() for stream in ranks)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(0, 7),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_resuming_gives_the_very_next_batch_also_under_another_number_of_ranks(sizes, num_seen, before, after, is_even):
    def stream():
        sources = [rows_source(size, i) for i, size in enumerate(sizes)]
        return Stream(sources, weights=(1.0,) * len(sizes) if is_even else (), seq_len=T, seed=2)

    first = stream()
    for _ in range(num_seen):
        first.take(4, slice(0, 4 // before))
    state = json.loads(json.dumps(first.state()))
    share = 4 // after
    for rank in range(after):
        expected, resumed = stream(), stream()
        resumed.take(3)
        resumed.restore(state)
        assert resumed.state() == state
        for _ in range(num_seen):
            expected.take(4)
        for _ in range(3):
            part = slice(rank * share, (rank + 1) * share)
            assert_equal(resumed.take(4, part), expected.take(4, part))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, now it is 1"),
        ({"seq_len": 2}, r"seq_len was 4, now it is 2; .*num_rows was \[5, 3\], now it is \[10, 6\]"),
        ({"weights": (1, 1)}, r"weights was \[5, 3\], now it is \[1, 1\]"),
        ({"held_back": 0.5}, r"num_rows was \[5, 3\], now it is \[3, 2\]"),
        ({"sources": [rows_source(5, 0)]}, r"contents was \['s00', 's11000'\], now it is \['s00'\]"),
        ({"sources": [rows_source(5, 0), rows_source(3, 2)]}, r"contents was \['s00', 's11000'\], now it is \['s00'"),
    ],
)
def test_a_state_of_other_data_is_refused_and_what_differs_is_named(change, message):
    options = {"sources": [rows_source(5, 0), rows_source(3, 1)], "seq_len": T, "seed": 0}
    state = Stream(**options).state()
    with pytest.raises(RunError, match=f"started on other data: .*{message}.*; resume with the same"):
        Stream(**options | change).restore(state)


# --- split and validation ---


@settings(deadline=None)
@given(st.integers(1, 300), st.floats(0, 1))
def test_the_last_rows_are_held_back_and_one_is_always_left(num_rows, fraction):
    held = split(rows_source(num_rows), T, fraction)
    assert held.stop == num_rows
    assert held.start >= 1
    assert (len(held) > 0) == (fraction > 0 and num_rows > 1)
    assert abs(len(held) - fraction * num_rows) <= 1


def test_what_is_held_back_never_comes_in_training():
    sources = [rows_source(8, 0), rows_source(3, 1), rows_source(1, 2)]
    stream = Stream(sources, seq_len=T, seed=0, held_back=0.25)
    parts = [(source, split(source, T, 0.25)) for source in sources]
    validation = Validation(parts, seq_len=T, num_rows=100)
    assert set(names(stream.take(100))) == {*((0, i) for i in range(6)), (1, 0), (1, 1), (2, 0)}
    assert names(validation.take(slice(None))) == [(0, 6), (1, 2), (0, 7)]


def test_validation_takes_the_first_rows_of_each_source_in_turn():
    parts = [(rows_source(5, 0), range(2, 5)), (rows_source(2, 1), range(2))]
    validation = Validation(parts, seq_len=T, num_rows=4)
    assert len(validation) == 4
    assert [names(batch) for batch in validation.batches(3)] == [[(0, 2), (1, 0), (0, 3)], [(1, 1)]]
    assert names(validation.take(slice(1, 3))) == [(1, 0), (0, 3)]


# --- from a recipe ---


def config_of(**options):
    return TextConfig(**{"train": ("pydoc_data.topics",), "seq_len": 64} | options)


def test_a_recipe_s_stream_validation_and_tokenizer():
    stream, validation, tokenizer = open_data(config_of(validation_rows=8), vocab_size=257, seed=0)
    batch = stream.take(4)
    assert tuple(batch.tokens_BT.shape) == (4, 64)
    assert len(validation) == 8
    assert tokenizer.decode(batch.tokens_BT[0].tolist()).isascii()
    seen = {tuple(row) for row in stream.take(stream.state()["data"]["num_rows"][0]).tokens_BT.tolist()}
    assert not seen & {tuple(row) for row in validation.take(slice(None)).tokens_BT.tolist()}


def test_validation_sources_of_their_own_are_taken_whole_and_nothing_is_held_back(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 639)
    (tmp_path / "b.txt").write_text("y" * 127)
    options = {"train": (str(tmp_path / "a.txt"),), "validation": (str(tmp_path / "b.txt"),)}
    stream, validation, tokenizer = open_data(config_of(**options), vocab_size=257, seed=0)
    assert stream.state()["data"]["num_rows"] == [10]
    texts = [tokenizer.decode(row) for row in validation.take(slice(None)).tokens_BT.tolist()]
    assert texts == ["y" * 64, "y" * 63]


def test_no_validation_is_asked_for_where_nothing_is_held_back():
    _, validation, _ = open_data(config_of(validation_fraction=0.0), vocab_size=257, seed=0)
    assert (len(validation), list(validation.batches(4))) == (0, [])


def test_validation_rows_without_a_token_to_be_predicted_are_refused_before_the_run(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 64)  # 65 tokens: the last one is alone in the row that is held back
    options = {"train": (str(tmp_path / "a.txt"),), "seq_len": 8}
    with pytest.raises(DataError, match=r"no token to be predicted; give more .* or data\.validation_rows = 0"):
        open_data(config_of(**options), vocab_size=257, seed=0)
    assert len(open_data(config_of(**options, validation_rows=0), vocab_size=257, seed=0)[1]) == 0
    (tmp_path / "a.txt").write_text("x" * 65)
    assert len(open_data(config_of(**options), vocab_size=257, seed=0)[1]) == 1


def test_a_prepared_directory_gives_the_stream_of_its_text(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(3000)))
    prepare([str(tmp_path / "a.txt")], tmp_path / "data", tokenizer=byte_tokenizer())
    streams = [
        open_data(config_of(train=(str(tmp_path / name),)), vocab_size=257, seed=4)[0] for name in ("a.txt", "data")
    ]
    for _ in range(20):
        assert_equal(*(stream.take(8) for stream in streams))
