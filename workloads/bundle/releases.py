"""What the registry holds: releases, which are bundles and deltas, and where their parts lie in the store.

Both are a directory with a manifest that names its files; they differ in names, keys and checks, which are in a `Form`
each. It reads, and writes nothing.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from workloads.bundle import delta as d
from workloads.bundle import manifest as m
from workloads.bundle.channels import RegistryFault
from workloads.bundle.verification import MANIFEST_MAX, check_content, read_manifest, verify
from workloads.contract.storage import delta_key, delta_signature_key, manifest_key, signature_key
from workloads.objects.store import Damaged, NotFound, ObjectStore

_T = TypeVar("_T")
_R = TypeVar("_R")


class NotPublished(RegistryFault):
    """The registry has no such release, or not all of it."""

    def __init__(self, what: str, reason: str = "it is not in the registry") -> None:
        super().__init__(f"{what} is not published: {reason}", "publish it: `rankbridge bundle publish`")


@dataclasses.dataclass(frozen=True)
class Form:
    """What sets bundles and deltas apart: names, keys, and the checks of a directory. The checks raise BundleFault."""

    word: str
    manifest: str
    manifest_max: int
    """Bytes."""
    manifest_key: Callable[[str], str]
    signature_key: Callable[[str], str]
    read: Callable[[Path], tuple[object, str]]
    """The manifest of a directory and the id it stands for; refuses unknown schemas and paths that leave it."""
    check: Callable[[Path], object]
    """Digests and content of a directory, whatever it is called."""
    verify: Callable[[Path], object]
    """The same, and its name."""

    def named(self, identity: str) -> str:
        """For messages."""
        return f"{self.word} {identity[:12]}"


def _check_bundle(directory: Path) -> object:
    manifest, _ = read_manifest(directory)
    check_content(directory, manifest)
    return manifest


BUNDLE: Final = Form(
    "bundle", m.MANIFEST, MANIFEST_MAX, manifest_key, signature_key, read_manifest, _check_bundle, verify
)
DELTA: Final = Form(
    "delta",
    d.DELTA_MANIFEST,
    d.MANIFEST_MAX,
    delta_key,
    delta_signature_key,
    d.read_delta_manifest,
    d.check_delta,
    d.verify_delta,
)


class Files(msgspec.Struct, frozen=True):
    """The part of a manifest, of whatever form and version, that names its files; and the bundle of a delta."""

    files: dict[str, m.FileEntry]
    bundle: str | None = None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(entry.size for entry in self.files.values())

    def distinct(self) -> list[str]:
        """One name for each digest: equal files are one object."""
        return sorted({entry.sha256: name for name, entry in sorted(self.files.items(), reverse=True)}.values())


def manifest_bytes(objects: ObjectStore, form: Form, identity: str) -> bytes:
    """Raises NotPublished; Damaged for bytes that are not the id's; RegistryFault for too many."""
    key = form.manifest_key(identity)
    try:
        if objects.head(key).size > form.manifest_max:
            raise RegistryFault(f"{key} is larger than {form.manifest_max} bytes", "it is not ours: remove it")
        return objects.get(key, sha256=identity).data
    except NotFound:
        raise NotPublished(form.named(identity)) from None


def read_files(objects: ObjectStore, form: Form, identity: str) -> Files | None:
    """What a manifest names; None when there is none, or its bytes are not the ones that its id stands for."""
    try:
        data = manifest_bytes(objects, form, identity)
    except (NotPublished, Damaged):
        return None
    try:
        return msgspec.json.decode(data, type=Files)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        fault = f"{form.manifest_key(identity)} names its files in a way that this release cannot read: {error}"
        raise RegistryFault(fault, "use the release that published it") from None


def written(objects: ObjectStore, key: Callable[[str], str]) -> dict[str, int]:
    """Id of every release that has an object of this kind (`form.signature_key`), and when that was written."""
    prefix, _, suffix = key("\n").partition("\n")
    return {
        listed.key[len(prefix) : -len(suffix)]: listed.modified_ms
        for listed in objects.list(prefix)
        if listed.key.endswith(suffix)
    }


def spread(work: Callable[[_T], _R], over: Iterable[_T], parallel: int) -> Iterator[_R]:
    """Results in order, `parallel` at a time; the first fault ends it, and what had not begun is not begun."""
    if parallel == 1:
        yield from map(work, over)
        return
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(work, one) for one in over]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
