"""Keeps the processes of both sites: starts what is missing, waits until it is ready, ends it, says how it is.

It does not restart what died by itself: a rehearsal that hides a crash would not be honest, and in the
cluster that is Kubernetes' work. What runs is written to `run/state.json` as it is started, so that the
next command finds it, also after this one was killed. It knows processes and no bundles.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import http.client
import os
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec

from rankbridge import processes
from rankbridge.cloud import CloudForm
from rankbridge.faults import DeskError
from rankbridge.interrupts import shield
from rankbridge.layout import Layout
from rankbridge.processes import Identity, Started
from rankbridge.roles import STOP_WAVES, Process, Role
from workloads.contract.http import Readiness
from workloads.contract.sites import SiteName
from workloads.contract.slo import Rung

_POLL_S: Final = 0.1


class Owner(enum.StrEnum):
    """Who started the processes, and so who may end them without being asked."""

    UP = "up"
    REHEARSAL = "rehearsal"


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What all running processes have in common; a second `up` must agree with it."""

    bundle: str | None
    """Path of the finished bundle; None where a channel is followed."""
    channel: str | None = None
    models_bucket: str | None = None
    aws: CloudForm | None = None
    """The cloud that the channel is in."""
    ports: dict[str, int] = {}
    """Overrides by listener name."""
    injections: tuple[str, ...] = ()
    hosts: dict[SiteName, str] = {}
    entries: dict[SiteName, tuple[str, ...]] = {}
    """Both as in `rankbridge.roles.Places`; empty on loopback."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One started process in state.json."""

    site: SiteName
    role: Role
    pid: int
    started: int
    keeper_pid: int
    keeper_started: int
    mark: str
    since: float
    """Unix time of the start."""
    url: str
    ready_url: str
    grace_s: float

    @property
    def name(self) -> str:
        """`<site>-<role>`."""
        return f"{self.site.value}-{self.role.value}"

    @property
    def handle(self) -> Started:
        """As `rankbridge.processes` knows it."""
        return Started(Identity(self.pid, self.started), Identity(self.keeper_pid, self.keeper_started), self.mark)


class State(msgspec.Struct, frozen=True, kw_only=True):
    """`run/state.json`."""

    schema_version: int = 1
    boot: str
    owner: Owner
    owner_pid: int
    owner_started: int
    facts: Facts
    processes: tuple[Record, ...] = ()

    @property
    def owner_is_alive(self) -> bool:
        """Whether the desk that started this still runs."""
        return processes.is_alive(Identity(self.owner_pid, self.owner_started))

    def with_record(self, record: Record) -> State:
        """With this process in the place of an older one of its name."""
        others = tuple(one for one in self.processes if one.name != record.name)
        return msgspec.structs.replace(self, processes=(*others, record))


class Condition(enum.StrEnum):
    """How a process is."""

    READY = "ready"
    RUNNING = "running"
    """Alive, and not ready or not answering."""
    EXITED = "exited"
    DOWN = "down"
    """Was not started, or was ended by `down`."""


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `rankbridge status`."""

    site: SiteName
    role: Role
    state: Condition
    detail: str = ""
    pid: int | None = None
    since: float | None = None
    """Unix time of the start."""
    pss_bytes: int = 0
    url: str = ""
    log: str = ""


class GatewayStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway says of its neighbours; `best_rung` is None when it does not answer."""

    url: str
    best_rung: int | None
    backends: dict[str, str]
    bundle: str = ""
    """First 12 hex digits of the bundle that it answers from; empty when it has none."""
    delta: int = 0


class Probe(NamedTuple):
    """What a readiness URL answered; `status` 0 is no answer."""

    status: int
    body: bytes


class Prober(Protocol):
    """Asks a process whether it is ready: the supervisor's one door to the network."""

    def __call__(self, url: str) -> Probe:
        """GET the URL; never raises."""
        ...


