"""Events from the spool into the lake every so often, and out of the spool once lake and profiles have them.

The lake's commit and the spool's trim are each durable by themselves; killed between them, the next round trims. Knows
the intake's one route and nothing else of it.
"""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

import msgspec

from workloads.contract.http import PATH_TRIM, TrimAnswer, TrimRequest
from workloads.feedback.archive import Archive, ArchiveError
from workloads.telemetry import log

_TIMEOUT_S: Final = 30.0
_logger = log.get(component="keeper")


class TrimError(Exception):
    """The intake did not trim. The message says why."""


class Trimmer(Protocol):
    """The door to the intake, which alone writes the spool."""

    def trim(self, up_to_seq: int, received_before_ms: int) -> int:
        """Take away what came before both; the number of events. Raises TrimError."""
        ...


class FakeTrimmer:
    """The fake: remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def trim(self, up_to_seq: int, received_before_ms: int) -> int:
        """See `Trimmer`."""
        self.asked.append((up_to_seq, received_before_ms))
        return 0


class HttpTrimmer:
    """The intake at `http://host:port`. Raises ValueError for anything else."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path.strip("/"):
            raise ValueError(f"{url!r} is no address of an intake; write http://host:port")
        self._host, self._port = parts.hostname, parts.port

    def trim(self, up_to_seq: int, received_before_ms: int) -> int:
        """See `Trimmer`."""
        body = msgspec.msgpack.encode(TrimRequest(up_to_seq=up_to_seq, received_before_ms=received_before_ms))
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
        try:
            with contextlib.closing(connection):
                connection.request("POST", PATH_TRIM, body, {"content-type": "application/msgpack"})
                answer = connection.getresponse()
                told = answer.read()
            if answer.status != 200:
                raise TrimError(f"the intake answered {answer.status}")
            return msgspec.msgpack.decode(told, type=TrimAnswer).events
        except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
            raise TrimError(f"the intake cannot be asked: {error}") from None


class Keeper:
    """One round at a time; used by one thread. `fault` says why the last one came to nothing."""

    def __init__(
        self,
        archive: Archive,
        spool: Path,
        trimmer: Trimmer | None,
        *,
        applied: Callable[[], int],
        keep_ms: int,
        clock_ms: Callable[[], int],
        on_taken: Callable[[int], None] = lambda _: None,
        on_trimmed: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`applied` is the last number that is in the profiles; an event stays in the spool for `keep_ms` at least."""
        self._archive = archive
        self._spool = spool
        self._trimmer = trimmer
        self._applied = applied
        self._keep_ms = keep_ms
        self._clock_ms = clock_ms
        self._on_taken = on_taken
        self._on_trimmed = on_trimmed
        self.fault: str | None = None

    def round(self) -> None:
        """Take in, then trim. Faults are told once and tried again with the next round."""
        if not self._spool.is_file():
            return  # the intake makes it; the follower says so
        try:
            taken = self._archive.take(self._spool)
            self._on_taken(taken)
            if self._trimmer is not None:
                done = self._trimmer.trim(min(taken, self._applied()), max(self._clock_ms() - self._keep_ms, 0))
                self._on_trimmed(done)
        except (ArchiveError, TrimError) as error:
            if self.fault is None:
                _logger.error("events stay in the spool", fault=str(error))
            self.fault = str(error)
            return
        if self.fault is not None:
            _logger.info("events go into the lake again")
            self.fault = None
