"""Processes of this machine: start, recognise, measure and end them. Linux only; knows no role or site.

A process is recognised by its pid together with its start time, so one that merely got a recycled pid is
never touched, and what it left behind by a mark in the environment. It is started under a keeper, a
shell of a few lines that outlives the desk, notes the exit code, and passes SIGTERM on. With a tether the kernel
ends the keeper when the desk dies, however it dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

MARK: Final = "RANKBRIDGE_PROCESS"
"""Environment variable that a process started here, and its children, carry."""

_POLL_S: Final = 0.02
_PID_WITHIN_S: Final = 10.0
_REAP_WITHIN_S: Final = 2.0
TAIL_LINES: Final = 12
"""Lines of a log that an error shows."""
_TAIL_BYTES: Final = 65_536

# $0 is the file for the exit code, $1 for the pid; the rest is the command. `wait` ends early when a signal
# is trapped, hence the loop. Signals are trapped, not ignored: a child inherits what is ignored.
_KEEPER: Final = """
pid_file=$1; shift
"$@" &
child=$!
trap 'kill -TERM $child 2>/dev/null' TERM INT HUP
echo $child >"$pid_file.new" && mv "$pid_file.new" "$pid_file"
wait $child; code=$?
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
echo $code >"$0.new" && mv "$0.new" "$0"
"""

_SHELL_SIGNAL_BASE: Final = 128


@dataclasses.dataclass(frozen=True)
class Identity:
    """A process that cannot be mistaken for a later one: its pid and start (clock ticks since boot)."""

    pid: int
    started: int


@dataclasses.dataclass(frozen=True)
class Started:
    """A process under its keeper; all three are written to state.json."""

    process: Identity
    keeper: Identity
    mark: str


@dataclasses.dataclass(frozen=True)
class Exit:
    """How a process ended: by itself with `code`, or by `signal`."""

    code: int | None
    signal: str | None

    def __str__(self) -> str:
        return f"signal {self.signal}" if self.signal else f"code {self.code}"


def identify(pid: int) -> Identity | None:
    """Who has this pid now; None when nobody has, or only a zombie."""
    fields = _stat(pid)
    if fields is None or fields[0] in {"Z", "X"}:
        return None
    return Identity(pid, int(fields[19]))


def is_alive(identity: Identity) -> bool:
    """Whether just this process still runs."""
    return identify(identity.pid) == identity


def start(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    log: Path,
    notes: Path,
    tether: bool,
) -> Started:
    """Start `command` in a session of its own, its output appended to `log`.

    `notes` is a path whose `.pid` and `.exit` the keeper writes. With `tether` it ends when the thread that
    called this does. Raises OSError when the keeper itself cannot start; a command that cannot be run
    ends at once with code 126 or 127 and says so in its log.
    """
    pid_file, exit_file = notes.with_suffix(".pid"), notes.with_suffix(".exit")
    for path in (pid_file, exit_file):
        path.unlink(missing_ok=True)
    for path in (log.parent, notes.parent):
        path.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    tie = ["setpriv", "--pdeathsig", "TERM"] if tether else []
    with log.open("ab") as output:
        keeper = subprocess.Popen(
            [*tie, "/bin/sh", "-c", _KEEPER, str(exit_file), str(pid_file), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**environment, MARK: mark},
            start_new_session=True,
        )
    keeper_identity = identify(keeper.pid) or Identity(keeper.pid, -1)
    deadline = time.monotonic() + _PID_WITHIN_S
    while not pid_file.exists():
        if keeper.poll() is not None or time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(keeper.pid, signal.SIGKILL)  # it stands in no state yet: nobody else could find it
            keeper.wait()
            raise OSError(f"the keeper of {command[0]} did not start; see {log}")
        time.sleep(_POLL_S)
    _keepers.append(keeper)
    pid = int(pid_file.read_text())
    # One that has ended already has no start time any more; -1 matches nothing that runs.
    return Started(identify(pid) or Identity(pid, -1), keeper_identity, mark)


_keepers: list[subprocess.Popen[bytes]] = []


def exit_of(notes: Path) -> Exit | None:
    """How the process ended, as its keeper noted it; None when it has not, or the keeper was killed as well."""
    _reap()
    try:
        code = int(notes.with_suffix(".exit").read_text())
    except (OSError, ValueError):
        return None
    if code > _SHELL_SIGNAL_BASE:
        with contextlib.suppress(ValueError):
            return Exit(None, signal.Signals(code - _SHELL_SIGNAL_BASE).name)
    return Exit(code, None)


def end(started: Sequence[Started], *, grace_s: float) -> list[Started]:
    """End processes together: SIGTERM, and SIGKILL for what is left after `grace_s`, children too.

    Returns those that had to be killed. A pid that now belongs to somebody else is left alone.
    """
    for one in started:
        send(one.process, signal.SIGTERM)
    _wait([one.process for one in started], grace_s)
    killed = [one for one in started if is_alive(one.process)]
    for one in killed:
        send(one.process, signal.SIGKILL)
    _wait([one.keeper for one in started], _REAP_WITHIN_S)
    left = [member for one in started for member in members(one)]
    for member in left:
        send(member, signal.SIGKILL)
    _wait(left, _REAP_WITHIN_S)
    _reap()
    return killed


def members(started: Started) -> list[Identity]:
    """The process, its keeper and their descendants: those of its session that carry its mark."""
    found = []
    wanted = f"{MARK}={started.mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        fields = _stat(int(entry.name))
        if fields is None or fields[0] in {"Z", "X"} or int(fields[3]) != started.keeper.pid:
            continue
        try:
            marked = wanted in (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if marked:
            found.append(Identity(int(entry.name), int(fields[19])))
    return found


def pss_bytes(started: Started) -> int:
    """Proportional set size of the process with all its children: shared pages are counted once over all."""
    return sum(_pss(member.pid) for member in members(started))


def tail(log: Path, lines: int = TAIL_LINES) -> tuple[str, ...]:
    """The last lines of a log; empty when there is none."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            return tuple(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ()


def boot_id() -> str:
    """Changes with every boot: start times of another boot mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (proc(5) counts them from 3); None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # a name may hold spaces and brackets


def send(identity: Identity, number: signal.Signals) -> None:
    """Signal just this process, through a pidfd: between the check and the signal its pid cannot change hands."""
    try:
        handle = os.pidfd_open(identity.pid)
    except OSError:
        return
    try:
        if is_alive(identity):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
    finally:
        os.close(handle)


def _wait(identities: Sequence[Identity], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while any(is_alive(one) for one in identities) and time.monotonic() < deadline:
        _reap()
        time.sleep(_POLL_S)


def _reap() -> None:
    """Take the exit status of keepers that have ended, so that none stays a zombie while the desk runs."""
    _keepers[:] = [keeper for keeper in _keepers if keeper.poll() is None]
