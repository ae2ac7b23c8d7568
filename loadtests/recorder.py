"""Keeps what a run produces: samples in memory and in their file, acknowledged event ids in theirs.

It knows neither Locust nor the clock: whoever records says when things happened.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import IO

from loadtests.samples import Run, RunHeader, Sample, SampleFile


class Recorder:
    """Records one run, from its header to `finish`; both paths are optional.

    Acknowledged ids are appended and flushed at once, because they are what a kill -9 is checked
    against. Raises OSError when a file cannot be written.
    """

    def __init__(self, header: RunHeader, *, samples: Path | None = None, acknowledged: Path | None = None) -> None:
        self.header = header
        self._samples: list[Sample] = []
        self._file: SampleFile | None = None
        self._ids: IO[str] | None = None
        if samples is not None:
            self._file = SampleFile(samples)
            self._file.header(header)
        if acknowledged is not None:
            acknowledged.parent.mkdir(parents=True, exist_ok=True)
            self._ids = acknowledged.open("w", encoding="ascii")

    def record(self, sample: Sample) -> None:
        """Keep one sample."""
        self._samples.append(sample)
        if self._file is not None:
            self._file.add(sample)

    def acknowledge(self, event_ids: Iterable[str]) -> None:
        """Keep the ids of events that the gateway said are on disk, one a line."""
        if self._ids is not None:
            self._ids.writelines(f"{event_id}\n" for event_id in event_ids)
            self._ids.flush()

    def finish(self, *, seconds: float, fault: str | None = None) -> Run:
        """Close the files and hand over the run; nothing can be recorded after it."""
        if self._file is not None:
            self._file.finish(seconds=seconds, fault=fault)
        if self._ids is not None:
            self._ids.close()
        return Run(header=self.header, samples=self._samples, seconds=seconds, fault=fault)
