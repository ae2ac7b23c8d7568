"""The command line's promises: exit codes, one line per fault, no traceback, help for newcomers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rankbridge import cli, interrupts, rehearsal
from rankbridge.interrupts import Interrupted
from rankbridge.layout import HOME_VARIABLE
from rankbridge.rig import namespaces

COMMANDS = (
    "rehearse",
    "data",
    "train",
    "export",
    "up",
    "down",
    "restart",
    "status",
    "load",
    "report",
    "bench",
    "forget",
    "erase",
    "version",
)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setattr(interrupts, "listen", lambda: None)  # pytest keeps its own handlers


def run(*arguments: str) -> int:
    return cli.main(arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_with_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "Usage:" in shown
    assert "Example:" in shown


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert [command for command in COMMANDS if not re.search(rf"^│ {command} ", shown, re.MULTILINE)] == []


def test_namespaces_without_root_are_one_error_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(namespaces, "is_root", lambda: False)
    assert run("rehearse", "--sites", "netns") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2
    assert "need root" in said[0]
    assert "remedy: " in said[1]


def test_down_when_nothing_is_up_is_no_fault(capsys: pytest.CaptureFixture[str]):
    assert run("down") == 0
    assert "nothing was up" in capsys.readouterr().out


def test_status_when_nothing_is_up_ends_with_3_and_still_gives_the_gateways(capsys: pytest.CaptureFixture[str]):
    assert run("status", "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["gateways"] == {"onprem": "http://127.0.10.1:8080", "aws": "http://127.0.20.1:8080"}
    assert found["ready"] is False
    assert {process["state"] for process in found["processes"]} == {"down"}


@pytest.mark.parametrize(
    ("arguments", "fault", "remedy"),
    [
        (("up",), "there is no bundle under", "make rehearse"),
        (("up", "--bundle", "abc"), "no bundle", "bundles here: none"),
        (("restart", "web@onprem"), "'web@onprem' is no process", "tritonserver"),
        (("restart", "gateway@onprem"), "nothing is up", "rankbridge up"),
        (("rehearse", "--data", "retail=x.csv"), "no such kind of data", "online-retail=PATH"),
        (("data", "--data", "events=/no/such/file.csv"), "cannot read the data file", "give the path"),
        (("train",), "there is no prepared data set", "rankbridge data"),
        (("export",), "nothing has been trained", "rankbridge train"),
        (("load", "--suite", "flood"), "no suite is called 'flood'", "mix"),
    ],
)
def test_a_fault_is_one_line_with_its_remedy_and_exit_code_2(
    arguments: tuple[str, ...], fault: str, remedy: str, capsys: pytest.CaptureFixture[str]
):
    assert run(*arguments) == 2
    shown = capsys.readouterr().err
    assert re.search(rf"error: .*{re.escape(fault)}", shown)
    assert re.search(rf"remedy: .*{re.escape(remedy)}", shown)
    assert "Traceback" not in shown


def test_a_wrong_option_is_explained_with_exit_code_2(capsys: pytest.CaptureFixture[str]):
    assert run("rehearse", "--rate", "many") == 2
    assert run("no-such-command") == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_with_the_signals_code(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(_: object) -> bool:
        raise Interrupted(number)

    monkeypatch.setattr(rehearsal.Rehearsal, "run", interrupted)
    assert run("rehearse") == code
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_the_verdict_decides_the_exit_code(passed: bool, code: int, monkeypatch: pytest.MonkeyPatch):  # noqa: FBT001 - a parameter of the test
    monkeypatch.setattr(rehearsal.Rehearsal, "run", lambda _: passed)
    assert run("rehearse") == code


def test_a_bug_is_told_as_ours_and_its_traceback_kept_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def broken(_: object) -> bool:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(rehearsal.Rehearsal, "run", broken)
    assert run("rehearse") == 70
    shown = capsys.readouterr().err
    assert "rankbridge has a bug: ZeroDivisionError" in shown
    assert "Traceback" not in shown
    assert "Traceback" in (tmp_path / "home" / "run" / "logs" / "desk-bug.log").read_text()


def test_nothing_heavy_is_loaded_before_a_command_needs_it():
    heavy = {"torch", "locust", "gevent", "onnxruntime", "faiss", "polars", "matplotlib"}
    code = f"import sys; from rankbridge import cli; print(sorted({heavy!r} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
