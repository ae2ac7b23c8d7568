"""Progress of long work as JSON lines on a stream, one object a line.

A job started as `python -m workloads.X` writes these to stdout; the desk draws them as bars. A job
knows nothing of terminals. Kinds: `progress`, `note` (one fact with figures), `result` (the last
line: what was made), `fault` (why nothing was made; `remedy` says what to do).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

import msgspec

_encoder = msgspec.json.Encoder()


class ProgressLine(msgspec.Struct, frozen=True, kw_only=True, tag="progress", tag_field="kind"):
    """`done` of `total` units of a stage; `figures` are the newest readings (loss, AUC)."""

    stage: str
    done: float
    total: float
    unit: str = ""
    figures: dict[str, float] = {}


class NoteLine(msgspec.Struct, frozen=True, kw_only=True, tag="note", tag_field="kind"):
    """One thing worth saying once."""

    stage: str
    text: str
    figures: dict[str, float] = {}


class ResultLine(msgspec.Struct, frozen=True, kw_only=True, tag="result", tag_field="kind"):
    """What a finished job made; paths as strings."""

    made: dict[str, str]
    figures: dict[str, float] = {}


class FaultLine(msgspec.Struct, frozen=True, kw_only=True, tag="fault", tag_field="kind"):
    """Why a job made nothing, in one sentence, and the remedy in another."""

    fault: str
    remedy: str


Line = ProgressLine | NoteLine | ResultLine | FaultLine


_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


def parse(line: str | bytes) -> Line | None:
    """The line as its type, or None when it is not one of ours (a library's chatter)."""
    try:
        return _decoder.decode(line)
    except msgspec.DecodeError:
        return None


class Progress:
    """Writes progress lines; at most one `progress` line per stage per `interval` seconds.

    The first and the last line of a stage always go out.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        interval: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._interval = interval
        self._clock = clock
        self._last: dict[str, float] = {}

    def step(self, stage: str, done: float, total: float, unit: str = "", **figures: float) -> None:
        """Say that `done` of `total` is finished."""
        now = self._clock()
        last = self._last.get(stage)
        if last is not None and now - last < self._interval and done < total:
            return
        self._last[stage] = now
        self._write(ProgressLine(stage=stage, done=done, total=total, unit=unit, figures=figures))

    def note(self, stage: str, text: str, **figures: float) -> None:
        """Say one fact once."""
        self._write(NoteLine(stage=stage, text=text, figures=figures))

    def result(self, made: dict[str, str], **figures: float) -> None:
        """Say what was made; the last line of a job."""
        self._write(ResultLine(made=made, figures=figures))

    def fault(self, fault: str, remedy: str) -> None:
        """Say why nothing was made; the last line of a job that failed."""
        self._write(FaultLine(fault=fault, remedy=remedy))

    def _write(self, line: Line) -> None:
        self._stream.write(_encoder.encode(line).decode() + "\n")
        self._stream.flush()
