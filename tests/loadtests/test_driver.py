"""The driver as a process against a stub gateway: it sends what is due, and every request has its one outcome."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from loadtests.drive import READS, Aim, Drive, Leg
from loadtests.driver import UNSENT, Begun
from loadtests.ledger import Ledger, ledger
from loadtests.samples import Run, read
from loadtests.stub import Behaviour, StubGateway

pytestmark = pytest.mark.real_parts


ROOT = Path(__file__).parents[2]


def _listens(at: str) -> bool:
    host, _, port = at.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


def run(folder: Path, drive: Drive) -> tuple[Run, Ledger]:
    (folder / "drive.json").write_bytes(msgspec.json.encode(drive))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loadtests.driver", str(folder / "drive.json")),
            *("--samples", str(folder / "samples.jsonl"), "--acknowledged", str(folder / "acknowledged.txt")),
        ],
        capture_output=True,
        timeout=60,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": ""},
    )
    assert msgspec.json.decode(done.stdout, type=Begun).unix_s > 0
    found = read(folder / "samples.jsonl")
    return found, ledger(found.samples, sent=len(list(drive.due())), stray=found.stray)


def a_drive(url: str, *, rate: float = 100.0, seconds: float = 2.0, **fields: object) -> Drive:
    return msgspec.convert({"aims": [{"url": url}], "legs": [{"seconds": seconds, "rate": rate}], **fields}, Drive)


@contextmanager
def server_of_bytes(answer: bytes) -> Iterator[str]:
    """Enters as a stub does, and answers every POST with these bytes."""
    with StubGateway() as stub, socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with connection:
                while data := connection.recv(65536):
                    if data.startswith(b"GET"):
                        path = data.split()[1].decode()
                        body = stub.answer("GET", path, b"")[1]
                        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                    else:
                        connection.sendall(answer)

        def accept() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def test_everything_that_is_due_is_sent_once_and_answered_once(tmp_path: Path):
    with StubGateway() as stub:
        found, sums = run(tmp_path, a_drive(stub.url, priorities={"high": 1, "low": 1}, tenants={"shop": 1}))
        posted = sum(count for path, count in stub.requests.items() if path.startswith("/v1/") and "cat" not in path)
        stored = set(stub.acknowledged)
    assert sums.balances
    assert sums.sent == sums.ok == posted == 200
    assert {one.priority for one in found.samples} == {"high", "low"}
    assert set((tmp_path / "acknowledged.txt").read_text().split()) == stored != set()


def test_a_stall_is_seen_by_all_that_were_due_meanwhile(tmp_path: Path):
    with StubGateway(Behaviour(stall_after_s=0.5, stall_s=0.8)) as stub:
        found, sums = run(tmp_path, a_drive(stub.url, seconds=2.5))
    assert sums.balances
    # A closed loop would have sent one request meanwhile; 80 were due.
    assert sum(one.latency_ms > 100 for one in found.samples) >= 60
    assert max(one.latency_ms for one in found.samples) > 700


def test_who_hangs_costs_time_outs_and_no_answer_is_taken_for_anothers(tmp_path: Path):
    with StubGateway(Behaviour(hang=True)) as stub:
        _, sums = run(tmp_path, a_drive(stub.url, seconds=1.0, timeout_s=0.3, connections=8))
    assert sums.balances
    assert sums.timed_out == sums.sent == 100


def test_a_dead_gateway_breaks_connections_and_every_request_says_so(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{probe.getsockname()[1]}"
    drive = a_drive(f"http://{at}", seconds=3.0, timeout_s=0.5)
    (tmp_path / "drive.json").write_bytes(msgspec.json.encode(drive))
    words = [sys.executable, "-m", "loadtests.driver", str(tmp_path / "drive.json")]
    with subprocess.Popen([sys.executable, "-m", "loadtests.stub", "--listen", at], cwd=ROOT) as stub:
        while not _listens(at):
            time.sleep(0.05)
        with subprocess.Popen(
            [*words, "--samples", str(tmp_path / "samples.jsonl")], cwd=ROOT, stdout=subprocess.PIPE
        ) as driver:
            assert driver.stdout is not None
            driver.stdout.readline()
            time.sleep(1.5)
            stub.kill()
            assert driver.wait(30) == 0
    found = read(tmp_path / "samples.jsonl")
    sums = ledger(found.samples, sent=300, stray=found.stray)
    assert sums.balances
    assert sums.ok > 0
    assert sums.broken > 0


def test_who_finds_no_connection_in_time_does_not_ask_any_more(tmp_path: Path):
    with StubGateway(Behaviour(hang=True)) as stub:
        drive = a_drive(stub.url, seconds=1.0, timeout_s=0.4, connections=1)
        found, sums = run(tmp_path, msgspec.structs.replace(drive, aims=[Aim(url=stub.url, mix=dict(READS))]))
        posted = sum(count for path, count in stub.requests.items() if path in READS)
    assert sums.balances
    assert sums.timed_out == 100
    assert posted < 10  # a hundred were due; each that got the connection held it until it was given up
    assert any(one.error == UNSENT for one in found.samples)


def test_a_refusal_keeps_its_type(tmp_path: Path):
    with StubGateway(Behaviour(refuse=503)) as stub:
        found, sums = run(tmp_path, a_drive(stub.url, seconds=0.5))
    assert sums.rejected == {"503 about:blank": 50}
    assert sums.balances
    assert all(one.status == 503 for one in found.samples)


def test_a_second_answer_to_one_request_is_stray(tmp_path: Path):
    twice = b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n" * 2
    with server_of_bytes(twice) as url:
        _, sums = run(tmp_path, a_drive(url, seconds=0.5, rate=20))
    assert sums.stray > 0
    assert not sums.balances


def test_legs_change_the_rate_and_deadlines_go_with_reads_alone(tmp_path: Path):
    with StubGateway() as stub:
        drive = Drive(
            aims=[Aim(url=stub.url, mix=dict(READS))], legs=[Leg(seconds=1, rate=20), Leg(seconds=1, rate=80)]
        )
        found, _ = run(tmp_path, drive)
    assert sum(one.at_s < 1 for one in found.samples) == 20
    assert sum(one.at_s >= 1 for one in found.samples) == 80
    assert drive.rate_at(1.5) == 80
    assert drive.rate_at(2.5) == 0


def test_a_drive_that_cannot_begin_says_why(tmp_path: Path):
    (tmp_path / "drive.json").write_bytes(msgspec.json.encode(a_drive("http://127.0.0.1:9")))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loadtests.driver", str(tmp_path / "drive.json")),
            *("--samples", str(tmp_path / "s.jsonl")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert "no catalogue sample" in done.stderr
    assert not (tmp_path / "s.jsonl").exists()
