"""The registry of bundles and deltas over object storage: publish, fetch, point channels at them, clean up.

A *release*, a bundle or a delta, is published in an order in which every moment is a good one to die at: files under
their digests, then the manifest, then the signature, and only with that is it there. Fetching is the same backwards
(`workloads.bundle.fetching`). Nothing that a channel points to is ever cleaned up (`workloads.bundle.cleaning`): what
is used anew is written anew once it is older than half of the grace period, and cleaning removes only what was written
before its grace period began, so that neither can take the ground from under the other.

It knows no site, no Triton and no job; endpoint and credentials are the object store's affair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from workloads.bundle import manifest as m
from workloads.bundle.channels import Audit, ChannelConflict, Channels, NoChannel, RegistryFault
from workloads.bundle.cleaning import Cleaned, Cleaning, Kept
from workloads.bundle.delta import directory_name
from workloads.bundle.difference import Difference, compare
from workloads.bundle.fetching import Fetch
from workloads.bundle.releases import (
    BUNDLE,
    DELTA,
    Files,
    Form,
    NotPublished,
    manifest_bytes,
    read_files,
    spread,
    written,
)
from workloads.bundle.signature import SignatureFault, Trust, verify_signature
from workloads.bundle.verification import BundleFault
from workloads.contract.storage import ChannelPointer, Release, object_key
from workloads.contract.tensors import FeatureSchema
from workloads.objects.store import Conflict, Content, NotFound, ObjectStore

__all__ = [
    "BundleFault",
    "ChannelConflict",
    "Cleaned",
    "Difference",
    "Kept",
    "Listing",
    "NoChannel",
    "NotPublished",
    "Published",
    "Registry",
    "RegistryFault",
    "SignatureFault",
]

GRACE_MS: Final = 24 * 3600 * 1000
"""What was written since then is never cleaned up: its publisher may be about to name it."""
PARALLEL: Final = 8


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """How a publish ended."""

    id: str
    files: int
    bytes: int
    """Of all files."""
    sent: int
    """Bytes of files that the registry did not have."""
    existed: bool
    """It had been published before."""


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """One published bundle."""

    id: str
    published_ms: int
    """By the store's clock, when the signature was written."""
    created_ms: int
    dataset: str
    items: int
    bytes: int
    signer: str | None
    """Name of the trusted key that the signature names; None for a stranger's. Nothing is verified for a listing."""
    deltas: int
    """Published deltas for it."""
    channels: list[str]
    """Channels that point to it: `stable`, `stable (previous)`."""


