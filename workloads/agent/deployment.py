"""Bringing a site from one edition to the next: the agent's decisions, one small step at a time.

Where a flip stands is in the editions file and nowhere else (`contract.editions`): whoever is killed and started again
reads it and goes on, or goes back, whichever the channel or the operator wants by then. A step looks at what is wanted
and at what is, and does the one thing that is due; nothing waits inside a step for retrieval or a gateway. It knows the
doors of Triton, of the releases and of the neighbours, and no network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge

from workloads.agent import memory, retention
from workloads.agent.crash import Reached, nowhere
from workloads.agent.door import TritonDoor, TritonError
from workloads.agent.injection import NOTHING_INJECTED, Injection
from workloads.agent.keeper import Keeper
from workloads.agent.memory import Hold, Seen
from workloads.agent.neighbours import Neighbours, Silence
from workloads.agent.probing import ProbeFault, Recorded, probe
from workloads.agent.refusal import Hindrance, Refusal
from workloads.agent.releases import Releases, Wanted
from workloads.agent.repository import render_repository
from workloads.bundle import manifest as m
from workloads.bundle.delta import read_delta_manifest, verify_delta
from workloads.bundle.probes import open_probes
from workloads.bundle.site import EditionsFault, SiteDirectory, read_editions, write_editions
from workloads.bundle.store import BundleFault, verify
from workloads.bundle.verification import read_manifest
from workloads.contract.editions import Edition, SiteEditions
from workloads.contract.sites import SiteClass
from workloads.contract.tensors import RANKER
from workloads.telemetry import log
from workloads.telemetry.beside import in_thread, settle

PATIENCE_FIRST_S: Final = 1.0
PATIENCE_LAST_S: Final = 60.0
"""What hinders is tried again after this at first, and doubling up to the last."""

_logger = log.get(component="deployment")


class Deployment:
    """One site's way from edition to edition. `step` again and again; `offer` when the channel was read."""

    def __init__(
        self,
        site: SiteDirectory,
        site_class: SiteClass,
        *,
        releases: Releases,
        door: TritonDoor,
        keeper: Keeper,
        neighbours: Neighbours,
        registry: CollectorRegistry,
        injection: Injection = NOTHING_INJECTED,
        onnxruntime: str | None = None,
        reached: Reached = nowhere,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._site = site
        self._class = site_class
        self._releases = releases
        self._door = door
        self._keeper = keeper
        self._neighbours = neighbours
        self._injection = injection
        self._onnxruntime = onnxruntime
        """Version at this site, where it is known here; retrieval holds bundles to its own in any case."""
        self._reached = reached
        self._clock = clock
        self._pointer: Wanted | None = None
        self._hold: Hold | None = None
        self._refused: dict[Wanted, Refusal] = {}
        self._hindrance = ""
        self._patience_s = PATIENCE_FIRST_S
        self._again_at = 0.0
        self._for: Wanted | None = None
        """What the patience is for."""
        self._begun_s: float | None = None
        self._settled = False
        self._waits = ""
        self._older = 0
        self._revision = 0
        """Of the file as it was written last, by whichever process."""
        self.editions = self._as_it_is()
        self._seen = self._newest_seen()
        self._refusals = Counter(
            "rankbridge_agent_refusals", "Releases that were not brought here", ("reason",), registry=registry
        )
        self._flips = Counter("rankbridge_agent_flips", "Editions brought to service", registry=registry)
        self._seconds = Gauge(
            "rankbridge_agent_flip_seconds",
            "From the first sight of the newest edition to its service",
            registry=registry,
        )

    # what is said of it

    def missing(self) -> dict[str, str]:
        """What keeps the site from serving at all; or, where it was given one bundle for ever, from serving that."""
        wanted = self._wanted()
        refused = None if wanted is None else self._refused.get(wanted)
        why = self._waits or self._hindrance or (f"{refused.reason}: {refused}" if refused else "")
        if self.editions is None:
            return {"edition": why or "nothing was brought here yet"}
        if self._releases.channel is not None:
            return {}
        if wanted is not None and (wanted.held or self.editions.load == [wanted.edition]):
            return {}
        name = "the bundle" if wanted is None else str(wanted.edition)
        return {"edition": f"{name} is not served alone yet: {why or 'it is being brought'}"}

    def detail(self) -> dict[str, object]:
        """For `/readyz`."""
        wanted = self._wanted()
        return {
            "serves": None if self.editions is None else str(self.editions.serve),
            "previous": None if self.editions is None or not self.editions.previous else str(self.editions.previous),
            "wants": None if wanted is None else str(wanted.edition),
            "held": self._hold is not None,
            "waits_for": self._waits,
            "hindered_by": self._hindrance,
            "refused": {str(one.edition): f"{why.reason}: {why}" for one, why in self._refused.items()},
        }

    # what is wanted

    def offer(self, wanted: Wanted | None) -> None:
        """The channel points to this now. One older than what was seen before is refused."""
        if wanted is None:
            return
        seen = self._seen
        if seen is not None and seen.channel == wanted.channel and wanted.sequence < seen.sequence:
            if self._older != wanted.sequence:
                self._older = wanted.sequence
                self._refusals.labels("old_pointer").inc()
                _logger.error(
                    "refuses a pointer that is older than one seen before",
                    channel=wanted.channel,
                    sequence=wanted.sequence,
                    seen=seen.sequence,
                )
            return
        if seen is None or (seen.channel, seen.sequence) != (wanted.channel, wanted.sequence):
            self._seen = Seen(channel=wanted.channel, sequence=wanted.sequence)
            if wanted.channel is not None:
                memory.write_seen(self._site.root, self._seen)
        self._pointer = wanted

    def _wanted(self) -> Wanted | None:
        """By hand before by channel; None while neither says anything."""
        hold = self._hold
        if hold is not None and hold.refused is None:
            there = self._site.installed_deltas(hold.edition.bundle)
            deltas = tuple(there.get(number, "") for number in range(1, hold.edition.delta + 1))
            return Wanted(hold.edition.bundle, deltas, sequence=hold.sequence, held=True)
        return self._pointer

    def _look_at_hold(self) -> None:
        hold = memory.read_hold(self._site.root)
        seen = 0 if self._seen is None else self._seen.sequence
        if hold is not None and self._pointer is not None and seen > hold.sequence:
            _logger.info("the channel has moved on: what was asked for by hand ends", edition=str(hold.edition))
            memory.write_hold(self._site.root, None)
            hold = None
        self._hold = hold

    # a step

    async def step(self) -> bool:
        """Do what is due; True while a flip is under way. Raises nothing that belongs to a release or a neighbour."""
        self._look_at_hold()
        wanted = self._wanted()
        if wanted != self._for:
            self._for, self._again_at, self._patience_s, self._begun_s = wanted, 0.0, PATIENCE_FIRST_S, self._clock()
            self._refused = {one: why for one, why in self._refused.items() if one == wanted}
            self._hindrance = ""
        if self._clock() < self._again_at:
            return False
        self._waits = ""
        try:
            with self._judged():
                moving = await self._advance(wanted)
        except Refusal as refusal:
            await self._refuse(wanted, refusal)
            return True
        except Hindrance as hindrance:
            self._hinder(str(hindrance))
            return False
        self._hindrance, self._patience_s = "", PATIENCE_FIRST_S
        return moving

    @contextlib.contextmanager
    def _judged(self) -> Iterator[None]:
        """What may come out of a step, as refusal or hindrance."""
        try:
            yield
        except ProbeFault as error:
            raise Refusal(error.reason, str(error)) from error
        except BundleFault as error:
            raise Refusal("content", str(error)) from error
        except (TritonError, OSError) as error:
            raise Hindrance(str(error)) from error
        except (Refusal, Hindrance):
            raise
        except Exception as error:  # whose fault it is, is not known: what serves is served on, and it is tried again
            _logger.exception("a step failed")
            raise Hindrance(f"{type(error).__name__}: {error}") from error

    async def _advance(self, wanted: Wanted | None) -> bool:
        editions = self.editions
        target = None if wanted is None or wanted in self._refused else wanted
        if editions is None:
            if target is None:
                return False
            await self._prepare(target)
            self._alone(target.edition, None, target)
            return True
        target = None if target is None else self._as_far_as_it_goes(editions, target)
        if len(editions.load) > 1:
            return await self._turn(editions, wanted, target)
        if target is None or target.edition == editions.serve:
            return await self._settle(editions)
        editions = self._make_way(editions, target)
        await self._prepare(target)
        self._write(editions, load=[editions.serve, target.edition])
        self._reached("announced")
        return True

    async def _turn(self, editions: SiteEditions, wanted: Wanted | None, target: Wanted | None) -> bool:
        """Two editions are loaded: on to the other one, or finish where gateways are to be."""
        serve = editions.serve
        other = next(edition for edition in editions.load if edition != serve)
        failed = target is None and wanted is not None and wanted.edition == serve  # refused by who is to serve it
        if failed or (target is not None and target.edition == other):
            if await self._is_held(other, judged=not failed):
                self._reached("held")
                self._write(editions, serve=other, of=target)
                self._reached("turned")
        elif await self._all_are_on(serve, judged=target is not None and target.edition == serve):
            self._reached("drained")
            # The first of the two is what served when the flip began.
            self._alone(serve, editions.previous if serve == editions.load[0] else editions.load[0], target)
        return True

    # preparing

    async def _prepare(self, wanted: Wanted) -> None:
        """Bring an edition to disk and into Triton, and see that it is what it should be."""
        self._reached("begun")
        if wanted.held:
            await in_thread(lambda: self._verify_on_disk(wanted))
        else:
            await in_thread(lambda: self._releases.fetch(wanted, self._site))
        self._reached("fetched")
        await in_thread(lambda: self._check(wanted))
        self._reached("checked")
        bundle = self._site.bundle(wanted.bundle)
        await in_thread(lambda: render_repository(bundle, self._site.triton, self._class, self._injection))
        self._reached("rendered")
        model = RANKER.triton_name(wanted.bundle)
        if model in self._keeper.models:
            return  # another edition of the same bundle is served: deltas have no models
        recorded = self._recorded(wanted.bundle)
        self._keeper.spared.add(model)
        if not await self._door.is_live():
            raise Hindrance("tritonserver does not answer")
        try:
            await self._door.load(model)
            self._reached("loaded")
            measured = await probe(self._door, model, recorded)
        except TritonError as error:
            if await self._door.is_live():
                raise Refusal("triton", str(error)) from error
            raise
        self._reached("probed")
        self._keeper.adopt(model, recorded)
        _logger.info("model is probed", model=model, **dataclasses.asdict(measured))

    def _verify_on_disk(self, wanted: Wanted) -> None:
        verify(self._site.bundle(wanted.bundle))
        for path in self._site.delta_paths(wanted.edition):
            verify_delta(path)

    def _check(self, wanted: Wanted) -> None:
        """Raises Refusal or BundleFault."""
        manifest, _ = read_manifest(self._site.bundle(wanted.bundle))
        for reason, unmet in (
            ("site_class", manifest.requires.unmet(site_class=self._class)),
            ("onnxruntime", manifest.requires.unmet(onnxruntime=self._onnxruntime)),
        ):
            if unmet is not None:
                raise Refusal(reason, f"{m.MANIFEST}: it {unmet}")
        before = None
        for number, path in enumerate(self._site.delta_paths(wanted.edition), start=1):
            delta, identity = read_delta_manifest(path)
            if (delta.bundle, delta.number, delta.previous) != (wanted.bundle, number, before):
                stands = f"does not stand on delta {number - 1} of {wanted.bundle[: m.SHORT]}"
                raise Refusal("chain", f"{path.name} {stands}")
            before = identity

    def _as_far_as_it_goes(self, editions: SiteEditions, target: Wanted) -> Wanted:
        """`target`, or the part of it that fits what is loaded.

        An edition is named by how many deltas it has: before a site can go to another delta of a number that is
        loaded, everybody must have left that one. What both chains stand on comes between.
        """
        if target.held:
            return target  # by what is on disk, so that it fits
        there = self._site.installed_deltas(target.bundle)
        loaded = max((one.delta for one in editions.load if one.bundle == target.bundle), default=0)
        for number, delta in enumerate(target.deltas[:loaded], start=1):
            if there.get(number, delta) != delta:
                return dataclasses.replace(target, deltas=target.deltas[: number - 1])
        return target

    def _make_way(self, editions: SiteEditions, target: Wanted) -> SiteEditions:
        """Remove deltas, none of them loaded, in whose place `target` has others; what is now written."""
        if target.held:
            return editions
        for number, delta in self._site.installed_deltas(target.bundle).items():
            if number > len(target.deltas) or target.deltas[number - 1] == delta:
                continue
            previous = editions.previous
            if previous is not None and previous.bundle == target.bundle and previous.delta >= number:
                self._write(editions, previous=None)
                editions = self.editions or editions
            retention.remove_delta(self._site, target.bundle, number, delta)
        return editions

    def _recorded(self, bundle: str) -> Recorded:
        """Raises BundleFault."""
        path = self._site.bundle(bundle)
        try:
            probes = open_probes(path / m.PROBES)
        except (OSError, ValueError) as error:
            raise BundleFault(path, m.PROBES, str(error)) from error
        return Recorded.of(probes, self._class, planted_delay_ms=self._injection.ranker_delay_ms)

    # asking

    async def _is_held(self, edition: Edition, *, judged: bool) -> bool:
        """Whether Triton and retrieval have it ready. Raises Refusal when retrieval cannot open it, if `judged`."""
        model = RANKER.triton_name(edition.bundle)
        if not self._keeper.is_warm(model):
            self._waits = f"{model} in Triton: {self._keeper.missing.get(model, 'is being loaded')}"
            return False
        state = await self._neighbours.retrieval()
        if state is None:
            return True
        name = str(edition)
        if isinstance(state, Silence):
            self._waits = f"retrieval to hold {name}: {state.value}"
            return False
        if state.revision != self._revision:
            self._waits = f"retrieval to look at revision {self._revision} of the editions file"
            return False
        if judged and name in state.faults:
            raise Refusal("retrieval", state.faults[name])
        if name not in state.editions:
            self._waits = f"retrieval to hold {name}"
            return False
        return True

    async def _all_are_on(self, edition: Edition, *, judged: bool) -> bool:
        """Whether every gateway that runs answers from it alone. Raises Refusal when one cannot, if it is `judged`."""
        name = str(edition)
        for gateway, state in await self._neighbours.gateways():
            if state is Silence.ABSENT:
                continue  # it serves nothing, and reads the file when it starts
            if isinstance(state, Silence):
                self._waits = f"{gateway} to serve {name}: {state.value}"
                return False
            if state.revision != self._revision:
                self._waits = f"{gateway} to bring about revision {self._revision} of the editions file"
                return False
            if judged and name in state.faults:
                raise Refusal("gateway", state.faults[name])
            if (state.bundle, state.delta) != (edition.bundle[: m.SHORT], edition.delta):
                self._waits = f"{gateway} to serve {name}"
                return False
            if state.draining:
                self._waits = f"{gateway} to finish {state.draining} requests on the edition before {name}"
                return False
        return True

    # writing

    def _alone(self, edition: Edition, previous: Edition | None, wanted: Wanted | None) -> None:
        """The file says: this edition and no other."""
        before = self.editions
        self._store(
            SiteEditions(
                load=[edition],
                serve=edition,
                previous=previous,
                channel=wanted.channel
                if wanted is not None and not wanted.held
                else before.channel
                if before
                else None,
                sequence=wanted.sequence if wanted is not None else before.sequence if before else 0,
            )
        )
        self._reached("alone")
        if before is None or (previous is not None and previous != before.previous):
            self._flips.inc()
            seconds = 0.0 if self._begun_s is None else self._clock() - self._begun_s
            self._seconds.set(seconds)
            _logger.info(
                "serves",
                edition=str(edition),
                before=None if previous is None else str(previous),
                sequence=0 if wanted is None else wanted.sequence,
                seconds=round(seconds, 3),
            )

    def _write(
        self,
        editions: SiteEditions,
        *,
        load: list[Edition] | None = None,
        serve: Edition | None = None,
        previous: Edition | EllipsisType | None = ...,
        of: Wanted | None = None,
    ) -> None:
        self._store(
            SiteEditions(
                load=load or editions.load,
                serve=serve or editions.serve,
                previous=editions.previous if previous is ... else previous,
                channel=editions.channel if of is None or of.held else of.channel,
                sequence=editions.sequence if of is None else of.sequence,
            )
        )

    def _store(self, editions: SiteEditions) -> None:
        editions = msgspec.structs.replace(editions, revision=self._revision + 1)
        write_editions(self._site.editions, editions)
        self.editions, self._revision = editions, editions.revision
        self._settled = False

    async def _settle(self, editions: SiteEditions) -> bool:
        """One edition is served and nothing else is under way: unload and remove what nobody needs."""
        if self._settled:
            return False
        needed = {RANKER.triton_name(edition.bundle) for edition in editions.load}
        for model in sorted((set(self._keeper.models) | self._keeper.spared) - needed):
            if self._neighbours.watched or model in self._keeper.spared:
                await self._keeper.drop(model)
            else:
                del self._keeper.models[model]  # somebody unseen may be on it: the keeper waits a while
        self._reached("unloaded")
        kept = [*editions.load, *([editions.previous] if editions.previous else [])]
        if self._hold is not None:
            kept.append(self._hold.edition)
        gone = await in_thread(lambda: retention.clean(self._site, kept))
        if gone:
            _logger.info("bundles removed", bundles=[name[: m.SHORT] for name in gone])
        self._reached("cleaned")
        settle()
        self._settled = True
        return False

    def _as_it_is(self) -> SiteEditions | None:
        """What the file says, as far as it is on disk; the keeper gets the models. For the start."""
        try:
            editions = read_editions(self._site.editions)
        except EditionsFault as error:
            _logger.error("the editions file cannot be read: the site begins anew", fault=str(error))
            return None
        if editions is None:
            return None
        self._revision = editions.revision
        there: list[Edition] = []
        for edition in editions.load:
            try:
                self._site.delta_paths(edition)
                recorded = self._recorded(edition.bundle)
                (model,) = render_repository(
                    self._site.bundle(edition.bundle), self._site.triton, self._class, self._injection
                )
            except (BundleFault, OSError) as error:
                _logger.error("an edition is not on disk any more", edition=str(edition), fault=str(error))
                continue
            self._keeper.models[model] = recorded
            there.append(edition)
        if editions.serve not in there:
            return None
        previous = editions.previous
        if previous is not None and not self._is_on_disk(previous):
            _logger.error("the edition to go back to is not on disk any more", edition=str(previous))
            previous = None
        if (there, previous) != (editions.load, editions.previous):
            editions = msgspec.structs.replace(editions, load=there, previous=previous)
            with contextlib.suppress(OSError):  # a full disk keeps no agent from keeping models where they are
                told = msgspec.structs.replace(editions, revision=self._revision + 1)
                write_editions(self._site.editions, told)
                editions, self._revision = told, told.revision
        return editions

    def _is_on_disk(self, edition: Edition) -> bool:
        try:
            self._site.delta_paths(edition)
        except BundleFault:
            return False
        return self._site.bundle(edition.bundle).is_dir()

    def _newest_seen(self) -> Seen | None:
        """The newest pointer that this site saw: by the note of it, or, where that was lost, by what is served."""
        seen, editions = memory.read_seen(self._site.root), self.editions
        if editions is None or editions.channel is None:
            return seen
        served = Seen(channel=editions.channel, sequence=editions.sequence)
        if seen is None or (seen.channel == served.channel and seen.sequence < served.sequence):
            return served
        return seen

    # what goes wrong

    async def _refuse(self, wanted: Wanted | None, refusal: Refusal) -> None:
        """Keep what serves, say why, once, and let the channel or the operator say something else."""
        if wanted is None:
            return
        self._refused[wanted] = refusal
        self._refusals.labels(refusal.reason).inc()
        _logger.error("refused", edition=str(wanted.edition), reason=refusal.reason, fault=str(refusal))
        if wanted.held and self._hold is not None:
            answer = Hold(
                edition=self._hold.edition, sequence=self._hold.sequence, refused=f"{refusal.reason}: {refusal}"
            )
            with contextlib.suppress(OSError):
                memory.write_hold(self._site.root, answer)
        self._settled = False
        model = RANKER.triton_name(wanted.bundle)
        loaded = [] if self.editions is None else self.editions.load
        if model not in {RANKER.triton_name(edition.bundle) for edition in loaded}:
            with contextlib.suppress(TritonError):  # then it goes with the next unloading
                await self._keeper.drop(model)

    def _hinder(self, why: str) -> None:
        if why != self._hindrance:
            _logger.warning("hindered", by=why, again_in_s=self._patience_s)
        self._hindrance = why
        self._again_at = self._clock() + self._patience_s
        self._patience_s = min(2 * self._patience_s, PATIENCE_LAST_S)
