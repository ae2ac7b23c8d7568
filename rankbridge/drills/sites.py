"""Both sites under drill: started so that everything between them passes a link, and done to as a script says.

The real form of `rankbridge.drills.scene.Scene`. How sites are laid out is a `rankbridge.drills.forms.Form`, which no
process of theirs knows. It judges nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from loadtests.samples import write_whole
from rankbridge import bundles, jobs, processes
from rankbridge import cloud as clouds
from rankbridge.asked import training_arguments
from rankbridge.border import Publisher, empty_sites
from rankbridge.cloud import Cloud, CloudForm
from rankbridge.drills import bad_bundles, forms
from rankbridge.drills.evidence import REFUSED
from rankbridge.drills.fault import Need
from rankbridge.drills.forms import ENDPOINT, Form
from rankbridge.drills.scene import IN_ALL, NOWHERE, OFF, OWN_CLOCK, RESOLVED, BadBundle, StoreFault
from rankbridge.faults import DeskError
from rankbridge.interrupts import shield
from rankbridge.layout import Layout
from rankbridge.link import Link
from rankbridge.processes import Identity
from rankbridge.roles import Followed, Plan, Process, Role
from rankbridge.serving import Serving
from rankbridge.supervisor import Facts, Owner, Probe, Supervisor, probe
from workloads.bundle.manifest import SHORT
from workloads.contract.http import PATH_READY
from workloads.contract.sites import HOME, SITES, AddressBook, Listener, Site, SiteName
from workloads.contract.storage import STABLE, Release

SLICE_S: Final = 0.02
"""One turn of a process that is slowed down: it runs for a part of it and is stopped for the rest."""
SETTLE_S: Final = 2.0
"""After everything is ready again, before the next fault."""
_READY_WITHIN_S: Final = 60.0
_LOOK_S: Final = 0.1
_ACTOR: Final = "drill"
_FULL_AT: Final = 4096
"""Bytes that a file may have on a disk that is full: none of the intake's is shorter."""
_HIDDEN: Final = "profiles_hidden"
_FAKETIME: Final = "faketime/libfaketimeMT.so.1"
_SMALL: Final = ("--users", "200", "--items", "120", "--events", "6000")
"""Size of the training that home does alone."""


class _Refused(msgspec.Struct, frozen=True):
    """The part of an agent's /readyz that says what it does not serve."""

    refused: dict[str, str] = {}
    missing: dict[str, str] = {}
    channel_fault: str = ""


@dataclasses.dataclass(frozen=True)
class DrilledServing(Serving):
    """A serving side whose processes find the other site behind the link."""

    rerouted: Callable[[Process], Process] = lambda process: process

    def processes(self, plan: Plan) -> list[Process]:
        """As they would be, with the other site's addresses replaced."""
        return [self.rerouted(process) for process in super().processes(plan)]


