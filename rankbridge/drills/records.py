"""What a fault suite writes down: one row per fault, with what was measured beside what was promised.

Records, and their file: `OUT/faults.json` is a `Suite`. Who draws or prints them needs nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from loadtests.ledger import Ledger
from loadtests.samples import write_whole
from loadtests.windows import Window

FILE: Final = "faults.json"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One expectation and what became of it."""

    what: str
    bound: str
    measured: str
    held: bool
    timed: bool = False
    """Whether it hangs on how fast the machine is, and not only on what was counted."""


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """Reads of one part of a drive: before, during or after the fault."""

    requests: int
    p50_ms: float | None
    """None: the request at this quantile failed, or there was none."""
    p99_ms: float | None
    rungs: dict[str, int]
    """Of recommendations, which have the whole ladder."""
    ranked_at: dict[str, int]


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """Acknowledged events, and how many of them are in the intake's store."""

    acknowledged: int
    stored: int
    rows: int
    """Rows that they have there: more than `stored` and one was stored twice."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One fault, made and judged; or why it was not."""

    id: str
    title: str
    how: str
    left_out: str | None = None
    """Why it was not made here; None where it was."""
    rate: float = 0.0
    """Requests a second, at the first leg."""
    seconds: float = 0.0
    fault_s: float = 0.0
    """When the fault began, in seconds of the drive."""
    heal_s: float = 0.0
    """When it was taken away."""
    seen_after_s: float | None = None
    """From the fault to the first answer that shows it; None where none did."""
    recovered_after_s: float | None = None
    """From healing to three seconds on end within all budgets; None where there were none."""
    before: Phase | None = None
    during: Phase | None = None
    after: Phase | None = None
    ledger: Ledger | None = None
    kept: Kept | None = None
    bundles: list[str] = []
    """From which bundles (12 hex digits) answers came."""
    hedges: float | None = None
    """Second calls that the home gateway made to cut its tail; None where it counts none."""
    checks: list[Check] = []
    windows: list[Window] = []
    notes: list[str] = []

    @property
    def passed(self) -> bool | None:
        """Whether every expectation held; None for a fault that was not made."""
        return None if self.left_out is not None else bool(self.checks) and all(check.held for check in self.checks)

    @property
    def counted(self) -> bool | None:
        """As `passed`, by what was counted alone: what a machine that is busy with something else cannot change."""
        held = bool(self.checks) and all(check.held or check.timed for check in self.checks)
        return None if self.left_out is not None else held


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What home answers with nothing wrong, measured by the same driver, in one run with the faults."""

    in_time_per_s: float
    """Highest rate of a leg at which 99 of 100 reads were answered in time."""
    peak_per_s: float
    """Most requests answered in time, a second, at any offered rate; the share is that of reads."""
    legs: list[tuple[float, float, float]] = []
    """(requests a second, answered in time a second, share of reads that were late)."""


class Suite(msgspec.Struct, frozen=True, kw_only=True):
    """A run of the suite."""

    schema_version: int = 1
    form: str
    """How the way between the sites is made: `relay` or `rig`."""
    cores: int
    generator: str
    """What the driver said of its place on the machine."""
    capacity: Capacity
    rows: list[Row]
    kubernetes_s: dict[str, float] = {}
    """What Kubernetes alone does about a lost site, in seconds (`make test-cluster`), where that was measured here."""

    @property
    def passed(self) -> bool:
        """Whether every fault that was made held all its expectations, and at least one was made."""
        return _all_made(row.passed for row in self.rows)

    @property
    def counted(self) -> bool:
        """As `passed`, by what was counted alone."""
        return _all_made(row.counted for row in self.rows)


def _all_made(held: Iterable[bool | None]) -> bool:
    made = [one for one in held if one is not None]
    return bool(made) and all(made)


def write(suite: Suite, folder: Path) -> None:
    """`faults.json`, whole or not at all."""
    write_whole(folder / FILE, msgspec.json.format(msgspec.json.encode(suite), indent=1) + b"\n")


def read(folder: Path) -> Suite | None:
    """An earlier run's; None where there is none that this version reads."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Suite)
    return None
