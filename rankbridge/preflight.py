"""What must be true before processes are started or a rehearsal begins, checked all at once.

Each check gives a list of faults with their remedies; it changes nothing on the machine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import psutil

from rankbridge import triton
from rankbridge.faults import DeskError, ManyFaults
from rankbridge.layout import Layout
from rankbridge.roles import LISTENERS, Process

GB: Final = 1000**3
MEMORY_SERVE_GB: Final = 3.0
"""What all serving processes may take together (PSS), and a little more than they do."""
MEMORY_REHEARSE_GB: Final = 4.0
DISK_REHEARSE_GB: Final = 2.0
SHARED_MEMORY_MB: Final = 64
"""What Triton's Python backends may put in /dev/shm; containers often get just this much."""


def refuse(faults: list[DeskError]) -> None:
    """Raise all faults as one; nothing when there is none."""
    every = [one for fault in faults for one in (fault.faults if isinstance(fault, ManyFaults) else (fault,))]
    if len(every) == 1:
        raise every[0]
    if every:
        raise ManyFaults(every)


def serving(layout: Layout, to_start: Iterable[Process], *, memory_gb: float = MEMORY_SERVE_GB) -> list[DeskError]:
    """Whether these processes can be started here and now."""
    to_start = list(to_start)
    if not to_start:
        return []
    return [*tools(layout), *ports(to_start), *memory(memory_gb), *shared_memory()]


def rehearsal(layout: Layout, to_start: Iterable[Process], data: Path | None, out: Path) -> list[DeskError]:
    """Whether a whole rehearsal can be done here and now."""
    return [
        *serving(layout, to_start, memory_gb=MEMORY_REHEARSE_GB),
        *disk(layout.home, DISK_REHEARSE_GB),
        *readable(data),
        *writable(out),
    ]


def ports(to_start: Iterable[Process]) -> list[DeskError]:
    """Whether each socket is free on its own address. All that are taken share one remedy, to be copied."""
    faults, taken, ways_out = [], [], {}
    for process in to_start:
        if process.entry:
            continue  # a network of its own
        for listener, (address, port) in zip(LISTENERS[process.role], process.sockets, strict=True):
            problem = _cannot_bind(address, port)
            if problem == errno.EADDRINUSE:
                taken.append(f"port {address}:{port} is taken{_holder(address, port)}")
                ways_out[listener] = f"--port {listener.value}={port + 1000 if port < 64_000 else port - 1000}"
            elif problem:
                remedy = "both sites need loopback addresses in 127.0.0.0/8 on the interface lo"
                faults.append(DeskError(f"cannot listen at {address}:{port}: {os.strerror(problem)}", remedy))
    remedy = f"end it (`rankbridge down` if it is ours), or choose another port: {' '.join(ways_out.values())}"
    return [*(DeskError(fault, remedy) for fault in taken), *faults]


def memory(needed_gb: float) -> list[DeskError]:
    """Whether enough memory is available."""
    available = psutil.virtual_memory().available / GB
    if available >= needed_gb:
        return []
    return [
        DeskError(f"{available:.1f} GB of memory are available; {needed_gb:.0f} GB are needed", "end other programs")
    ]


def disk(folder: Path, needed_gb: float) -> list[DeskError]:
    """Whether enough disk is free where `folder` is, or will be."""
    place = nearest(folder)
    free = shutil.disk_usage(place).free / GB
    if free >= needed_gb:
        return []
    remedy = "make room there, or set RANKBRIDGE_HOME to a folder on a larger disk"
    return [DeskError(f"{free:.1f} GB of disk are free in {place}; {needed_gb:.0f} GB are needed", remedy)]


def shared_memory() -> list[DeskError]:
    """Whether /dev/shm has room for Triton's Python backends."""
    free = shutil.disk_usage(triton.SHARED_MEMORY).free / 1000**2
    if free >= SHARED_MEMORY_MB:
        return []
    remedy = "free it, or give the container more: --shm-size=256m"
    return [DeskError(f"{free:.0f} MB are free in {triton.SHARED_MEMORY}; Triton needs {SHARED_MEMORY_MB}", remedy)]


def tools(layout: Layout) -> list[DeskError]:
    """Whether what we start can be started."""
    faults = []
    try:
        triton.locate(layout.root)
    except triton.TritonFault as fault:
        faults.append(DeskError(fault.fault, fault.remedy))
    faults += [
        DeskError(f"{name} is missing on this machine", f"install it (Debian, Ubuntu: `apt install {package}`)")
        for name, package in (("setpriv", "util-linux"), ("sh", "dash"))
        if shutil.which(name) is None
    ]
    return faults


def readable(data: Path | None) -> list[DeskError]:
    """Whether the data file is there and may be read; None needs none."""
    if data is None:
        return []
    try:
        with data.open("rb") as file:
            if not file.read(1):
                return [DeskError(f"the data file {data} is empty", "give the path of the file that holds the data")]
    except OSError as error:
        remedy = "give the path of a file that you may read: --data online-retail=PATH"
        return [DeskError(f"cannot read the data file {data}: {(error.strerror or str(error)).lower()}", remedy)]
    return []


def writable(out: Path) -> list[DeskError]:
    """Whether results can be written to `out`, which may not exist yet."""
    try:
        place = nearest(out.absolute())
    except OSError as error:
        return [DeskError(f"--out: {(error.strerror or str(error)).lower()}", "give a shorter path")]
    if not place.is_dir():
        return [DeskError(f"--out {out}: {place} is not a folder", "give the path of a folder")]
    if not os.access(place, os.W_OK):
        return [DeskError(f"--out {out}: no permission to write in {place}", "give a folder that you may write to")]
    return []


def nearest(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return path


def _cannot_bind(address: str, port: int) -> int:
    """The errno that listening there would meet, or 0. Reuse is allowed, as our servers do: TIME_WAIT is no fault."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((address, port))
        except OSError as error:
            return error.errno or errno.EINVAL
    return 0


def _holder(address: str, port: int) -> str:
    """` by pid 12 (name)` where we may know it, else an empty string."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr or not connection.pid:
                continue
            ip, number = connection.laddr
            if number == port and ip in {address, "0.0.0.0", "::"}:  # noqa: S104 - read, not bound
                return f" by pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""
