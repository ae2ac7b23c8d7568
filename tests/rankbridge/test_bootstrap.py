"""Set-up refuses what cannot work before it begins, and a stamp knows what is there already. Nothing is installed."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankbridge import bootstrap
from rankbridge.bootstrap import Environment, Setup, uv_environment

SOURCE = (Path(__file__).parents[2] / "rankbridge" / "bootstrap.py").read_text()


def test_an_old_python_can_read_the_file_that_refuses_it():
    ast.parse(SOURCE, feature_version=(3, 6))
    assert "from __future__" not in SOURCE  # `annotations` is a SyntaxError before 3.7


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 10, 12), (3, 14, 0), (2, 7, 18)])
def test_a_python_out_of_range_is_one_line_with_a_remedy(version: tuple[int, ...]):
    (fault,) = bootstrap.python_faults(version, has_venv=True, has_libpython=True)
    assert f"python3 is {version[0]}.{version[1]}; rankbridge needs 3.11 to 3.13" in fault.fault
    assert "make PYTHON=" in fault.remedy


def test_a_debian_without_venv_and_libpython_is_told_both_packages():
    faults = bootstrap.python_faults((3, 11, 2), has_venv=False, has_libpython=False)
    assert ["python3.11-venv" in fault.remedy or "libpython3.11" in fault.remedy for fault in faults] == [True, True]


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 3), (3, 13, 1)])
def test_a_python_in_range_is_no_fault(version: tuple[int, ...]):
    assert bootstrap.python_faults(version, has_venv=True, has_libpython=True) == []


def test_a_machine_without_wheels_is_refused_by_name():
    assert "Darwin arm64" in bootstrap.machine_faults("Darwin", "arm64", ("", ""))[0].fault
    assert "glibc 2.31" in bootstrap.machine_faults("Linux", "x86_64", ("glibc", "2.31"))[0].fault
    assert "not glibc" in bootstrap.machine_faults("Linux", "x86_64", ("", ""))[0].fault
    assert bootstrap.machine_faults("Linux", "x86_64", ("glibc", "2.36")) == []


def test_too_little_disk_is_told_with_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bootstrap, "DISK_FRESH_GB", 10**6)
    (fault,) = bootstrap.disk_faults(tmp_path, tmp_path / "no" / "cache", fresh=True)
    assert "set-up and a rehearsal need 1000000 GB" in fault.fault
    monkeypatch.setattr(bootstrap, "DISK_AGAIN_GB", 0)
    assert bootstrap.disk_faults(tmp_path, tmp_path, fresh=False) == []


def environment(root: Path) -> Environment:
    (root / "lock.txt").write_text("package==1\n")
    return Environment(root, "made", ["lock.txt"], "a thing")


def build(made: Environment) -> None:
    made.begin()
    made.partial.mkdir()
    (made.partial / "content").write_text("new")
    made.finish()


def test_a_stamp_knows_what_it_was_made_from(tmp_path: Path):
    made = environment(tmp_path)
    assert not made.is_current()
    build(made)
    assert made.is_current()
    (tmp_path / "lock.txt").write_text("package==2\n")
    assert not made.is_current()


def test_an_environment_that_was_moved_is_made_again(tmp_path: Path):
    (tmp_path / "first").mkdir()
    build(environment(tmp_path / "first"))
    (tmp_path / "first").rename(tmp_path / "second")
    assert not environment(tmp_path / "second").is_current()


def test_an_interrupted_build_leaves_the_old_environment_and_is_done_again(tmp_path: Path):
    made = environment(tmp_path)
    build(made)
    (tmp_path / "lock.txt").write_text("package==2\n")
    made.begin()
    made.partial.mkdir()
    (made.partial / "half").touch()  # killed here
    assert (made.place / "content").read_text() == "new"
    assert not made.is_current()
    build(made)
    assert made.is_current()
    assert not (made.place / "half").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock.txt", "made"]


def test_all_environments_are_pending_in_a_fresh_clone_and_none_is_made_on_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "requirements").mkdir()
    for name in ("tools", "tritonserver", "triton-python", "project"):
        (tmp_path / "requirements" / f"{name}.txt").touch()
    (tmp_path / "pyproject.toml").touch()
    assert [one.place.name for one in Setup(tmp_path).pending()] == ["uv", "triton", "triton-python", ".venv"]
    monkeypatch.setattr(bootstrap, "DISK_FRESH_GB", 10**6)
    assert bootstrap.main(tmp_path) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / ".tools").exists()


def test_a_failing_command_is_a_fault_and_set_up_can_go_on():
    with pytest.raises(bootstrap.Fault, match="the thing failed"):
        bootstrap.call([sys.executable, "-c", "raise SystemExit(3)"], "the thing")


def test_an_interrupt_ends_the_running_command_and_says_how_to_go_on():
    code = (
        "import sys; from pathlib import Path; from rankbridge import bootstrap\n"
        "def attempt(root): bootstrap.call(['sleep', '61.7'], 'sleep')\n"
        "bootstrap.attempt = attempt\n"
        "import signal; signal.signal(signal.SIGTERM, bootstrap._interrupt)\n"
        "print('begun', flush=True); sys.exit(bootstrap.main(Path('.')))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    told = process.communicate()[0]
    assert process.returncode == 130
    assert "run the same command again" in told


def test_uv_takes_over_pips_index_and_certificates_unless_it_has_its_own():
    settings = {"global.index-url": "https://mirror.example/simple", "global.cert": "/etc/ssl/own.pem"}
    taken = uv_environment({"VIRTUAL_ENV": "/elsewhere"}, settings)
    assert taken["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert taken["SSL_CERT_FILE"] == "/etc/ssl/own.pem"
    assert "VIRTUAL_ENV" not in taken
    assert "UV_DEFAULT_INDEX" not in uv_environment({"UV_INDEX_URL": "https://own.example"}, settings)


def test_a_set_up_that_is_complete_asks_nothing_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Setup, "pending", lambda _: [])
    monkeypatch.setattr(bootstrap, "machine_checks", lambda _: pytest.fail("checked a machine that is set up"))
    assert bootstrap.main(tmp_path) == 0
