"""The operators as servers: readiness follows whole rounds, and a bad command line ends in words."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from workloads.operators.service import Pulse, hygiene_service
from workloads.telemetry.service import Service


class Rounds:
    """A sweeper that says what it is told to say."""

    def __init__(self, *said: str | Exception) -> None:
        self.said = list(said)

    def round(self) -> str:
        what = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if isinstance(what, Exception):
            raise what
        return what


async def asked(service: Service, path: str) -> tuple[int, bytes]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await service({"type": "http", "path": path, "method": "GET", "headers": []}, receive, send)
    return sent[0]["status"], sent[1]["body"]


async def living(service: Service, look: Callable[[], Awaitable[None]]) -> None:
    """Start the service, look, and stop it."""
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    started = asyncio.Event()
    await told.put({"type": "lifespan.startup"})

    async def send(_: dict[str, Any]) -> None:
        started.set()

    life = asyncio.ensure_future(service({"type": "lifespan"}, told.get, send))
    await started.wait()
    await look()
    await told.put({"type": "lifespan.shutdown"})
    await life


@pytest.mark.parametrize("bad", ["the answer lacks the group g", RuntimeError("a mistake of ours")])
async def test_it_is_ready_from_its_first_whole_round_on_and_no_fault_ends_its_loop(bad: str | Exception):
    registry = CollectorRegistry()
    service = hygiene_service(Rounds(bad, bad, ""), registry, period_s=0.0)  # type: ignore[arg-type]  # plays a Sweeper

    async def look() -> None:
        status, body = await asked(service, "/readyz")
        assert status == 503
        for _ in range(500):
            if (await asked(service, "/readyz"))[0] == 200:
                break
            await asyncio.sleep(0.01)
        status, body = await asked(service, "/readyz")
        assert status == 200
        assert b'"last_success":"' in body

    await living(service, look)
    assert (registry.get_sample_value("rankbridge_hygiene_last_success_seconds") or 0) > 0


def test_a_round_that_was_long_ago_is_no_readiness():
    pulse = Pulse("hygiene", -1, CollectorRegistry())
    pulse.beat()
    pulse.beat("cannot describe instances")
    assert "cannot describe instances" in pulse.missing()["hygiene"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hygiene", "--group", "g", "--rounds", "1"], "at least two must agree"),
        (["spot", "--queue-url", "http://q", "--serving", "s"], "no cluster is configured"),
    ],
)
def test_what_cannot_start_says_why_and_ends_with_2(arguments: list[str], said: str, tmp_path: Any):  # noqa: ANN401 - pytest's
    config = tmp_path / "kubeconfig"
    users = "[{name: u, user: {token: x}}]" if "--rounds" in arguments else "[]"
    config.write_text(
        "{apiVersion: v1, kind: Config, current-context: c, clusters: [{name: c, cluster: {server: 'http://c.invalid'}}],"
        f" contexts: [{{name: c, context: {{cluster: c, user: u}}}}], users: {users}}}"
    )
    environment = {"PATH": os.defpath, "HOME": str(tmp_path), "KUBECONFIG": str(config)}
    shared = ["--site", "aws", "--region", "eu-central-1", "--listen", "127.0.0.1:0"]
    ended = subprocess.run(
        [sys.executable, "-m", "workloads.operators", *arguments, *shared],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
