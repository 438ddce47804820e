"""A server's life: what it is told, how it starts, how it ends, and several models in one."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import httpx
import pytest

import eellm
from eellm.cli import serve as verb
from eellm.cli.main import main
from eellm.config.load import from_toml
from eellm.config.serve import ServeConfig, ServedModel
from eellm.errors import CheckpointError, ConfigError
from eellm.infer.native.network import NativeNetwork
from eellm.serve.models import load_models, serve_models
from tests.directories import assert_same_model
from tests.models import needs_compiler, tiny_model
from tests.serve.servers import eventually, held, raw, read_all, request_bytes, served_model, serving
from tests.worlds import tiny_tokenizer

LONG = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "temperature": 0, "ignore_eos": True}
CLOSE = ["connection: close"]


@pytest.fixture(scope="module")
def model():
    return served_model(max_seq_len=4096)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A base, two adapters for it, a recipe with all three and a file of keys."""
    world = tmp_path_factory.mktemp("served")
    for name, layers in (("one", (2,)), ("two", (1, 4))):
        model = tiny_model(dtype="float32", vocab_size=512, exits=(), max_seq_len=4096, head_dim=16)
        model.tokenizer = tiny_tokenizer()
        eellm.save(model, world / "base")
        eellm.add_exits(model, [eellm.ExitConfig(layer=n, kind="norm") for n in layers])
        eellm.save_adapter(model, world / name, base=world / "base")
    (world / "keys.toml").write_text('alice = "sk-one"\n')
    (world / "serve.toml").write_text(
        f"""
        port = 0
        warm_up = false
        drain_s = 20
        models = [
            {{ name = "base", path = "{world / "base"}" }},
            {{ name = "one", path = "{world / "base"}", adapter = "{world / "one"}" }},
            {{ name = "two", path = "{world / "two"}" }},
        ]
        """
    )
    return world


# --- draining ---


def test_a_draining_server_ends_what_runs_and_takes_nothing_new(model):
    with serving({"tiny": model}, max_tokens=4096) as server, raw(server) as running:
        with held(server.engine) as go:
            running.sendall(request_bytes(LONG | {"max_tokens": 20}, headers=CLOSE))
            go(5)
            eventually(lambda: server.engine.num_ticks == 5)
            assert server.get("/ready").status_code == 200
            server.running.loop.call_soon_threadsafe(server.running.drain)
            eventually(lambda: server.get("/ready").status_code == 503)
            assert server.get("/health").status_code == 200
            answer = server.post(**LONG)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "shutting_down"
            assert answer.headers["retry-after"]
        assert read_all(running).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("stream", [False, True])
def test_what_isn_t_over_when_the_drain_is_hears_of_it(model, stream):
    with serving({"tiny": model}, max_tokens=4096, drain_s=0.2) as server, raw(server) as running:
        with held(server.engine) as go:
            running.sendall(request_bytes(LONG | {"stream": stream}, headers=CLOSE))
            go(5)
            eventually(lambda: server.engine.num_ticks == 5)
            server.running.loop.call_soon_threadsafe(server.running.drain)
            eventually(lambda: not server.worker._inbox.empty())
        answer = read_all(running)
    assert answer.startswith(b"HTTP/1.1 200 " if stream else b"HTTP/1.1 503 ")
    assert b"the server is shutting down" in answer
    assert stream == answer.rstrip(b"\r\n0").endswith(b"data: [DONE]")


def test_a_request_that_comes_as_the_engine_s_thread_ends_is_answered_too(model):
    with serving({"tiny": model}, max_tokens=4096) as server, raw(server) as running, raw(server) as late:
        with held(server.engine) as go:
            running.sendall(request_bytes(LONG, headers=CLOSE))
            go(5)
            eventually(lambda: server.engine.num_ticks == 5)
            server.running.loop.call_soon_threadsafe(server.worker.stop)
            eventually(lambda: server.worker._inbox.qsize() == 1)
            late.sendall(request_bytes(LONG, headers=CLOSE))
            eventually(lambda: server.worker._inbox.qsize() == 2)
        for connection in (running, late):
            assert read_all(connection).startswith(b"HTTP/1.1 503 ")


def test_a_second_signal_ends_it_at_once(model):
    with serving({"tiny": model}, max_tokens=4096, drain_s=1000) as server, raw(server) as running:
        running.sendall(request_bytes(LONG | {"stream": True}, headers=CLOSE))
        assert running.recv(100)
        for _ in range(2):
            server.running.loop.call_soon_threadsafe(server.running.drain)


