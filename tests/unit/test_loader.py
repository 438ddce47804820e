import numpy as np
import pytest
import torch

from eellm.data.documents import Document
from eellm.data.loader import Batch, Loader, batches
from eellm.data.packing import Rows, pack
from eellm.errors import DataError, RunError


def rows_of(num_rows: int) -> Rows:
    """Rows of two tokens whose first token is the row's number."""
    tokens = np.stack([np.arange(num_rows), np.arange(num_rows)], axis=1).reshape(-1).astype(np.int32)
    return pack([Document(tokens=tokens, is_target=np.ones(len(tokens), bool))], seq_len=2)


def numbers(batch: Batch) -> list[int]:
    return batch.tokens_BT[:, 0].tolist()


def test_a_batch_holds_whole_rows_as_int64():
    rows = rows_of(5)
    batch = Loader(rows, batch_size=3, seed=0).next()
    chosen = numbers(batch)
    for name in ("tokens", "labels", "positions", "documents"):
        values = getattr(batch, f"{name}_BT")
        assert values.dtype == torch.int64
        assert values.tolist() == getattr(rows, f"{name}_NT")[chosen].tolist()


def test_a_batch_moves_to_a_device_as_a_whole():
    batch = Loader(rows_of(2), batch_size=2, seed=0).next().to("meta")
    devices = {
        values.device.type for values in (batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.documents_BT)
    }
    assert devices == {"meta"}


@pytest.mark.parametrize(("num_rows", "batch_size"), [(6, 2), (7, 3), (4, 4), (1, 1)])
def test_every_row_comes_once_an_epoch_each_time_in_another_order(num_rows, batch_size):
    loader = Loader(rows_of(num_rows), batch_size=batch_size, seed=0)
    stream = [number for _ in range(4 * num_rows) for number in numbers(loader.next())]
    epochs = [stream[i : i + num_rows] for i in range(0, len(stream), num_rows)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    assert num_rows < 4 or len(set(map(tuple, epochs))) > 1


def test_the_order_is_that_of_the_seed():
    def stream(seed):
        loader = Loader(rows_of(9), batch_size=4, seed=seed)
        return [numbers(loader.next()) for _ in range(5)]

    assert stream(1) == stream(1) != stream(2)


@pytest.mark.parametrize("num_seen", range(8))
def test_a_restored_loader_gives_the_very_next_batch(num_seen):
    rows = rows_of(7)
    loader = Loader(rows, batch_size=3, seed=5)
    for _ in range(num_seen):
        loader.next()
    state = loader.state()
    assert all(type(value) is int for value in state.values())
    other = Loader(rows, batch_size=3, seed=0)
    other.next()
    other.restore(state)
    assert other.state() == state
    assert [numbers(other.next()) for _ in range(5)] == [numbers(loader.next()) for _ in range(5)]


def test_a_state_of_other_data_is_refused():
    state = Loader(rows_of(7), batch_size=3, seed=5).state()
    with pytest.raises(RunError, match="started on 7 rows of data, and now there are 8"):
        Loader(rows_of(8), batch_size=3, seed=5).restore(state)


def test_fewer_rows_than_a_batch_are_refused_with_the_number_needed():
    with pytest.raises(DataError, match="2 rows of 2 tokens: a batch needs 3"):
        Loader(rows_of(2), batch_size=3, seed=0)


def test_validation_sees_every_row_once_in_order():
    assert [numbers(batch) for batch in batches(rows_of(5), batch_size=2)] == [[0, 1], [2, 3], [4]]
