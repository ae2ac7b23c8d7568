"""What our own OpenAPI says, taken at its word and against it: answers keep the description, and nothing breaks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from siege import Siege

from workloads.contract.http import PATH_OPENAPI

pytestmark = pytest.mark.real_parts

OPERATIONS = (
    *("POST /v1/recommend", "POST /v1/search", "POST /v1/similar", "POST /v1/events"),
    *("GET /v1/catalogue/sample", "GET /v1/users/{id}/profile", "DELETE /v1/users/{id}/profile"),
    *("GET /healthz", "GET /readyz", "GET /metrics"),
)
CHECKS = (status_code_conformance, content_type_conformance, response_schema_conformance)


@functools.cache
def described(url: str) -> dict[str, Any]:
    """Operations by method and path, as the running gateway describes itself."""
    schema = schemathesis.openapi.from_url(url + PATH_OPENAPI)
    found = [operation.ok() for operation in schema.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


def test_every_operation_that_is_described_is_attacked(besieged: Siege):
    assert set(described(besieged.url)) == set(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_the_description_allows_and_forbids_is_answered_as_it_says(
    besieged: Siege, name: str, mode: GenerationMode
):
    operation = described(besieged.url)[name]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.path_parameters):
        pytest.skip("it takes nothing that could be wrong")

    @settings(max_examples=30, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def attack(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        answer = case.call()
        case.validate_response(answer, checks=CHECKS)
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == ["application/problem+json"]
        # A deadline of a millisecond, which the description allows, is too short for any disk.
        assert answer.status_code < 500 or answer.json()["type"] == "/problems/not-acknowledged", answer.text

    attack()
    besieged.holds()
