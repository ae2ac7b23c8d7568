"""What the real scene does to files and processes of its own, without any site."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankbridge import processes
from rankbridge.drills.sites import SLICE_S, _DutyCycle, rename_profiles
from workloads.data.profiles import Profile, ProfilesDownError, SqliteProfiles, write_profiles

SPIN = "import time\nwhile True: time.process_time()\n"


@pytest.fixture
def spinner() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", SPIN]) as process:
        time.sleep(0.3)
        yield process
        process.kill()


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_profiles_that_are_hidden_cannot_be_read_and_come_back_whole(tmp_path: Path):
    path = tmp_path / "profiles.sqlite"
    write_profiles(path, [Profile("p1-a", [])], {})
    with SqliteProfiles(path) as store:
        rename_profiles(path, hidden=True)
        rename_profiles(path, hidden=True)
        with pytest.raises(ProfilesDownError):
            store.get("p1-a")
        rename_profiles(path, hidden=False)
        rename_profiles(path, hidden=False)
        assert store.get("p1-a") is not None


def test_a_home_without_profiles_is_left_without(tmp_path: Path):
    rename_profiles(tmp_path / "none.sqlite", hidden=False)
    assert not list(tmp_path.iterdir())
    with sqlite3.connect(tmp_path / "other.sqlite") as store:
        store.execute("CREATE TABLE something (x)")
    store.close()
    rename_profiles(tmp_path / "other.sqlite", hidden=True)


def test_a_process_that_is_slowed_down_gets_its_share_and_all_of_it_after(spinner: subprocess.Popen[bytes]):
    identity = processes.identify(spinner.pid)
    assert identity is not None
    cycle = _DutyCycle([identity], 0.1)
    cycle.start()
    before, began = cpu_s(spinner.pid), time.monotonic()
    time.sleep(1.5)
    share = (cpu_s(spinner.pid) - before) / (time.monotonic() - began)
    cycle.stop()
    assert share < 0.3
    processes.send(identity, signal.SIGCONT)
    before = cpu_s(spinner.pid)
    time.sleep(10 * SLICE_S)
    assert cpu_s(spinner.pid) > before
