"""Makes a rig's network namespaces and veth pairs and removes them, also those that a killed run left.

A slot of the machine belongs to whoever holds its lock, which the kernel gives back when the holder dies: what lies in
a slot that nobody holds is a leftover. It knows no tunnel and no process but to end all that still run inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from rankbridge import processes
from rankbridge.faults import DeskError
from rankbridge.rig.wiring import SLOTS, Wiring

RUN: Final = Path("/run/rankbridge-rig")
"""A folder for each slot: short paths, for sockets; what holds a key has a mode of its own."""
NAMED: Final = Path("/run/netns")
"""Where iproute2 keeps named namespaces."""

_CLONE_NEWNET: Final = 0x40000000
_END_WITHIN_S: Final = 10.0
_QUIET: Final = (
    # No router solicitations on the wires: what travels there is counted.
    "net.ipv6.conf.all.disable_ipv6=1",
    "net.ipv6.conf.default.disable_ipv6=1",
    # Flows, not pairs of addresses, are spread over the tunnels: all of a site has one address here.
    "net.ipv4.fib_multipath_hash_policy=1",
)

T = TypeVar("T")


def enter(namespace: str) -> tuple[str, ...]:
    """What to put before a command line, so that it runs inside; the process keeps its pid."""
    return ("nsenter", f"--net={NAMED / namespace}", "--")


def inside(namespace: str, make: Callable[[], T]) -> T:
    """Call `make` inside a namespace: a socket made there stays there. Raises what it raises."""
    made: list[T] = []
    raised: list[BaseException] = []

    def visit() -> None:
        try:
            with (NAMED / namespace).open() as handle:
                # os.setns is there from Python 3.12 on. A namespace is the thread's own, and this thread ends.
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
            made.append(make())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=visit)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return made[0]


@contextlib.contextmanager
def slot() -> Iterator[int]:
    """The first slot of this machine that nobody has, for as long as the context lasts.

    Raises DeskError when every slot is taken.
    """
    RUN.mkdir(mode=0o755, parents=True, exist_ok=True)
    for number in range(SLOTS):
        with (RUN / f"{number}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            yield number
            return
    raise DeskError(f"{SLOTS} rigs run on this machine already", "end one of them")


def folder(slot: int) -> Path:
    """A slot's folder for sockets and settings."""
    return RUN / str(slot)


def make(wiring: Wiring) -> None:
    """Namespaces, cables, addresses and routes, all up. Raises DeskError."""
    _clear_folder(wiring.slot)
    folder(wiring.slot).mkdir(mode=0o755)
    for name in wiring.namespaces:
        _ip("netns", "add", name)
        _run([*enter(name), "sysctl", "-q", "-w", *_QUIET])
        _ip("-n", name, "link", "set", "lo", "up")
    for cable in wiring.cables:
        ends = (
            (cable.left, cable.left_device, cable.left_address),
            (cable.right, cable.right_device, cable.right_address),
        )
        (left, left_device, _), (right, right_device, _) = ends
        there = ["netns", right] if right else []
        _ip(*_at(left), "link", "add", left_device, "type", "veth", "peer", "name", right_device, *there)
        for namespace, device, address in ends:
            # A packet leaves with its checksum made: a relay that reads it from the wire passes on what is there.
            _in(namespace, functools.partial(_no_offload, device))
            if address is not None:
                _ip(*_at(namespace), "address", "add", str(address), "dev", device)
            _ip(*_at(namespace), "link", "set", device, "up")
    for way in wiring.ways:
        through = ["via", str(way.through)] if way.through else []
        _ip(*_at(way.namespace), "route", "add", str(way.to), *through, "dev", way.device)


def remove(wiring: Wiring) -> list[str]:
    """End what runs in a rig's namespaces and remove them with all that is theirs; the names of those there were."""
    found = [name for name in wiring.namespaces if (NAMED / name).exists()]
    _end_all(found)
    for cable in wiring.cables:  # first: the kernel takes the others away with their namespaces, in its own time
        if cable.left is None and Path("/sys/class/net", cable.left_device).exists():
            _ip("link", "delete", cable.left_device)
    for name in found:
        _ip("netns", "delete", name)
    _clear_folder(wiring.slot)
    return found


def remove_leftovers(wiring_of: Callable[[int], Wiring]) -> list[str]:
    """Remove what lies in slots that nobody holds; the names of the namespaces."""
    RUN.mkdir(mode=0o755, parents=True, exist_ok=True)
    removed = []
    for number in range(SLOTS):
        with (RUN / f"{number}.lock").open("w") as file, contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed += remove(wiring_of(number))
    return removed


def pids(namespace: str) -> list[int]:
    """Every process inside."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def _end_all(names: Sequence[str]) -> None:
    """SIGTERM, then SIGKILL, for every process inside: nobody else has business in a namespace of ours."""
    for number, within in ((signal.SIGTERM, _END_WITHIN_S), (signal.SIGKILL, _END_WITHIN_S)):
        there = [one for name in names for pid in pids(name) if (one := processes.identify(pid))]
        for one in there:
            processes.send(one, number)
        deadline = time.monotonic() + within
        while any(processes.is_alive(one) for one in there) and time.monotonic() < deadline:
            time.sleep(0.02)


def _clear_folder(slot: int) -> None:
    shutil.rmtree(folder(slot), ignore_errors=True)


def _at(namespace: str | None) -> list[str]:
    return ["-n", namespace] if namespace else []


def _in(namespace: str | None, do: Callable[[], None]) -> None:
    if namespace is None:
        do()
    else:
        inside(namespace, do)


def _no_offload(device: str) -> None:
    """ETHTOOL_STXCSUM off (linux/ethtool.h), which takes segmentation offload with it."""
    command = (ctypes.c_uint32 * 2)(0x17, 0)
    request = device.encode().ljust(16, b"\0") + ctypes.addressof(command).to_bytes(8, "little")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, 0x8946, request.ljust(40, b"\0"))  # SIOCETHTOOL


def _ip(*words: str) -> None:
    _run(["ip", *words])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise DeskError(
            f"cannot make the rig's network: `{' '.join(command)}` ended with {done.returncode}",
            "is this root, with leave to make network namespaces (not a container without CAP_SYS_ADMIN)?",
            detail=tuple(said[-5:]),
        )


def is_root() -> bool:
    """Whether this process may make namespaces at all."""
    return os.geteuid() == 0
