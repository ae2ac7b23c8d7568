"""The record of one request, and the file that a run's records are kept in.

Pure but for reading and writing that file: JSON lines, the run's header first. A sample's time is
counted from the moment it was meant to be sent. It does not judge anything; `gate` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO

import msgspec

SCHEMA_VERSION = 1


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway that was sent to. `best_rung` is what its catalogue sample said, per endpoint."""

    site: str
    share: float
    best_rung: dict[str, int]


class RunHeader(msgspec.Struct, frozen=True, kw_only=True, tag="run", tag_field="record"):
    """What was meant to be sent."""

    schema_version: int = SCHEMA_VERSION
    suite: str
    started_ms: float
    """Unix time of the run's start, milliseconds."""
    warmup_s: float
    arrivals: str
    """`poisson` or `constant`."""
    rate_per_user: float
    seed: int
    targets: list[Target]
    note: str = ""
    """What a reader of the figures should know of the generator itself."""


class Sample(msgspec.Struct, frozen=True, kw_only=True, tag="sample", tag_field="record", omit_defaults=True):
    """One request that was due, whatever became of it."""

    endpoint: str
    site: str
    """Which site answered; for a request that nobody answered, the one it was sent to."""
    at_s: float
    """When it was due, in seconds since the run's start."""
    latency_ms: float
    """From the moment it was due to the last byte of the answer, or to the moment it was given up."""
    lateness_ms: float
    """How much later than due the generator really sent it."""
    status: int
    """HTTP status; 0 when no answer came."""
    error: str | None = None
    """What was wrong, in a few words; None when nothing was."""
    rung: int | None = None
    best_rung: int | None = None
    """Best configured rung of the site it was sent to."""
    reason: str | None = None
    """Why the answer is below the best rung, in the gateway's words."""
    ranked: int | None = None
    stages_ms: dict[str, float] = {}
    bundle: str | None = None
    warmup: bool = False
    """Due during warm-up: kept, and judged by nobody."""
    problem: str | None = None
    """Type of the problem by which it was refused, where the answer said one."""
    sent_to: str | None = None
    """Site that it was sent to, where the generator notes it."""
    ranked_at: str | None = None
    """Site whose ranker scored the answer."""
    priority: str | None = None
    """As the request's header said; None without one."""

    @property
    def is_below_best(self) -> bool:
        """Whether the answer came from below the best configured rung."""
        return self.rung is not None and self.best_rung is not None and self.rung > self.best_rung


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run: its header, its samples, and how long it was meant to be sent to after warm-up."""

    header: RunHeader
    samples: list[Sample]
    seconds: float
    """Length of the judged part (warm-up excluded)."""
    fault: str | None = None
    """Why the run could not be done as asked, in a sentence; None when it could."""
    stray: int = 0
    """Answers, or pieces of one, that came for no request: one that has its answer already, or none at all."""


class _End(msgspec.Struct, frozen=True, kw_only=True, tag="end", tag_field="record"):
    """Last line of a finished file: without it a file is known to be cut short."""

    seconds: float
    fault: str | None = None
    stray: int = 0


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[RunHeader | Sample | _End] = msgspec.json.Decoder(RunHeader | Sample | _End)


class SampleFile:
    """Writes a run's samples as they come; the file appears under its name only when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream: IO[bytes] = self._part.open("wb", buffering=1 << 20)

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def header(self, header: RunHeader) -> None:
        """The first line."""
        self._stream.write(_encoder.encode(header) + b"\n")

    def add(self, sample: Sample) -> None:
        """One more line."""
        self._stream.write(_encoder.encode(sample) + b"\n")

    def finish(self, *, seconds: float, fault: str | None, stray: int = 0) -> None:
        """Write the last line, make the file durable and give it its name."""
        self._stream.write(_encoder.encode(_End(seconds=seconds, fault=fault, stray=stray)) + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._part.replace(self._path)


def read(path: Path) -> Run:
    """A finished file of samples.

    Raises ValueError with the line's number when a line is not a record, when the header is missing
    or of another version, and when the file was cut short.
    """
    header: RunHeader | None = None
    end: _End | None = None
    samples: list[Sample] = []
    with path.open("rb") as lines:
        for record in _records(lines, path):
            match record:
                case RunHeader():
                    header = record
                case Sample():
                    samples.append(record)
                case _End():
                    end = record
    if header is None:
        raise ValueError(f"{path.name}: no header line; this is not a file of samples")
    if header.schema_version != SCHEMA_VERSION:
        raise ValueError(
            f"{path.name}: schema version {header.schema_version}, and this version reads {SCHEMA_VERSION} only"
        )
    if end is None:
        raise ValueError(f"{path.name}: the last line is missing; the run was cut short, do it again")
    return Run(header=header, samples=samples, seconds=end.seconds, fault=end.fault, stray=end.stray)


def _records(lines: Iterable[bytes], path: Path) -> Iterable[RunHeader | Sample | _End]:
    for number, line in enumerate(lines, start=1):
        try:
            yield _decoder.decode(line)
        except msgspec.DecodeError as fault:
            raise ValueError(f"{path.name}, line {number}: {fault}") from None


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a reader sees all of it or none: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
