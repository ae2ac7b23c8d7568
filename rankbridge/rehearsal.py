"""The whole way from behaviour data to a verdict, step by step, so that it can be interrupted anywhere.

`data -> train -> export -> load -> verdict`; both sites are up during `load` alone. What is finished stands
in a ledger under `work/`, named by what was asked for: the same command goes on from there. A finished
rehearsal closes its ledger, and the next one does everything again. It knows no process and no model; `Hands`
does the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec
from rich.console import Console
from rich.markup import escape

from loadtests.gate import LoadResult
from loadtests.samples import write_whole
from rankbridge import jobs, preflight, report, verdict
from rankbridge import load as load_runs
from rankbridge.asked import AWS_SHARE, Request, data_arguments, export_arguments, reproduce, training_arguments
from rankbridge.faults import DeskError
from rankbridge.interrupts import shield
from rankbridge.layout import Layout
from rankbridge.load import LoadFiles, LoadPlan
from rankbridge.roles import Process
from rankbridge.serving import Serving
from rankbridge.supervisor import Owner
from rankbridge.tables import load_table, quality_table
from rankbridge.verdict import BundleFacts, DatasetFacts, Durability, ProcessMemory, Verdict
from workloads.bundle import manifest as manifests
from workloads.contract.quality import QualityReport
from workloads.contract.sites import AWS, HOME, Listener
from workloads.data.dataset import SPLITS, read_meta
from workloads.data.split import SplitReport
from workloads.telemetry.progress import ResultLine, parse

_HEARTBEAT: Final = "rehearsal.lock"
_IDS_AT_ONCE: Final = 500


class StepName(enum.StrEnum):
    """The steps, in order."""

    DATA = "data"
    TRAIN = "train"
    EXPORT = "export"
    LOAD = "load"
    VERDICT = "verdict"


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A finished step."""

    name: StepName
    seconds: float
    made: dict[str, str] = {}
    note: str = ""


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """What a rehearsal has begun and finished; one file, replaced whole."""

    schema_version: int = 1
    opened: float
    """Unix time."""
    begun: tuple[StepName, ...] = ()
    done: tuple[Done, ...] = ()
    closed: bool = False

    def step(self, name: StepName) -> Done | None:
        """The finished step of this name."""
        return next((one for one in self.done if one.name is name), None)

    def made(self, name: StepName, what: str) -> Path:
        """A path that a finished step made."""
        done = self.step(name)
        if done is None or what not in done.made:
            raise KeyError(f"{name.value} made no {what}")
        return Path(done.made[what])


@dataclasses.dataclass(frozen=True)
class LedgerFile:
    """A ledger and its folder of intermediate results."""

    folder: Path

    @property
    def path(self) -> Path:
        """The ledger itself, beside its folder."""
        return self.folder.with_suffix(".json")

    def open(self) -> Ledger:
        """The ledger of an interrupted run, or a new one."""
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            found = msgspec.json.decode(self.path.read_bytes(), type=Ledger)
            if not found.closed:
                return found
        return Ledger(opened=time.time())

    def write(self, ledger: Ledger) -> None:
        """Replace it, durably."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(ledger)))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured while both sites were up; kept until the verdict."""

    load: LoadResult
    memory: list[ProcessMemory]
    durability: Durability


class Hands(Protocol):
    """Does what a rehearsal asks for; the fake beside the tests does it at once."""

    def check(self, request: Request) -> None:
        """Raises DeskError with everything that speaks against a rehearsal here and now."""

    def job(self, module: str, arguments: Sequence[str], log: Path, *, append: bool) -> ResultLine:
        """Run a job to its end."""
        ...

    def load(self, request: Request, bundle: Path, folder: Path) -> Loaded:
        """Serve the bundle at both sites, load them, measure; the sites are down after, unless asked otherwise."""
        ...

    def newest_bundle(self) -> Path:
        """The bundle to serve when none is made."""
        ...


