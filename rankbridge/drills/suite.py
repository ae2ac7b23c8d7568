"""Runs faults one after another: load, fault, healing, judgement. What it needs of the world comes in by two doors.

The driver is a process of its own (`loadtests.driver`); the moments of a fault are noted by the same clock as its
requests. A row is made of the samples alone, and of what the intake's store holds after.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final, Protocol

import msgspec

from loadtests import samples as sample_files
from loadtests import windows
from loadtests.drive import Aim, Drive, Leg
from loadtests.driver import Begun
from loadtests.ledger import is_late, ledger
from loadtests.samples import Run, Sample, write_whole
from rankbridge.drills.evidence import Evidence, always
from rankbridge.drills.fault import Fault, Need
from rankbridge.drills.records import Capacity, Check, Kept, Row, Suite
from rankbridge.drills.scene import Scene
from rankbridge.faults import DeskError
from rankbridge.supervisor import probe
from workloads.contract.http import PATH_METRICS
from workloads.contract.sites import AWS, HOME, Site

CAPACITY_RATES: Final = (40.0, 60.0, 90.0, 135.0, 200.0, 300.0, 450.0, 675.0, 1000.0, 1500.0, 2250.0, 3400.0)
"""Requests a second that home is tried with, each for a while, until twice most of them were late."""
CAPACITY_LEG_S: Final = 4.0
_MOST: Final = 0.5
_IDS_AT_ONCE: Final = 500
_LATE_S: Final = 30.0
"""The driver may take this much longer than its drive."""
_HEDGES: Final = re.compile(r"^rankbridge_\w*hedge\w*_total(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)
_COUNTS_HEDGES: Final = re.compile(r"^# TYPE rankbridge_\w*hedge\w* counter$", re.MULTILINE)
"""A counter with labels has no line before it counted something."""

Say = Callable[[str], None]


class Ground(Scene, Protocol):
    """Where faults are made: a scene, and what is asked about it."""

    @property
    def offers(self) -> frozenset[Need]:
        """What can be had here."""
        ...

    @property
    def published(self) -> frozenset[str]:
        """12 hex digits of every bundle that may be served."""
        ...

    @property
    def events(self) -> Path:
        """The intake's store."""
        ...

    @property
    def notes(self) -> dict[str, str]:
        """What scripts noted since the last `restore`."""
        ...

    def gateway(self, site: Site) -> str:
        """A gateway's URL."""
        ...

    def restore(self) -> None:
        """Undo whatever is still done, and wait until all is ready."""


@dataclasses.dataclass(frozen=True)
class Driven:
    """What a drive left: its samples, what it acknowledged, and when its script did what."""

    run: Run
    acknowledged: tuple[str, ...]
    note: str
    fault_s: float
    heal_s: float


class Drives(Protocol):
    """Sends load while something is done: the door to the driver. Its fake is in the tests."""

    def __call__(self, drive: Drive, steps: Iterator[float], before_s: float, name: str) -> Driven:
        """Drive; at `before_s` begin with the steps, each yields the seconds to the next one."""
        ...


