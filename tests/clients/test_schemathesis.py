"""Whatever a client may send by the published document, or may not: never a 5xx, and never what is not described."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.clients.conftest import KEY, NAME, QUESTION, bearer

PATHS = ["/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions", "/v1/responses",
         "/v1/embeddings", "/tokenize", "/detokenize"]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LIMITS = {"/v1/completions": ("max_tokens",), "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
          "/v1/responses": ("max_output_tokens",)}


@pytest.fixture(scope="module")
def operations(served):
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json", headers=bearer(KEY))
    return {operation.ok().path: operation.ok() for operation in document.get_all_operations()}


def test_each_operation_of_the_document_is_tried_here(operations):
    assert sorted(operations) == sorted(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_a_server_error(path, operations):
    @given(case=operations[path].as_strategy())
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    def attempt(case):
        case.body = sober(case.body, LIMITS.get(path, ()))
        case.call_and_validate(headers=bearer(KEY), checks=CHECKS, timeout=120)

    attempt()


@pytest.mark.parametrize("path, body", [
    ("/v1/completions", {"prompt": "One,"}), ("/v1/chat/completions", {"messages": QUESTION}),
    ("/v1/responses", {"input": "One,"})])
def test_the_events_of_a_stream_are_as_described(path, body, operations):
    case = operations[path].Case(body={"model": NAME, "stream": True, LIMITS[path][0]: 2} | body,
                                 media_type="application/json")
    response = case.call_and_validate(headers=bearer(KEY), checks=CHECKS, timeout=120)
    assert response.status_code == 200 and response.headers["content-type"][0].startswith("text/event-stream")


def sober(body, limits):
    """The model that is there, else nearly everything would end at one that is not; and few tokens."""
    if not isinstance(body, dict):
        return body
    asked = dict(body)
    if isinstance(asked.get("model"), str):
        asked["model"] = NAME
    if limits and not asked.keys() & set(limits):
        asked[limits[0]] = 2
    for name in ("n", *limits):
        if type(asked.get(name)) is int and asked[name] > 2:
            asked[name] = 2
    return asked
