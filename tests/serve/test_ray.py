"""Replicas on a local Ray: both answer, one that dies comes back, one that goes ends what it runs."""

import asyncio
import socket
import threading

import httpx
import openai
import pytest

import eellm
from eellm.config.serve import ServeConfig
from tests.models import tiny_model
from tests.serve.servers import eventually
from tests.worlds import tiny_tokenizer

ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402 - behind the skip

from examples.ray_serve import Replicas, deploy, end  # noqa: E402

pytestmark = pytest.mark.timeout(300)
SHORT = {"model": "tiny", "prompt": "for x in", "max_tokens": 12, "temperature": 0}
LONG = {"model": "tiny", "prompt": "x", "max_tokens": 3000, "temperature": 0}
KEY = "sk-one"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    world = tmp_path_factory.mktemp("replicas")
    model = tiny_model(dtype="float32", vocab_size=512, max_seq_len=4096)
    model.tokenizer = tiny_tokenizer()
    eellm.save(model, world / "tiny")
    (world / "keys.toml").write_text(f'alice = "{KEY}"\n')
    return world


@pytest.fixture(scope="module")
def url(directory, monkeypatch_module):
    monkeypatch_module.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ServeConfig(
        model=str(directory / "tiny"),
        api_keys=directory / "keys.toml",
        port=port,
        max_batch=4,
        warm_up=False,
        stream_s=0.0,
    )
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        deploy(config, Replicas(number=2, threads=1))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def wanted(directory):
    (out,) = eellm.generate(eellm.load(directory / "tiny"), ["for x in"], method="full", max_new_tokens=12)
    return out.text


def answers(url, number):
    """So many at once: who gave each, and its text."""

    async def ask(client):
        raw = await client.completions.with_raw_response.create(**SHORT)
        return raw.headers["x-replica"], raw.parse().choices[0].text

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=5, timeout=60) as client:
            return await asyncio.gather(*(ask(client) for _ in range(number)))

    return asyncio.run(all_of_them())


def replicas_of(given):
    return {replica for replica, _ in given}


def headers():
    return {"authorization": f"Bearer {KEY}"}


def test_both_replicas_answer_and_say_the_same(url, wanted):
    given = answers(url, 24)
    assert {text for _, text in given} == {wanted}
    assert len(replicas_of(given)) == 2


def test_streams_come_in_pieces_through_the_proxy(url, wanted):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        token_by_token = {"early_exit": {"method": "full"}}  # an answer that was given before may come at once
        made = client.completions.create(**SHORT, stream=True, extra_body=token_by_token)
        pieces = [chunk.choices[0].text for chunk in made]
    assert "".join(pieces) == wanted
    assert len(pieces) > 3


def test_refusals_pass_through_and_every_path_of_ours_wants_a_key(url):
    for path in ("/v1/models", "/ready", "/metrics", "/openapi.json"):
        assert httpx.get(url + path).status_code == 401
        assert httpx.get(url + path, headers=headers()).status_code == 200
    assert httpx.get(url + "/health").json() == {"status": "ok"}
    answer = httpx.post(url + "/v1/completions", json=SHORT | {"tools": []}, headers=headers())
    assert answer.status_code == 400
    assert "unknown field 'tools'" in answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_slot(url):
    for _ in range(8):
        with httpx.stream("POST", url + "/v1/completions", json=LONG | {"stream": True}, headers=headers()) as left:
            assert next(left.iter_lines()).startswith("data: {")
    seen = {}

    def are_idle():
        answer = httpx.get(url + "/metrics", headers=headers())
        seen[answer.headers["x-replica"]] = 'eellm_num_requests_running{model="tiny"} 0.0' in answer.text
        return len(seen) == 2 and all(seen.values())

    eventually(are_idle, timeout_s=60)


def test_a_replica_that_dies_comes_back_and_the_other_answers_meanwhile(url, wanted):
    before = replicas_of(answers(url, 24))
    killed = min(before)
    (name,) = (actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if killed in actor["name"])
    ray.kill(ray.get_actor(name, namespace="serve"))
    given = []

    def is_back():
        given.extend(answers(url, 8))
        return len(replicas_of(given) - before) == 1

    eventually(is_back, timeout_s=120)
    assert {text for _, text in given} == {wanted}
    assert killed not in replicas_of(answers(url, 24))


def test_the_end_waits_for_what_runs(url):  # the last one: nothing answers afterwards
    with httpx.stream("POST", url + "/v1/completions", json=LONG | {"stream": True}, headers=headers()) as running:
        lines = running.iter_lines()
        assert next(lines).startswith("data: {")
        ending = threading.Thread(target=end)
        ending.start()
        rest = [line for line in lines if line]
    ending.join(60)
    assert not ending.is_alive()
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")
