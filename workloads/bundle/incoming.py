"""Directories that are there whole or not at all: written beside their place, forced to disk, renamed into it.

What writers that were killed left behind goes when the next one begins. It knows nothing of what the
directories hold; who publishes says how one that is there already is held good.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from workloads.bundle.manifest import FileEntry

_PREFIX: Final = ".incoming-"


@contextlib.contextmanager
def incoming_directory(parent: Path) -> Iterator[Path]:
    """A hidden directory below `parent`, gone at the end unless it was published."""
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{_PREFIX}*"):
        if not _is_alive(leftover.name.removeprefix(_PREFIX).split("-")[0]):
            shutil.rmtree(leftover, ignore_errors=True)
    incoming = parent / f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    incoming.mkdir()
    try:
        yield incoming
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def publish_directory(incoming: Path, final: Path, verify: Callable[[Path], object]) -> Path:
    """Force `incoming` to disk and let it appear as `final`, unless a good one is there already.

    `verify` raises ValueError for a directory that is not good: a damaged one at `final` is replaced, and
    what appeared is verified once more.
    """
    for path in (*incoming.rglob("*"), incoming):
        # A scratch directory's modes came along; what is published is for every process of the site to read.
        path.chmod(0o755 if path.is_dir() else 0o644)
        _sync(path)
    if final.exists():
        try:
            verify(final)
        except ValueError:
            # Moved into the hidden directory's place-to-be-removed, so that a reader never sees half of it.
            shutil.move(final, incoming.with_name(f"{incoming.name}-damaged"))
        else:
            return final
    incoming.rename(final)
    _sync(final.parent)
    shutil.rmtree(incoming.with_name(f"{incoming.name}-damaged"), ignore_errors=True)
    verify(final)
    return final


def file_entry(path: Path) -> FileEntry:
    """Digest and size of a file as a manifest has them."""
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