def test_a_client_that_doesn_t_read_can_t_keep_a_server_from_ending(model):
    with serving({"tiny": model}, max_tokens=4096, drain_s=0.1) as server, raw(server) as running:
        running.sendall(request_bytes(LONG | {"stream": True, "logprobs": 0, "n": 4}))
        assert running.recv(10)


def test_sigterm_ends_a_process_with_0_after_its_running_requests(directory, tmp_path):
    command = [sys.executable, "-m", "eellm", "serve", str(directory / "serve.toml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving base, one, two at http://127.0.0.1:"), process.stderr.read()
        url = line.split()[-1]
        fields = LONG | {"model": "two", "stream": True, "max_tokens": 3000}
        with httpx.stream("POST", f"{url}/v1/completions", json=fields, timeout=60) as run:
            lines = run.iter_lines()
            assert next(lines).startswith("data: {")
            process.send_signal(signal.SIGTERM)
            eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "")
    logged = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [line["new_tokens"] for line in logged if line["path"] == "/v1/completions"] == [3000]
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_signals_end_a_process_at_once_while_streams_run_and_every_client_hears_of_it(directory, number):
    command = [sys.executable, "-m", "eellm", "serve", str(directory / "serve.toml"), "--drain-s", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split()[-1]
        fields = LONG | {"stream": True}
        with contextlib.ExitStack() as stack:
            streams = []
            for name in ("base", "one", "two") * 4:
                body = fields | {"model": name}
                run = stack.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60))
                streams.append(run.iter_lines())
                assert next(streams[-1]).startswith("data: {")
            process.send_signal(number)
            eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
            process.send_signal(number)
            ends = [[line for line in lines if line][-2:] for lines in streams]
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == (0 if number == signal.SIGTERM else 130)
    assert "Traceback" not in err
    for error, done in ends:
        assert done == "data: [DONE]"
        is_cut = json.loads(error.removeprefix("data: ")).get("error", {}).get("code") == "shutting_down"
        assert is_cut or '"finish_reason":"length"' in error


# --- several models ---


def test_adapters_of_one_base_share_its_parameters(directory):
    config = from_toml(ServeConfig, directory / "serve.toml")
    models = load_models(config.served(), dtype="float32", device="cpu")
    assert models["one"].decoder is models["two"].decoder is models["base"].decoder
    assert [models[name].config.exit_layers for name in ("base", "one", "two")] == [(), (2,), (1, 4)]
    for name in ("one", "two"):
        assert_same_model(models[name], eellm.load(directory / name))
    text = eellm.generate(models["two"], ["for x"], threshold=0.3, max_new_tokens=8)[0].text
    assert text == eellm.generate(eellm.load(directory / "two"), ["for x"], threshold=0.3, max_new_tokens=8)[0].text


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("compile", [pytest.param(True, marks=needs_compiler), False])
def test_engines_of_adapters_of_one_base_share_the_packed_matrices(directory, compile, quantize):
    config = replace(from_toml(ServeConfig, directory / "serve.toml"), compile=compile, quantize=quantize)
    served = serve_models(config, cache_dir=None)
    base, *others = (matrices(served[name].engine.network) for name in ("base", "one", "two"))
    assert len(base) == 4 * 6 + 1
    assert [place for place in base if not all(other[place] == base[place] for other in others)] == []
    for name in ("one", "two"):
        alone = eellm.Engine(eellm.load(directory / name), compile=compile, quantize=quantize)
        assert not set(base.values()) & set(matrices(alone.network).values())
        fields = {"threshold": 0.3, "max_new_tokens": 8}
        together = served[name].engine
        assert together.generate(["for x"], **fields)[0].tokens == alone.generate(["for x"], **fields)[0].tokens


def matrices(network):
    """Where each of the backbone's matrices lies, by its place."""
    if isinstance(network, NativeNetwork):
        layers, output, place = network._layers, network._outputs[6], lambda matrix: matrix.weight
    else:
        layers, output, place = network.layers, network.heads[6].output, id
    found = {"output": place(output)}
    for n, layer in layers.items():
        for name, matrix in (
            ("qkv", layer.qkv),
            ("out", layer.out),
            ("up", layer.mlp.gate_up),
            ("down", layer.mlp.down),
        ):
            found[n, name] = place(matrix)
    return found


