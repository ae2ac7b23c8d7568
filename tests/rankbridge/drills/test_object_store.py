"""The door before the object store: each fault as a client of S3 meets it, and none when there is none."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rankbridge.drills import object_store
from rankbridge.drills.object_store import StoreProxy
from rankbridge.drills.scene import StoreFault


class _Store(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "4")
        self.end_headers()
        self.wfile.write(b"data")

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it that
        """Nothing."""


@pytest.fixture
def proxy() -> Iterator[StoreProxy]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = server.server_address[:2]
        with StoreProxy((str(host), int(port))) as proxy:
            yield proxy
        server.shutdown()


def ask(proxy: StoreProxy, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*proxy.address, timeout=5)
    try:
        connection.request(method, "/bucket/key")
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def again(connection: http.client.HTTPConnection) -> None:
    connection.request("GET", "/bucket/key")
    connection.getresponse()


def test_without_a_fault_the_store_answers(proxy: StoreProxy):
    assert ask(proxy) == (200, b"data")
    assert proxy.met == 0


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (StoreFault.ERROR_500, 500, b"InternalError"),
        (StoreFault.ERROR_503, 503, b"SlowDown"),
        (StoreFault.EXPIRED, 403, b"ExpiredToken"),
    ],
)
def test_errors_come_in_s3s_form(proxy: StoreProxy, fault: StoreFault, status: int, code: bytes):
    proxy.tell(fault)
    found, body = ask(proxy)
    assert found == status
    assert code in body
    assert ask(proxy, "HEAD") == (status, b"")
    assert proxy.met == 2


def test_a_reset_store_answers_nobody(proxy: StoreProxy):
    proxy.tell(StoreFault.RESET)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(proxy)


def test_a_slow_store_is_slow_and_well_again_when_told(proxy: StoreProxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(object_store, "SLOW_S", 0.4)
    proxy.tell(StoreFault.SLOW)
    began = time.monotonic()
    assert ask(proxy)[0] == 200
    assert time.monotonic() - began >= 0.4
    proxy.tell(StoreFault.NONE)
    began = time.monotonic()
    assert ask(proxy)[0] == 200
    assert time.monotonic() - began < 0.3


def test_connections_that_are_open_meet_a_new_fault_as_well(proxy: StoreProxy):
    connection = http.client.HTTPConnection(*proxy.address, timeout=5)
    connection.request("GET", "/bucket/key")
    assert connection.getresponse().read() == b"data"
    proxy.tell(StoreFault.ERROR_500)
    time.sleep(0.2)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        again(connection)
    connection.close()
