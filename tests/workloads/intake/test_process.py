"""The intake as the process that is really started: stopped, killed, and started again."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import httpx
import pytest
import uuid_utils

from workloads.contract.http import PATH_ERASE, PATH_INTAKE, PATH_TRIM

pytestmark = pytest.mark.real_parts

LONG = os.environ.get("RANKBRIDGE_LONG") == "1"
KILLS = 100 if LONG else 5
PERSON = "p1-0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """A test that failed leaves no process."""
    yield
    for started in IntakeProcess.started:
        if started.process.poll() is None:
            started.end(signal.SIGKILL)
        elif started.process.stderr is not None:
            started.process.stderr.close()
    IntakeProcess.started.clear()


class IntakeProcess:
    """A started intake; `end` ends exactly this process."""

    started: ClassVar[list[IntakeProcess]] = []

    def __init__(
        self, store: pathlib.Path, port: int, *arguments: str, under: Sequence[str] = (), ready: int = 200
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        where = ["--listen", f"127.0.0.1:{port}", "--store", str(store)]
        self.process = subprocess.Popen(
            [*under, sys.executable, "-m", "workloads.intake", *where, *arguments], stderr=subprocess.PIPE
        )
        self.started.append(self)
        deadline = time.monotonic() + 30
        while True:
            if self.process.poll() is not None:
                raise AssertionError(self.errors())
            try:
                if httpx.get(f"{self.url}/readyz").status_code == ready:
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


def remove(url: str) -> None:
    """Housekeeping that has nothing to remove but goes through all of it."""
    with contextlib.suppress(httpx.TransportError):
        httpx.post(url + PATH_TRIM, json={"up_to_seq": 10**9, "received_before_ms": 1})
        httpx.post(url + PATH_ERASE, json={"pseudonyms": [PERSON]})


def test_every_acknowledged_event_is_there_exactly_once_after_each_kill(store: pathlib.Path):
    port = free_port()
    acknowledged: list[str] = []
    again: list[list[dict[str, Any]]] = [[] for _ in range(4)]
    for _ in range(KILLS):
        intake = IntakeProcess(store, port)
        senders = [Sender(intake.url, unanswered) for unanswered in again]
        for sender in senders:
            sender.start()
        # By what was acknowledged and not by the clock: on a busy machine half a second may see nothing at all.
        wanted, deadline = random.randint(1, 60), time.monotonic() + 30
        while sum(len(sender.acknowledged) for sender in senders) < wanted:
            assert time.monotonic() < deadline, "nothing is acknowledged"
            time.sleep(0.001)
        if random.random() < 0.3:  # a kill may meet a trim or an erasure as well
            removing = threading.Thread(target=remove, args=(intake.url,))
            removing.start()
            time.sleep(random.uniform(0, 0.02))
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
    figures = {
        "kills": KILLS,
        "acknowledged": len(acknowledged),
        "lost": len(set(acknowledged) - set(stored)),
        "doubled": len(stored) - len(set(stored)),
    }
    print(json.dumps(figures))  # noqa: T201 - shown with -s: what the run measured
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


def completed_calls(trace: str) -> Iterator[str]:
    """System calls of a trace of several threads, each at the moment of its end."""
    begun: dict[str, str] = {}
    for line in trace.splitlines():
        thread, _, call = line.partition(" ")
        call = call.strip()
        if call.endswith("<unfinished ...>"):
            begun[thread] = call.removesuffix("<unfinished ...>")
        elif resumed := re.match(r"<\.\.\. \w+ resumed>", call):
            yield begun.pop(thread, "") + call[resumed.end() :]
        else:
            yield call


def test_the_log_is_synced_before_the_reply_leaves(store: pathlib.Path, tmp_path: pathlib.Path):
    if shutil.which("strace") is None or subprocess.run(["strace", "-o", "/dev/null", "true"], check=False).returncode:
        pytest.skip("strace is not installed or may not trace here: apt-get install strace")
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,pwrite64,write,writev,sendto,sendmsg"
    intake = IntakeProcess(store, free_port(), under=["strace", "-f", "-y", "-s", "64", "-e", calls, "-o", str(trace)])
    for _ in range(3):
        assert httpx.post(intake.url + PATH_INTAKE, json={"events": [event()]}).json()["accepted"] == 1
    (child,) = pathlib.Path(f"/proc/{intake.process.pid}/task/{intake.process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    assert intake.process.wait(20) == 0
    assert intake.process.stderr is not None
    intake.process.stderr.close()
    story = ""
    for call in completed_calls(trace.read_text()):
        if call.startswith("pwrite64(") and "events.sqlite-wal>" in call:
            story += "w"
        elif call.startswith(("fsync(", "fdatasync(")) and "events.sqlite-wal>" in call and call.endswith("= 0"):
            story += "s"
        elif "HTTP/1.1 200" in call:
            story += "r"
    answered = story.split("r")  # the readiness asked for at the start is a reply without a write before it
    assert sum("w" in before for before in answered[:-1]) >= 3
    assert all(before.endswith("s") for before in answered[:-1] if "w" in before)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root and CAP_SYS_ADMIN")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_callers_are_turned_away_before_the_disk_is_full_and_come_back_after_a_trim(small_disk: pathlib.Path):
    store = small_disk / "events.sqlite"
    intake = IntakeProcess(store, free_port(), "--reserve-mib", "8")
    acknowledged, statuses = 0, set[int]()
    with httpx.Client(base_url=intake.url) as client:
        for _ in range(2000):
            batch = [{**event(), "context": {"page": "x" * 100}} for _ in range(100)]
            answer = client.post(PATH_INTAKE, json={"events": batch})
            statuses.add(answer.status_code)
            if answer.status_code != 200:
                break
            acknowledged += answer.json()["accepted"]
        assert statuses == {200, 429}
        assert int(answer.headers["retry-after"]) > 0
        ready = client.get("/readyz")
        assert (ready.status_code, list(ready.json()["missing"])) == (503, ["disk"])
        assert shutil.disk_usage(small_disk).free > 2 << 20
        trim = {"up_to_seq": acknowledged, "received_before_ms": 2**50}
        trimmed = client.post(PATH_TRIM, json=trim, timeout=60).json()
        assert "events" in trimmed, trimmed
        assert (trimmed["events"], trimmed["last_seq"]) == (acknowledged, acknowledged)
        assert client.post(PATH_INTAKE, json={"events": [event()]}).status_code == 200
        assert client.get("/readyz").status_code == 200
    assert intake.end(signal.SIGTERM) == 0


def test_a_person_is_erased_from_every_byte_while_events_arrive(store: pathlib.Path):
    intake = IntakeProcess(store, free_port())
    for _ in range(5):
        batch = [{**event(), "user": PERSON}, event(), {**event(), "user": PERSON, "item": None}]
        httpx.post(intake.url + PATH_INTAKE, json={"events": batch})
    senders = [Sender(intake.url, []) for _ in range(3)]
    for sender in senders:
        sender.start()
    answer = httpx.post(intake.url + PATH_ERASE, json={"pseudonyms": [PERSON]}, timeout=60)
    files = b"".join(file.read_bytes() for file in store.parent.iterdir())
    assert intake.end(signal.SIGKILL) == -signal.SIGKILL
    for sender in senders:
        sender.join(20)
    assert answer.json() == {"events": 5, "dead_letters": 5}
    assert PERSON[3:19].encode() not in files
    assert PERSON[19:].encode() not in files
    with sqlite3.connect(store) as reader:
        assert reader.execute("SELECT count(*) FROM events WHERE user IS NOT NULL").fetchone() == (0,)
        stored = {name for (name,) in reader.execute("SELECT event_id FROM events")}
    reader.close()
    assert {name for sender in senders for name in sender.acknowledged} <= stored
