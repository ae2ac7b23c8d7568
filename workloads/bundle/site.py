"""A site's directory: where its bundles and deltas lie, and the file that says which of them are served.

    <site>/editions.json                            written by the agent alone, replaced whole
    <site>/bundles/<id>/
    <site>/deltas/<bundle id>/<number>-<delta id>/
    <site>/triton/                                  the rendered model repository

It knows files, and neither servers nor channels.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import msgspec

from workloads.bundle.store import Bundle, BundleFault, open_bundle
from workloads.contract.editions import EDITIONS_FILE, Edition, SiteEditions

LOOK_EVERY_S: Final = 0.2
"""Between two looks at the editions file: a stat."""

_DELTA: Final = re.compile(r"([1-9][0-9]{0,5})-([0-9a-f]{64})")


class EditionsFault(ValueError):  # noqa: N818 - as BundleFault
    """An editions file that says nothing that could be brought about; the message names file and reason."""


class SiteDirectory:
    """The paths below one site's directory. Looks at nothing until asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bundles = root / "bundles"
        self.deltas = root / "deltas"
        self.triton = root / "triton"
        self.editions = root / EDITIONS_FILE

    def bundle(self, identity: str) -> Path:
        """Where the bundle of this id lies, or would."""
        return self.bundles / identity

    def delta_folder(self, bundle: str, number: int, delta: str) -> Path:
        """Where this delta of a bundle lies, or would; numbers begin at 1."""
        return self.deltas / bundle / f"{number}-{delta}"

    def installed_deltas(self, bundle: str) -> dict[int, str]:
        """Number to id of every delta of a bundle that is on disk; two of one number: the later id by name."""
        folder = self.deltas / bundle
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return {int(found[1]): found[2] for name in names if (found := _DELTA.fullmatch(name))}

    def delta_paths(self, edition: Edition) -> list[Path]:
        """The directories of an edition's deltas, in order. Raises BundleFault when one is not there."""
        there = self.installed_deltas(edition.bundle) if edition.delta else {}
        for number in range(1, edition.delta + 1):
            if number not in there:
                raise BundleFault(self.deltas / edition.bundle, "", f"delta {number} of {edition.delta} is not there")
        return [self.delta_folder(edition.bundle, n, there[n]) for n in range(1, edition.delta + 1)]

    def open(self, edition: Edition) -> Bundle:
        """The edition, opened for serving. Raises BundleFault."""
        return open_bundle(self.bundle(edition.bundle), self.delta_paths(edition))


def read_editions(path: Path) -> SiteEditions | None:
    """What a site serves; None while nothing does. Raises EditionsFault."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=SiteEditions)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise EditionsFault(f"{path}: {error}") from None
    if found.schema_version != 1:
        raise EditionsFault(f"{path}: schema version {found.schema_version}; this release reads version 1")
    if found.serve not in found.load:
        raise EditionsFault(f"{path}: it serves {found.serve}, which it does not load")
    return found


def write_editions(path: Path, editions: SiteEditions) -> None:
    """Replace the file: whoever looks, also after a power cut, sees the one before or this one, whole."""
    replace_file(path, msgspec.json.format(msgspec.json.encode(editions), indent=2) + b"\n")


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, force it to disk and let it take its place. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Force a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class EditionsWatch:
    """Says when the editions file was replaced; a look is a stat."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None

    def changed(self) -> SiteEditions | None:
        """What the file says, if that is new since the last look. Raises EditionsFault, once for each version."""
        try:
            found = self.path.stat()
        except OSError:
            return None  # not written yet, or away for a moment: what is served is served on
        mark = (found.st_mtime_ns, found.st_ino, found.st_size)
        if mark == self._seen:
            return None
        # Before reading: a version that came after the stat is looked at once more, which changes nothing.
        self._seen = mark
        return read_editions(self.path)