@dataclasses.dataclass(frozen=True)
class Registry:
    """One models bucket, and whose signatures count.

    `audit` gets a line before each publish, move and clean-up takes effect. `parallel` is how many files or ranges
    travel at once.
    """

    objects: ObjectStore
    trust: Trust
    _: dataclasses.KW_ONLY
    audit: Audit | None = None
    clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    grace_ms: int = GRACE_MS
    parallel: int = PARALLEL

    @property
    def channels(self) -> Channels:
        """The pointers, without regard to what they point to."""
        return Channels(self.objects, audit=self.audit, clock_ms=self.clock_ms)

    # releases

    def publish(self, bundle: Path, signature: Path, *, actor: str) -> Published:
        """Publish a bundle; again is harmless and completes what was begun.

        Raises BundleFault, SignatureFault: what lies there may not be published. ObjectsError.
        """
        return self._publish(BUNDLE, bundle, signature, actor)

    def publish_delta(self, delta: Path, signature: Path, *, actor: str) -> Published:
        """Publish a delta (a directory `<number>-<id>`), as `publish`."""
        return self._publish(DELTA, delta, signature, actor)

    def fetch(self, bundle_id: str, bundles: Path) -> Path:
        """Bring a bundle to `<bundles>/<id>`, its signature to `<id>.sig` beside it; returns the directory.

        A good signed copy there stays, and the store is not asked. What is refused leaves nothing behind; what was
        interrupted goes on behind the files that were checked. Raises NotPublished, BundleFault, SignatureFault,
        ObjectsError, and RegistryFault where the disk is too small.
        """
        return Fetch(self.objects, self.trust, self.parallel)(BUNDLE, bundle_id, bundles / bundle_id)

    def fetch_delta(self, delta_id: str, deltas: Path, bundle_id: str, number: int) -> Path:
        """Bring a delta to `<deltas>/<bundle id>/<number>-<delta id>`, as `fetch`."""
        final = deltas / bundle_id / directory_name(number, delta_id)
        return Fetch(self.objects, self.trust, self.parallel)(DELTA, delta_id, final)

    # channels

    def pointer(self, channel: str) -> tuple[ChannelPointer, str]:
        """The channel's pointer and its etag. Raises NoChannel, RegistryFault, ObjectsError."""
        return self.channels.read(channel)

    def promote(self, channel: str, release: Release, actor: str, *, expect: int | None = None) -> ChannelPointer:
        """Point a channel to a release that is published whole and signed by somebody trusted.

        Raises NotPublished, SignatureFault, ChannelConflict (`winner`), ObjectsError.
        """
        self._require(release)
        return self.channels.promote(channel, release, actor, expect=expect)

    def rollback(self, channel: str, actor: str, *, expect: int | None = None) -> ChannelPointer:
        """Point a channel to what it pointed to before; asked for twice it happens once. Raises as `promote`."""
        pointer, _ = self.channels.read(channel)
        if pointer.previous is not None:
            self._require(pointer.previous)
        return self.channels.rollback(channel, actor, expect=expect)

    # looking

    def list(self) -> Sequence[Listing]:
        """Every published bundle, the newest first."""
        signatures = written(self.objects, BUNDLE.signature_key)
        ids = written(self.objects, DELTA.signature_key)
        deltas = [files for files in self._spread_files(DELTA, [*ids]) if files is not None]
        seen: dict[str, list[str]] = {}
        for pointer in self.channels.all():
            for release, word in ((pointer.current, ""), (pointer.previous, " (previous)")):
                if release is not None:
                    seen.setdefault(release.bundle, []).append(pointer.channel + word)

        def one(bundle: str) -> Listing | None:
            try:
                manifest = self.manifest(bundle)
                signature = self.objects.get(BUNDLE.signature_key(bundle)).data
            except (NotFound, RegistryFault):
                return None  # being removed, or of a release that we cannot read
            signer: str | None = None
            with contextlib.suppress(SignatureFault):
                signer = self.trust.signer(signature, BUNDLE.signature_key(bundle)).name
            return Listing(
                id=bundle,
                published_ms=signatures[bundle],
                created_ms=manifest.created_ms,
                dataset=manifest.dataset,
                items=manifest.ann.items,
                bytes=sum(entry.size for entry in manifest.files.values()),
                signer=signer,
                deltas=sum(1 for delta in deltas if delta.bundle == bundle),
                channels=seen.get(bundle, []),
            )

        found = [listing for listing in spread(one, signatures, self.parallel) if listing is not None]
        return sorted(found, key=lambda listing: (-listing.published_ms, listing.id))

    def manifest(self, bundle: str) -> m.Manifest:
        """The manifest of a published bundle. Raises NotPublished; RegistryFault for one that cannot be read."""
        data = manifest_bytes(self.objects, BUNDLE, bundle)
        try:
            return m.decode(data)
        except ValueError as error:
            fault = f"{BUNDLE.manifest_key(bundle)}: {error}"
            raise RegistryFault(fault, "use the release of rankbridge that published it") from None

    def resolve(self, prefix: str) -> str:
        """The one published bundle whose id begins with `prefix`. Raises RegistryFault."""
        found = [bundle for bundle in written(self.objects, BUNDLE.signature_key) if bundle.startswith(prefix)]
        if len(found) != 1:
            what = "no published bundle has" if not found else f"{len(found)} published bundles have"
            raise RegistryFault(f"{what} an id that begins with {prefix!r}", "see `rankbridge bundle list`")
        return found[0]

    def diff(self, before: str, after: str) -> Difference:
        """What changed from one published bundle to another. Raises as `manifest`."""

        def side(bundle: str) -> tuple[str, m.Manifest, FeatureSchema]:
            manifest = self.manifest(bundle)
            digest = manifest.files[m.FEATURES].sha256
            data = self.objects.get(object_key(digest), sha256=digest).data
            return bundle, manifest, msgspec.json.decode(data, type=FeatureSchema)

        return compare(side(before), side(after))

    # cleaning up

    def gc(self, keep: int, *, actor: str, dry_run: bool = False) -> Cleaned:
        """Remove bundles beyond the `keep` newest, their deltas, and files that nothing names.

        What a channel points to, would go back to, or was rolled back from stays, with all its deltas; so does what was
        written within the grace period, and what Object Lock holds, which is reported. Raises RegistryFault at a
        manifest or pointer that cannot be read: what it names cannot be known. ObjectsError.
        """

        def announce(bundles: int, deltas: int) -> None:
            if not dry_run:
                self._record("registry.gc", actor, "models", {"keep": keep, "bundles": bundles, "deltas": deltas})

        return Cleaning(
            objects=self.objects,
            pointers=[*self.channels.all()],
            keep=keep,
            cutoff_ms=self.clock_ms() - self.grace_ms,
            dry_run=dry_run,
            parallel=self.parallel,
            announce=announce,
        ).run()

    # inside

    def _publish(self, form: Form, directory: Path, signature: Path, actor: str) -> Published:
        directory = directory.resolve()
        form.verify(directory)
        _, identity = form.read(directory)
        verify_signature(directory, signature, self.trust)
        data = (directory / form.manifest).read_bytes()
        named = msgspec.json.decode(data, type=Files)
        existed = self._signed(form, identity, directory)
        if not existed:
            facts = {"files": len(named.files), "bytes": named.bytes}
            self._record(f"{form.word}.publish", actor, identity, facts)
        sent = spread(
            lambda name: self._put(object_key(named.files[name].sha256), directory / name),
            named.distinct(),
            self.parallel,
        )
        total = sum(sent)
        self._put(form.manifest_key(identity), data)
        try:
            self._freshen(form.signature_key(identity))
        except NotFound:
            self.objects.put_new(form.signature_key(identity), signature.read_bytes())
        return Published(id=identity, files=len(named.files), bytes=named.bytes, sent=total, existed=existed)

    def _signed(self, form: Form, identity: str, directory: Path) -> bool:
        """Whether a good signature is there; each signing gives other bytes, so it need not be the one at hand.

        Raises SignatureFault when one is there that is not good: it is not ours to remove.
        """
        key = form.signature_key(identity)
        try:
            data = self.objects.get(key).data
        except NotFound:
            return False
        with tempfile.TemporaryDirectory() as scratch:
            there = Path(scratch) / "published.sig"
            there.write_bytes(data)
            try:
                verify_signature(directory, there, self.trust)
            except SignatureFault as fault:
                remedy = "find out who put it there, remove it, and publish again"
                raise SignatureFault(key, fault.reason, remedy) from None
        return True

    def _put(self, key: str, content: Content) -> int:
        """Bytes sent for an object that is now there and young; 0 when it was there."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        while True:
            put = self.objects.put_new(key, content)
            if not put.existed:
                return size
            if put.modified_ms >= self._young_since():
                return 0
            # Old, and perhaps about to be cleaned up: written anew, it is out of reach.
            with contextlib.suppress(Conflict, NotFound):  # somebody else did the same, or it is gone: look again
                self.objects.replace(key, content, put.etag)
                return 0

    def _freshen(self, key: str) -> None:
        """Write a small object anew when it is old. Raises NotFound when it is gone."""
        while self.objects.head(key).modified_ms < self._young_since():
            got = self.objects.get(key)
            with contextlib.suppress(Conflict):  # somebody else did the same: look again
                self.objects.replace(key, got.data, got.etag)
                return

    def _young_since(self) -> int:
        return self.clock_ms() - self.grace_ms // 2

    def _require(self, release: Release) -> None:
        """Raises NotPublished for a release that is not there whole, SignatureFault for a stranger's."""
        self._require_one(BUNDLE, release.bundle)
        for delta in release.deltas:
            base = self._require_one(DELTA, delta).bundle
            if base != release.bundle:
                fault = f"{DELTA.named(delta)} is for bundle {base}, not for {release.bundle}"
                raise RegistryFault(fault, "name deltas of this bundle")

    def _require_one(self, form: Form, identity: str) -> Files:
        key = form.signature_key(identity)
        try:
            self._freshen(key)
            signature = self.objects.get(key).data
        except NotFound:
            raise NotPublished(form.named(identity), "it has no signature") from None
        statement = self.trust.statement(signature, key)
        named = read_files(self.objects, form, identity)
        if named is None:
            raise NotPublished(form.named(identity), "it has no manifest that is its own")
        if statement.files.get(form.manifest) != identity:
            raise SignatureFault(key, f"is not of {form.named(identity)}", "publish it again, signed")

        def fault(name: str) -> str | None:
            try:
                size = self.objects.head(object_key(named.files[name].sha256)).size
            except NotFound:
                return f"{name} is missing"
            return None if size == named.files[name].size else f"{name} has another size"

        for found in spread(fault, named.distinct(), self.parallel):
            if found is not None:
                raise NotPublished(form.named(identity), found)
        return named

    def _spread_files(self, form: Form, identities: Sequence[str]) -> Sequence[Files | None]:
        return [*spread(lambda one: read_files(self.objects, form, one), identities, self.parallel)]

    def _record(self, action: str, actor: str, subject: str, detail: dict[str, int]) -> None:
        if self.audit is not None:
            self.audit(action=action, actor=actor, subject=subject, detail=detail)
