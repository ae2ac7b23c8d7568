"""Who is in a home's data does not change while data is prepared of it, and nothing is prepared while that changes.

A preparation reads people from a source and writes them minutes later. An erasure, or a change of the key, that came
between would empty every place, call it done, and see them come back. So a preparation holds a lock that many may hold,
and what changes people holds it alone; the kernel gives it back, however a process ends. Knows neither.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

WAIT_S: Final = 60.0
_POLL_S: Final = 0.05


class CustodyError(Exception):
    """Others hold the home's people; names fault and remedy."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault
        self.remedy = remedy


@contextlib.contextmanager
def custody(home: Path, *, alone: bool, wait_s: float | None = None) -> Iterator[None]:
    """Hold the home's people, `alone` to change who they are or what they are called.

    Raises CustodyError where others still hold them after `wait_s` seconds (WAIT_S); OSError.
    """
    path = home / "onprem" / "custody.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + (WAIT_S if wait_s is None else wait_s)
        while True:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    what = "data is being prepared, or an erasure or a change of key is under way"
                    raise CustodyError(f"{home}: {what}", "wait for its end, and run this again") from None
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)
