"""Real servers for tests: tiny seeded models, a free port, an event loop in a thread of its own."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass

import httpx
import openai

from eellm.config.serve import ServeConfig
from eellm.serve.access import Keys
from eellm.serve.app import Server
from eellm.serve.models import make_served
from eellm.serve.run import Running, bound
from tests.models import tiny_model
from tests.worlds import tiny_tokenizer


def served_model(*, tokenizer=True, **changes):
    """float64: what it says doesn't depend on what runs beside it."""
    model = tiny_model(**({"vocab_size": 512, "max_seq_len": 256} | changes))
    model.tokenizer = tiny_tokenizer() if tokenizer else None
    return model


@dataclass
class TestServer:
    __test__ = False

    url: str
    running: Running
    server: Server

    def client(self, key="none", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **({"max_retries": 0, "timeout": 30} | options))

    def async_client(self, key="none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def post(self, path="/v1/completions", headers=None, content=None, **body) -> httpx.Response:
        options = {"json": body} if content is None else {"content": content}
        headers = {"content-type": "application/json", **(headers or {})}
        return httpx.post(self.url + path, headers=headers, timeout=30, **options)

    def get(self, path, headers=None) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=30)

    @property
    def worker(self):
        return next(iter(self.server.served.values())).worker

    @property
    def engine(self):
        return next(iter(self.server.served.values())).engine

    def is_ending_all(self) -> bool:
        """Whether word to end it waits for the thread from each open job, behind word to begin some of them."""
        return self.worker._inbox.qsize() >= 2 * self.worker.num_open - len(self.worker._jobs)

    def is_idle(self) -> bool:
        stats = self.engine.stats()
        return self.worker.num_open == 0 == stats.num_running == stats.num_waiting and self.server.num_open == 0


def eventually(condition, timeout_s=20.0):
    """Waits for it to become true; fails when it doesn't."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "this never came true"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(models, *, keys=None, **changes):
    """models: by name. changes: of the config."""
    fields = {
        "max_batch": 4,
        "max_tokens": 256,
        "warm_up": False,
        "drain_s": 5.0,
        "stream_s": 0.0,
        "max_waiting": 16,
    } | changes
    config = ServeConfig(model="-", **fields)
    with bound(config.host, 0) as listening:
        server = Server(config, {name: make_served(name, model, config) for name, model in models.items()})
        running = Running(server, None if keys is None else Keys(keys), listening)
        url: list[str] = []
        is_up = threading.Event()

        def announce(at):
            url.append(at)
            is_up.set()

        def run():
            with asyncio.Runner(loop_factory=running.loop_factory) as runner:
                runner.run(running.run(announce, signals=False))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert is_up.wait(30)
            yield TestServer(url[0], running, server)
        finally:
            running.loop.call_soon_threadsafe(running.drain)
            thread.join(30)
            assert not thread.is_alive(), "the server doesn't end"


def events(text: str) -> list[dict]:
    """The data of server-sent events; the last must be [DONE]."""
    assert text.endswith("\n\n")
    lines = text[:-2].split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@contextlib.contextmanager
def held(engine):
    """Its steps wait for `go(number)`; at the end they are free."""
    steps = threading.Semaphore(0)
    free = threading.Event()
    step = engine.step

    def waiting():
        while not free.is_set() and not steps.acquire(timeout=0.02):
            pass
        return step()

    engine.step = waiting
    try:
        yield steps.release
    finally:
        free.set()
        engine.step = step


def raw(server: TestServer) -> socket.socket:
    """A connection on which anything can be sent."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    return connection


def left_while_waiting(server: TestServer, number: int, body: dict) -> None:
    """So many clients ask for it and leave; returns when the engine's thread, held as it is, is to hear of all."""
    connections = [raw(server) for _ in range(number)]
    for connection in connections:
        connection.sendall(request_bytes(body))
    eventually(lambda: server.worker.num_open == number)
    for connection in connections:
        connection.close()
    eventually(server.is_ending_all)


def request_bytes(body: dict, path="/v1/completions", headers=()) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json", *headers]
    return "\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode() + data


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)
