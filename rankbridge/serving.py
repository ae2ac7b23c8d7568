"""Brings a bundle into service at both sites and takes it out again.

Puts together what the desk's other parts know: which bundle, which processes, whether they can be
started, and the agents' installation before them. `up`, `restart`, `status` and a rehearsal use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from rankbridge import cloud as clouds
from rankbridge import jobs, preflight, triton
from rankbridge.faults import DeskError
from rankbridge.layout import Layout
from rankbridge.roles import LOOPBACK, Followed, Places, Plan, Process, Role, injection_faults, parse_ports
from rankbridge.supervisor import Condition, Facts, GatewayStatus, Owner, ProcessStatus, Say, Supervisor
from workloads.bundle import manifest as manifests
from workloads.bundle import store
from workloads.contract.sites import SITES, AddressBook, SiteName
from workloads.data.profiles import ProfileStoreError, SqliteProfiles


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """`rankbridge status --json`. `gateways` gives each site's public URL, whether it answers or not."""

    schema_version: int = 1
    ready: bool
    bundle: str | None
    """First 12 hex digits of its id, as the first gateway says; None when none serves."""
    injections: tuple[str, ...]
    gateways: dict[str, str]
    sites: dict[str, GatewayStatus]
    processes: list[ProcessStatus]
    pss_bytes: int


