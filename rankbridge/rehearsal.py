"""The whole way from behaviour data to a verdict, step by step, so that it can be interrupted anywhere.

`data -> replicate -> train -> export -> load -> verdict`; both sites are up during `load` alone. What is finished
stands in a ledger under `work/`, named by what was asked for: the same command goes on from there. A finished
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol

import msgspec
from rich.console import Console
from rich.markup import escape

from loadtests.gate import LoadResult
from loadtests.samples import write_whole
from rankbridge import border, jobs, preflight, report, verdict
from rankbridge import cloud as clouds
from rankbridge import load as load_runs
from rankbridge.asked import (
    AWS_SHARE,
    Request,
    SitesForm,
    cloud_training_arguments,
    data_arguments,
    export_arguments,
    lake_arguments,
    replication_arguments,
    reproduce,
)
from rankbridge.border import Publisher
from rankbridge.cloud import Cloud, CloudForm
from rankbridge.faults import DeskError
from rankbridge.interrupts import shield
from rankbridge.layout import Layout
from rankbridge.load import LoadFiles, LoadPlan
from rankbridge.rig import rig as rigs
from rankbridge.rig.packets import Seen
from rankbridge.rig.rig import Rig
from rankbridge.roles import LOOPBACK, Followed, Places, Process
from rankbridge.serving import Serving, home_digest
from rankbridge.supervisor import Owner
from rankbridge.tables import ladder_table, load_table, quality_table
from rankbridge.verdict import (
    BundleFacts,
    Crossing,
    DatasetFacts,
    Durability,
    LakeFacts,
    ProcessMemory,
    Verdict,
    VpnFacts,
)
from workloads.bundle import manifest as manifests
from workloads.contract.quality import QualityReport
from workloads.contract.sites import AWS, HOME, Listener, SiteName
from workloads.contract.storage import STABLE
from workloads.data.dataset import SPLITS, read_meta
from workloads.data.split import SplitReport
from workloads.telemetry.progress import ResultLine, parse

_HEARTBEAT: Final = "rehearsal.lock"
_IDS_AT_ONCE: Final = 500


class StepName(enum.StrEnum):
    """The steps, in order."""

    DATA = "data"
    REPLICATE = "replicate"
    TRAIN = "train"
    EXPORT = "export"
    LOAD = "load"
    VERDICT = "verdict"


_ANEW: Final = {StepName.DATA: ["--again"]}
_AS_IT_WAS: Final = {StepName.TRAIN: ["--reuse"]}
"""Preparation takes a finished result unless told otherwise, training the other way round; both go on from
their own checkpoints by themselves."""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A finished step."""

    name: StepName
    seconds: float
    """Over all attempts, as far as they could be counted."""
    made: dict[str, str] = {}
    note: str = ""


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """What a rehearsal has begun and finished; one file, replaced whole."""

    schema_version: int = 1
    opened: float
    """Unix time."""
    begun: tuple[StepName, ...] = ()
    done: tuple[Done, ...] = ()
    spent: dict[StepName, float] = {}
    """Seconds in a step before it was interrupted."""
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
    served_after_s: dict[str, float] = {}
    """From the moment at which the channel moved, by site."""
    new_item_after_s: dict[str, float] = {}
    """From the moment at which the new item's file was there, by site."""
    lake: LakeFacts | None = None
    vpn: VpnFacts | None = None
    """What was between the sites; None on loopback."""