def test_a_model_that_can_t_be_loaded_is_named(directory):
    for entry in (
        ServedModel(name="x", path=str(directory / "nowhere")),
        ServedModel(name="x", path=str(directory / "base"), adapter=directory / "base"),
        ServedModel(name="x", path=str(directory / "one"), adapter=directory / "two"),
    ):
        with pytest.raises(CheckpointError):
            load_models([entry], dtype="float32", device="cpu")


# --- what it is told ---


def test_a_recipe_comes_under_the_options(directory):
    config = verb.read([str(directory / "serve.toml"), "--port", "81", "--quantize", "int8", "--no-warm-up"])
    assert (config.port, config.quantize, config.drain_s) == (81, "int8", 20)
    assert [model.name for model in config.served()] == ["base", "one", "two"]
    config = verb.read(["some/model", "--adapter", "a", "--max-batch", "3", "--cors-origins", "https://a", "https://b"])
    assert config.served() == (ServedModel(name="model", path="some/model", adapter="a" and config.adapter),)
    assert str(config.adapter) == "a"
    assert config.cors_origins == ("https://a", "https://b")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "name the model to serve"),
        (["--port", "1"], "name the model to serve"),
        (["m", "--prot", "1"], "unknown option '--prot' (did you mean '--port'?)"),
        (["m", "--port", "70000"], "port = 70000: must be at most 65535"),
        (["m", "--port", "-1"], "port = -1: must be at least 0"),
        (["m", "--max-batch", "0"], "max_batch = 0: must be at least 1"),
        (["m", "--deadline-s", "0"], "deadline_s = 0.0"),
        (["m", "--method", "fast"], "'fast'"),
        (["m", "--host", "0.0.0.0"], "give --api-keys FILE, or say --open-to-all"),
        (["m", "--host", "::"], "give --api-keys FILE, or say --open-to-all"),
        (["m", "--host", "example.org"], "give --api-keys FILE"),
        (["m", "--api-keys", "nowhere.toml"], "nowhere.toml: can't be read"),
        (["m", "--models.0.name", "x"], "write them in the recipe"),
        (["nowhere.toml"], "nowhere.toml: no such recipe"),
        (["no/such/model", "--port", "0"], "no/such/model"),
    ],
)
def test_what_can_t_be_is_refused_on_one_line(capfd, args, words):
    assert main(["serve", *args]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('prot = 1\nmodel = "m"', "unknown key 'prot' (did you mean 'port'?)"),
        ('model = "m"\nport = "1"', "must be a whole number"),
        ('model = "m"\n[[models]]\nname = "x"\npath = "y"', "not both"),
        ('[[models]]\nname = "x"\npath = "y"\n[[models]]\nname = "x"\npath = "z"', "two are called 'x'"),
        ('[[models]]\nname = "x"', "'models[0].path' is missing"),
        ('[[models]]\nname = ""\npath = "y"', "must be a printable word"),
        ('adapter = "a"', "name the model that the adapter or the name is for"),
        ('model = "m"\nquantize = "int3"', "quantize"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path, text, words):
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        from_toml(ServeConfig, tmp_path / "serve.toml")
    assert words in str(refused.value)


def test_only_the_loopback_needs_no_word():
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        ServeConfig(model="m", host=host).check_open()
    ServeConfig(model="m", host="0.0.0.0", open_to_all=True).check_open()


def test_a_port_in_use_is_named_before_anything_is_loaded(directory, model, capfd):
    with serving({"tiny": model}) as server:
        port = server.url.rpartition(":")[2]
        assert main(["serve", str(directory / "base"), "--port", port]) == 2
    assert f"port = {port}: Address already in use" in capfd.readouterr().err


def test_without_the_extra_it_says_what_to_install(monkeypatch, capfd):
    monkeypatch.setattr(verb, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve", "m"]) == 2
    assert capfd.readouterr().err == "eellm: uvicorn is not installed: pip install 'eellm[serve]'\n"


def test_a_server_leaves_no_thread_behind(model):
    before = set(threading.enumerate())
    with serving({"tiny": model}) as server:
        server.get("/health")
    left = [thread.name for thread in set(threading.enumerate()) - before if not thread.name.startswith("asyncio")]
    assert left == []


def test_measuring_beforehand_changes_no_answer(model):
    fields = {"model": "tiny", "prompt": "for x in", "max_tokens": 8, "temperature": 0}
    texts = []
    for warm_up in (False, True):
        with serving({"tiny": model}, warm_up=warm_up) as server:
            texts.append(server.post(**fields).json()["choices"][0]["text"])
    assert texts[0] == texts[1] == eellm.generate(model, ["for x in"], method="full", max_new_tokens=8)[0].text