class Sites:
    """Both sites, up for as long as the context lasts. See `Scene` for what can be done to them."""

    def __init__(
        self,
        layout: Layout,
        *,
        ports: Sequence[str],
        cloud_form: CloudForm | None,
        real_tunnels: bool,
        view: jobs.View,
        say: Callable[[str], None],
        seed: int,
    ) -> None:
        self._layout = layout
        self._ports = ports
        self._cloud_form = cloud_form
        self._real_tunnels = real_tunnels
        self._view = view
        self._chance = random.Random(seed)  # noqa: S311 - moments of kills, no secrets
        self._stack = contextlib.ExitStack()
        self._cloud: Cloud | None = None
        self._form: Form | None = None
        self._content_with_200 = False
        supervisor = Supervisor(layout, prober=self._probe, say=say)
        self._serving = DrilledServing(layout, supervisor, dict(os.environ), self._as_it_runs)
        self._plan: Plan | None = None
        self._facts: Facts | None = None
        self._good: Path = layout.bundles
        self._twin: Path | None = None
        self._bad: Path | None = None
        self._slowed: list[_DutyCycle] = []
        self._frozen: list[tuple[Role, SiteName]] = []
        self._rekeyed: list[int] = []
        self._full = False
        self._clocks: dict[SiteName, Path] = {}
        """Files that say how far a site's clock is off, of those that have one of their own."""
        self.notes: dict[str, str] = {}

    # a context

    def __enter__(self) -> Sites:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with shield(), contextlib.ExitStack() as last:
            last.callback(self._stack.close)
            last.callback(self._serving.down)
            self._undo()

    def _open(self) -> None:
        serving = self._serving
        self._good = serving.bundle(None)
        self.hide_profiles(hidden=False)  # a suite that was killed may have left them so
        shutil.rmtree(self._scratch)  # bundles of an earlier suite: each is as large as a good one
        with serving.supervisor.lock():
            serving.make_way(Owner.REHEARSAL)
        if self._cloud_form is not None:
            self._cloud = self._stack.enter_context(clouds.opened(self._cloud_form, self._layout))
        self._plan, self._facts = serving.plan(self._serves(), self._ports, ())
        store = self._store_address()
        opened: contextlib.AbstractContextManager[Form] = (
            forms.rig(self._layout.logs / "rig", store)
            if self._real_tunnels
            else forms.relay(self._plan.addresses, store)
        )
        self._form = self._stack.enter_context(opened)
        if self._cloud is not None:
            self._publish()
        started = (lambda: None) if self._cloud is None else self._promote_first
        serving.up(self._plan, self._facts, owner=Owner.REHEARSAL, view=self._view, started=started)

    def _serves(self) -> Path | Followed:
        """The channel where there is a cloud, which must then be empty, else the bundle."""
        if self._cloud is None or self._cloud_form is None:
            return self._good
        empty_sites(self._layout)
        return Followed(STABLE, self._cloud.models_bucket, self._cloud_form)

    def _store_address(self) -> tuple[str, int] | None:
        """Where the object store is; None where it is none of this machine, and not ours to misuse."""
        endpoint = urllib.parse.urlsplit(self._cloud.settings.get(ENDPOINT, "") if self._cloud else "")
        if endpoint.scheme != "http" or not endpoint.hostname or not endpoint.port:
            return None
        return endpoint.hostname, endpoint.port

    def _publish(self) -> None:
        """The bundle and a twin of it: home is to have an earlier one to go back to."""
        self._twin = bad_bundles.twin(self._good, self._scratch, "drill twin")
        for bundle in (self._twin, self._good):
            self._publisher.publish(bundle)

    def _promote_first(self) -> None:
        for bundle in (self._twin, self._good):
            if bundle is not None:
                self._publisher.promote(bundle.name)
                self._served_at_both(bundle)

    # what the suite asks

    def _as_it_runs(self, process: Process) -> Process:
        placed = self.form.process(process)
        offset = self._clocks.get(process.site)
        if offset is None or process.role is Role.TRITON:
            return placed
        return dataclasses.replace(placed, environment={**placed.environment, **_clock(offset)})

    @property
    def form(self) -> Form:
        """How the sites are laid out."""
        if self._form is None:
            raise RuntimeError("the sites are not up")
        return self._form

    @property
    def link(self) -> Link:
        """See Scene."""
        return self.form.link

    @property
    def offers(self) -> frozenset[Need]:
        """What can be had here."""
        return self.form.offers | ({Need.CLOCK} if _faketime() is not None else set())

    @property
    def published(self) -> frozenset[str]:
        """12 hex digits of every bundle that may be served."""
        return frozenset(path.name[:SHORT] for path in (self._good, self._twin) if path is not None)

    def gateway(self, site: Site) -> str:
        """Its URL for who is at the site."""
        return self._at(site, Listener.GATEWAY)

    @property
    def events(self) -> Path:
        """The intake's store."""
        return self._layout.events

    def restore(self) -> None:
        """Undo whatever is still done, start what is missing, wait until all is ready and calm."""
        self._undo()
        self.bring_back()
        time.sleep(SETTLE_S)
        self.notes = {}

    # Scene

    def kill(self, role: Role, site: SiteName) -> None:
        """See Scene."""
        for one in self._members(role, site):
            processes.send(one, signal.SIGKILL)

    def bring_back(self) -> None:
        """See Scene."""
        plan, facts = self._the_plan, self._the_facts
        self._serving.up(plan, facts, owner=Owner.REHEARSAL, view=self._view)

    def freeze(self, role: Role, site: SiteName) -> None:
        """See Scene."""
        self._frozen.append((role, site))
        for one in self._members(role, site):
            processes.send(one, signal.SIGSTOP)

    def thaw(self, role: Role, site: SiteName) -> None:
        """See Scene."""
        for cycle in self._slowed:
            cycle.stop()
        self._slowed = []
        self._frozen = [one for one in self._frozen if one != (role, site)]
        for one in self._members(role, site):
            processes.send(one, signal.SIGCONT)

    def slow_down(self, role: Role, site: SiteName, times: float) -> None:
        """See Scene."""
        self._frozen.append((role, site))
        cycle = _DutyCycle(self._members(role, site), 1.0 / times)
        self._slowed.append(cycle)
        cycle.start()

    def hide_profiles(self, *, hidden: bool) -> None:
        """See Scene."""
        rename_profiles(self._layout.profiles, hidden=hidden)

    def store(self, fault: StoreFault) -> None:
        """See Scene."""
        if self.form.proxy is not None:
            self.form.proxy.tell(fault)

    def fill_disk(self, *, full: bool) -> None:
        """See Scene. A limit of the running process: the host's disk has room enough."""
        for one in self._members(Role.INTAKE, HOME.name):
            _, hard = resource.prlimit(one.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (_FULL_AT if full else hard, hard))
        self._full = full

    def give_clock(self, site: SiteName) -> None:
        """See Scene."""
        self._clocks[site] = self._scratch / f"{site.value}-clock"
        write_whole(self._clocks[site], b"+0\n")
        self._start_anew(site)
        self.bring_back()
        own = [one for role in Role if role is not Role.TRITON for one in self._members(role, site)]
        wound = [one for one in own if _maps(one, _FAKETIME)]
        self.note(OWN_CLOCK, IN_ALL if own and wound == own else f"in {len(wound)} of {len(own)} processes")

    def set_clock(self, site: SiteName, off_s: int) -> None:
        """See Scene. Its processes look at the file every second or two; here a process of its own does."""
        write_whole(self._clocks[site], f"{off_s:+d}\n".encode())
        environment = {**os.environ, **_clock(self._clocks[site])}
        said = subprocess.run(["date", "+%s"], env=environment, capture_output=True, timeout=10, check=False).stdout
        off_h = round((int(said or 0) - time.time()) / 3600)
        self.note(OFF, ", ".join(filter(None, [self.notes.get(OFF), f"{off_h:+d} h"])))

    def look_up(self, name: str) -> None:
        """See Scene."""
        where = [site.value for site in SiteName if self.form.resolves(site, name)]
        self.note(RESOLVED, ", ".join(where) or NOWHERE)

    def publish_bad(self, what: BadBundle) -> None:
        """See Scene."""
        cloud = self._the_cloud
        self._bad = bad_bundles.make(self._good, self._scratch, what)
        client = clouds.s3(cloud)
        bad_bundles.put(
            client, cloud.models_bucket, self._bad, what, key=self._layout.publisher_key, scratch=self._scratch
        )
        self._promote_unchecked(self._bad)

    def publish_good(self) -> None:
        """See Scene. Notes first what the agents said of the bad one."""
        for site in SITES.values():
            self.note(f"bad bundle at {site.name.value}", self._said_of_bad(site))
        self._promote_unchecked(self._good)

    def restart(self, role: Role, site: SiteName) -> None:
        """See Scene. What is ready answers 200: a gateway that misses the other site is ready all the same."""
        self._serving.supervisor.stop(f"{site.value}-{role.value}")
        self._content_with_200 = True
        try:
            self.bring_back()
        finally:
            self._content_with_200 = False
        self.note("restarted", "ready")

    def roll(self) -> None:
        """See Scene."""
        if self._twin is None:
            self.note("rolled", "there is one bundle only")
            return
        folder = ["--site-dir", str(self._layout.site(HOME.name))]
        self._job("workloads.agent", ["rollback", *folder, "--to", self._twin.name])
        there = self._is_served(HOME, self._twin)
        self._job("workloads.agent", ["rollback", *folder, "--to", self._good.name])
        back = self._is_served(HOME, self._good)
        self._job("workloads.agent", ["resume", *folder])
        self.note("rolled", "there and back" if there and back else "not served")

    def scale_up(self) -> None:
        """See Scene."""
        plan = self._the_plan
        first = next(one for one in self._serving.processes(plan) if (one.role, one.site) == (Role.GATEWAY, HOME.name))
        mine = urllib.parse.urlsplit(self.gateway(HOME))
        url = f"http://{mine.hostname}:{_free_port(plan.addresses)}"
        command = [word.replace(mine.netloc, url.removeprefix("http://")) for word in first.command]
        second = processes.start(
            command,
            environment=first.environment,
            folder=self._layout.root,
            log=self._layout.log("drill-second-gateway"),
            notes=self._layout.run / "notes" / "drill-second-gateway",
            tether=True,
        )
        try:
            both = all(
                _until(lambda url=url: probe(url + PATH_READY).status == 200)  # type: ignore[misc]  # a default binds it
                for url in (url, self.gateway(HOME))
            )
        finally:
            processes.end([second], grace_s=first.grace_s)
        self.note("scaled", "both gateways answer" if both else "the second one does not answer")

    def retrain(self) -> None:
        """See Scene. On a data set of its own size: the machine is answering meanwhile."""
        home = Layout(self._layout.root, self._scratch / "alone")
        shutil.rmtree(home.home, ignore_errors=True)
        self._job("workloads.data", ["--source", "simulator", "--home", str(home.home), *_SMALL])
        dataset = next((home.site(HOME.name) / "datasets").glob("*-*"))
        self._job("workloads.training", training_arguments(home, dataset, seed=1))
        self.note("retrained", "done" if any(home.training_home.glob("work/train-*")) else "made nothing")

    def replace_endpoint(self, tunnel: int) -> None:
        """See Scene."""
        self.form.replace_endpoint(tunnel)

    def use_key(self, tunnel: int, *, wrong: bool) -> None:
        """See Scene."""
        self._rekeyed = [*([tunnel] if wrong else []), *(one for one in self._rekeyed if one != tunnel)]
        self.form.use_key(tunnel, wrong=wrong)

    def await_route(self, tunnel: int, *, away: bool, within_s: float) -> float:
        """See Scene."""
        began = time.monotonic()
        after = self.form.moved_after_s(tunnel, away=away, within_s=within_s)
        if Need.RIG in self.offers:
            self.note("route moved away" if away else "route came back", "never" if after is None else f"{after:.1f}")
        return time.monotonic() - began

    def note(self, name: str, found: str) -> None:
        """See Scene."""
        self.notes[name] = found

    def waits(self) -> float:
        """See Scene."""
        return self._chance.random()

    # inside

    @property
    def _the_plan(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("the sites are not up")
        return self._plan

    @property
    def _the_facts(self) -> Facts:
        if self._facts is None:
            raise RuntimeError("the sites are not up")
        return self._facts

    @property
    def _the_cloud(self) -> Cloud:
        if self._cloud is None:
            raise DeskError("there is no object store", "`make localstack-install`")
        return self._cloud

    @property
    def _publisher(self) -> Publisher:
        return Publisher(self._layout, self._the_cloud)

    @property
    def _scratch(self) -> Path:
        folder = self._layout.work / "drills"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _promote_unchecked(self, bundle: Path) -> None:
        """As whoever may write the channel's document could: the registry's own checks are not asked."""
        cloud = self._the_cloud
        with bundles.told():
            models = bundles.registry(self._layout, cloud.models_bucket, client=clouds.s3(cloud))
            models.channels.promote(STABLE, Release(bundle=bundle.name), _ACTOR)

    def _said_of_bad(self, site: Site) -> str:
        """What a site's agent says of the bad bundle: that it is refused and why, or what it waits for."""
        if self._bad is None:
            return "nothing was published"
        agent = self._at(site, Listener.AGENT)
        with contextlib.suppress(msgspec.DecodeError):
            said = msgspec.json.decode(probe(agent + PATH_READY).body, type=_Refused)
            for edition, why in said.refused.items():
                if edition.startswith(self._bad.name[:SHORT]):
                    return f"{REFUSED}{why}"
            waits = "; ".join([*said.missing.values(), said.channel_fault]).strip("; ")
            return f"not refused; the agent says: {waits or 'nothing'}"
        return "the agent does not answer"

    def _probe(self, url: str) -> Probe:
        found = probe(url)
        return Probe(found.status, b"{}") if self._content_with_200 and found.status == 200 else found

    def _members(self, role: Role, site: SiteName) -> list[Identity]:
        """A process and its children, without the keeper, which must note how they end."""
        state = self._serving.supervisor.state()
        found = [one for one in state.processes if (one.role, one.site) == (role, site)] if state else []
        return [
            member for record in found for member in processes.members(record.handle) if member != record.handle.keeper
        ]

    def _undo(self) -> None:
        for role, site in list(self._frozen):
            self.thaw(role, site)
        if self._form is not None:
            self._form.link.heal()
            self.store(StoreFault.NONE)
        for tunnel in self._rekeyed:
            self.form.use_key(tunnel, wrong=False)
        self._rekeyed = []
        self.hide_profiles(hidden=False)
        if self._full:
            self.fill_disk(full=False)
        for site in list(self._clocks):
            self._start_anew(site)
            del self._clocks[site]
            _sweep_clocks()

    def _start_anew(self, site: SiteName) -> None:
        """End what a clock is for; whoever brings back what is missing starts it with the clock that it then has."""
        for process in self._serving.processes(self._the_plan):
            if process.site is site and process.role is not Role.TRITON:
                self._serving.supervisor.stop(process.name)

    def _at(self, site: Site, listener: Listener) -> str:
        """A listener's URL, as the desk reaches it."""
        return self.form.url(self._the_plan.addresses.url(site, listener))

    def _is_served(self, site: Site, bundle: Path) -> bool:
        url = self.gateway(site)
        return self._serving.supervisor.gateway(url, url + PATH_READY).bundle == bundle.name[:SHORT]

    def _served_at_both(self, bundle: Path) -> None:
        for site in SITES.values():
            if not _until(lambda site=site: self._is_served(site, bundle)):  # type: ignore[misc]  # a default binds it
                raise DeskError(
                    f"{site.name.value} does not serve bundle {bundle.name[:SHORT]}",
                    f"see {self._layout.shown(self._layout.log(f'{site.name.value}-agent'))}",
                )

    def _job(self, module: str, arguments: Sequence[str]) -> None:
        """A job, behind everything that answers."""
        log = self._layout.log("drill-jobs")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            done = subprocess.run(
                ["nice", "-n", "10", sys.executable, "-m", module, *arguments],
                cwd=self._layout.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            raise DeskError(
                f"{module} ended with code {done.returncode}",
                f"its log is {self._layout.shown(log)}",
                detail=processes.tail(log),
            )


class _DutyCycle:
    """Lets processes run for a share of the time."""

    def __init__(self, members: Sequence[Identity], share: float) -> None:
        self._members = members
        self._share = share
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._turn, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _turn(self) -> None:
        while not self._over.is_set():
            self._tell(signal.SIGSTOP)
            self._over.wait(SLICE_S * (1.0 - self._share))
            self._tell(signal.SIGCONT)
            time.sleep(SLICE_S * self._share)

    def _tell(self, number: signal.Signals) -> None:
        for one in self._members:
            processes.send(one, number)


def rename_profiles(path: Path, *, hidden: bool) -> None:
    """Take the table of profiles from under its readers, or give it back; what is so already stays so."""
    now, then = ("profiles", _HIDDEN) if hidden else (_HIDDEN, "profiles")
    if not path.exists():
        return
    with contextlib.closing(sqlite3.connect(path, timeout=10.0, isolation_level=None)) as store:
        if store.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (now,)).fetchone():
            store.execute(f"ALTER TABLE {now} RENAME TO {then}")


def _clock(offset: Path) -> dict[str, str]:
    """The environment of a process whose clock is off by what a file says; clocks that only go on stay as they are."""
    return {
        "LD_PRELOAD": str(_faketime()),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def _maps(one: Identity, library: str) -> bool:
    try:
        return library in Path(f"/proc/{one.pid}/maps").read_text()
    except OSError:  # it has ended
        return False


def _sweep_clocks() -> None:
    """Shared memory and semaphores that libfaketime leaves behind with each process that ends."""
    for left in Path("/dev/shm").glob("*faketime_s*_*"):  # noqa: S108 - where the library puts them
        pid = left.name.rpartition("_")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            left.unlink(missing_ok=True)


def _faketime() -> Path | None:
    """The library, where Debian's package put it."""
    return next(Path("/usr/lib").glob(f"*/{_FAKETIME}"), None)


def _free_port(addresses: AddressBook) -> int:
    """One that no listener has."""
    return max(addresses.port(listener) for listener in Listener) + 1


def _until(holds: Callable[[], bool], within_s: float = _READY_WITHIN_S) -> bool:
    end = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK_S)
    return True
