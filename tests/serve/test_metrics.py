"""The counters at /metrics hold the work of every request, however it ended."""

import pytest

from tests.serve.servers import (
    eventually,
    held,
    left_while_waiting,
    raw,
    read_all,
    request_bytes,
    served_model,
    serving,
)

LONG = {"model": "tiny", "prompt": "for x in", "max_tokens": 200, "ignore_eos": True, "early_exit": {"method": "full"}}


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture
def server(model):
    with serving({"tiny": model}) as running:
        yield running


def values(server) -> dict[str, float]:
    lines = [line for line in server.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def answers(server) -> dict[str, float]:
    """How many answers ended, by outcome."""
    found = {name: value for name, value in values(server).items() if name.startswith("eellm_answers_total")}
    return {name.partition('outcome="')[2].partition('"')[0]: value for name, value in found.items()}


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_a_client_that_left_are_counted(server, stream):
    with held(server.engine) as go:
        with raw(server) as connection:
            connection.sendall(request_bytes(LONG | {"stream": stream}))
            go(5)
            eventually(lambda: server.engine.num_ticks == 5)
        eventually(lambda: not server.worker._inbox.empty())
        go(1)
        eventually(server.is_idle)
    found = values(server)
    made = server.engine.stats().new_tokens
    assert made >= 4
    assert found['eellm_generation_tokens_total{key="",model="tiny"}'] == made
    assert found['eellm_exit_tokens_total{layer="6",model="tiny"}'] == made
    assert found['eellm_layers_full_total{model="tiny"}'] == 6 * made
    assert found['eellm_layers_run_total{model="tiny"}'] >= 6 * made
    assert found['eellm_prompt_tokens_total{key="",model="tiny"}'] > 0
    assert answers(server) == {"cancelled": 1}
    assert found.get('eellm_e2e_request_latency_seconds_count{model="tiny"}', 0) == 0


def test_a_client_that_left_while_it_waited_has_made_nothing(server):
    with held(server.engine) as go:
        left_while_waiting(server, 5, LONG)
        go(2)
        eventually(server.is_idle)
    assert answers(server) == {"cancelled": 5}
    assert values(server)['eellm_generation_tokens_total{key="",model="tiny"}'] == server.engine.stats().new_tokens


def test_tokens_made_until_the_deadline_are_counted(model):
    with serving({"tiny": model}, deadline_s=0.3, max_tokens=4096) as server:
        with held(server.engine) as go, raw(server) as connection:
            connection.sendall(request_bytes(LONG, headers=["connection: close"]))
            go(3)
            eventually(lambda: server.engine.num_ticks == 3)
            eventually(lambda: go(1) is None and server.worker.num_open == 0)
            assert b" 504 " in read_all(connection)
        made = server.engine.stats().new_tokens
        assert values(server)['eellm_generation_tokens_total{key="",model="tiny"}'] == made > 0
        assert answers(server) == {"deadline": 1}


def test_answers_are_counted_by_how_they_ended(server):
    fields = {"model": "tiny", "prompt": "for x in", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    text = server.post(**fields).json()["choices"][0]["text"]
    server.post(**fields, stop=text[-1])
    server.post(**fields, n=2, stream=True)
    server.post(**fields | {"prompt": [10_000]})  # refused before it is an answer
    assert answers(server) == {"length": 3, "stop": 1}


def test_tokens_of_an_engine_that_was_lost_are_counted(server):
    with held(server.engine) as go, raw(server) as connection:
        connection.sendall(request_bytes(LONG, headers=["connection: close"]))
        go(4)
        eventually(lambda: server.engine.num_ticks == 4)

        def lost(*_):
            raise AssertionError("a bug")

        server.engine.loop.step = lost
        go(1)
        assert b" 500 " in read_all(connection)
        assert values(server)['eellm_generation_tokens_total{key="",model="tiny"}'] == server.engine.stats().new_tokens
        assert answers(server) == {"failed": 1}


def test_the_log_says_how_many_tokens_a_client_that_left_was_made(server, caplog):
    with caplog.at_level("INFO", logger="eellm"), held(server.engine) as go:
        with raw(server) as connection:
            connection.sendall(request_bytes(LONG | {"stream": True}))
            go(5)
            eventually(lambda: len(server.worker._jobs) == 1 and len(next(iter(server.worker._jobs)).times) >= 4)
        eventually(lambda: '"new_tokens"' in caplog.text)
        assert '"new_tokens": 0' not in caplog.text
        go(1)
        eventually(server.is_idle)
