"""The intake as the process that is really started: stopped, killed, and started again."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest
import uuid_utils

from workloads.contract.http import PATH_INTAKE

pytestmark = pytest.mark.real_parts

KILLS = 4


class IntakeProcess:
    """A started intake; `kill` and `stop` end exactly this process."""

    def __init__(self, store: pathlib.Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workloads.intake", "--listen", f"127.0.0.1:{port}", "--store", str(store)],
            stderr=subprocess.PIPE,
        )
        deadline = time.monotonic() + 30
        while True:
            if self.process.poll() is not None:
                raise AssertionError(self.errors())
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, "intake did not become ready"
            time.sleep(0.02)

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        code = self.process.wait(20)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def event() -> dict[str, Any]:
    return {
        "event_id": str(uuid_utils.uuid7()),
        "type": "click",
        "timestamp_ms": 1_700_000_000_000,
        "item": "mug",
    }


@pytest.fixture
def store(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "events.sqlite"


class Sender(threading.Thread):
    """Posts small batches without pause until the server is gone; `acknowledged` are the ids it was told are safe.

    What was sent and not acknowledged is sent again by the next sender, as a real client does.
    """

    def __init__(self, url: str, again: list[dict[str, Any]]) -> None:
        super().__init__()
        self.url = url
        self.acknowledged: list[str] = []
        self.unanswered = again

    def run(self) -> None:
        with httpx.Client() as client:
            while True:
                batch = self.unanswered or [event() for _ in range(random.randint(1, 5))]
                self.unanswered = batch
                try:
                    answer = client.post(self.url + PATH_INTAKE, json={"events": batch})
                except httpx.TransportError:
                    return
                assert answer.status_code == 200
                counts = answer.json()
                assert counts["accepted"] + counts["duplicates"] == len(batch)
                self.acknowledged += [sent["event_id"] for sent in batch]
                self.unanswered = []


def test_every_acknowledged_event_is_there_exactly_once_after_each_kill(store: pathlib.Path):
    port = free_port()
    acknowledged: list[str] = []
    again: list[list[dict[str, Any]]] = [[] for _ in range(4)]
    for _ in range(KILLS):
        intake = IntakeProcess(store, port)
        senders = [Sender(intake.url, unanswered) for unanswered in again]
        for sender in senders:
            sender.start()
        time.sleep(random.uniform(0.1, 0.5))
        assert intake.end(signal.SIGKILL) == -signal.SIGKILL
        for sender in senders:
            sender.join(20)
            acknowledged += sender.acknowledged
        again = [sender.unanswered for sender in senders]

    intake = IntakeProcess(store, port)
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as reader:
        stored = [name for (name,) in reader.execute("SELECT event_id FROM events")]
        assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    reader.close()
    assert intake.end(signal.SIGTERM) == 0
    assert len(acknowledged) > 4 * KILLS
    assert len(stored) == len(set(stored))
    assert set(acknowledged) <= set(stored)
    in_doubt = {sent["event_id"] for batch in again for sent in batch}
    assert set(stored) <= set(acknowledged) | in_doubt


def test_a_stop_answers_what_is_under_way_and_leaves_one_file(store: pathlib.Path):
    intake = IntakeProcess(store, free_port())
    senders = [Sender(intake.url, []) for _ in range(4)]
    for sender in senders:
        sender.start()
    time.sleep(0.3)
    begun = time.monotonic()
    assert intake.end(signal.SIGTERM) == 0
    assert time.monotonic() - begun < 10
    for sender in senders:
        sender.join(20)
    acknowledged = {name for sender in senders for name in sender.acknowledged}
    with sqlite3.connect(store) as reader:
        stored = {name for (name,) in reader.execute("SELECT event_id FROM events")}
    reader.close()
    assert acknowledged <= stored
    assert [path.name for path in store.parent.iterdir()] == ["events.sqlite"]


def test_the_store_is_written_durably_and_says_what_a_commit_costs(store: pathlib.Path):
    intake = IntakeProcess(store, free_port())
    assert "rankbridge_process_pss_bytes" in httpx.get(f"{intake.url}/metrics").text
    intake.process.send_signal(signal.SIGTERM)
    records = [json.loads(line) for line in intake.errors().splitlines()]
    assert intake.process.wait(20) == 0
    assert intake.process.stderr is not None
    intake.process.stderr.close()
    (opened,) = [record for record in records if record["event"] == "store opened"]
    assert (opened["journal_mode"], opened["synchronous"], opened["role"]) == ("wal", 2, "intake")
    assert opened["commit_ms"] > 0


@pytest.mark.parametrize("fault", ["address", "port", "store"])
def test_a_start_that_cannot_be_is_one_line_with_a_remedy(store: pathlib.Path, fault: str):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = {"address": "0.0.0.0:0", "port": f"127.0.0.1:{taken.getsockname()[1]}", "store": "127.0.0.1:0"}[fault]
        if fault == "store":
            store.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "workloads.intake", "--listen", address, "--store", str(store)],
            capture_output=True,
            timeout=30,
            check=False,
            env={**os.environ, "PYTHONWARNINGS": "error"},
        )
    assert done.returncode == 2, done.stderr
    assert b"Traceback" not in done.stderr
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert any(record.get("remedy") for record in records)
