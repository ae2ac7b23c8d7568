"""Saved states of a run, each written whole or not at all, and read back without executing anything.

A run works in a draft directory of its own beside its final place, locked while it works; what is
interrupted leaves its draft, and the next run of the same data set and settings goes on from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

CHECKPOINTS: Final = "checkpoints"
LOCK: Final = "lock"


class BusyError(RuntimeError):
    """Another process trains the same thing now."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as before: temporary name, fsync, rename."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class Checkpoints:
    """States by name in a directory. A state is made of tensors, numbers, strings, lists and dicts."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Keep a state under a name, instead of the one before."""
        path = self._directory / f"{name}.pt"
        draft = path.with_name(f".{path.name}")
        with draft.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def load(self, name: str) -> dict[str, Any] | None:
        """The state kept under a name, or None. A file that cannot be read counts as none: the work is done again."""
        try:
            state = torch.load(self._directory / f"{name}.pt", map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception:  # torch raises what its parsers raise; whatever is wrong, the work is done again
            return None
        return state if isinstance(state, dict) else None


@contextlib.contextmanager
def draft_of(final: Path) -> Iterator[Path]:
    """The draft directory of a run that will end at `final`, held by this process alone.

    It stays when the block fails. Raises BusyError when another process holds it.
    """
    draft = final.with_name(f".{final.name}.draft")
    draft.mkdir(parents=True, exist_ok=True)
    with (draft / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{draft} is being worked on by another process") from None
        yield draft


def settle(draft: Path, final: Path) -> None:
    """Give a finished draft its final name, in place of an earlier run's result."""
    for path in sorted(draft.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    (draft / LOCK).unlink(missing_ok=True)
    shutil.rmtree(draft / CHECKPOINTS, ignore_errors=True)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    draft.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
