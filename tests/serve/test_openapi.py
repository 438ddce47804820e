"""Requests that nobody thought of: made from the server's own OpenAPI description, right ones and wrong ones."""

from collections import Counter

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi_checks

from tests.serve.servers import eventually, served_model, serving

CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def server():
    with serving({"tiny": served_model(max_seq_len=32)}, max_tokens=32) as running:
        yield running


@pytest.fixture(scope="module")
def operations(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return {f"{found.ok().method} {found.ok().path}": found.ok() for found in schema.get_all_operations()}


def explore(operation, mode, check):
    settings = hypothesis.settings(
        max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    settings(hypothesis.given(case=operation.as_strategy(generation_mode=mode))(check))()


BODIES = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 4},
}
"""Of requests that can be served: whether any made-up one can is luck."""


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_one_that_the_description_knows(server, operations, path, mode):
    statuses = Counter()

    def check(case):
        if mode is GenerationMode.POSITIVE:
            case.body["model"] = "tiny"  # a made-up name gets no further than 404
        answer = case.call()
        case.validate_response(answer, checks=CHECKS)
        statuses[answer.status_code] += 1

    operation = operations[f"post {path}"]
    if mode is GenerationMode.POSITIVE:
        check(operation.Case(body=dict(BODIES[path]), media_type="application/json"))
        assert statuses == {200: 1}
    explore(operation, mode, check)
    assert statuses.keys() <= ({200, 400} if mode is GenerationMode.POSITIVE else {400, 404}), statuses
    eventually(server.is_idle)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{name}", "/metrics", "/ready", "/health"])
def test_what_is_only_read_answers_as_described(operations, path):
    def check(case):
        case.call_and_validate(checks=CHECKS)

    explore(operations[f"get {path}"], GenerationMode.POSITIVE, check)


def test_the_description_knows_every_path(operations):
    assert len(operations) == 7