class Hands(Protocol):
    """Does what a rehearsal asks for; the fake beside the tests does it at once."""

    def check(self, request: Request) -> None:
        """Raises DeskError with everything that speaks against a rehearsal here and now."""

    def job(self, module: str, arguments: Sequence[str], log: Path, *, append: bool) -> ResultLine:
        """Run a job to its end."""
        ...

    def cloud(self, request: Request) -> AbstractContextManager[Cloud]:
        """The AWS of this rehearsal, there until the end of the context; jobs find it in their environment."""
        ...

    def load(self, request: Request, bundle: Path, folder: Path, cloud: Cloud) -> Loaded:
        """Publish the bundle, let both sites pull and serve it, load them, measure.

        The sites are down after, unless asked otherwise.
        """
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
        self._hands = hands or LocalHands(layout, console)
        self._file = LedgerFile(layout.work / f"rehearsal-{request.digest()}")
        self._ledger = Ledger(opened=0)

    def run(self) -> bool:
        """Whether every budget held. Raises DeskError, and Interrupted after everything has been stopped."""
        with self._alone():
            self._hands.check(self._request)
            self._ledger = self._file.open()
            self._greet()
            with self._hands.cloud(self._request) as cloud:
                self._steps(cloud)
            found = self._verdict()
            self._ledger = msgspec.structs.replace(self._ledger, closed=True)
            self._file.write(self._ledger)
        self._conclude(found)
        return found.passed

    def _steps(self, cloud: Cloud) -> None:
        if not self._request.reuse_bundle:
            self._step(StepName.DATA, "behaviour data into the lake, pseudonymised, split", self._data)
            self._step(StepName.REPLICATE, "what may leave home, to the data bucket", lambda: self._replicate(cloud))
            self._step(
                StepName.TRAIN,
                "in aws, from the bucket alone: retrieval and ranker, and the traditional recommender to beat",
                lambda: self._train(cloud),
            )
            self._step(StepName.EXPORT, "models to a verified bundle", self._export)
        self._step(
            StepName.LOAD,
            "signed, published, pulled by both sites; open-loop load; nothing lost",
            lambda: self._load(cloud),
        )

    def _data(self) -> dict[str, str]:
        r = self._request
        arguments = data_arguments(self._layout, r.data, users=r.users, items=r.items, events=r.events, seed=r.seed)
        made = self._job(StepName.DATA, "data", arguments).made
        self._hands.job(
            "workloads.lake",
            lake_arguments(self._layout, Path(made["dataset"])),
            self._log(StepName.DATA),
            append=True,
        )
        return made

    def _replicate(self, cloud: Cloud) -> dict[str, str]:
        dataset = self._ledger.made(StepName.DATA, "dataset")
        done = self._job(
            StepName.REPLICATE, "replication", replication_arguments(self._layout, dataset, cloud.data_bucket)
        )
        path = self._file.folder / "replicated.json"
        write_whole(path, msgspec.json.encode(done))
        return {**done.made, "replicated": str(path)}

    def _train(self, cloud: Cloud) -> dict[str, str]:
        replica = self._ledger.made(StepName.REPLICATE, "replica").name
        arguments = cloud_training_arguments(self._layout, replica, cloud.data_bucket, seed=self._request.seed)
        return self._job(StepName.TRAIN, "training", arguments).made

    def _export(self) -> dict[str, str]:
        training = self._ledger.made(StepName.TRAIN, "training")
        dataset = self._ledger.made(StepName.TRAIN, "dataset")
        arguments = [*export_arguments(self._layout, training, dataset), "--confine"]
        return self._job(StepName.EXPORT, "export", arguments).made

    def _load(self, cloud: Cloud) -> dict[str, str]:
        loaded = self._hands.load(self._request, self._bundle(), self._file.folder, cloud)
        path = self._file.folder / "loaded.json"
        write_whole(path, msgspec.json.encode(loaded))
        return {"loaded": str(path)}

    def _log(self, step: StepName) -> Path:
        return self._file.folder / f"{step.value}.log"

    def _job(self, step: StepName, module: str, arguments: list[str]) -> ResultLine:
        """Run a job: the first time in this rehearsal anew, later from wherever it was."""
        anew = step not in self._ledger.begun
        log = self._log(step)
        if anew:
            log.unlink(missing_ok=True)
            self._ledger = msgspec.structs.replace(self._ledger, begun=(*self._ledger.begun, step))
            self._file.write(self._ledger)
        extra = (_ANEW if anew else _AS_IT_WAS).get(step, [])
        return self._hands.job(f"workloads.{module}", [*arguments, *extra], log, append=not anew)

    def _step(self, name: StepName, title: str, do: Callable[[], dict[str, str]]) -> None:
        """Do a step unless it is done, and what it made still there."""
        done = self._ledger.step(name)
        still_there = done is not None and all(Path(p).exists() for p in done.made.values() if p.startswith("/"))
        # Profiles at home are one set, and a LocalStack forgets: both jobs see at once whether they have work to do.
        if done is not None and still_there and name not in {StepName.DATA, StepName.REPLICATE}:
            self._console.print(f"[bold]{name.value}[/]: done before the interruption, in {done.seconds:.0f} s")
            return
        self._console.print(f"[bold]{name.value}[/]: {title}")
        before = self._ledger.spent.get(name, 0.0) + (done.seconds if done is not None else 0.0)
        note = "continued after an interruption" if before or name in self._ledger.begun else ""
        began = time.monotonic()
        try:
            made = do()
        except BaseException:
            spent = {**self._ledger.spent, name: before + time.monotonic() - began}
            with shield():
                self._ledger = msgspec.structs.replace(self._ledger, spent=spent)
                self._file.write(self._ledger)
            raise
        finished = Done(name=name, seconds=before + time.monotonic() - began, made=made, note=note)
        with shield():
            others = [one for one in self._ledger.done if one.name is not name]
            every = sorted([*others, finished], key=lambda one: list(StepName).index(one.name))
            self._ledger = msgspec.structs.replace(self._ledger, done=tuple(every))
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
        log = self._log(StepName.TRAIN)
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
            crossing=self._crossing(loaded),
            vpn=loaded.vpn,
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

    def _crossing(self, loaded: Loaded) -> Crossing:
        """What crossed the border; of the replication what its step noted, where there was one."""
        figures: dict[str, float] = {}
        if self._ledger.step(StepName.REPLICATE) is not None:
            noted = self._ledger.made(StepName.REPLICATE, "replicated")
            figures = msgspec.json.decode(noted.read_bytes(), type=ResultLine).figures
        return Crossing(
            replicated_bytes=int(figures.get("bytes", 0)),
            replicated_parts=int(figures.get("parts", 0)),
            replicated_events=int(figures.get("events", 0)),
            confined=not self._request.reuse_bundle,
            served_after_s=loaded.served_after_s,
            new_item_after_s=loaded.new_item_after_s,
            lake=loaded.lake,
        )

    def _greet(self) -> None:
        finished = [one.name.value for one in self._ledger.done]
        if finished:
            self._console.print(f"going on with the interrupted rehearsal; done already: {', '.join(finished)}")

    def _conclude(self, found: Verdict) -> None:
        out = self._console
        out.print()
        if found.quality is not None:
            out.print(quality_table(found.quality))
            if found.quality.rungs:
                out.print(ladder_table(found.quality))
        if found.load is not None:
            out.print(load_table(found.load))
        if found.crossing is not None and found.crossing.served_after_s:
            served, added = (
                ", ".join(f"{site} {after:.1f} s" for site, after in seconds.items())
                for seconds in (found.crossing.served_after_s, found.crossing.new_item_after_s)
            )
            out.print(f"channel moved to bundle served: {served}; a new item's file to recommended: {added}")
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


