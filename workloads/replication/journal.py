"""What a push has begun in the bucket, on this machine's disk: uploads by name, and their parts.

One JSON line a fact, on disk before the next step is taken; a last line that was cut short is dropped. It spares asking
the store for uploads by key, and lets a part be known again. It can be lost: the store knows what has arrived, too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec


class Begun(msgspec.Struct, frozen=True, kw_only=True, tag="begun", tag_field="kind"):
    """An upload was opened."""

    key: str
    upload: str
    chunk: int
    """Bytes of each part but the last."""


class Sent(msgspec.Struct, frozen=True, kw_only=True, tag="sent", tag_field="kind"):
    """A part was acknowledged."""

    upload: str
    number: int
    etag: str


class Closed(msgspec.Struct, frozen=True, kw_only=True, tag="closed", tag_field="kind"):
    """An upload is over: completed or given up."""

    upload: str


Line = Begun | Sent | Closed
_decoder: Final[msgspec.json.Decoder[Line]] = msgspec.json.Decoder(Line)


class Journal:
    """The file at `path`, read when it is opened; one writer."""

    def __init__(self, path: Path) -> None:
        self._open: dict[str, Begun] = {}
        self._parts: dict[str, dict[int, str]] = {}
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                self._take(_decoder.decode(line))
            except msgspec.DecodeError:
                break
            whole += len(line)
        os.ftruncate(self._descriptor, whole)
        os.lseek(self._descriptor, 0, os.SEEK_END)

    @property
    def open_uploads(self) -> list[Begun]:
        """Uploads that were begun and not closed."""
        return list(self._open.values())

    def etags(self, upload: str) -> dict[int, str]:
        """Etag of each part that was acknowledged, by number."""
        return dict(self._parts.get(upload, {}))

    def write(self, line: Line) -> None:
        """Keep a fact; it is on disk when this returns. Not for two threads at once."""
        os.write(self._descriptor, msgspec.json.encode(line) + b"\n")
        os.fsync(self._descriptor)
        self._take(line)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _take(self, line: Line) -> None:
        match line:
            case Begun():
                self._open[line.upload] = line
            case Sent():
                self._parts.setdefault(line.upload, {})[line.number] = line.etag
            case Closed():
                self._open.pop(line.upload, None)
                self._parts.pop(line.upload, None)