def probe(url: str, timeout_s: float = 1.0) -> Probe:
    """The real door: plain HTTP without proxies."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path)
        answer = connection.getresponse()
        return Probe(answer.status, answer.read())
    except (OSError, http.client.HTTPException) as error:
        return Probe(0, str(error).encode())
    finally:
        connection.close()


class _Missing(msgspec.Struct, frozen=True):
    """The part of every /readyz that says what is not there."""

    missing: dict[str, str] | list[str] = []


Say = Callable[[str], None]


class Supervisor:
    """The processes of one `.rankbridge/`. `say` gets one line per thing that happened."""

    def __init__(self, layout: Layout, *, prober: Prober = probe, say: Say = lambda _: None) -> None:
        self._layout = layout
        self._probe = prober
        self._say = say

    @property
    def _state_file(self) -> Path:
        return self._layout.run / "state.json"

    def state(self) -> State | None:
        """What was started and not ended since; None when nothing was, or before the last boot."""
        try:
            state = msgspec.json.decode(self._state_file.read_bytes(), type=State)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise DeskError(
                f"{self._layout.shown(self._state_file)} cannot be read: {error}",
                "end the processes it names by hand if there are any, then remove the file",
            ) from error
        return state if state.boot == processes.boot_id() else None

    def alive(self) -> list[Record]:
        """Processes of the state that run."""
        state = self.state()
        return [one for one in state.processes if processes.is_alive(one.handle.process)] if state else []

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while processes are started or ended. Raises DeskError when another command holds it."""
        self._layout.run.mkdir(parents=True, exist_ok=True)
        with (self._layout.run / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DeskError(
                    "another rankbridge command is starting or ending processes here", "wait until it is done"
                ) from error
            yield

    def up(
        self,
        wanted: Sequence[Process],
        facts: Facts,
        *,
        owner: Owner,
        before: Callable[[Process], None] = lambda _: None,
        started: Callable[[], None] = lambda: None,
    ) -> None:
        """Start what is missing of `wanted`, in order, and wait until all of it is ready.

        A rehearsal's processes end with this process; those of `up` go on. `before` is called for each that is about
        to be started, `started` once when all of them answer, ready or not. Raises DeskError with the end of the log
        when one does not come up; what this call started is ended then, and also when it is interrupted.
        """
        state = self.state()
        running = {one.name for one in self.alive()}
        if state is None or not running:
            me = processes.identify(os.getpid()) or Identity(os.getpid(), -1)
            state = State(
                boot=processes.boot_id(), owner=owner, owner_pid=me.pid, owner_started=me.started, facts=facts
            )
        missing = [process for process in wanted if process.name not in running]
        begun: list[Record] = []
        try:
            for process in missing:
                before(process)
                with shield():  # a process that runs is always in the state
                    record = self._start(process, tether=owner is Owner.REHEARSAL)
                    begun.append(record)
                    state = state.with_record(record)
                    self._write(state)
            identities = {one.name: one.handle.process for one in state.processes}
            self._await_answers(missing, identities)
            started()
            self._await(wanted, begun, identities)
        except BaseException:
            with shield():
                self._end(begun)
            raise

    def down(self) -> list[str]:
        """End every process of the state; the names of those that ran. Ended means gone: SIGKILL follows SIGTERM."""
        state = self.state()
        if state is None:
            return []
        names = [one.name for one in self.alive()]
        with shield():
            self._end(list(state.processes))
            self._state_file.unlink(missing_ok=True)
        return names

    def stop(self, name: str) -> None:
        """End one process; it stays in the state as exited."""
        state = self.state()
        self._end([one for one in state.processes if one.name == name] if state else [])

    def status(self, wanted: Sequence[Process]) -> list[ProcessStatus]:
        """How each of `wanted` is now."""
        state = self.state()
        records = {one.name: one for one in state.processes} if state else {}
        return [self._status(process, records.get(process.name)) for process in wanted]

    def gateway(self, url: str, ready_url: str) -> GatewayStatus:
        """What a gateway knows of its neighbours."""
        answer = self._readiness(ready_url)
        if answer is None:
            return GatewayStatus(url=url, best_rung=None, backends={})
        backends = {name: "up" if one.up else f"down: {one.detail}" for name, one in answer.backends.items()}
        return GatewayStatus(
            url=url,
            best_rung=int(best_rung(answer)) if answer.bundle else None,
            backends=backends,
            bundle=answer.bundle,
            delta=answer.delta,
        )

    def pss_bytes(self) -> dict[str, int]:
        """Proportional set size by process name, children included."""
        return {one.name: processes.pss_bytes(one.handle) for one in self.alive()}

    def tail(self, name: str) -> tuple[str, ...]:
        """The last lines of a process's log."""
        return processes.tail(self._layout.log(name))

    def _start(self, process: Process, *, tether: bool) -> Record:
        try:
            started = processes.start(
                process.command,
                environment=process.environment,
                folder=self._layout.root,
                log=self._layout.log(process.name),
                notes=self._notes(process.name),
                tether=tether,
            )
        except OSError as error:
            raise DeskError(f"cannot start {process.title}: {error}", "see `rankbridge status`") from error
        return Record(
            site=process.site,
            role=process.role,
            pid=started.process.pid,
            started=started.process.started,
            keeper_pid=started.keeper.pid,
            keeper_started=started.keeper.started,
            mark=started.mark,
            since=time.time(),
            url=process.url,
            ready_url=process.ready_url,
            grace_s=process.grace_s,
        )

    def _await_answers(self, wanted: Sequence[Process], identities: Mapping[str, Identity]) -> None:
        """Until each answers anything at its readiness URL."""
        for process in wanted:
            began = time.monotonic()
            while not self._probe(process.ready_url).status:
                if not processes.is_alive(identities[process.name]):
                    raise self._failure(process, f"ended ({self._ending(process.name)}) before it was ready")
                if time.monotonic() - began > process.ready_within_s:
                    raise self._failure(process, f"does not answer after {process.ready_within_s:.0f} s")
                time.sleep(_POLL_S)

    def _await(self, wanted: Sequence[Process], begun: Sequence[Record], identities: Mapping[str, Identity]) -> None:
        """Until each is ready, in any order; those that ran already get no longer than the new ones."""
        began = time.monotonic()
        fresh = {one.name for one in begun}
        pending = list(wanted)
        while pending:
            for process in list(pending):
                if not processes.is_alive(identities[process.name]):
                    raise self._failure(process, f"ended ({self._ending(process.name)}) before it was ready")
                waiting_for = self._waiting_for(process)
                if waiting_for is None:
                    pending.remove(process)
                    if process.name in fresh:
                        self._say(f"{process.title} is ready at {process.url}")
                elif time.monotonic() - began > process.ready_within_s:
                    raise self._failure(process, f"is not ready after {process.ready_within_s:.0f} s ({waiting_for})")
            if pending:
                time.sleep(_POLL_S)

    def _waiting_for(self, process: Process) -> str | None:
        """What it still waits for; None when it is ready, a gateway with all its neighbours."""
        answer = self._probe(process.ready_url)
        missing = _missing(answer.body)
        if answer.status != 200:
            return missing or answer.body.decode(errors="replace").strip()[:300] or f"answers {answer.status}"
        return missing if process.role is Role.GATEWAY else None

    def _failure(self, process: Process, what: str) -> DeskError:
        log = self._layout.log(process.name)
        return DeskError(
            f"{process.title} {what}",
            f"its whole log is {self._layout.shown(log)}",
            detail=processes.tail(log),
        )

    def _ending(self, name: str) -> str:
        """How it ended, in words; the keeper needs a moment to note it."""
        for _ in range(20):
            ending = processes.exit_of(self._notes(name))
            if ending is not None:
                return str(ending)
            time.sleep(_POLL_S / 2)
        return "nobody saw how"

    def _end(self, records: Sequence[Record]) -> None:
        for wave in STOP_WAVES:
            several = [one for one in records if one.role in wave]
            if several:
                killed = processes.end([one.handle for one in several], grace_s=max(one.grace_s for one in several))
                for one in several:
                    if one.handle in killed:
                        self._say(f"{one.role.value} at {one.site.value} did not stop in {one.grace_s:.0f} s: killed")

    def _status(self, process: Process, record: Record | None) -> ProcessStatus:
        log = self._layout.shown(self._layout.log(process.name))
        if record is None:
            return ProcessStatus(site=process.site, role=process.role, state=Condition.DOWN, url=process.url)
        if not processes.is_alive(record.handle.process):
            return ProcessStatus(
                site=process.site,
                role=process.role,
                state=Condition.EXITED,
                detail=self._ending(process.name),
                since=record.since,
                url=record.url,
                log=log,
            )
        waiting_for = self._waiting_for(process)
        answers = (
            waiting_for is None or self._probe(record.ready_url).status == 200
        )  # a gateway on a lower rung is ready
        return ProcessStatus(
            site=process.site,
            role=process.role,
            state=Condition.READY if answers else Condition.RUNNING,
            detail=waiting_for or "",
            pid=record.pid,
            since=record.since,
            pss_bytes=processes.pss_bytes(record.handle),
            url=record.url,
            log=log,
        )

    def _readiness(self, url: str) -> Readiness | None:
        answer = self._probe(url)
        try:
            return msgspec.json.decode(answer.body, type=Readiness) if answer.status else None
        except msgspec.DecodeError:
            return None

    def _notes(self, name: str) -> Path:
        return self._layout.run / "notes" / name

    def _write(self, state: State) -> None:
        new = self._state_file.with_suffix(".new")
        with new.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(state)))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._state_file)


def _missing(body: bytes) -> str | None:
    """What a /readyz says is missing, in words; None when it says nothing of the kind."""
    try:
        missing = msgspec.json.decode(body, type=_Missing).missing
    except msgspec.DecodeError:
        return None
    words = [f"{name}: {text}" for name, text in missing.items()] if isinstance(missing, dict) else missing
    return f"waits for {'; '.join(words)}" if words else None


def best_rung(readiness: Readiness) -> Rung:
    """The best rung that a gateway can reach with the neighbours it has now, and with those of the other site.

    Of that one only its gateway's life is known: whether it ranks for others now, an answer says.
    """
    up = {name for name, one in readiness.backends.items() if one.up}
    if "retrieval" not in up:
        return Rung.TRADITIONAL
    if {"triton", "peer"} & up:
        return Rung.FULL_RANKER
    return Rung.DISTILLED_RANKER if "student" in up else Rung.RETRIEVAL_SCORE