class FaultSuite:
    """One run of chosen faults over one ground."""

    def __init__(self, ground: Ground, drives: Drives, *, say: Say, seed: int = 1, form: str = "relay") -> None:
        self._ground = ground
        self._drives = drives
        self._say = say
        self._seed = seed
        self._form = form
        self._cores = len(os.sched_getaffinity(0))
        self._generator = ""

    def run(self, faults: Sequence[Fault], keep: Callable[[Suite], None]) -> Suite:
        """Make and judge each; `keep` gets the suite after every row."""
        capacity = self.capacity()
        self._say(f"home answers {capacity.in_time_per_s:.0f}/s in time; at most {capacity.peak_per_s:.0f}/s")
        rows: list[Row] = []
        suite = Suite(form=self._form, cores=self._cores, generator=self._generator, capacity=capacity, rows=[])
        for fault in faults:
            rows.append(self._row_whatever(fault, capacity))
            self._say(said(rows[-1]))
            suite = msgspec.structs.replace(suite, rows=list(rows))
            keep(suite)
        return suite

    def capacity(self) -> Capacity:
        """What home can do with nothing wrong: ever faster, until most requests are late."""
        legs: list[tuple[float, float, float]] = []
        for rate in CAPACITY_RATES:
            leg = Leg(seconds=CAPACITY_LEG_S, rate=rate)
            drive = Drive(aims=[Aim(url=self._ground.gateway(HOME))], legs=[leg], seed=self._seed)
            driven = self._drives(drive, iter(()), 0.0, f"capacity-{rate:g}")
            self._generator = driven.note
            legs.append(_leg(driven.run.samples, leg))
            if len(legs) > 1 and min(late for _, _, late in legs[-2:]) > _MOST:
                break
        in_time = 0.0
        for rate, _, late in legs:
            if late > windows.LATE_SHARE_MAX:
                break
            in_time = rate
        # A machine that is busy with others may be late at any rate; the lowest is then what there is.
        return Capacity(in_time_per_s=in_time or legs[0][0], peak_per_s=max(good for _, good, _ in legs), legs=legs)

    def _row_whatever(self, fault: Fault, capacity: Capacity) -> Row:
        """A fault that cannot be made or healed as it should has failed; the others are made nevertheless."""
        try:
            return self.row(fault, capacity)
        except DeskError as error:
            check = Check(what="made and healed", bound="as it says", measured=error.fault, held=False)
            return Row(id=fault.id, title=fault.title, how=fault.how, checks=[check], notes=list(error.detail))

    def row(self, fault: Fault, capacity: Capacity) -> Row:
        """One fault, made and judged; or why not."""
        absent = fault.absent or "; ".join(need.value for need in fault.needs if need not in self._ground.offers)
        if fault.script is None and not absent:
            absent = "it has no script"
        if absent or fault.script is None:
            return Row(id=fault.id, title=fault.title, how=fault.how, left_out=absent)
        ground, lasting = self._ground, fault.lasting(capacity.in_time_per_s)
        ground.restore()
        if fault.prepare is not None:
            fault.prepare(ground)
        drive = lasting.drive(
            ground.gateway(HOME),
            ground.gateway(AWS),
            capacity.in_time_per_s,
            capacity.peak_per_s,
            seed=self._seed,
        )
        hedges = self._hedges()
        try:
            driven = self._drives(drive, fault.script(ground, lasting.during_s), lasting.before_s, fault.id)
            notes = dict(ground.notes)
            hedged = self._hedges()
        finally:
            ground.restore()
        samples = driven.run.samples
        seen = Evidence(
            samples=samples,
            ledger=ledger(samples, sent=sum(1 for _ in drive.due()), stray=driven.run.stray),
            fault_s=driven.fault_s,
            heal_s=driven.heal_s,
            seconds=drive.seconds,
            kept=kept(driven.acknowledged, ground.events),
            published=ground.published,
            hedges=None if hedges is None or hedged is None else hedged - hedges,
            ranked=sum(sample.ranked is not None for sample in samples),
            peak_per_s=capacity.peak_per_s,
            facts=notes,
        )
        expects = (*fault.expects, *(fault.on_rig if Need.RIG in ground.offers else ()))
        return judged(dataclasses.replace(fault, expects=expects), seen, drive)

    def _hedges(self) -> float | None:
        """The home gateway's count of second calls; None where it counts none, or does not answer."""
        return hedges_in(probe(self._ground.gateway(HOME) + PATH_METRICS).body.decode(errors="replace"))


def hedges_in(metrics: str) -> float | None:
    """Second calls by what `/metrics` says; None where that knows no such counter."""
    return sum(map(float, _HEDGES.findall(metrics))) if _COUNTS_HEDGES.search(metrics) else None


def judged(fault: Fault, seen: Evidence, drive: Drive) -> Row:
    """The row that evidence makes."""
    return Row(
        id=fault.id,
        title=fault.title,
        how=fault.how,
        rate=drive.rate_at(0.0),
        seconds=drive.seconds,
        fault_s=seen.fault_s,
        heal_s=seen.heal_s,
        seen_after_s=windows.seen_after_s(seen.samples, seen.fault_s),
        recovered_after_s=windows.recovered_after_s(seen.samples, seen.heal_s, drive.seconds),
        before=seen.phase(0.0, seen.fault_s),
        during=seen.phase(seen.fault_s, seen.heal_s),
        after=seen.phase(seen.heal_s, drive.seconds),
        ledger=seen.ledger,
        kept=seen.kept,
        bundles=seen.bundles,
        hedges=seen.hedges,
        checks=[expects(seen) for expects in (*always(), *fault.expects)],
        windows=windows.windows(seen.samples, start_s=0.0, end_s=drive.seconds),
        notes=[*_unwell(seen), *(f"{name}: {found}" for name, found in seen.facts.items())],
    )