class Rehearsal:
    """One rehearsal; `run` does it and is the only thing to call."""

    def __init__(self, layout: Layout, request: Request, *, console: Console, hands: Hands | None = None) -> None:
        self._layout = layout
        self._request = request
        self._console = console
        self._hands: Hands = hands if hands is not None else LocalHands(layout, console)
        self._file = LedgerFile(layout.work / f"rehearsal-{request.digest()}")
        self._ledger = Ledger(opened=0)

    def run(self) -> bool:
        """Whether every budget held. Raises DeskError, and Interrupted after everything has been stopped."""
        with self._alone():
            self._hands.check(self._request)
            self._ledger = self._file.open()
            self._greet()
            if not self._request.reuse_bundle:
                self._step(StepName.DATA, "behaviour data to a pseudonymised, split data set", self._data)
                self._step(StepName.TRAIN, "retrieval and ranker, and the traditional recommender to beat", self._train)
                self._step(StepName.EXPORT, "models to a verified bundle", self._export)
            self._step(StepName.LOAD, "both sites up, open-loop load, nothing lost", self._load)
            found = self._verdict()
            self._ledger = msgspec.structs.replace(self._ledger, closed=True)
            self._file.write(self._ledger)
        self._conclude(found)
        return found.passed

    def _data(self) -> dict[str, str]:
        r = self._request
        arguments = data_arguments(self._layout, r.data, users=r.users, items=r.items, events=r.events, seed=r.seed)
        return self._job(StepName.DATA, "data", arguments)

    def _train(self) -> dict[str, str]:
        dataset = self._ledger.made(StepName.DATA, "dataset")
        return self._job(StepName.TRAIN, "training", training_arguments(self._layout, dataset, seed=self._request.seed))

    def _export(self) -> dict[str, str]:
        training = self._ledger.made(StepName.TRAIN, "training")
        dataset = self._ledger.made(StepName.DATA, "dataset")
        return self._job(StepName.EXPORT, "export", export_arguments(self._layout, training, dataset))

    def _load(self) -> dict[str, str]:
        loaded = self._hands.load(self._request, self._bundle(), self._file.folder)
        path = self._file.folder / "loaded.json"
        write_whole(path, msgspec.json.encode(loaded))
        return {"loaded": str(path)}

    def _job(self, step: StepName, module: str, arguments: list[str]) -> dict[str, str]:
        """Run a job; the first time in this rehearsal from scratch, later from where it was."""
        again = step not in self._ledger.begun
        log = self._file.folder / f"{step.value}.log"
        if again:
            log.unlink(missing_ok=True)
            self._ledger = msgspec.structs.replace(self._ledger, begun=(*self._ledger.begun, step))
            self._file.write(self._ledger)
        extra = ["--again"] if again and step is not StepName.EXPORT else []
        return self._hands.job(f"workloads.{module}", [*arguments, *extra], log, append=not again).made

    def _step(self, name: StepName, title: str, do: Callable[[], dict[str, str]]) -> None:
        """Do a step unless it is done, and what it made still there."""
        done = self._ledger.step(name)
        still_there = done is not None and all(Path(p).exists() for p in done.made.values() if p.startswith("/"))
        # Profiles at home are one set: another data set may have been prepared since. The job sees that at once.
        if done is not None and still_there and name is not StepName.DATA:
            self._console.print(f"[bold]{name.value}[/]: done before the interruption, in {done.seconds:.0f} s")
            return
        self._console.print(f"[bold]{name.value}[/]: {title}")
        began = time.monotonic()
        made = do()
        finished = Done(name=name, seconds=time.monotonic() - began, made=made, note="")
        with shield():
            others = tuple(one for one in self._ledger.done if one.name is not name)
            self._ledger = msgspec.structs.replace(self._ledger, done=(*others, finished))
            self._file.write(self._ledger)
        self._console.print(f"[bold]{name.value}[/]: done in {finished.seconds:.0f} s")

    def _bundle(self) -> Path:
        if self._request.reuse_bundle:
            return self._hands.newest_bundle()
        return self._ledger.made(StepName.EXPORT, "bundle")

    def _verdict(self) -> Verdict:
        loaded = msgspec.json.decode(self._ledger.made(StepName.LOAD, "loaded").read_bytes(), type=Loaded)
        dataset, bundle, quality = facts_of(self._layout, self._bundle())
        lines = []
        log = self._file.folder / f"{StepName.TRAIN.value}.log"
        if log.exists():
            lines = [line for text in log.read_text(errors="replace").splitlines() if (line := parse(text))]
        r = self._request
        found = verdict.build(
            dataset=dataset,
            bundle=bundle,
            quality=quality,
            load=loaded.load,
            memory=loaded.memory,
            durability=loaded.durability,
            steps=[verdict.Step(name=one.name.value, seconds=one.seconds, note=one.note) for one in self._ledger.done],
            curves=verdict.curves(lines),
            injected=r.injections,
            notes=["The bundle was made by an earlier run."] if r.reuse_bundle else [],
            reproduce=reproduce(r),
        )
        r.out.mkdir(parents=True, exist_ok=True)
        verdict.write(found, r.out / "verdict.json")
        report.write(found, r.out / "report.html")
        return found

    def _greet(self) -> None:
        finished = [one.name.value for one in self._ledger.done]
        if finished:
            self._console.print(f"going on with the interrupted rehearsal; done already: {', '.join(finished)}")

    def _conclude(self, found: Verdict) -> None:
        out = self._console
        out.print()
        if found.quality is not None:
            out.print(quality_table(found.quality))
        if found.load is not None:
            out.print(load_table(found.load))
        for breach in found.breaches:
            out.print(f"[red]breach[/] {escape(breach.sentence)}", soft_wrap=True)
        word = "[bold green]passed[/]" if found.passed else f"[bold red]failed[/], {len(found.breaches)} breaches"
        out.print(f"verdict: {word}   {escape(str(self._request.out / 'report.html'))}")
        if self._request.keep_up:
            out.print("both sites are still up: `rankbridge status`, `rankbridge down`")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One rehearsal at a time in one home of state. Raises DeskError."""
        self._layout.run.mkdir(parents=True, exist_ok=True)
        with (self._layout.run / _HEARTBEAT).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DeskError("another rehearsal is running here", "wait for it, or end it with Ctrl-C") from error
            yield


class LocalHands:
    """The real hands: jobs and servers of this machine."""

    def __init__(self, layout: Layout, console: Console) -> None:
        self._layout = layout
        self._console = console
        self._serving = Serving.of(layout, say=lambda text: console.print(f"  {escape(text)}", soft_wrap=True))

    def check(self, request: Request) -> None:
        """See Hands."""
        serving = self._serving
        with serving.supervisor.lock():
            serving.make_way(Owner.REHEARSAL)
        faults: list[DeskError] = []
        to_start: list[Process] = []
        try:
            plan, _ = serving.plan(self._layout.bundles / "none", request.ports, request.injections)
            to_start = serving.processes(plan)
        except DeskError as fault:
            faults.append(fault)
        faults += preflight.rehearsal(self._layout, to_start, request.data.path, request.out)
        if request.reuse_bundle and (mismatch := serving.mismatch(self.newest_bundle())):
            faults.append(DeskError(mismatch, "prepare that data again, or rehearse without --reuse-bundle"))
        preflight.refuse(faults)

    def job(self, module: str, arguments: Sequence[str], log: Path, *, append: bool) -> ResultLine:
        """See Hands."""
        with jobs.viewing(self._console) as view:
            return jobs.run(module, arguments, log=log, view=view, root=self._layout.root, append=append)

    def newest_bundle(self) -> Path:
        """See Hands."""
        return self._serving.bundle(None)

    def load(self, request: Request, bundle: Path, folder: Path) -> Loaded:
        """See Hands."""
        serving = self._serving
        plan, facts = serving.plan(bundle, request.ports, request.injections)
        files = LoadFiles(folder)
        wanted = LoadPlan(
            host=plan.addresses.url(HOME, Listener.GATEWAY),
            also_host=plan.addresses.url(AWS, Listener.GATEWAY),
            also_share=AWS_SHARE,
            rate=request.rate,
            seconds=request.load_seconds,
            min_samples=request.min_samples,
            seed=request.seed if request.seed is not None else 1,
        )
        finished = False
        try:
            with jobs.viewing(self._console) as view:
                serving.up(plan, facts, owner=Owner.UP if request.keep_up else Owner.REHEARSAL, view=view)
                judged = load_runs.run(wanted, files, root=self._layout.root, view=view)
            # Asked right after the load: page tables are at their largest, and asking during it would cost latency.
            memory = [
                ProcessMemory(site=site, role=role, pss_mb=held / 2**20)
                for name, held in serving.supervisor.pss_bytes().items()
                for site, _, role in [name.partition("-")]
            ]
            finished = True
        finally:
            if not (finished and request.keep_up):
                with shield():
                    serving.down()
        return Loaded(load=judged, memory=memory, durability=durability(files.acknowledged, self._layout.events))


def durability(acknowledged: Path, store: Path) -> Durability:
    """Look for every acknowledged event in the intake's store. A store that is not there has none of them."""
    ids = acknowledged.read_text().split() if acknowledged.exists() else []
    found = 0
    if store.exists():
        with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as events:
            for start in range(0, len(ids), _IDS_AT_ONCE):
                some = ids[start : start + _IDS_AT_ONCE]
                marks = ",".join("?" * len(some))
                query = f"SELECT count(*) FROM events WHERE event_id IN ({marks})"  # noqa: S608 - only marks are put in
                found += int(events.execute(query, some).fetchone()[0])
    return Durability(acknowledged=len(set(ids)), found=found)


def facts_of(layout: Layout, bundle: Path) -> tuple[DatasetFacts | None, BundleFacts, QualityReport]:
    """What a bundle says of itself, and its data set where that is still here."""
    manifest = manifests.decode((bundle / manifests.MANIFEST).read_bytes())
    dataset = None
    for folder in (layout.site(HOME.name) / "datasets").glob(f"*-{manifest.dataset_digest[: manifests.SHORT]}"):
        splits = msgspec.json.decode((folder / SPLITS).read_bytes(), type=SplitReport)
        dataset = DatasetFacts.of(read_meta(folder), splits)
    return dataset, BundleFacts.of(bundle.name, manifest), manifest.quality
