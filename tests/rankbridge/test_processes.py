"""The keeper, identities and ends of processes, tried on real small ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rankbridge import processes
from rankbridge.processes import Exit, Identity, Started

SLEEP = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)")


def until(condition: Callable[[], object], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def begin(folder: Path, command: tuple[str, ...] = SLEEP, *, tether: bool = False) -> Started:
    return processes.start(
        command,
        environment=dict(os.environ),
        folder=folder,
        log=folder / "logs" / "one.log",
        notes=folder / "notes" / "one",
        tether=tether,
    )


def test_a_process_runs_writes_to_its_log_and_ends_when_asked(tmp_path: Path):
    started = begin(tmp_path)
    try:
        until(lambda: "up" in (tmp_path / "logs" / "one.log").read_text())
        assert processes.is_alive(started.process)
        assert processes.pss_bytes(started) > 1_000_000
    finally:
        killed = processes.end([started], grace_s=5)
    assert killed == []
    assert not processes.is_alive(started.process)
    assert not processes.is_alive(started.keeper)
    assert processes.exit_of(tmp_path / "notes" / "one") == Exit(None, "SIGTERM")


def test_the_exit_code_is_known_after_the_process_has_gone(tmp_path: Path):
    begin(tmp_path, (sys.executable, "-c", "raise SystemExit(7)"))
    until(lambda: processes.exit_of(tmp_path / "notes" / "one"))
    assert processes.exit_of(tmp_path / "notes" / "one") == Exit(7, None)


def test_a_kill_from_outside_is_named(tmp_path: Path):
    started = begin(tmp_path)
    os.kill(started.process.pid, signal.SIGKILL)
    until(lambda: processes.exit_of(tmp_path / "notes" / "one"))
    assert str(processes.exit_of(tmp_path / "notes" / "one")) == "signal SIGKILL"


def test_a_command_that_does_not_exist_ends_with_127_and_says_so_in_the_log(tmp_path: Path):
    begin(tmp_path, ("no-such-command-anywhere",))
    until(lambda: processes.exit_of(tmp_path / "notes" / "one"))
    assert processes.exit_of(tmp_path / "notes" / "one") == Exit(127, None)
    assert "no-such-command-anywhere" in (tmp_path / "logs" / "one.log").read_text()


def test_a_process_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path):
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    started = begin(tmp_path, (sys.executable, "-c", stubborn))
    until(lambda: "up" in (tmp_path / "logs" / "one.log").read_text())
    assert processes.end([started], grace_s=0.2) == [started]
    assert not processes.is_alive(started.process)


def test_children_of_a_killed_process_are_found_by_their_mark_and_ended(tmp_path: Path):
    parent = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    started = begin(tmp_path, (sys.executable, "-c", parent))
    log = tmp_path / "logs" / "one.log"
    until(log.read_text)
    child = processes.identify(int(log.read_text()))
    assert child is not None
    os.kill(started.process.pid, signal.SIGKILL)
    until(lambda: not processes.is_alive(started.process))
    assert processes.is_alive(child)
    processes.end([started], grace_s=1)
    assert not processes.is_alive(child)


def test_a_recycled_pid_is_left_alone():
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        real = processes.identify(bystander.pid)
        assert real is not None
        stale = Identity(bystander.pid, real.started - 100)
        processes.end([Started(stale, stale, "mark")], grace_s=0.1)
        assert not processes.is_alive(stale)
        assert processes.is_alive(real)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("tether", [True, False])
def test_only_a_tethered_process_ends_with_the_desk_that_started_it(tmp_path: Path, tether: bool):  # noqa: FBT001 - a parameter of the test
    desk = (
        "import sys; from pathlib import Path; from tests_begin import begin; "
        f"s = begin(Path({str(tmp_path)!r}), tether={tether}); "
        "print(s.process.pid, s.process.started, s.keeper.pid, s.keeper.started, s.mark, flush=True); "
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / "tests_begin.py").write_text(Path(__file__).read_text())
    told = subprocess.run(
        [sys.executable, "-c", desk],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    pid, began, keeper, keeper_began, mark = told.stdout.split()
    started = Started(Identity(int(pid), int(began)), Identity(int(keeper), int(keeper_began)), mark)
    try:
        if tether:
            until(lambda: not processes.is_alive(started.process))
        else:
            time.sleep(0.3)  # long enough for a tether to have pulled, had there been one
            assert processes.is_alive(started.process)
    finally:
        processes.end([started], grace_s=5)
    assert not processes.is_alive(started.process)


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path):
    log = tmp_path / "long.log"
    log.write_text("".join(f"line {number}\n" for number in range(10_000)))
    assert processes.tail(log)[-1] == "line 9999"
    assert len(processes.tail(log)) == 12
    assert processes.tail(tmp_path / "none.log") == ()
