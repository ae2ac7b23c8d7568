"""`rankbridge doctor` as it is asked: exit codes, JSON, and checks that do not apply say why."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from rankbridge import cli
from rankbridge.doctor import calls
from rankbridge.doctor.findings import Finding, Findings, Verdict, fault, ok, skipped, table, warn
from rankbridge.faults import ExitCode
from rankbridge.layout import HOME_VARIABLE


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No credentials, and a home of its own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    nowhere = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(nowhere))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv(HOME_VARIABLE, str(nowhere / "state"))


class Stub(http.server.BaseHTTPRequestHandler):
    """Answers as a gateway does; `swallows` are the methods that it leaves unanswered."""

    swallows: tuple[str, ...] = ()

    def _answer(self) -> None:
        if self.command in self.swallows and self.path != "/healthz":
            self.close_connection = True
            return
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST = _answer  # noqa: N815 - names that the library calls

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[tuple[str, int]]:
    Stub.swallows = ()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[0], server.server_address[1]
        server.shutdown()
        thread.join()


def by_name(found: list[Finding]) -> dict[str, Verdict]:
    return {one.name: one.verdict for one in found}


def test_a_gateway_that_answers_large_calls_is_well(gateway: tuple[str, int]):
    found = by_name(calls.gateway("aws", gateway, mss=None, needed=True))
    assert found == {
        "gateway aws": Verdict.OK,
        "MSS to aws": Verdict.SKIPPED,
        "64 kB POST to aws": Verdict.OK,
        "large answer from aws": Verdict.OK,
    }


def test_a_small_call_that_passes_and_a_large_one_that_does_not_are_told_apart(gateway: tuple[str, int]):
    Stub.swallows = ("POST",)
    found = by_name(calls.gateway("aws", gateway, mss=None, needed=True))
    assert found["gateway aws"] is found["large answer from aws"] is Verdict.OK
    assert found["64 kB POST to aws"] is Verdict.FAULT


def test_segments_larger_than_the_plan_allows_are_a_warning(gateway: tuple[str, int]):
    assert by_name(calls.gateway("aws", gateway, mss=1_406, needed=True))["MSS to aws"] is Verdict.WARN
    assert by_name(calls.gateway("aws", gateway, mss=65_495, needed=True))["MSS to aws"] is Verdict.OK


@pytest.mark.parametrize(("needed", "verdict"), [(True, Verdict.FAULT), (False, Verdict.SKIPPED)])
def test_a_gateway_that_is_not_there_is_a_fault_only_where_one_is_due(needed: bool, verdict: Verdict):  # noqa: FBT001
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    assert by_name(calls.gateway("aws", address, mss=None, needed=needed)) == {"gateway aws": verdict}


def test_no_triton_is_skipped_and_a_server_that_speaks_no_grpc_is_a_fault(
    gateway: tuple[str, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(calls, "WAIT_S", 0.5)
    assert calls.triton("aws", ("127.0.0.1", 1)).verdict is Verdict.SKIPPED
    assert calls.triton("aws", gateway).verdict is Verdict.FAULT


def test_exit_codes_are_0_for_health_and_1_for_a_fault():
    good, bad = [ok("a", "x"), warn("b", "x", "y", "z"), skipped("c", "why")], [fault("d", "x", "y", "z")]
    assert Findings.of(good).exit_code is ExitCode.OK
    assert Findings.of(good + bad).exit_code is ExitCode.VERDICT_FAILED
    assert table(Findings.of(good + bad)).row_count == 4


def test_on_one_machine_what_needs_a_tunnel_is_skipped_with_a_reason(capfd: pytest.CaptureFixture[str]):
    code = cli.main(["doctor", "--json"])
    found = json.loads(capfd.readouterr().out)
    verdicts = {one["name"]: one["verdict"] for one in found["findings"]}
    for name in ("plan", "tunnels", "BGP", "mtu onprem to aws", "mtu aws to onprem", "clock", "DNS", "certificates"):
        assert verdicts[name] == "skipped"
    assert verdicts["disk"] == "ok"
    assert all(one["measured"] for one in found["findings"])
    assert code == (0 if found["healthy"] else 1)


def test_a_certificate_that_is_not_there_ends_with_1_and_its_remedy(capfd: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "--certificate", "/nowhere.pem"]) == 1
    assert "HOST:PORT" in capfd.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--peer", "10.0.0.1"],
        ["--echo", "10.0.0.1"],
        ["--stack", "foundation-local"],
        ["--stack", "foundation-nowhere", "--peer", "10.0.0.1"],
        ["--stack", "foundation-local", "--peer", "not an address"],
        ["--stack", "foundation-local", "--peer", "10.0.0.1", "--echo", "10.0.0.1:x"],
        ["--stack", "foundation-local", "--peer", "10.0.0.1", "--echo", "10.0.0.1:99999"],
        ["--port", "nothing=1"],
        ["--router", "ssh 'gw"],
        ["--answer", "203.0.113.7:1"],
        ["--answer", "nowhere"],
    ],
)
def test_what_cannot_be_examined_ends_with_2_and_a_remedy(options: list[str], capfd: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", *options]) == 2
    said = capfd.readouterr().err
    assert "remedy" in said
    assert "Traceback" not in said
