"""The public API's description, made from the types that check its messages, and a page to read it with.

OpenAPI 3.0.3, because the Swagger UI that travels in our environment (swagger-ui-bundle, 4.15.5) reads
no 3.1; msgspec writes JSON Schema 2020-12, so the few things that 3.0 says differently are rewritten.
The page loads nothing from elsewhere.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import swagger_ui_bundle

from workloads.contract.events import ID_PATTERN
from workloads.contract.http import (
    BODY_MAX_BYTES,
    DEADLINE_HEADER,
    DEADLINE_MAX_MS,
    DEADLINE_MIN_MS,
    PATH_DOCS,
    PATH_HEALTH,
    PATH_METRICS,
    PATH_OPENAPI,
    PATH_PROFILE,
    PATH_READY,
    PATH_SAMPLE,
    PRIORITY_HEADER,
    REQUEST_ID_HEADER,
    REQUEST_ID_PATTERN,
    RUNG_HEADER,
    SAMPLE_DEFAULT,
    SAMPLE_MAX,
    TENANT_HEADER,
    TENANT_PATTERN,
    CatalogueSample,
    EventsAnswer,
    EventsRequest,
    ItemsAnswer,
    Problem,
    ProfileAnswer,
    Readiness,
    RecommendRequest,
    SearchRequest,
    SimilarRequest,
)
from workloads.contract.slo import DEADLINE_MS, Endpoint, Priority, Rung

_REF: Final = "#/components/schemas/{name}"
_MESSAGES: Final = (
    *(RecommendRequest, SearchRequest, SimilarRequest, EventsRequest),
    *(ItemsAnswer, EventsAnswer, ProfileAnswer, CatalogueSample, Readiness, Problem),
)
_PROBLEMS: Final[Mapping[int, str]] = {
    400: "The body is no JSON, or a header of ours cannot be read",
    408: "The body did not arrive",
    413: f"The body is larger than {BODY_MAX_BYTES} bytes",
    415: "The body is not declared as JSON",
    422: "A field breaks its rule",
    429: "More than this tenant's share under overload, or no room for more events, none of which was stored; "
    "Retry-After says when to send again",
    503: "Too many requests at once, or events that are not acknowledged; Retry-After says when to try again",
}


@dataclasses.dataclass(frozen=True)
class _Operation:
    """A POST endpoint as the description has it."""

    summary: str
    text: str
    request: type[msgspec.Struct]
    answer: type[msgspec.Struct]
    example: dict[str, Any]


_OPERATIONS: Final[Mapping[Endpoint, _Operation]] = {
    Endpoint.RECOMMEND: _Operation(
        "Items for a user",
        "Candidates from several sources, ranked for this user and moment. Unknown users and items are cold starts, "
        "not errors. `served` says at which rung of the quality ladder the answer was made, and why.",
        RecommendRequest,
        ItemsAnswer,
        {"user": "u-1", "history": ["item-00001"], "k": 10},
    ),
    Endpoint.SEARCH: _Operation(
        "Items for a query",
        "Lexical and vector candidates, fused.",
        SearchRequest,
        ItemsAnswer,
        {"query": "red vintage lantern", "k": 10},
    ),
    Endpoint.SIMILAR: _Operation(
        "Items like an item",
        "An unknown item gets popular ones.",
        SimilarRequest,
        ItemsAnswer,
        {"item": "item-00001", "k": 10},
    ),
    Endpoint.EVENTS: _Operation(
        "Tell what people did",
        "Acknowledged when every event is on disk at home. Event ids are made by the client, so sending an "
        "event again is safe.",
        EventsRequest,
        EventsAnswer,
        {
            "events": [
                {
                    "event_id": "01890a5d-ac96-774b-bcce-b302099a8057",
                    "type": "click",
                    "timestamp_ms": 1_790_000_000_000,
                    "user": "u-1",
                    "item": "item-00001",
                }
            ]
        },
    ),
}


_ASIDE: Final[list[dict[str, Any]]] = [
    {
        "name": PRIORITY_HEADER,
        "in": "header",
        "description": "Who is refused first when more is asked than can be answered: low before normal before high.",
        "schema": {"type": "string", "enum": list(Priority), "default": Priority.NORMAL},
    },
    {
        "name": TENANT_HEADER,
        "in": "header",
        "description": "Who the request is for: under overload no tenant gets more than its share.",
        "schema": {"type": "string", "pattern": TENANT_PATTERN, "default": "default"},
    },
    {
        "name": RUNG_HEADER,
        "in": "header",
        "description": "Answer from this rung of the quality ladder or a lower one, though a better could be had.",
        "schema": {"type": "integer", "minimum": int(min(Rung)), "maximum": int(max(Rung))},
    },
]
"""Headers that every POST takes; events have no rung, and read it no further than its form."""


def document(version: str) -> dict[str, Any]:
    """The OpenAPI document, ready to be encoded."""
    _, components = msgspec.json.schema_components(_MESSAGES, ref_template=_REF)
    paths: dict[str, Any] = {
        endpoint.value: {"post": _post(endpoint, operation)} for endpoint, operation in _OPERATIONS.items()
    }
    paths[PATH_SAMPLE] = {
        "get": {
            "summary": "What load users draw from",
            "description": inspect.getdoc(CatalogueSample),
            "parameters": [
                {
                    "name": "size",
                    "in": "query",
                    "schema": {"type": "integer", "minimum": 1, "maximum": SAMPLE_MAX, "default": SAMPLE_DEFAULT},
                }
            ],
            "responses": {"200": _json("The sample", CatalogueSample), "422": _problem(_PROBLEMS[422])},
        }
    }
    paths[PATH_PROFILE] = _profile()
    paths[PATH_HEALTH] = {"get": {"summary": "Alive", "responses": {"200": {"description": "The process answers"}}}}
    paths[PATH_READY] = {
        "get": {
            "summary": "Ready, and what of its neighbours is not",
            "responses": {"200": _json("Ready", Readiness), "503": _json("Starting or stopping", Readiness)},
        }
    }
    paths[PATH_METRICS] = {
        "get": {"summary": "Prometheus metrics", "responses": {"200": {"description": "Text exposition format"}}}
    }
    return {
        "openapi": "3.0.3",
        "info": {
            "title": "rankbridge",
            "version": version,
            "license": {"name": "Apache-2.0"},
            "description": "Search, recommendation and ranking for shops. Every failure is problem+json (RFC 9457) "
            "that names the field, the rule and the remedy.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": {name: _as_3_0(schema) for name, schema in components.items()}},
    }


def _post(endpoint: Endpoint, operation: _Operation) -> dict[str, Any]:
    return {
        "summary": operation.summary,
        "description": operation.text,
        "operationId": endpoint.name.lower(),
        "parameters": [
            {
                "name": DEADLINE_HEADER,
                "in": "header",
                "description": "Milliseconds from now in which the answer is wanted; stages get their shares of it.",
                "schema": {
                    "type": "number",
                    "minimum": DEADLINE_MIN_MS,
                    "maximum": DEADLINE_MAX_MS,
                    "default": DEADLINE_MS[endpoint],
                },
            },
            {
                "name": REQUEST_ID_HEADER,
                "in": "header",
                "description": "An id to find this request again by; made when there is none.",
                "schema": {"type": "string", "pattern": REQUEST_ID_PATTERN},
            },
            *_ASIDE,
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref(operation.request), "example": operation.example}},
        },
        "responses": {
            "200": _json("The answer", operation.answer),
            **{str(status): _problem(text) for status, text in _PROBLEMS.items()},
        },
    }


def _profile() -> dict[str, Any]:
    user = {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "The user's id as events and requests carry it, percent-encoded.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 128, "pattern": ID_PATTERN},
    }
    refused = {
        "403": _problem("Not at home: only there are profiles"),
        "422": _problem(_PROBLEMS[422]),
        "503": _problem("The store does not answer, or the gateway starts; Retry-After says when to try again"),
    }
    return {
        "parameters": [user],
        "get": {
            "summary": "What is known of a person's taste",
            "description": "At home only. Somebody unknown is a cold start, not an error.",
            "operationId": "profile",
            "responses": {"200": _json("The profile", ProfileAnswer), **refused},
        },
        "delete": {
            "summary": "Forget a person",
            "description": "From the answer on recommendations for this id are those of a cold start; what is left "
            "elsewhere is erased after it. Forgetting somebody unknown, or twice, is no error.",
            "operationId": "forget",
            "responses": {"204": {"description": "Forgotten"}, **refused},
        },
    }


def _ref(message: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=message.__name__)}


def _json(text: str, message: type[msgspec.Struct]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _ref(message)}}}


def _problem(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/problem+json": {"schema": _ref(Problem)}}}


def _as_3_0(schema: Any) -> Any:  # noqa: ANN401 - a JSON value
    """The same schema in OpenAPI 3.0's dialect, with `nullable` for a null among the choices."""
    if isinstance(schema, list):
        return [_as_3_0(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: _as_3_0(part) for name, part in schema.items()}
    choices = schema.get("anyOf", ())
    if {"type": "null"} in choices:
        others = [choice for choice in schema.pop("anyOf") if choice != {"type": "null"}]
        schema |= {**others[0], "nullable": True} if len(others) == 1 else {"anyOf": others, "nullable": True}
    if "prefixItems" in schema:  # 3.0 knows lists of one kind only, which ours are
        schema["items"] = schema.pop("prefixItems")[0]
    if schema.get("required") == []:  # 3.0 wants at least one, or none said
        del schema["required"]
    if isinstance(schema.get("description"), str):
        schema["description"] = inspect.cleandoc(schema["description"])  # indented, it would be shown as code
    return schema


DOCS_POLICY: Final = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
"""Content-Security-Policy of the page: nothing from elsewhere. Swagger UI styles inline and draws by data: URLs."""

_PAGE: Final = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"><title>rankbridge API</title>
<link rel="icon" type="image/png" href="{PATH_DOCS}/favicon-32x32.png">
<link rel="stylesheet" href="{PATH_DOCS}/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="{PATH_DOCS}/swagger-ui-bundle.js"></script>
<script src="{PATH_DOCS}/start.js"></script>
</body>
</html>
"""
_START: Final = f"""window.addEventListener("load", () => {{
  SwaggerUIBundle({{ url: "{PATH_OPENAPI}", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null }});
}});
"""
_SHIPPED: Final[Mapping[str, str]] = {
    "swagger-ui.css": "text/css; charset=utf-8",
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "favicon-32x32.png": "image/png",
}


def page(path: str) -> tuple[bytes, str] | None:
    """Body and Content-Type of what is under `/docs`; None for what is not there. Files are read when asked for."""
    name = path.removeprefix(PATH_DOCS).removeprefix("/")
    if name == "":
        return _PAGE.encode(), "text/html; charset=utf-8"
    if name == "start.js":
        return _START.encode(), "text/javascript; charset=utf-8"
    if name not in _SHIPPED:
        return None
    return Path(swagger_ui_bundle.swagger_ui_path, name).read_bytes(), _SHIPPED[name]
