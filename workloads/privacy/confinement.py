"""Keep this process from everything but its own home: Linux Landlock, without root.

After `confine` the process, and every one that it starts, reads the interpreter, libraries, the product's own code and
what the system tells about itself, writes below its home only, and opens no TCP connection. Nothing lifts it, and a
symlink, a relative path or another process's `/proc` entry is no way round: the kernel judges the file, not the name.
Knows nothing of training, and loads no library that starts threads: a thread that is there before would stay free.

Sources: Linux kernel documentation, "Landlock: unprivileged access control"; landlock(7).
"""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from landlock import FSAccess, LandlockError, Ruleset
from landlock.plumbing import RulesetAttr, get_create_ruleset, get_restrict_self, landlock_abi_version

import workloads
from workloads.telemetry.progress import Progress

Asked = Literal["yes", "try"]
"""`yes`: confined or not at all; `try`: where the kernel can."""
ASKED: Final[tuple[Asked, ...]] = get_args(Asked)
SCRATCH: Final = "scratch"
"""Folder in the home for temporary files."""

_NETWORK_ABI, _SCOPE_ABI = 4, 6
_TCP: Final = 0b11  # LANDLOCK_ACCESS_NET_BIND_TCP | LANDLOCK_ACCESS_NET_CONNECT_TCP
_SCOPES: Final = 0b11  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | LANDLOCK_SCOPE_SIGNAL

_SYSTEM: Final = (
    "/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin",
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd",
    "/etc/group", "/etc/mime.types", "/sys/devices/system", "/sys/fs/cgroup",
    # Not /proc: the environments of other processes of this user lie there, credentials in them.
    "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/filesystems", "/proc/loadavg", "/proc/sys",
)  # fmt: skip
_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class _WideAttr(RulesetAttr):  # type: ignore[misc]  # the library is untyped
    """`landlock_ruleset_attr` as of ABI 6; the library ends with the first field."""

    _fields_ = [("handled_access_net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]  # noqa: RUF012 - ctypes' form


class ConfinementError(Exception):
    """The process could not be confined, and nothing may go on as if it were: the fault and the remedy."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault
        self.remedy = remedy


class UnsupportedError(ConfinementError):
    """This kernel has no Landlock, or has it switched off."""


@dataclass(frozen=True)
class Confinement:
    """What holds from now on."""

    abi: int
    home: Path
    network: bool
    """Whether TCP is closed (kernels from 6.7 on, ABI 4)."""

    def __str__(self) -> str:
        tcp = "no TCP" if self.network else "TCP as before: this kernel cannot close it"
        return f"Landlock ABI {self.abi}: reads libraries and {self.home}, writes only there, {tcp}"


def confine(home: Path) -> Confinement:
    """Confine this process to `home` for good. Temporary files go to `<home>/scratch` from now on.

    To be called before anything starts a thread. Raises UnsupportedError where the kernel has no Landlock,
    ConfinementError where the process could still get out: other threads are running, or the home lies in a folder
    that is open anyway. Files that are open already are closed, but for the standard streams.
    """
    abi = _abi()
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208 - one number
    if threads > 1:
        raise ConfinementError(f"{threads - 1} threads are running and would stay free", "confine before they start")
    home = home.resolve()
    scratch = home / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    readable = [Path(name) for name in (*_SYSTEM, f"/proc/{os.getpid()}", *_libraries())]
    for folder in readable:
        if folder.exists() and home.is_relative_to(folder.resolve()):
            raise ConfinementError(f"{home} lies in {folder}, all of which may be read", "choose a home elsewhere")
    try:
        _restrict(home, readable, abi)
    except (LandlockError, OSError) as error:
        raise ConfinementError(f"the kernel refused the confinement ({error})", "see `dmesg`, or report it") from None
    tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
    _prove(home)
    return Confinement(abi=abi, home=home, network=abi >= _NETWORK_ABI)


def confine_as_asked(asked: Asked | None, home: Path, progress: Progress) -> None:
    """What a job's `--confine` means; says in a note what holds. Raises ConfinementError."""
    if asked is None:
        return
    try:
        progress.note("confine", str(confine(home)))
    except UnsupportedError as error:
        if asked == "yes":
            raise
        progress.note("confine", f"not confined: {error.fault}")


def within(home: Path, paths: Iterable[Path]) -> None:
    """Raise ConfinementError for a path outside the home: a confined job could not read it."""
    for path in paths:
        if not path.resolve().is_relative_to(home.resolve()):
            raise ConfinementError(
                f"{path} lies outside {home}, which is all that a confined job reads",
                "fetch the replica into that home (`--replica`), and train and export there",
            )


def _abi() -> int:
    try:
        return int(landlock_abi_version())
    except (LandlockError, OSError):
        raise UnsupportedError(
            "this kernel has no Landlock, or it is switched off",
            "boot Linux 5.13 or later with landlock in the lsm= list, or say --confine=try to go on without",
        ) from None


def _libraries() -> Iterable[str]:
    """The interpreter, its libraries and this product's code; never the folder that the code lies in."""
    yield from {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    yield from {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    yield from workloads.__path__


def _restrict(home: Path, readable: Iterable[Path], abi: int) -> None:
    read = FSAccess.READ_FILE | FSAccess.READ_DIR | FSAccess.EXECUTE
    files = Ruleset()
    for path in readable:
        if path.exists():
            files.allow(path, rules=read if path.is_dir() else read & FSAccess.all_file())
    for device in map(Path, _DEVICES):
        if device.exists():
            files.allow(device, rules=FSAccess.READ_FILE | FSAccess.WRITE_FILE)
    files.allow(home, rules=FSAccess.all() & ~(FSAccess.EXECUTE | FSAccess.MAKE_CHAR | FSAccess.MAKE_BLOCK))
    if abi >= _NETWORK_ABI:
        rights = _WideAttr(handled_access_net=_TCP, scoped=_SCOPES if abi >= _SCOPE_ABI else 0)
        # An older kernel takes the longer record only where the part it does not know is zero.
        connections = get_create_ruleset()(ctypes.byref(rights), ctypes.sizeof(rights), 0)
        files.apply()
        get_restrict_self()(connections, 0)
    else:
        files.apply()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the rule sets are open files, too; the kernel keeps its own


def _prove(home: Path) -> None:
    """Believe no call that said yes: the folder that the home lies in must be closed now."""
    try:
        os.scandir(home.parent).close()
    except PermissionError:
        return
    raise ConfinementError(
        f"{home.parent} can still be read after the confinement", "choose a home that lies in no open folder"
    )
