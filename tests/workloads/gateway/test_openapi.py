"""The API's description says what the types check, in the dialect that the page's reader knows, offline."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
import swagger_ui_bundle

from workloads.contract.http import K_MAX
from workloads.gateway import openapi


@pytest.fixture
def document() -> dict[str, Any]:
    return openapi.document("1.2.3")


def _everything(value: object) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value, *(found for part in value.values() for found in _everything(part))]
    if isinstance(value, list):
        return [found for part in value for found in _everything(part)]
    return []


async def test_the_document_is_served_and_describes_every_path_that_is_served(client: httpx.AsyncClient):
    served = (await client.get("/nothing")).json()["rule"].removeprefix("one of ").split(", ")
    described = (await client.get("/openapi.json")).json()["paths"]
    assert set(served) - {"/docs", "/openapi.json"} == set(described)


def test_the_rules_of_the_types_are_in_the_document(document: dict[str, Any]):
    k = document["components"]["schemas"]["RecommendRequest"]["properties"]["k"]
    assert (k["minimum"], k["maximum"], k["default"]) == (1, K_MAX, 10)


def test_every_reference_leads_somewhere(document: dict[str, Any]):
    references = {part["$ref"] for part in _everything(document) if "$ref" in part}
    assert references
    for reference in references:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


def test_the_document_says_nothing_that_openapi_3_0_does_not_know(document: dict[str, Any]):
    assert document["openapi"] == "3.0.3"
    for part in _everything(document["components"]):
        assert not {"const", "prefixItems", "$defs", "exclusiveMinimum"} & set(part)
        assert part.get("type") != "null"
        assert part.get("required") != []
    assert document["components"]["schemas"]["RecommendRequest"]["properties"]["user"]["nullable"] is True


async def test_the_examples_of_the_document_are_answered(client: httpx.AsyncClient, document: dict[str, Any]):
    for path, operations in document["paths"].items():
        if "post" in operations:
            example = operations["post"]["requestBody"]["content"]["application/json"]["example"]
            assert (await client.post(path, json=example)).status_code == 200


async def test_the_page_loads_nothing_from_elsewhere(client: httpx.AsyncClient):
    page = await client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert links
    for link in links:
        assert link.startswith("/docs/")
        part = await client.get(link)
        assert part.status_code == 200
        assert len(part.content) > 100
    assert "http" not in (await client.get("/docs/start.js")).text


def test_the_shipped_reader_still_reads_the_dialect_that_we_write():
    script = openapi.page("/docs/swagger-ui-bundle.js")
    assert script is not None
    assert "openapi: 3.0.n" in script[0].decode()
    assert "4.15" in str(swagger_ui_bundle.swagger_ui_path), "a newer reader may read 3.1: write that instead"


@pytest.mark.parametrize("path", ["/docs/../app.py", "/docs/index.html", "/docs//etc/passwd", "/docs/x.css"])
def test_only_the_files_of_the_page_are_under_docs(path: str):
    assert openapi.page(path) is None


def test_the_document_is_plain_json(document: dict[str, Any]):
    assert json.loads(json.dumps(document)) == document
