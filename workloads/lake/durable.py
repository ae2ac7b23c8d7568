"""Files that are there whole and stay: what Iceberg writes through, and the lock that keeps writers apart.

Everything is written beside its place, fsynced, renamed, and its folder fsynced, before anything names it. Knows
neither tables nor events. `place` and `remove` are the only calls that change what names exist.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from io import SEEK_SET
from pathlib import Path
from types import TracebackType
from typing import Final

from pyiceberg.io import FileIO, InputFile, InputStream, OutputFile, OutputStream
from pyiceberg.typedef import EMPTY_DICT, Properties

from workloads.lake.faults import LakeBusyError

SCHEME: Final = "file://"
PART: Final = ".part"
"""Ending of a file that is still being written."""
_POLL_S: Final = 0.02


def location(path: Path) -> str:
    """How Iceberg names a file: Spark, Trino and DuckDB read the same form."""
    return SCHEME + str(path)


def path_of(name: str) -> Path:
    """The file behind a location."""
    return Path(name.removeprefix(SCHEME))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """The folder and those above it, each name on disk."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
        sync_folder(made.parent)


def place(part: Path, path: Path) -> None:
    """Give a finished, fsynced file its name, durably."""
    part.replace(path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Take a file, or a folder with all in it, away; one that is gone already is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """A file whole or not at all."""
    make_folder(path.parent)
    part = path.with_name(path.name + PART)
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    place(part, path)


class Input(InputFile):
    """A file that is read."""

    def __len__(self) -> int:
        return path_of(self.location).stat().st_size

    def exists(self) -> bool:
        """Whether it is there."""
        return path_of(self.location).exists()

    def open(self, seekable: bool = True) -> InputStream:  # noqa: FBT001, FBT002 - pyiceberg's signature
        """The file's bytes."""
        del seekable
        return path_of(self.location).open("rb")


class _Draft(OutputStream):
    """A stream that becomes the file when it is closed without an error."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self._path = path
        self._part = path.with_name(path.name + PART)
        self._file = self._part.open("wb")

    @property
    def closed(self) -> bool:
        """Whether no more can be written; pyarrow asks."""
        return self._file.closed

    def write(self, b: bytes) -> int:
        return self._file.write(b)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        """Move within the draft."""
        return self._file.seek(offset, whence)

    def flush(self) -> None:
        """Hand what was written to the kernel; pyarrow asks."""
        self._file.flush()

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        place(self._part, self._path)

    def __enter__(self) -> _Draft:
        return self

    def __exit__(
        self, exctype: type[BaseException] | None, excinst: BaseException | None, exctb: TracebackType | None
    ) -> None:
        if exctype is None:
            self.close()
        else:
            self._file.close()


class Output(OutputFile):
    """A file that is written once."""

    def __len__(self) -> int:
        return path_of(self.location).stat().st_size

    def exists(self) -> bool:
        """Whether it is there."""
        return path_of(self.location).exists()

    def to_input_file(self) -> InputFile:
        """The same file, to read."""
        return Input(self.location)

    def create(self, overwrite: bool = False) -> OutputStream:  # noqa: FBT001, FBT002 - pyiceberg's signature
        """A draft of the file. Raises FileExistsError unless it may be replaced."""
        path = path_of(self.location)
        if not overwrite and path.exists():
            raise FileExistsError(f"{path} is there already")
        return _Draft(path)


class DurableFileIO(FileIO):
    """Iceberg's door to the disk."""

    def new_input(self, location: str) -> InputFile:
        """A file to read."""
        return Input(location)

    def new_output(self, location: str) -> OutputFile:
        """A file to write."""
        return Output(location)

    def delete(self, location: str | InputFile | OutputFile) -> None:
        """Take a file away."""
        remove(path_of(location if isinstance(location, str) else location.location))


MOVED_FROM: Final = "rankbridge.moved.from"
MOVED_TO: Final = "rankbridge.moved.to"


class MovedFileIO(DurableFileIO):
    """Reads what lies in one folder by the names it had in another; properties `MOVED_FROM` and `MOVED_TO`."""

    def __init__(self, properties: Properties = EMPTY_DICT) -> None:
        super().__init__(properties)
        self._from, self._to = Path(properties[MOVED_FROM]), Path(properties[MOVED_TO])

    def new_input(self, location: str) -> InputFile:
        """The file that this name means now."""
        return Input(rebased(location, self._from, self._to))


def rebased(name: str, old: Path, new: Path) -> str:
    """A location in `old` as one in `new`; any other stays."""
    path = path_of(name)
    return location(new / path.relative_to(old)) if path.is_relative_to(old) else name


@contextlib.contextmanager
def locked(path: Path, wait_s: float) -> Iterator[None]:
    """Be the only writer. The kernel gives the lock back when its holder dies. Raises LakeBusyError."""
    make_folder(path.parent)
    with path.open("a") as file:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise LakeBusyError(
                        f"{path.parent}: another process has been writing for {wait_s:.0f} s",
                        "wait for it and try again",
                    ) from None
                time.sleep(_POLL_S)
        yield
