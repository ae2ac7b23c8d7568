"""A gateway process under siege: a small bundle, an intake, nobody else; raw sockets, and what it may cost."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import psutil
import pytest

from workloads.contract.http import Problem
from workloads.privacy.vault import SqliteVault

CORPUS = Path(__file__).parents[1] / "corpus"
PATIENCE_S = 60.0
GROWTH_MAX_MB = 64.0
"""What all attacks together may add to the process; a single one of those in the corpus sends more."""
ANSWER_WITHIN_S = 2.0
"""Of a good request meanwhile, on a machine that attacks itself."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One response as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    def problem(self) -> Problem:
        """It is one, in the form of all."""
        assert self.headers["content-type"] == "application/problem+json", self
        found = msgspec.json.decode(self.body, type=Problem)
        assert found.status == self.status
        assert found.type.startswith("/problems/")
        return found


def read_answer(file: BinaryIO, *, head: bool = False) -> Answer | None:
    """The next response, or None at the connection's end; what comes before a final one is skipped."""
    while True:
        try:
            line = file.readline()
        except ConnectionError:
            return None
        if not line:
            return None
        version, status, *_ = line.split(b" ", 2)
        assert version == b"HTTP/1.1", line
        headers = {}
        while (header := file.readline()) not in {b"\r\n", b""}:
            name, _, value = header.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if int(status) >= 200:
            break
    length = 0 if head else int(headers.get("content-length", "0"))
    body = file.read(length)
    assert len(body) == length, "an answer was cut short"
    return Answer(int(status), headers, body)


class Siege:
    """The process, what it weighed at rest, and ways to speak to it."""

    def __init__(self, directory: Path, bundle: Path) -> None:
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(4)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            self.port, intake, retrieval, triton = (each.getsockname()[1] for each in sockets)
        SqliteVault(directory / "vault.sqlite", create=True).admit(["u-1"])
        self._log = directory / "gateway.log"
        self._intake = self._start(
            "intake", "--listen", f"127.0.0.1:{intake}", "--store", str(directory / "events.sqlite")
        )
        self._process = self._start(
            "gateway",
            *("--site", "onprem", "--listen", f"127.0.0.1:{self.port}", "--bundle", str(bundle)),
            *("--retrieval", f"http://127.0.0.1:{retrieval}", "--triton", f"127.0.0.1:{triton}"),
            *("--intake", f"http://127.0.0.1:{intake}", "--vault", str(directory / "vault.sqlite")),
        )
        try:
            for port in (intake, self.port):
                self._await(port)
            for _ in range(20):
                self.answers_well()
        except BaseException:
            self.stop()
            raise
        self.at_rest_mb = self.rss_mb()

    def _start(self, module: str, *options: str) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"workloads.{module}", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def _await(self, port: int) -> None:
        end = time.monotonic() + PATIENCE_S
        while True:
            assert self._process.poll() is None, self.log()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)

    def stop(self) -> None:
        """End both."""
        for process in (self._process, self._intake):
            process.terminate()
        for process in (self._process, self._intake):
            process.wait(20)

    def log(self) -> str:
        """The end of what they said."""
        return self._log.read_text(errors="replace")[-3000:]

    @property
    def url(self) -> str:
        """Where the gateway is."""
        return f"http://127.0.0.1:{self.port}"

    def rss_mb(self) -> float:
        """Resident memory of the gateway."""
        return psutil.Process(self._process.pid).memory_info().rss / 2**20

    def connect(self, timeout_s: float = 20.0) -> socket.socket:
        """A new connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout_s)

    def answers_well(self) -> float:
        """Ask a good request on a connection of its own; the seconds that its answer took."""
        begun = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/recommend", '{"k": 3}', {"content-type": "application/json"})
            answer = connection.getresponse()
            found = json.loads(answer.read())
        assert answer.status == 200, found
        assert len(found["items"]) == 3
        return time.monotonic() - begun

    def holds(self) -> None:
        """Alive, answering, and no heavier than it may be."""
        assert self._process.poll() is None, self.log()
        assert self.answers_well() < ANSWER_WITHIN_S
        grown = self.rss_mb() - self.at_rest_mb
        assert grown < GROWTH_MAX_MB, f"{grown:.0f} MB more than at rest"
        assert "Traceback" not in self._log.read_text(errors="replace"), self.log()

    def exchange(self, *parts: bytes, at_least: int = 0, quiet_s: float = 0.1) -> tuple[list[Answer], bool]:
        """Send these bytes on one connection; its answers, and whether it was closed.

        Waits with patience for so many answers, then until it is quiet.

        A server that refuses may close while we still send: that is its right, and no error here.
        """
        with self.connect() as sock:
            with contextlib.suppress(ConnectionError):
                for part in parts:
                    sock.sendall(part)
            answers: list[Answer] = []
            with sock.makefile("rb") as file, contextlib.suppress(TimeoutError):
                while True:
                    if len(answers) >= at_least:
                        sock.settimeout(quiet_s)
                    if (answer := read_answer(file)) is None:
                        return answers, True
                    answers.append(answer)
            return answers, False


@dataclasses.dataclass(frozen=True)
class Case:
    """One file of the corpus."""

    why: str
    parts: tuple[bytes, ...]
    status: tuple[int, ...]
    """Of the answers in their order; none: the connection is closed without one."""
    kind: str | None
    """The last answer's problem type."""

    @classmethod
    def read(cls, path: Path) -> Case:
        """From a file that says `why`, `status`, perhaps `kind`, and `part`s: `text` (latin-1) `times` over."""
        found: dict[str, Any] = tomllib.loads(path.read_text())
        parts = tuple(part["text"].encode("latin-1") * part.get("times", 1) for part in found["part"])
        return cls(found["why"], parts, tuple(found["status"]), found.get("kind"))


def corpus() -> list[Any]:
    """Every case that was ever found, by its file's name."""
    return [pytest.param(Case.read(path), id=path.stem) for path in sorted(CORPUS.glob("*.toml"))]
