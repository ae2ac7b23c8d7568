"""The doctor's large gRPC call is taken by a real Triton: it skips the field that it does not know."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from rankbridge.doctor import calls
from rankbridge.doctor.findings import Verdict
from rankbridge.triton import locate, remove_shared_memory
from workloads.contract.sites import ONPREM, AddressBook, Listener

pytestmark = pytest.mark.real_parts

ROOT = Path(__file__).resolve().parents[3]


def test_64_kb_pass_to_a_triton_that_serves_nothing(tmp_path: Path):
    if not (ROOT / ".tools" / "triton").exists():
        pytest.skip("tritonserver is not unpacked: run `make setup`")
    listeners = (Listener.TRITON_HTTP, Listener.TRITON_GRPC, Listener.TRITON_METRICS)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in listeners]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        book = AddressBook({at: each.getsockname()[1] for at, each in zip(listeners, sockets, strict=True)})
    site, found = dataclasses.replace(ONPREM, address="127.0.0.1"), locate(ROOT)
    (tmp_path / "models").mkdir()
    command = found.command(site, book, repository=tmp_path / "models", scratch=tmp_path / "scratch")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=found.environment(os.environ), stdout=log, stderr=log)
    address = ("127.0.0.1", book.port(Listener.TRITON_GRPC))
    try:
        end = time.monotonic() + 60
        while calls.triton("aws", address).verdict is Verdict.SKIPPED:
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < end
            time.sleep(0.1)
        told = calls.triton("aws", address)
    finally:
        process.kill()
        process.wait(20)
        remove_shared_memory(site, book)
    assert told.verdict is Verdict.OK
    assert told.measured.startswith("65536 bytes")
