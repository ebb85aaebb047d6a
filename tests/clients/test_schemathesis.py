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

from tests.clients.conftest import KEY, NAME

HEADERS = {"Authorization": f"Bearer {KEY}"}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture
def document(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json", headers=HEADERS)


@pytest.mark.parametrize("number", range(8))
def test_nothing_is_a_server_error(number, document):
    operation = list(document.get_all_operations())[number].ok()

    @given(case=operation.as_strategy())
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    def attempt(case):
        ask(case)

    attempt()


def ask(case):
    body = case.body
    if isinstance(body, dict):  # else nearly everything would end at a model that is not there
        if isinstance(body.get("model"), str):
            body["model"] = NAME
        for limit in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(body.get(limit), int) or (limit == "max_tokens" and "messages" in body):
                body[limit] = 2
    case.call_and_validate(headers=HEADERS, checks=CHECKS)
