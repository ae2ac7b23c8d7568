"""Everything that a client can get wrong, and the problem that says so: the field, the rule, the remedy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workloads.contract.http import BODY_MAX_BYTES, Problem
from workloads.gateway import app as app_module
from workloads.gateway.app import DRAIN_BYTES, Gateway
from workloads.gateway.doors import FakeIntake, FakeRanker, FakeRetrieval

JSON = {"content-type": "application/json"}
EVENT = {
    "event_id": "01890a5d-ac96-774b-bcce-b302099a8057",
    "type": "view",
    "timestamp_ms": 1_700_000_000_000,
    "item": "item-00001",
}


def _events(*changes: dict[str, object]) -> bytes:
    return json.dumps({"events": [EVENT | change for change in changes]}).encode()


def problem(answer: httpx.Response, status: int) -> Problem:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = msgspec.json.decode(answer.content, type=Problem)
    assert found.status == status
    assert found.type.startswith("/problems/")
    assert found.title
    assert found.detail
    return found


@pytest.fixture(autouse=True)
def no_neighbour_is_asked(
    ranker: FakeRanker, retrieval: FakeRetrieval, intake: FakeIntake
) -> AsyncIterator[None] | None:
    yield
    assert (ranker.calls, retrieval.calls, intake.calls) == (0, 0, 0)


@pytest.mark.parametrize(
    ("path", "body", "field", "rule"),
    [
        ("/v1/recommend", b'{"k": 0}', "$.k", ">= 1"),
        ("/v1/recommend", b'{"k": -1}', "$.k", ">= 1"),
        ("/v1/recommend", b'{"k": 1000000000}', "$.k", "<= 100"),
        ("/v1/recommend", b'{"k": 99999999999999999999999999}', "$.k", "<= 100"),
        ("/v1/recommend", b'{"k": 1e400}', "$.k", "finite"),
        ("/v1/recommend", b'{"k": 1.5}', "$.k", "`int`"),
        ("/v1/recommend", b'{"k": "ten"}', "$.k", "`int`"),
        ("/v1/recommend", b'{"k": null}', "$.k", "`int`"),
        ("/v1/recommend", b'{"user": 7}', "$.user", "`str | null`"),
        ("/v1/recommend", b'{"user": ""}', "$.user", "length >= 1"),
        ("/v1/recommend", b'{"user": "a\\u0007b"}', "$.user", "control characters"),
        ("/v1/recommend", b'{"history": "item"}', "$.history", "`array`"),
        ("/v1/recommend", b'{"history": ["a", {}]}', "$.history[1]", "`str`"),
        ("/v1/recommend", b'{"repeats": "yes"}', "$.repeats", "`bool`"),
        ("/v1/recommend", b'{"colour": "red"}', "$.colour", "no fields but the documented ones"),
        ("/v1/recommend", b"[]", "$", "`object`"),
        ("/v1/recommend", b"null", "$", "`object`"),
        ("/v1/recommend", b'"text"', "$", "`object`"),
        ("/v1/search", b"{}", "$.query", "required"),
        ("/v1/search", b'{"query": ""}', "$.query", "length >= 1"),
        ("/v1/search", b'{"query": "  \\t "}', "$.query", "not white space"),
        ("/v1/search", json.dumps({"query": "q" * 100_000}).encode(), "$.query", "length <= 256"),
        ("/v1/similar", b"{}", "$.item", "required"),
        ("/v1/similar", b'{"item": ["a"]}', "$.item", "`str`"),
        ("/v1/events", b'{"events": []}', "$.events", "length >= 1"),
        ("/v1/events", _events(*[{}] * 1001), "$.events", "length <= 1000"),
        ("/v1/events", _events({}, {"type": "stare"}), "$.events[1].type", "one of"),
        ("/v1/events", _events({"event_id": "1"}), "$.events[0].event_id", "UUID"),
        ("/v1/events", _events({"timestamp_ms": 1}), "$.events[0].timestamp_ms", ">="),
        ("/v1/events", _events({"item": None}), "$.events[0].item", "names its item"),
        ("/v1/events", _events({"type": "search"}), "$.events[0].query", "the query"),
        ("/v1/events", _events({"price": -1}), "$.events[0].price", ">= 0"),
    ],
)
async def test_a_field_that_breaks_its_rule_is_named_with_the_rule(
    client: httpx.AsyncClient, path: str, body: bytes, field: str, rule: str
):
    found = problem(await client.post(path, content=body, headers=JSON), 422)
    assert found.field == field
    assert found.rule is not None
    assert rule in found.rule
    assert found.remedy


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "truncated"),
        (b'{"k": 1', "truncated"),
        (b'{"k": 1}}', "trailing"),
        (b"k=1&user=a", "malformed"),
        (b'{"k": NaN}', "NaN"),
        (b'{"k": -Infinity}', "Infinity"),
        (b'{"k": Infinity}', "Infinity"),
        (b'{"user": "\\ud800"}', "surrogate"),
        (b'{"user": "\\udfff x"}', "surrogate"),
        (b'{"user": "\xff\xfe"}', "UTF-8"),
        (b"\xef\xbb\xbf{}", "malformed"),
        (b"\x00" * 100, "malformed"),
    ],
)
async def test_a_body_that_is_no_json_is_refused_with_the_reason(client: httpx.AsyncClient, body: bytes, detail: str):
    found = problem(await client.post("/v1/recommend", content=body, headers=JSON), 400)
    assert detail in found.detail
    assert found.remedy


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/search", "/v1/similar", "/v1/events"])
@pytest.mark.parametrize("opening", [b'{"history":', b'{"events":', b'{"context":', b'{"a":', b""])
async def test_the_deepest_nesting_is_refused_and_overturns_nothing(
    client: httpx.AsyncClient, path: str, opening: bytes
):
    for brackets in (b"[", b'{"a":'):
        body = opening + brackets * (200_000 // len(brackets))
        answer = await client.post(path, content=body, headers=JSON)
        assert answer.status_code in {400, 422}
        problem(answer, answer.status_code)


async def test_a_megabyte_is_too_large_however_it_arrives(client: httpx.AsyncClient):
    body = b'{"user": "' + b"a" * 1_000_000 + b'"}'

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    whole = await client.post("/v1/recommend", content=body, headers=JSON)
    in_pieces = await client.post("/v1/recommend", content=pieces(), headers=JSON)
    for answer in (whole, in_pieces):
        found = problem(answer, 413)
        assert str(BODY_MAX_BYTES) in (found.rule or "")
        assert answer.headers["connection"] == "close"


async def test_a_body_of_exactly_the_limit_is_read(client: httpx.AsyncClient):
    for length, status in ((BODY_MAX_BYTES, 422), (BODY_MAX_BYTES + 1, 413)):
        body = b'{"user": "' + b"a" * (length - 12) + b'"}'
        assert len(body) == length
        problem(await client.post("/v1/recommend", content=body, headers=JSON), status)


async def test_a_body_that_never_ends_is_not_read_for_ever(make_app: Callable[[], Gateway]):
    read = 0
    sent = []

    async def receive() -> dict[str, object]:
        nonlocal read
        read += 65_536
        return {"type": "http.request", "body": b"a" * 65_536, "more_body": True}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    await make_app()(_scope("/v1/recommend"), receive, send)
    assert sent[0]["status"] == 413
    assert read < BODY_MAX_BYTES + DRAIN_BYTES + 3 * 65_536


async def test_a_body_that_does_not_come_is_given_up(make_app: Callable[[], Gateway], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app_module, "BODY_WAIT_S", 0.02)
    sent = []

    async def receive() -> dict[str, object]:
        await asyncio.Event().wait()
        return {}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    await make_app()(_scope("/v1/recommend"), receive, send)
    assert sent[0]["status"] == 408


@pytest.mark.parametrize("pieces", [[], [b'{"k":']])
async def test_a_client_that_goes_away_gets_no_answer_and_breaks_nothing(
    make_app: Callable[[], Gateway], pieces: list[bytes]
):
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]

    async def receive() -> dict[str, object]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        raise AssertionError(message)

    await make_app()(_scope("/v1/recommend"), receive, send)


def _scope(path: str) -> dict[str, object]:
    return {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/msgpack"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/jsonx"},
        {"content-type": ""},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_a_body_not_declared_as_json_is_refused(client: httpx.AsyncClient, headers: dict[str, str]):
    answer = await client.post("/v1/recommend", content=b"{}", headers=headers)
    problem(answer, 415)
    assert answer.headers["accept"] == "application/json"


async def test_an_unknown_path_is_answered_with_the_known_ones(client: httpx.AsyncClient):
    for path in ("/", "/v1/recommend/", "/v2/recommend", "/docs/../etc/passwd", "/docs/nothing.js", "/%00"):
        found = problem(await client.get(path), 404)
        assert "/v1/recommend" in (found.rule or "")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/recommend", "POST"),
        ("DELETE", "/v1/events", "POST"),
        ("POST", "/healthz", "GET, HEAD"),
        ("PUT", "/docs", "GET, HEAD"),
        ("PATCH", "/v1/catalogue/sample", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_answered_with_the_right_ones(
    client: httpx.AsyncClient, method: str, path: str, allowed: str
):
    answer = await client.request(method, path)
    problem(answer, 405)
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("deadline", ["", "abc", "0", "-5", "0.5", "60001", "1e3", "nan", "inf", "1 0", "999999999999"])
async def test_a_deadline_that_cannot_be_kept_is_refused(client: httpx.AsyncClient, deadline: str):
    answer = await client.post("/v1/recommend", json={}, headers={"rankbridge-deadline-ms": deadline})
    found = problem(answer, 400)
    assert found.field == "Rankbridge-Deadline-Ms"
    assert "1 to 60000" in (found.rule or "")


@pytest.mark.parametrize(
    ("header", "given", "rule"),
    [
        *(("Rankbridge-Priority", given, "high, normal, low") for given in ("", "urgent", "HIGH", "normal,low")),
        *(("Rankbridge-Tenant", given, "hyphens") for given in ("", "Shop", "-a", "a" * 33, "a b", "\u00fc", "a\x7f")),
        *(("Rankbridge-Rung", given, "1 to 4") for given in ("", "0", "5", "-1", "1.0", "01", "two", "9" * 30)),
    ],
)
async def test_a_header_of_ours_that_says_nothing_is_refused_with_its_rule(
    client: httpx.AsyncClient, header: str, given: str, rule: str
):
    for path in ("/v1/recommend", "/v1/events"):
        answer = await client.post(path, json={}, headers=[(header, given.encode("latin-1"))])
        found = problem(answer, 400)
        assert found.field == header
        assert rule in (found.rule or "")
        assert found.remedy


@pytest.mark.parametrize("size", ["0", "-1", "abc", "1000000000", "1.5", ""])
async def test_a_sample_of_a_senseless_size_is_refused(client: httpx.AsyncClient, size: str):
    assert problem(await client.get(f"/v1/catalogue/sample?size={size}"), 422).field == "size"


async def test_a_problem_repeats_no_value_that_it_refuses(client: httpx.AsyncClient, user: str):
    for path, message in (
        ("/v1/recommend", {"user": user, "k": 0}),
        ("/v1/recommend", {"user": user + "\n"}),
        ("/v1/recommend", {"k": user}),
        ("/v1/events", {"events": [{**EVENT, "type": user}]}),
        ("/v1/events", {"events": [{**EVENT, "event_id": user}]}),
    ):
        answer = await client.post(path, json=message)
        problem(answer, 422)
        assert user not in answer.text


async def test_a_refusal_carries_the_id_that_the_request_came_with(client: httpx.AsyncClient):
    answer = await client.post("/v1/recommend", json={"k": 0}, headers={"rankbridge-request-id": "my-id.1"})
    assert answer.headers["rankbridge-request-id"] == "my-id.1"
    assert len((await client.get("/nothing")).headers["rankbridge-request-id"]) == 36


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
async def test_no_bytes_whatever_make_the_gateway_fail(client: httpx.AsyncClient, body: bytes):
    for path in ("/v1/search", "/v1/similar", "/v1/events"):
        answer = await client.post(path, content=body, headers=JSON)
        problem(answer, answer.status_code)
        assert answer.status_code in {400, 422}
