"""Messages between the processes of an engine: whatever their size, they come as they went."""

import threading

import pytest
import torch
import torch.distributed as dist

import eellm
from eellm.infer.pipelined import wire
from eellm.infer.pipelined.wire import Inbox, Outbox, gloo
from tests.models import tiny_model


@pytest.fixture
def pair():
    """Two members of a group, in one process."""
    store, groups = dist.HashStore(), {}
    threads = [
        threading.Thread(target=lambda rank=rank: groups.update({rank: gloo(store, rank, 2)})) for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return groups[0], groups[1]


@pytest.mark.parametrize("limit", [32, 64, 1000, 1 << 16])
def test_messages_of_any_size_come_whole_and_in_order(pair, limit, monkeypatch):
    monkeypatch.setattr(wire, "MESSAGE_BYTES", limit)
    outbox, inbox = Outbox(pair[0], 1), Inbox(pair[1], 0)
    sizes = [
        (0, 0),
        (1, 0),
        (3, 5),
        (4, 0),
        (5, 1),
        (200, 0),
        (200, 300),
        (3, 20_000),
        (9000, 0),
        (9000, 40_000),
        (2, 1),
    ]
    sent = []
    for kind, (num_values, num_floats) in enumerate(sizes):
        values = [kind + i / 8 for i in range(num_values)]
        data = torch.arange(num_floats, dtype=torch.float32).view(-1, 1) if num_floats else None
        outbox.send(kind, values, data)
        sent.append((kind, values, data))
    for kind, values, data in sent:
        message = inbox.take(wire.START_TIMEOUT)
        assert (message.kind, message.values) == (kind, values)
        assert (message.data is None) == (data is None)
        if data is not None:
            assert torch.equal(message.tensor(torch.float32, 1), data)
    outbox.flush()


@pytest.mark.timeout(120)
def test_workers_take_a_pass_of_more_sequences_than_a_message_has_room_for():
    model = tiny_model(seed=0, max_seq_len=8)
    prompts = [[i % 29] for i in range(500)]
    with eellm.Engine(model, max_batch=500) as alone, eellm.Engine(model, max_batch=500, workers=2) as engine:
        expected = alone.generate(prompts, threshold=0.4, max_new_tokens=2)
        found = engine.generate(prompts, method="pipelined", threshold=0.4, max_new_tokens=2)
    assert [out.tokens for out in found] == [out.tokens for out in expected]
    assert [out.exits for out in found] == [out.exits for out in expected]