def _unwell(seen: Evidence) -> list[str]:
    """What a reader must know of a drive that was not within budget before anything was done. It judges nothing."""
    before = windows.between(seen.reads, 0.0, seen.fault_s)
    late = sum(map(is_late, before))
    if late <= windows.LATE_SHARE_MAX * len(before):
        return []
    return [f"{late} of {len(before)} reads were late before the fault began: the machine was busy with something else"]


def said(row: Row) -> str:
    """One line for who waits."""
    if row.left_out is not None:
        return f"{row.id} {row.title}: left out, {row.left_out}"
    failed = [f"{check.what} {check.measured} (bound {check.bound})" for check in row.checks if not check.held]
    return f"{row.id} {row.title}: " + ("passed" if not failed else "FAILED: " + "; ".join(failed))


def kept(acknowledged: Sequence[str], store: Path) -> Kept:
    """Look for every acknowledged event in the intake's store. A store that is not there has none of them."""
    ids = sorted(set(acknowledged))
    stored = rows = 0
    if store.exists():
        with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as events:
            for start in range(0, len(ids), _IDS_AT_ONCE):
                some = ids[start : start + _IDS_AT_ONCE]
                marks = ",".join("?" * len(some))
                query = (
                    "SELECT count(*), count(DISTINCT event_id) FROM events "  # noqa: S608 - only marks are put in
                    f"WHERE event_id IN ({marks})"
                )
                found = events.execute(query, some).fetchone()
                rows += int(found[0])
                stored += int(found[1])
    return Kept(acknowledged=len(ids), stored=stored, rows=rows)


class DriverProcess:
    """The real driver: a process whose files lie in a folder."""

    def __init__(self, folder: Path, root: Path) -> None:
        self._folder = folder
        self._root = root

    def __call__(self, drive: Drive, steps: Iterator[float], before_s: float, name: str) -> Driven:
        """See Drives. Raises DeskError when the driver cannot do its drive."""
        self._folder.mkdir(parents=True, exist_ok=True)
        asked, samples = self._folder / f"{name}.drive.json", self._folder / f"{name}.samples.jsonl"
        acknowledged, log = self._folder / f"{name}.acknowledged.txt", self._folder / f"{name}.log"
        for path in (samples, acknowledged):
            path.unlink(missing_ok=True)
        write_whole(asked, msgspec.json.encode(drive))
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "loadtests.driver", str(asked)),
                    *("--samples", str(samples), "--acknowledged", str(acknowledged)),
                ],
                cwd=self._root,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
            try:
                begun = _begun(process.stdout, log)
                times = _act(steps, begun.monotonic_s, before_s)
                process.wait(timeout=drive.seconds + drive.timeout_s + _LATE_S)
            except subprocess.TimeoutExpired as late:
                remedy = "is the machine overloaded?"
                raise DeskError(f"the driver did not end {_LATE_S:.0f} s after its drive", remedy) from late
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                if process.stdout is not None:
                    process.stdout.close()
        if process.returncode:
            raise DeskError(f"the driver ended with code {process.returncode}", f"its log is {log}")
        run = sample_files.read(samples)
        return Driven(
            run=run,
            acknowledged=tuple(acknowledged.read_text().split()),
            note=begun.note,
            fault_s=times[0] if times else drive.seconds,
            heal_s=times[-1] if times else drive.seconds,
        )


def _begun(stdout: IO[bytes] | None, log: Path) -> Begun:
    line = stdout.readline() if stdout is not None else b""
    try:
        return msgspec.json.decode(line, type=Begun)
    except msgspec.DecodeError:
        raise DeskError("the driver did not begin", log.read_text(errors="replace").strip() or f"see {log}") from None


def _act(steps: Iterator[float], begin: float, before_s: float) -> list[float]:
    """Take the steps at their moments; when each began, in seconds of the drive. What heals is a step, too."""
    times = []
    due = begin + before_s
    while True:
        time.sleep(max(0.0, due - time.monotonic()))
        times.append(time.monotonic() - begin)
        wait = next(steps, None)
        if wait is None:
            return times
        # From when the step was done: what a step takes is no part of how long it is to last.
        due = time.monotonic() + wait


def _leg(samples: Sequence[Sample], leg: Leg) -> tuple[float, float, float]:
    """(rate, requests answered in time a second, share of late reads) of one leg."""
    found = windows.reads(samples)
    late = sum(map(is_late, found)) / max(1, len(found))
    return leg.rate, windows.goodput_per_s(samples, 0.0, leg.seconds), late