_IN_THE_CLOUD: Final = frozenset({"workloads.training", "workloads.export", "workloads.delta"})
"""Jobs that run at aws. What one of home reads there crosses the VPN, where there is one, and the other way round."""


class LocalHands:
    """The real hands: jobs and servers of this machine."""

    def __init__(self, layout: Layout, console: Console) -> None:
        self._layout = layout
        self._console = console
        self._environment = dict(os.environ)
        self._places = LOOPBACK
        self._rig: Rig | None = None
        self._serving = Serving.of(layout, say=lambda text: console.print(f"  {escape(text)}", soft_wrap=True))

    def check(self, request: Request) -> None:
        """See Hands."""
        serving = self._serving
        if request.sites is SitesForm.NETNS:
            preflight.refuse(rigs.faults())  # without it there is nothing else to say
        with serving.supervisor.lock():
            serving.make_way(Owner.REHEARSAL)
        faults: list[DeskError] = []
        to_start: list[Process] = []
        places = LOOPBACK
        if request.sites is SitesForm.NETNS:
            if request.keep_up:
                faults.append(DeskError("--keep-up: a rig ends with its rehearsal", "keep sites up on loopback"))
            places = Places(entries=dict.fromkeys(SiteName, ("nsenter",)))  # not made yet, and free of all others
        try:
            plan, _ = serving.plan(Followed(STABLE, "none", request.aws), request.ports, request.injections, places)
            to_start = serving.processes(plan)
        except DeskError as fault:
            faults.append(fault)
        faults += preflight.rehearsal(self._layout, to_start, request.data.path, request.out)
        if request.reuse_bundle and (mismatch := serving.mismatch(self.newest_bundle())):
            faults.append(DeskError(mismatch, "prepare that data again, or rehearse without --reuse-bundle"))
        faults += clouds.check(request.aws, os.environ)
        preflight.refuse(faults)

    @contextlib.contextmanager
    def cloud(self, request: Request) -> Iterator[Cloud]:
        """See Hands."""
        with contextlib.ExitStack() as stack:
            if request.sites is SitesForm.NETNS:
                self._rig = rig = stack.enter_context(rigs.opened(self._layout.logs / "rig"))
                self._places = Places(rig.hosts, {site: rig.entry(site) for site in SiteName})
                self._console.print(f"  two tunnels are up between {' and '.join(rig.hosts.values())}")
            where = clouds.place(self._places.hosts, self._places.entries)
            cloud = stack.enter_context(
                clouds.opened(request.aws, self._layout, keep=request.keep_up, where=where),
            )
            self._environment = cloud.environment(os.environ)
            yield cloud

    def job(self, module: str, arguments: Sequence[str], log: Path, *, append: bool) -> ResultLine:
        """See Hands."""
        site = AWS if module in _IN_THE_CLOUD else HOME
        with jobs.viewing(self._console) as view:
            return jobs.run(
                module,
                arguments,
                log=log,
                view=view,
                root=self._layout.root,
                append=append,
                environment=self._environment,
                entry=self._places.entries.get(site.name, ()),
            )

    def newest_bundle(self) -> Path:
        """See Hands."""
        return self._serving.bundle(None)

    def load(self, request: Request, bundle: Path, folder: Path, cloud: Cloud) -> Loaded:
        """See Hands."""
        serving, publisher = self._serving, Publisher(self._layout, cloud)
        followed = Followed(publisher.channel, cloud.models_bucket, request.aws)
        plan, facts = serving.plan(followed, request.ports, request.injections, self._places)
        files = LoadFiles(folder)
        gateways = {site.name.value: plan.addresses.url(site, Listener.GATEWAY) for site in (HOME, AWS)}
        wanted = LoadPlan(
            host=gateways[HOME.name],
            also_host=gateways[AWS.name],
            also_share=AWS_SHARE,
            rate=request.rate,
            seconds=request.load_seconds,
            min_samples=request.min_samples,
            seed=request.seed if request.seed is not None else 1,
        )
        publisher.publish(bundle)
        if request.aws is CloudForm.LOCALSTACK:
            border.empty_sites(self._layout)
        served: dict[str, float] = {}

        def promote() -> None:
            since = time.monotonic()
            publisher.promote(bundle.name)
            served.update(border.served_after(gateways, bundle.name, since))

        with jobs.viewing(self._console) as view, self._watched() as seen:
            # What cannot come up ends what it started itself; sites that somebody else has up are none of ours.
            owner = Owner.UP if request.keep_up else Owner.REHEARSAL
            serving.up(plan, facts, owner=owner, view=view, started=promote)
            finished = False
            try:
                judged = load_runs.run(wanted, files, root=self._layout.root, view=view)
                # Asked right after the load: page tables are at their largest, and asking during it costs latency.
                memory = [
                    ProcessMemory(site=site, role=role, pss_mb=held / 2**20)
                    for name, held in serving.supervisor.pss_bytes().items()
                    for site, _, role in [name.partition("-")]
                ]
                found = self._new_item(publisher, bundle, folder, gateways)
                finished = True
            finally:
                if not (finished and request.keep_up):
                    with shield():
                        serving.down()
        return Loaded(
            load=judged,
            memory=memory,
            durability=durability(files.acknowledged, self._layout.events),
            served_after_s=served,
            new_item_after_s=found,
            lake=self._lake(folder),
            vpn=seen(),
        )

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Callable[[], VpnFacts | None]]:
        """Every frame between the sites is looked at, where there are any; the callable says what was seen."""
        if self._rig is None:
            yield lambda: None
            return
        rig = self._rig
        with rig.watched() as seen:
            yield lambda: _vpn(rig, seen())

    def _new_item(
        self, publisher: Publisher, bundle: Path, folder: Path, gateways: Mapping[str, str]
    ) -> dict[str, float]:
        """Put an item on sale and wait until both sites recommend it; seconds from the file at hand, by site."""
        item, twin = border.new_item_like(bundle, folder / "new-item.jsonl")
        since = time.monotonic()
        arguments = publisher.add_arguments(folder / "new-item.jsonl")
        self.job("workloads.delta", arguments, folder / "new-item.log", append=False)
        return border.found_after(gateways, item, twin, since)

    def _lake(self, folder: Path) -> LakeFacts:
        """Bring what is left of the spool into the lake and hold one against the other."""
        home = ["--home", str(self._layout.home)]
        log = folder / "lake.log"
        self.job("workloads.lake", ["ingest", *home], log, append=False)
        try:
            done = self.job("workloads.lake", ["verify", *home], log, append=True)
        except DeskError as difference:
            return LakeFacts(events=0, difference=difference.fault)
        return LakeFacts(events=int(done.figures["events"]))


def _vpn(rig: Rig, seen: Seen) -> VpnFacts:
    state = rig.state()
    return VpnFacts(
        tunnels=len(state.tunnels),
        up=sum(one.up for one in state.tunnels),
        cipher=", ".join(sorted({sa.cipher for one in state.tunnels for sa in one.sas.values()})),
        mtu=rig.mtu,
        frames=seen.frames,
        encrypted=seen.kinds.get("esp", 0),
        missed=seen.missed,
        wrong=seen.wrong,
        faults=list(seen.faults),
    )


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
    digest = home_digest(layout, manifest.dataset_digest)
    for folder in (layout.site(HOME.name) / "datasets").glob(f"*-{digest[: manifests.SHORT]}"):
        splits = msgspec.json.decode((folder / SPLITS).read_bytes(), type=SplitReport)
        dataset = DatasetFacts.of(read_meta(folder), splits)
    return dataset, BundleFacts.of(bundle.name, manifest), manifest.quality
