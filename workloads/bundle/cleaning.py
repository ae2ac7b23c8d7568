"""Cleaning up the registry: what nothing points to any more goes, and nothing else.

A release goes signature first, then manifest, then the files that only it named, so that a clean-up which is cut off
leaves each release either published whole or not published, and the next one finds the rest. Each removal says before
when the thing must have been written: who writes something anew meanwhile, because they want it, keeps it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import msgspec

from workloads.bundle.releases import BUNDLE, DELTA, Files, Form, read_files, spread, written
from workloads.contract.storage import ChannelPointer, object_key
from workloads.objects.store import Locked, NotFound, ObjectStore


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """Something that cleaning would have removed, and why it is still there."""

    key: str
    reason: str
    until_ms: int | None = None
    """When Object Lock lets go of it."""


class Cleaned(msgspec.Struct, frozen=True, kw_only=True):
    """What cleaning removed, or with `dry_run` would try to."""

    dry_run: bool
    bundles: list[str]
    deltas: list[str]
    objects: int
    bytes: int
    """Of the objects that were removed."""
    kept: list[Kept]


@dataclasses.dataclass
class Cleaning:
    """One run."""

    objects: ObjectStore
    pointers: Iterable[ChannelPointer]
    keep: int
    """So many of the newest bundles stay whether somebody points to them or not."""
    cutoff_ms: int
    """What was written since then stays, by the store's clock."""
    dry_run: bool
    parallel: int
    announce: Callable[[int, int], None]
    """Told how many bundles and deltas are to go, before the first does."""
    kept: list[Kept] = dataclasses.field(default_factory=list)

    def run(self) -> Cleaned:
        """Raises RegistryFault when a manifest cannot be read, ObjectsError."""
        releases = [
            release
            for pointer in self.pointers
            for release in (pointer.current, pointer.previous, pointer.left)
            if release is not None
        ]
        signatures = written(self.objects, BUNDLE.signature_key)
        newest = sorted(signatures, key=lambda bundle: (-signatures[bundle], bundle))[: self.keep]
        pinned = {release.bundle for release in releases} | set(newest)
        dead_bundles = [one for one in self._old(BUNDLE) if one not in pinned]
        staying = set(self._all(BUNDLE)) - set(dead_bundles)
        pinned_deltas = {delta for release in releases for delta in release.deltas}
        old_deltas = [one for one in self._old(DELTA) if one not in pinned_deltas]
        bases = dict(zip(old_deltas, self._read(DELTA, old_deltas), strict=True))
        dead_deltas = [one for one, base in bases.items() if base is None or base.bundle not in staying]
        self.announce(len(dead_bundles), len(dead_deltas))
        gone_bundles = [one for one in dead_bundles if self._retire(BUNDLE, one)]
        # A bundle that somebody took up again, or that is locked, keeps its deltas.
        back = set(dead_bundles) - set(gone_bundles)
        gone_deltas = [
            one
            for one in dead_deltas
            if not ((base := bases[one]) is not None and base.bundle in back) and self._retire(DELTA, one)
        ]
        live = {
            entry.sha256
            for form, gone in ((BUNDLE, gone_bundles), (DELTA, gone_deltas))
            for files in self._read(form, sorted(set(self._all(form)) - set(gone)))
            if files is not None
            for entry in files.files.values()
        }
        count, size = self._sweep(live)
        return Cleaned(
            dry_run=self.dry_run,
            bundles=gone_bundles,
            deltas=gone_deltas,
            objects=count,
            bytes=size,
            kept=self.kept,
        )

    def _all(self, form: Form) -> dict[str, int]:
        """Every release that has a manifest or a signature, and when the later of the two was written."""
        found = written(self.objects, form.manifest_key)
        for identity, when in written(self.objects, form.signature_key).items():
            found[identity] = max(when, found.get(identity, when))
        return found

    def _old(self, form: Form) -> list[str]:
        return [identity for identity, when in self._all(form).items() if when < self.cutoff_ms]

    def _read(self, form: Form, identities: Iterable[str]) -> list[Files | None]:
        return list(spread(lambda one: read_files(self.objects, form, one), identities, self.parallel))

    def _retire(self, form: Form, identity: str) -> bool:
        """Take a release out of circulation; False when it stays after all."""
        signature, manifest = form.signature_key(identity), form.manifest_key(identity)
        if self.dry_run:
            return True
        return all(self._remove(key) or not self._exists(key) for key in (signature, manifest))

    def _exists(self, key: str) -> bool:
        try:
            self.objects.head(key)
        except NotFound:
            return False
        return True

    def _sweep(self, live: set[str]) -> tuple[int, int]:
        """Remove the files that nothing names; how many, and their bytes."""
        prefix = object_key("")
        orphans = [
            listed
            for listed in self.objects.list(prefix)
            if listed.key.removeprefix(prefix) not in live and listed.modified_ms < self.cutoff_ms
        ]
        if self.dry_run:
            return len(orphans), sum(listed.size for listed in orphans)
        done = list(spread(lambda listed: self._remove(listed.key), orphans, self.parallel))
        removed = [listed for listed, gone in zip(orphans, done, strict=True) if gone]
        return len(removed), sum(listed.size for listed in removed)

    def _remove(self, key: str) -> bool:
        try:
            return self.objects.delete(key, written_before_ms=self.cutoff_ms)
        except Locked as lock:
            until = int(lock.until.timestamp() * 1000) if lock.until else None
            self.kept.append(Kept(key=key, reason=lock.fault, until_ms=until))
            return False
