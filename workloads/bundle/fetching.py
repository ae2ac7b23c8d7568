"""Bringing a release from the store to a disk: checked before it appears, and it appears whole.

Everything goes into a hidden directory named after the release, locked while somebody works on it. Files take their
names there once their digest is right, so that the next try goes on behind them; whatever is refused takes the
whole directory with it. It asks nothing of a store when a good copy is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from workloads.bundle import manifest as m
from workloads.bundle.channels import RegistryFault
from workloads.bundle.incoming import file_entry
from workloads.bundle.releases import Files, Form, NotPublished, manifest_bytes, spread
from workloads.bundle.signature import SIGNATURE_MAX, SignatureFault, Trust, signature_path, verify_signature
from workloads.bundle.verification import BundleFault
from workloads.contract.storage import object_key
from workloads.objects.store import Damaged, NotFound, ObjectStore

PART_BYTES: Final = 8 << 20
"""Files above this are fetched in several ranges at once."""
MARGIN_BYTES: Final = 64 << 20
"""Disk that a fetch leaves free."""
ABANDONED_S: Final = 7 * 24 * 3600.0
"""After so long nobody goes on with an interrupted fetch."""
_HIDDEN: Final = ".fetch-"


class Fetch:
    """Fetches from one store for a site that trusts these keys; `parallel` files or ranges travel at once."""

    def __init__(self, objects: ObjectStore, trust: Trust, parallel: int) -> None:
        self._objects = objects
        self._trust = trust
        self._parallel = parallel

    def __call__(self, form: Form, identity: str, final: Path) -> Path:
        """Bring a release to `final`, its signature beside it. Raises as `Registry.fetch`."""
        final.parent.mkdir(parents=True, exist_ok=True)
        _forget_the_abandoned(final.parent)
        with _workplace(final.parent / f"{_HIDDEN}{identity}") as work:
            if self._good(form, final):
                shutil.rmtree(work)
                return final
            try:
                self._gather(form, identity, work / final.name)
            except (BundleFault, SignatureFault, Damaged, NotPublished):
                shutil.rmtree(work)
                raise
            _appear(work, final)
        return final

    def _good(self, form: Form, final: Path) -> bool:
        """Whether a verified and signed copy is there already."""
        if not final.is_dir():
            return False
        try:
            form.verify(final)
            verify_signature(final, signature_path(final), self._trust)
        except (BundleFault, SignatureFault):
            return False
        return True

    def _gather(self, form: Form, identity: str, target: Path) -> None:
        """Everything of a release into `target`, its signature beside it; checked. What is there and right stays."""
        data = manifest_bytes(self._objects, form, identity)
        signature = self._signature(form, identity)
        statement = self._trust.statement(signature, form.signature_key(identity))
        target.mkdir(exist_ok=True)
        _write(target / form.manifest, data)
        _write(signature_path(target), signature)
        form.read(target)  # before any name in it is used
        files = msgspec.json.decode(data, type=Files).files
        if statement.files != {name: entry.sha256 for name, entry in files.items()} | {form.manifest: identity}:
            fault = f"is not of the files that {form.named(identity)} names"
            raise SignatureFault(form.signature_key(identity), fault, f"publish the {form.word} again, signed")
        wanted = [name for name, entry in sorted(files.items()) if not _is(target / name, entry)]
        need, free = sum(files[name].size for name in wanted), shutil.disk_usage(target).free
        if need > free - MARGIN_BYTES:
            fault = f"{form.named(identity)} needs {need} bytes, and {target.parent.parent} has {free} free"
            raise RegistryFault(fault, "make room there")
        self._download(target, files, wanted)
        form.check(target)
        verify_signature(target, signature_path(target), self._trust)

    def _signature(self, form: Form, identity: str) -> bytes:
        key = form.signature_key(identity)
        try:
            if self._objects.head(key).size > SIGNATURE_MAX:
                raise SignatureFault(key, f"is larger than {SIGNATURE_MAX} bytes", "it is not ours: remove it")
            return self._objects.get(key).data
        except NotFound:
            raise SignatureFault(key, "is missing", f"publish the {form.word} again, signed") from None

    def _download(self, target: Path, files: Mapping[str, m.FileEntry], wanted: Sequence[str]) -> None:
        """The files `wanted`, in ranges of PART_BYTES; each takes its name once its digest is right."""
        partial = target.parent / "partial"
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        ranges: list[tuple[str, int, int]] = []
        for name in wanted:
            size = files[name].size
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with (partial / _flat(name)).open("wb") as file:
                file.truncate(size)
            ranges += [(name, start, min(PART_BYTES, size - start)) for start in range(0, size, PART_BYTES)]
        left = {name: sum(1 for other, _, _ in ranges if other == name) for name in wanted}

        def bring(part: tuple[str, int, int]) -> str:
            name, start, length = part
            key = object_key(files[name].sha256)
            try:
                data = self._objects.get_range(key, start, length)
            except NotFound:
                raise NotPublished(name, f"{key} is missing") from None
            if len(data) != length:
                reason = f"was cut short: {key} gave {len(data)} bytes from byte {start}, not {length}"
                raise BundleFault(target, name, reason)
            with (partial / _flat(name)).open("r+b") as file:
                file.seek(start)
                file.write(data)
            return name

        for name in (name for name in wanted if not files[name].size):
            self._take(partial / _flat(name), target, name, files[name])
        for name in spread(bring, ranges, self._parallel):
            left[name] -= 1
            if not left[name]:
                self._take(partial / _flat(name), target, name, files[name])
        shutil.rmtree(partial)

    @staticmethod
    def _take(path: Path, target: Path, name: str, entry: m.FileEntry) -> None:
        found = file_entry(path)
        if found != entry:
            reason = f"was altered: its sha256 is {found.sha256}, the manifest says {entry.sha256}"
            raise BundleFault(target, name, reason)
        path.chmod(0o644)
        _force(path)
        path.replace(target / name)


def _appear(work: Path, final: Path) -> None:
    """Let a finished directory take its place, the signature first: what is there is signed."""
    fresh = work / final.name
    for path in (*(path for path in fresh.rglob("*") if path.is_dir()), fresh):
        path.chmod(0o755)
        _force(path)
    signature_path(fresh).replace(signature_path(final))
    _force(final.parent)
    damaged = work / "damaged"
    if damaged.exists():
        shutil.rmtree(damaged)
    if final.exists():
        # Into the hidden directory, so that a reader never sees half of it.
        final.rename(damaged)
    fresh.rename(final)
    _force(final.parent)
    shutil.rmtree(work)


@contextlib.contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """The hidden directory, ours alone: whoever comes meanwhile waits, and then finds the release there."""
    while True:
        path.mkdir(exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its owner finished between the two lines
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                yield path
                return
        finally:
            os.close(descriptor)


def _forget_the_abandoned(parent: Path) -> None:
    """Remove what interrupted fetches left that nobody went on with for ABANDONED_S."""
    for path in parent.glob(f"{_HIDDEN}*"):
        with contextlib.suppress(OSError):  # somebody works on it, or it is gone
            if time.time() - path.stat().st_mtime < ABANDONED_S:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(descriptor)


def _is(path: Path, entry: m.FileEntry) -> bool:
    """Whether an earlier try left the file, and it is right."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size == entry.size and file_entry(path) == entry


def _flat(name: str) -> str:
    """A file name that stands for a path."""
    return hashlib.sha256(name.encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)


def _force(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