@dataclasses.dataclass(frozen=True)
class Serving:
    """The serving side of one `.rankbridge/`."""

    layout: Layout
    supervisor: Supervisor
    environment: Mapping[str, str]

    @classmethod
    def of(cls, layout: Layout, say: Say = lambda _: None) -> Serving:
        """With the real supervisor and this process's environment."""
        return cls(layout, Supervisor(layout, say=say), dict(os.environ))

    def bundle(self, prefix: str | None) -> Path:
        """The bundle whose id begins with `prefix`, or the newest. Raises DeskError when there is none."""
        if prefix is None:
            newest = store.newest(self.layout.bundles)
            if newest is None:
                where = self.layout.shown(self.layout.bundles)
                raise DeskError(f"there is no bundle under {where}", "make one: `make rehearse`")
            return newest
        try:
            return store.find(self.layout.bundles, prefix)
        except LookupError as error:
            known = ", ".join(sorted(path.name[:12] for path in self.layout.bundles.glob("[0-9a-f]*"))) or "none"
            raise DeskError(str(error), f"bundles here: {known}") from error

    def mismatch(self, bundle: Path) -> str | None:
        """Why what home knows of people does not go with a bundle, in a sentence; None when it does.

        Raises DeskError when home knows nothing: its gateway would not start.
        """
        manifest = manifests.decode((bundle / manifests.MANIFEST).read_bytes())
        trained_on = home_digest(self.layout, manifest.dataset_digest)[: manifests.SHORT]
        try:
            with SqliteProfiles(self.layout.profiles) as profiles:
                prepared = dict(profiles.meta).get("dataset", "unknown")
        except ProfileStoreError as error:
            remedy = "prepare them with `rankbridge data`; `make rehearse` does it all"
            raise DeskError(f"home has no profiles: {error}", remedy) from error
        if prepared.endswith(trained_on):
            return None
        return f"profiles at home are of data set {prepared}, and the bundle was trained on another ({trained_on})"

    def plan(
        self,
        serves: Path | Followed,
        ports: Sequence[str],
        injections: Sequence[str],
        places: Places = LOOPBACK,
    ) -> tuple[Plan, Facts]:
        """What to bring about, and where. Raises DeskError for settings that cannot be."""
        addresses, faults = parse_ports(ports)
        preflight.refuse([*faults, *injection_faults(injections)])
        followed = serves if isinstance(serves, Followed) else None
        facts = Facts(
            bundle=str(serves) if followed is None else None,
            channel=followed.channel if followed else None,
            models_bucket=followed.models_bucket if followed else None,
            aws=followed.aws if followed else None,
            ports={listener.value: port for listener, port in addresses.overrides.items()},
            injections=tuple(injections),
            hosts=dict(places.hosts),
            entries=dict(places.entries),
        )
        addresses = AddressBook(addresses.overrides, places.hosts)
        return Plan(self.layout, addresses, serves, tuple(injections), places.entries), facts

    def running_plan(self) -> tuple[Plan, Facts] | None:
        """The plan that what is up now was started with; None when nothing is up."""
        state = self.supervisor.state()
        if state is None or not state.processes:
            return None
        facts = state.facts
        ports = [f"{name}={port}" for name, port in facts.ports.items()]
        return self.plan(_serves(facts), ports, facts.injections, Places(facts.hosts, facts.entries))

    def up(
        self,
        plan: Plan,
        facts: Facts,
        *,
        owner: Owner,
        view: jobs.View,
        started: Callable[[], None] = lambda: None,
    ) -> None:
        """Start what is missing, when nothing speaks against it; see `Supervisor.up`. Raises DeskError."""
        with self.supervisor.lock():
            self.make_way(owner, facts)
            running = {one.name for one in self.supervisor.alive()}
            wanted = self.processes(plan)
            missing = [process for process in wanted if process.name not in running]
            preflight.refuse(preflight.serving(self.layout, missing))
            # A server that comes back reads the repository anew; one that runs has it in memory.
            for site in SITES.values():
                if any(process.site is site.name and process.role in {Role.TRITON, Role.AGENT} for process in missing):
                    self._install(plan, site.name, view)
            self.supervisor.up(wanted, facts, owner=owner, before=self._before(plan), started=started)

    def down(self) -> list[str]:
        """End everything; the names of what ran."""
        with self.supervisor.lock():
            return self.supervisor.down()

    def restart(self, role: Role, site: SiteName) -> None:
        """End one process, start it again as it was, and wait until all that run are ready. Raises DeskError."""
        with self.supervisor.lock():
            running = self.running_plan()
            if running is None:
                raise DeskError("nothing is up", "`rankbridge up` starts both sites")
            plan, facts = running
            self.make_way(Owner.UP, facts)
            names = {process.name for process in self.processes(plan)}
            name = f"{site.value}-{role.value}"
            if name not in names:
                raise DeskError(f"{site.value} has no {role.value}", f"one of {', '.join(sorted(names))}")
            self.supervisor.stop(name)
            running_names = {one.name for one in self.supervisor.alive()} | {name}
            wanted = [process for process in self.processes(plan) if process.name in running_names]
            self.supervisor.up(wanted, facts, owner=Owner.UP, before=self._before(plan))

    def status(self) -> Status:
        """How both sites are now; also when nothing is up."""
        running = self.running_plan()
        plan = running[0] if running else Plan(self.layout, AddressBook(), self.layout.bundles / "none")
        processes = self.processes(plan)
        listed = self.supervisor.status(processes)
        gateways = [process for process in processes if process.role is Role.GATEWAY]
        gateway_states = {
            process.site.value: self.supervisor.gateway(process.url, process.ready_url) for process in gateways
        }
        return Status(
            ready=all(one.state is Condition.READY for one in listed),
            bundle=next((one.bundle for one in gateway_states.values() if one.bundle), None),
            injections=plan.injections if running else (),
            gateways={process.site.value: process.url for process in gateways},
            sites=gateway_states,
            processes=listed,
            pss_bytes=sum(one.pss_bytes for one in listed),
        )

    def processes(self, plan: Plan) -> list[Process]:
        """The processes of a plan. Raises DeskError when tritonserver is not there to be started."""
        try:
            return plan.processes(triton.locate(self.layout.root), self._environment(plan))
        except triton.TritonFault as fault:
            raise DeskError(fault.fault, fault.remedy) from fault

    def _environment(self, plan: Plan) -> dict[str, str]:
        """What processes find in their environment: agents that follow a channel need its cloud."""
        if isinstance(plan.serves, Followed):
            return clouds.environment(
                plan.serves.aws, self.layout, self.environment, clouds.place(plan.addresses.hosts, plan.entries)
            )
        return dict(self.environment)

    def make_way(self, owner: Owner, facts: Facts | None = None) -> None:
        """End leftovers of a rehearsal that was killed; refuse to disturb what somebody else started.

        Call with the supervisor's lock. `facts` are what the new processes have in common, when it is known.
        """
        state = self.supervisor.state()
        if state is None or not self.supervisor.alive():
            return
        if state.owner is Owner.REHEARSAL:
            if state.owner_is_alive and state.owner_pid != os.getpid():
                raise DeskError(f"a rehearsal is running (pid {state.owner_pid})", "wait for it, or end it with Ctrl-C")
            if not state.owner_is_alive:
                self.supervisor.down()
        elif owner is Owner.REHEARSAL:
            raise DeskError("the sites are up already, and a rehearsal needs them for itself", "`rankbridge down`")
        elif facts is not None and state.facts != facts:
            raise DeskError(
                f"the sites are up with {_facts_text(state.facts)}; that cannot change while they run",
                "`rankbridge down` first",
            )

    def _install(self, plan: Plan, site: SiteName, view: jobs.View) -> None:
        command = plan.install(SITES[site])
        if command is None:
            return
        jobs.follow(
            command,
            title=f"the agent of {site.value}",
            log=self.layout.log(f"{site.value}-install"),
            view=view,
            root=self.layout.root,
        )

    def _before(self, plan: Plan) -> Callable[[Process], None]:
        def tidy(process: Process) -> None:
            if process.role is Role.TRITON:
                triton.remove_shared_memory(SITES[process.site], plan.addresses)
                # It refuses to start without its folder, into which the agent puts models later.
                (self.layout.site(process.site) / "triton").mkdir(parents=True, exist_ok=True)

        return tidy


def home_digest(layout: Layout, digest: str) -> str:
    """The digest at home of a data set that a bundle was trained on: a replica has another one than its origin."""
    from workloads.data.dataset import DatasetError, read_meta  # noqa: PLC0415 - polars, which `status` need not wait for

    for folder in layout.replicas.glob(f"*-{digest[: manifests.SHORT]}"):
        with contextlib.suppress(DatasetError):
            origin = read_meta(folder).replica
            if origin is not None:
                return origin.digest
    return digest


def _serves(facts: Facts) -> Path | Followed:
    if facts.channel is not None and facts.models_bucket is not None and facts.aws is not None:
        return Followed(facts.channel, facts.models_bucket, facts.aws)
    return Path(facts.bundle or "")


def _facts_text(facts: Facts) -> str:
    parts = [f"bundle {Path(facts.bundle).name[:12]}" if facts.bundle else f"channel {facts.channel}"]
    parts += [f"port {name}={port}" for name, port in facts.ports.items()]
    parts += list(facts.injections)
    return ", ".join(parts)
