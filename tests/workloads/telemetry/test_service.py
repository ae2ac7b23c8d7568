"""The shell around every internal server: what it refuses and how it reports on itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from workloads.telemetry.metrics import StageMetrics
from workloads.telemetry.service import CannotStartError, RefusalError, Reply, Request, Service, listen


class Caller:
    """Speaks ASGI to an application without a socket."""

    def __init__(self, app: Service) -> None:
        self.app = app

    async def __call__(
        self,
        method: str,
        path: str,
        parts: Sequence[bytes] = (b"",),
        headers: Sequence[tuple[bytes, bytes]] = (),
        *,
        hangs_up: bool = False,
    ) -> tuple[int, dict[str, str], Any] | None:
        messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": part, "more_body": hangs_up or at < len(parts) - 1}
            for at, part in enumerate(parts)
        ]
        if hangs_up:
            messages.append({"type": "http.disconnect"})
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.app({"type": "http", "method": method, "path": path, "headers": list(headers)}, receive, send)
        if not sent:
            return None
        body = sent[1]["body"]
        out = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], out, json.loads(body) if "json" in out["content-type"] else body


async def echo(request: Request) -> Reply:
    return Reply(request.body, "text/plain", headers=(("x-request", request.request_id),))


async def broken(_: Request) -> Reply:
    raise ZeroDivisionError


async def busy(_: Request) -> Reply:
    raise RefusalError.of(503, "busy", "Busy", "come back", retry_after_s=7)


@pytest.fixture
def missing() -> dict[str, str]:
    return {}


@pytest.fixture
def call(missing: dict[str, str]) -> Caller:
    return Caller(
        Service(
            routes={("POST", "/echo"): echo, ("POST", "/broken"): broken, ("POST", "/busy"): busy},
            metrics=StageMetrics(CollectorRegistry()),
            missing=lambda: missing,
            body_max_bytes=10,
        )
    )


async def test_a_body_in_pieces_is_one_body(call: Caller):
    assert await call("POST", "/echo", [b"ab", b"", b"cd"]) == (
        200,
        {"content-type": "text/plain", "content-length": "4", "x-request": ""},
        b"abcd",
    )


@pytest.mark.parametrize(("given", "seen"), [(b"r-1.A_z", "r-1.A_z"), (b"a b", ""), (b"x" * 129, ""), (b"\xff", "")])
async def test_only_a_well_formed_request_id_is_taken(call: Caller, given: bytes, seen: str):
    answer = await call("POST", "/echo", headers=[(b"rankbridge-request-id", given)])
    assert answer is not None
    assert answer[1]["x-request"] == seen


@pytest.mark.parametrize(
    ("parts", "headers"),
    [
        ([b"x" * 11], []),
        ([b"x" * 6, b"x" * 6], []),
        ([b"x" * 6, b"x" * 6, b"never read"], []),
        ([b""], [(b"content-length", b"11")]),
    ],
)
async def test_a_body_above_the_limit_is_refused_however_it_comes(
    call: Caller, parts: list[bytes], headers: list[tuple[bytes, bytes]]
):
    answer = await call("POST", "/echo", parts, headers)
    assert answer is not None
    status, sent, problem = answer
    assert (status, sent["content-type"], problem["type"]) == (
        413,
        "application/problem+json",
        "/problems/body-too-large",
    )


async def test_a_caller_that_hangs_up_is_not_answered(call: Caller):
    assert await call("POST", "/echo", [b"ab"], hangs_up=True) is None


async def test_an_unknown_path_and_a_wrong_method_are_told_apart(call: Caller):
    unknown, wrong = await call("GET", "/nope"), await call("GET", "/echo")
    assert unknown is not None
    assert wrong is not None
    assert (unknown[0], wrong[0]) == (404, 405)
    assert "POST" in wrong[2]["detail"]
    assert wrong[1]["allow"] == "POST"


async def test_a_handler_that_breaks_is_a_problem_without_its_innards(call: Caller):
    answer = await call("POST", "/broken")
    assert answer is not None
    assert answer[0] == 500
    assert "ZeroDivision" not in json.dumps(answer[2])


async def test_a_refusal_says_when_to_come_back(call: Caller):
    answer = await call("POST", "/busy")
    assert answer is not None
    assert (answer[0], answer[1]["retry-after"], answer[2]["status"]) == (503, "7", 503)


async def test_ready_says_what_is_missing(call: Caller, missing: dict[str, str]):
    assert (await call("GET", "/readyz") or ())[0] == 200
    missing["store"] = "disk full"
    answer = await call("GET", "/readyz")
    assert answer is not None
    assert (answer[0], answer[2]) == (503, {"ready": False, "missing": {"store": "disk full"}})
    assert (await call("GET", "/healthz") or ())[0] == 200


async def test_metrics_count_routes_and_never_unknown_paths(call: Caller):
    await call("POST", "/echo")
    await call("POST", "/made-up-by-a-scanner")
    answer = await call("GET", "/metrics")
    assert answer is not None
    text = answer[2].decode()
    assert 'rankbridge_responses_total{endpoint="/echo",status="200"} 1.0' in text
    assert "scanner" not in text


@pytest.mark.parametrize(
    "address", ["0.0.0.0:0", "192.0.2.1:0", "localhost:0", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", ":80"]
)
def test_a_server_listens_at_loopback_addresses_only(address: str):
    with pytest.raises(CannotStartError):
        listen(address)


def test_a_server_listens_on_a_pods_address_only_when_it_is_told_that_others_guard_it():
    with listen("0.0.0.0:0", anywhere=True) as bound:
        assert bound.getsockname()[1] > 0
    with pytest.raises(CannotStartError) as caught:
        listen("0.0.0.0:0")
    assert "RANKBRIDGE_LISTEN=anywhere" in caught.value.remedy


def test_a_taken_port_is_one_sentence_with_a_remedy():
    with listen("127.0.0.1:0") as first:
        first.listen()
        with pytest.raises(CannotStartError, match="in use") as caught:
            listen(f"127.0.0.1:{first.getsockname()[1]}")
    assert "port" in caught.value.remedy


@pytest.mark.parametrize("when", ["while it loads", "while it serves"])
def test_a_server_that_is_asked_to_stop_ends_with_zero(when: str):
    program = textwrap.dedent(f"""
        import sys, time
        from prometheus_client import CollectorRegistry
        from workloads.telemetry.metrics import StageMetrics
        from workloads.telemetry.service import Service, run

        async def started():
            print("serving", flush=True)

        def build():
            print("loading", flush=True)
            time.sleep({60 if when == "while it loads" else 0})
            return Service(routes={{}}, metrics=StageMetrics(CollectorRegistry()), missing=dict, start=started)

        sys.exit(run("test", "onprem", "127.0.0.1:0", build))
    """)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    awaited = b"loading" if when == "while it loads" else b"serving"
    while process.stdout.readline().strip() != awaited:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    said = [json.loads(line)["event"] for line in errors.splitlines()]
    assert said == ([] if when == "while it loads" else ["starting", "stopped"])
