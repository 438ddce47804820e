"""Clients that leave, dawdle and flood: the others' answers stay right, nothing is left behind, nobody hangs."""

import asyncio
import contextlib
import gc
import json
import os
import signal
from collections import Counter

import httpx
import openai
import pytest
import torch

import eellm
from eellm.errors import WorkerError
from eellm.infer.drafts import DraftPlan
from eellm.infer.score import CHUNK, Scoring
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

LONG = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "temperature": 0, "ignore_eos": True}
SHORT = {"model": "tiny", "prompt": "for x in", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def model():
    return served_model(max_seq_len=4096)


@pytest.fixture
def server(model):
    with serving({"tiny": model}, max_tokens=4096, max_batch=4, max_waiting=4) as running:
        yield running


def wanted(model):
    (out,) = eellm.generate(model, ["for x in"], method="full", max_new_tokens=12)
    return out.text


def ask(server, **fields):
    return server.post(**SHORT | fields)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_before_the_next_step_but_one(server, stream):
    with held(server.engine) as go:
        with raw(server) as connection:
            connection.sendall(request_bytes(LONG | {"stream": stream}))
            go(3)
            eventually(lambda: server.engine.num_ticks == 3)
            assert server.engine.stats().num_running == 1
        eventually(lambda: not server.worker._inbox.empty())
        go(1)
        eventually(lambda: server.engine.stats().num_running == 0)
        assert server.engine.num_ticks <= 4
    eventually(server.is_idle)
    assert 'eellm_num_requests_running{model="tiny"} 0.0' in server.get("/metrics").text
    assert ask(server).status_code == 200


def test_a_client_that_leaves_while_it_waits_takes_its_place_in_the_queue_along(server):
    with held(server.engine) as go:
        left_while_waiting(server, 6, LONG)
        go(2)
        eventually(server.is_idle)
    assert server.engine.stats().num_free_slots == 4


@pytest.mark.slow
def test_200_clients_that_leave_mid_stream_disturb_nobody_and_leave_nothing(server, model):
    text = wanted(model)

    async def leave(client, i):
        fields = LONG | {"prompt": f"x{i}", "stream": True}
        while True:
            async with client.stream("POST", "/v1/completions", json=fields) as answer:
                if answer.status_code == 200:
                    async for _ in answer.aiter_raw():
                        return
            assert answer.status_code == 429
            await asyncio.sleep(0.01)

    async def stay(client):
        while True:
            answer = await client.post("/v1/completions", json=SHORT)
            if answer.status_code == 200:
                return answer.json()["choices"][0]["text"]
            assert answer.status_code == 429
            await asyncio.sleep(0.01)

    async def all_of_them(num_leaving):
        limits = httpx.Limits(max_connections=12)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            leaving = [leave(client, i) for i in range(num_leaving)]
            staying = [stay(client) for _ in range(6)]
            return (await asyncio.gather(*leaving, *staying))[num_leaving:]

    asyncio.run(all_of_them(12))  # memory for keys and values has grown, and every slot has had a prompt
    eventually(server.is_idle)
    memory_bytes, things = server.engine.stats().memory_bytes, our_objects()
    assert asyncio.run(all_of_them(200)) == [text] * 6
    eventually(server.is_idle)
    assert server.engine.stats().num_free_slots == 4
    assert server.engine.stats().memory_bytes == memory_bytes
    rules = Counter(SplitRule=len(server.engine.loop.stops))  # the scheduler makes one a stop, when it first asks
    assert our_objects() - things - rules == Counter()


def our_objects() -> Counter:
    """What of the package's is alive, by type. Plans of drafts aren't counted: they are a memo of bounded size."""
    gc.collect()
    kinds = (type(thing) for thing in gc.get_objects())
    ours = (kind for kind in kinds if str(kind.__module__).startswith("eellm.") and kind is not DraftPlan)
    return Counter(kind.__qualname__ for kind in ours)


def test_a_client_that_reads_a_byte_at_a_time_holds_up_nobody(server, model):
    with raw(server) as slow:
        slow.sendall(request_bytes(LONG | {"stream": True, "max_tokens": 400, "logprobs": 0}))
        assert slow.recv(1)
        for _ in range(5):
            assert ask(server).json()["choices"][0]["text"] == wanted(model)
            assert slow.recv(1)
        eventually(lambda: server.worker.num_open == 0)  # its tokens are made, read or not
        rest = b""
        while not rest.endswith(b"0\r\n\r\n"):
            rest += slow.recv(65536)
    assert rest.count(b"data: {") == 400
    assert b"data: [DONE]" in rest


def test_a_client_that_never_sends_its_body_is_let_go(model):
    with serving({"tiny": model}, body_s=0.3) as server, raw(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 50\r\n\r\n{")
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("begun", [b"", b"POST /v1/completions HTTP/1.1\r\nhost:"])
def test_a_client_that_never_ends_its_head_is_let_go(model, begun):
    with serving({"tiny": model}, body_s=0.3) as server, raw(server) as connection:
        connection.sendall(begun)
        assert read_all(connection) == b""


def test_nor_is_one_that_was_served_before(model):
    with serving({"tiny": model}, body_s=0.3) as server, raw(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")
        connection.sendall(b"GET")
        assert b"HTTP" not in read_all(connection)


@pytest.mark.parametrize("part", [b"x-many: 1\r\n", b"x" * 1000])
def test_a_head_without_end_is_cut_off(server, part):
    with raw(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n")
        head = part * (10_000 // len(part))
        with pytest.raises(ConnectionError):
            eventually(lambda: connection.sendall(head))
    assert ask(server).status_code == 200


def test_a_client_that_leaves_within_its_body_leaves_nothing(server):
    with raw(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 50\r\n\r\n{")
    eventually(server.is_idle)
    assert ask(server).status_code == 200


@pytest.mark.parametrize("junk", [b"\x00\x01\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"\x16\x03\x01\x02", b"\r\n\r\n"])
def test_what_is_no_http_hurts_nobody(server, junk):
    with raw(server) as connection:
        connection.sendall(junk)
        connection.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            read_all(connection)
    assert ask(server).status_code == 200


def test_one_request_too_many_gets_429_and_is_told_when_to_come_back(server):
    with held(server.engine):
        connections = [raw(server) for _ in range(8)]
        for connection in connections:
            connection.sendall(request_bytes(SHORT))
        eventually(lambda: server.worker.num_open == 8)
        answer = ask(server)
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "rate_limit_error"
        with server.client() as client, pytest.raises(openai.RateLimitError):
            client.completions.create(**SHORT, stream=True)
        text = server.get("/metrics").text
        assert 'eellm_num_requests_waiting{model="tiny"}' in text
    for connection in connections:
        with connection:
            connection.settimeout(30)
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    with server.client(max_retries=2) as client:
        assert client.completions.create(**SHORT)


def test_several_answers_take_as_many_places(server):
    with held(server.engine), raw(server) as connection:
        connection.sendall(request_bytes(SHORT | {"n": 7}))
        eventually(lambda: server.worker.num_open == 7)
        assert ask(server, n=2).status_code == 429
        assert server.worker.num_open == 7
    eventually(server.is_idle)


def test_prompts_to_be_scored_wait_in_the_same_queue(server):
    scoring = SHORT | {"echo": True, "logprobs": 0, "max_tokens": 0}
    with held(server.engine), raw(server) as running:
        running.sendall(request_bytes(LONG))
        eventually(lambda: server.worker.num_open == 1)
        connections = [raw(server) for _ in range(7)]
        for connection in connections:
            connection.sendall(request_bytes(scoring))
        eventually(lambda: server.worker.num_open == 8)
        assert server.post(**scoring).status_code == 429
    for connection in connections:
        with connection:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    eventually(server.is_idle)


def test_a_request_past_its_deadline_is_ended(model):
    with serving({"tiny": model}, deadline_s=0.3, max_tokens=4096) as server:
        answer = server.post(**LONG)
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "timeout_error"
        eventually(server.is_idle)
        fields = {name: value for name, value in LONG.items() if name != "ignore_eos"}
        with server.client() as client:
            chunks = client.completions.create(**fields, stream=True, extra_body={"ignore_eos": True})
            with pytest.raises(openai.APIError, match="took longer"):
                list(chunks)
        eventually(server.is_idle)


def test_a_request_that_waits_past_its_deadline_is_ended_too(model):
    with serving({"tiny": model}, deadline_s=0.5, max_batch=1, max_tokens=4096) as server:

        async def both():
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
                return await asyncio.gather(*(client.post("/v1/completions", json=LONG) for _ in range(2)))

        assert [answer.status_code for answer in asyncio.run(both())] == [504, 504]
        eventually(server.is_idle)


def test_a_bug_in_one_request_s_beginning_ends_that_request_alone(server, monkeypatch, caplog):
    submit = server.engine.submit

    def broken(tokens, options):
        if options.max_new_tokens == 7:
            raise AssertionError("a bug")
        return submit(tokens, options)

    monkeypatch.setattr(server.engine, "submit", broken)
    answer = ask(server, max_tokens=7)
    assert answer.status_code == 500
    assert "a bug" not in answer.text
    assert "AssertionError: a bug" in caplog.text
    assert ask(server).status_code == 200
    eventually(server.is_idle)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_for_which_the_model_says_no_numbers_fails_alone(stream):
    model = served_model()
    with torch.no_grad():
        model.decoder.embed.weight[7] = torch.nan
        model.decoder.output.weight[7] = model.decoder.output.weight[0]  # so that no answer says it
    with serving({"tiny": model}, max_tokens=100) as server:
        bad = {"prompt": [5, 7, 9], "max_tokens": 4, "early_exit": {"method": "full"}}
        good = bad | {"prompt": [5, 6, 9]}
        answer = ask(server, **bad, stream=stream)
        assert "are no numbers (NaN)" in answer.text
        assert "model_failed" in answer.text
        assert stream or answer.status_code == 500
        assert ask(server, **good).status_code == 200
        eventually(server.is_idle)


@pytest.mark.parametrize(("error", "status"), [(WorkerError("worker 1 died"), 503), (AssertionError("a bug"), 500)])
def test_when_the_engine_is_lost_everybody_hears_of_it_and_nobody_hangs(model, error, status):
    with serving({"tiny": model}, max_tokens=4096) as server, raw(server) as whole, raw(server) as streamed:
        with held(server.engine) as go:
            whole.sendall(request_bytes(LONG, headers=["connection: close"]))
            streamed.sendall(request_bytes(LONG | {"stream": True}, headers=["connection: close"]))
            eventually(lambda: server.worker.num_open == 2)
            go(4)
            eventually(lambda: server.worker.num_running == 2)

            def lost(*_):
                raise error

            server.engine.loop.step = lost
        answer = read_all(whole)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"a bug" not in answer
        assert b'"error":{' in read_all(streamed)
        assert ask(server).status_code == status
        for path in ("/ready", "/health"):
            assert server.get(path).status_code == status
        assert server.worker.num_open == 0


@pytest.mark.parametrize("tp", [1, 2])
def test_a_worker_process_that_is_killed_ends_what_runs_and_waits_with_503_and_is_named(model, caplog, tp):
    fields = {"workers": 2, "tp": tp, "max_tokens": 4096, "max_batch": 2}
    with serving({"tiny": model}, **fields) as server, contextlib.ExitStack() as stack:
        whole, streamed, waiting = (stack.enter_context(raw(server)) for _ in range(3))
        whole.sendall(request_bytes(LONG, headers=["connection: close"]))
        streamed.sendall(request_bytes(LONG | {"stream": True}, headers=["connection: close"]))
        begun = streamed.recv(15)
        eventually(lambda: server.worker.num_running == 2)
        waiting.sendall(request_bytes(LONG, headers=["connection: close"]))
        eventually(lambda: server.worker.num_open == 3)
        os.kill(server.engine.crew.pids[0], signal.SIGKILL)
        for connection in (whole, waiting):
            answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"a worker process of the model is lost" in answer
        answer = begun + read_all(streamed)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b'"code":"worker_lost"' in answer
        for path in ("/ready", "/health"):
            assert server.get(path).status_code == 503
        assert ask(server).status_code == 503
        assert server.worker.num_open == 0
    assert "WorkerError: worker 1 " in caplog.text


def test_stop_strings_of_ten_thousand_tokens_are_refused_or_where_they_are_allowed_hold_up_nobody(server, model):
    (out,) = eellm.generate(model, ["for x in"], method="full", max_new_tokens=12)
    long_stop = out.text[:3] + " x" * 10_000  # it begins as the answer does: text is held back for it
    many_stops = [f"no such text {i}" for i in range(9_999)] + [out.text[4:7]]
    for stop in (long_stop, many_stops):
        answer = ask(server, stop=stop)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "stop"
    limits = {"max_stops": 10_000, "max_stop_chars": 100_000}
    with serving({"tiny": model}, max_tokens=4096, **limits) as generous, raw(generous) as slow:
        slow.sendall(request_bytes(LONG | {"stop": many_stops[:-1], "max_tokens": 200}, headers=["connection: close"]))
        eventually(lambda: generous.worker.num_running == 1)
        assert ask(generous).json()["choices"][0]["text"] == out.text
        assert ask(generous, stop=long_stop).json()["choices"][0]["text"] == out.text
        cut = ask(generous, stop=many_stops).json()["choices"][0]
        assert (cut["text"], cut["finish_reason"]) == (out.text[: out.text.find(out.text[4:7])], "stop")
        assert read_all(slow).startswith(b"HTTP/1.1 200 OK")


def test_a_long_prompt_that_is_scored_holds_up_others_for_no_more_than_a_chunk(server):
    sizes = []
    engine = server.engine
    scoring, step = engine.scoring, engine.step

    def watched(*args, **fields):
        made = scoring(*args, **fields)
        advance = made.advance

        def counted():
            sizes.append(sum(part.end - part.start for part in made._chunks[0]))
            return advance()

        made.advance = counted
        return made

    def stepped():
        sizes.append("step")
        return step()

    engine.scoring, engine.step = watched, stepped
    fields = {"echo": True, "logprobs": 0, "max_tokens": 0, "prompt": [3] * 1000}
    with raw(server) as running, raw(server) as first, raw(server) as second:
        running.sendall(request_bytes(LONG))
        eventually(lambda: "step" in sizes)
        for connection in (first, second):
            connection.sendall(request_bytes(SHORT | fields, headers=["connection: close"]))
        for connection in (first, second):
            assert read_all(connection).startswith(b"HTTP/1.1 200 OK")
    pieces = [size for size in sizes if size != "step"]
    assert sum(pieces) == 2 * 999
    assert max(pieces) == CHUNK
    between = "".join("s" if size == "step" else "p" for size in sizes)
    assert "pp" not in between, "two pieces without a step between them"


def test_a_client_that_leaves_while_its_prompt_is_scored_ends_that(server, monkeypatch):
    pieces = []
    advance = Scoring.advance
    monkeypatch.setattr(Scoring, "advance", lambda self: pieces.append(self) or advance(self))
    fields = {"echo": True, "logprobs": 0, "max_tokens": 0, "prompt": [3] * 4000}
    with held(server.engine) as go, raw(server) as running:
        running.sendall(request_bytes(LONG))
        go(1)
        eventually(lambda: server.engine.num_ticks == 1)
        with raw(server) as left:
            left.sendall(request_bytes(SHORT | fields))
            eventually(lambda: server.worker.num_open == 2)
            go(2)
            eventually(lambda: len(pieces) == 2)
        eventually(lambda: server.worker.num_open == 1)
        go(4)
        eventually(lambda: server.engine.num_ticks == 7)
        assert len(pieces) <= 3, "one may have been on its way"
    eventually(server.is_idle)


def test_a_prompt_that_can_t_be_scored_in_time_is_refused(model):
    connections = []
    fields = {"echo": True, "logprobs": 0, "max_tokens": 0, "prompt": [3] * 4000}
    with serving({"tiny": model}, deadline_s=0.5, max_tokens=4096) as server, held(server.engine) as go:
        for body in (LONG, SHORT | fields):
            connections.append(raw(server))
            connections[-1].sendall(request_bytes(body, headers=["connection: close"]))
            go(1)
            eventually(lambda: server.engine.num_ticks == 1)
        assert read_all(connections[-1]).startswith(b"HTTP/1.1 504 ")


def test_a_score_that_can_t_be_made_is_refused(server):
    answer = ask(server, echo=True, logprobs=0, max_tokens=0, prompt=[3] * 5000)
    assert answer.status_code == 400


def test_memory_of_requests_goes_with_them(server):
    fresh = our_objects()
    for i in range(4):
        ask(server, prompt=f"x{i}", echo=True, logprobs=1)
    eventually(server.is_idle)
    before = our_objects()
    for i in range(20):
        ask(server, prompt=f"x{i}", stream=i % 2 == 0, echo=i % 3 == 0, logprobs=1)
    with raw(server) as left:
        left.sendall(request_bytes(LONG | {"stream": True}))
        assert left.recv(15) == b"HTTP/1.1 200 OK"
    eventually(server.is_idle)
    after = our_objects()
    assert after - before == Counter()
    kinds = ("Job", "Answer", "Handle", "Sequence", "Scoring")
    assert [kind for kind in kinds if after[kind] > fresh[kind]] == [], "nor is the last one held"


def test_an_event_that_ends_badly_says_so_within_the_stream(model):
    with serving({"tiny": model}, deadline_s=0.4, max_tokens=4096) as server:
        answer = server.post(**LONG | {"stream": True})
        assert answer.status_code == 200
        lines = answer.text[:-2].split("\n\n")
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "deadline"
        assert "x-request-id" in answer.headers
