"""A home of state in a temporary folder, and small stub processes in the place of the real ones."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rankbridge.layout import Layout
from rankbridge.roles import Process, Role
from workloads.contract.sites import SiteName

STUB = """
import http.server, json, os, signal, sys, time
port, behaviour = int(sys.argv[1]), sys.argv[2]
print("stub begins", flush=True)
if behaviour == "dies":
    print("stub: something is wrong with the bundle", flush=True)
    sys.exit(7)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = 503 if behaviour == "never-ready" else 200
        self.send_response(status)
        self.end_headers()
        if behaviour.startswith("gateway"):
            up = behaviour != "gateway-alone"
            self.wfile.write(json.dumps({
                "ready": True, "site": "onprem", "bundle": "0" * 12, "missing": [] if up else ["triton"],
                "backends": {"triton": {"up": up, "detail": "asked"}, "retrieval": {"up": True, "detail": "asked"}},
            }).encode())
        else:
            self.wfile.write(b'{"missing": "a model"}' if status == 503 else b"{}")
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path, tmp_path / "home")


@pytest.fixture
def stub(tmp_path: Path) -> Callable[..., Process]:
    """Makes a process for a supervisor, a stub that listens on a free port of 127.0.0.1 and behaves as told."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)

    def make(
        role: Role = Role.RETRIEVAL, site: SiteName = SiteName.ONPREM, *, behaviour: str = "good", within_s: float = 20
    ) -> Process:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        return Process(
            site=site,
            role=role,
            command=(sys.executable, str(script), str(port), behaviour),
            sockets=(("127.0.0.1", port),),
            url=url,
            ready_url=url + "/readyz",
            ready_within_s=within_s,
            grace_s=1.0,
            environment={"PATH": "/usr/bin:/bin"},
        )

    return make
