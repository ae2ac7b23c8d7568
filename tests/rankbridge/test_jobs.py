"""Jobs: their progress as a person sees it, their faults as one line, their end on an interrupt."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rankbridge import jobs
from rankbridge.faults import DeskError
from rankbridge.interrupts import Interrupted
from workloads.telemetry.progress import NoteLine, ProgressLine, ResultLine

PRELUDE = "import sys, time, signal; from workloads.telemetry.progress import Progress; p = Progress(interval=0)\n"


class FakeView:
    """Keeps what it is told; raises at a note when it is told to."""

    def __init__(self, at_note: BaseException | None = None) -> None:
        self.lines: list[ProgressLine | NoteLine] = []
        self._at_note = at_note

    def progress(self, line: ProgressLine) -> None:
        self.lines.append(line)

    def note(self, line: NoteLine) -> None:
        self.lines.append(line)
        if self._at_note is not None:
            raise self._at_note


def job(code: str, folder: Path, view: jobs.View | None = None) -> ResultLine:
    command = [sys.executable, "-c", PRELUDE + code]
    return jobs.follow(command, title="the job", log=folder / "job.log", view=view or FakeView(), root=folder)


def test_a_job_shows_its_progress_and_returns_its_result(tmp_path: Path):
    view = FakeView()
    code = "p.step('read', 1, 2); print('chatter'); p.note('read', 'half'); p.result({'made': 'here'}, rows=2)"
    result = job(code, tmp_path, view)
    assert result == ResultLine(made={"made": "here"}, figures={"rows": 2})
    assert [type(line) for line in view.lines] == [ProgressLine, NoteLine]
    assert "chatter" in (tmp_path / "job.log").read_text()


def test_a_fault_line_becomes_the_commands_own_error(tmp_path: Path):
    with pytest.raises(DeskError) as error:
        job("p.fault('column user is missing', 'add it'); sys.exit(2)", tmp_path)
    assert (error.value.fault, error.value.remedy) == ("column user is missing", "add it")


def test_a_job_that_crashes_is_told_with_the_end_of_its_log(tmp_path: Path):
    with pytest.raises(DeskError, match="the job ended with code 1") as error:
        job("raise ValueError('a bug')", tmp_path)
    assert error.value.detail[-1] == "ValueError: a bug"


def test_a_job_without_a_result_is_a_fault_even_with_code_zero(tmp_path: Path):
    with pytest.raises(DeskError, match="ended without a result"):
        job("pass", tmp_path)


def test_a_job_that_was_killed_is_told_by_the_signal(tmp_path: Path):
    with pytest.raises(DeskError, match="ended with signal SIGKILL"):
        job("import os; os.kill(os.getpid(), 9)", tmp_path)


def test_an_interrupt_is_passed_on_and_the_job_may_write_its_state_first(tmp_path: Path):
    code = (
        "def leave(*_): open('state', 'w').write('here'); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, leave)\np.note('train', 'begun')\ntime.sleep(60)"
    )
    with pytest.raises(Interrupted):
        job(code, tmp_path, FakeView(at_note=Interrupted(signal.SIGINT)))
    assert (tmp_path / "state").read_text() == "here"


def test_a_job_that_does_not_heed_an_interrupt_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "STOP_WITHIN_S", 0.2)
    code = (
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\nimport os; open('pid', 'w').write(str(os.getpid()))\n"
        "p.note('train', 'begun')\ntime.sleep(60)"
    )
    with pytest.raises(Interrupted):
        job(code, tmp_path, FakeView(at_note=Interrupted(signal.SIGINT)))
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_a_job_dies_with_a_killed_desk(tmp_path: Path):
    desk = (
        "import os, signal; from pathlib import Path; from rankbridge import jobs\n"
        "class View:\n"
        "    def progress(self, line): pass\n"
        "    def note(self, line): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"code = {PRELUDE!r} + 'import os; open(\\'pid\\', \\'w\\').write(str(os.getpid()))' + chr(10)\n"
        "code += 'p.note(\\'a\\', \\'b\\'); time.sleep(60)'\n"
        f"root = Path({str(tmp_path)!r})\n"
        f"jobs.follow([{sys.executable!r}, '-c', code], title='job', log=root / 'log', view=View(), root=root)"
    )
    assert subprocess.run([sys.executable, "-c", desk], check=False).returncode == -signal.SIGKILL
    pid = (tmp_path / "pid").read_text()
    for _ in range(500):
        if not Path(f"/proc/{pid}").exists():
            return
        signal.sigtimedwait([], 0.02)
    pytest.fail("the job outlived its desk")


def test_plain_lines_are_few_and_always_hold_the_last():
    said: list[str] = []
    moment = [0.0]
    view = jobs.PlainView(said.append, clock=lambda: moment[0])
    for step in range(101):
        moment[0] = step * 0.5
        view.progress(ProgressLine(stage="train", done=step, total=100, figures={"loss": 0.5}))
    assert said[0] == "  train:   0 %  loss 0.5"
    assert said[-1] == "  train: 100 %  loss 0.5"
    assert len(said) == 6


def test_without_a_terminal_there_are_lines_and_with_one_there_are_bars():
    for terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=120)
        with jobs.viewing(console) as view:
            view.progress(ProgressLine(stage="read [events]", done=5, total=10))
            view.note(NoteLine(stage="read", text="[half] way"))
            view.progress(ProgressLine(stage="read [events]", done=10, total=10, figures={"rows": 12345}))
        text = out.getvalue()
        assert "[half] way" in text
        assert "12,345" in text
        assert ("\x1b[" in text) is terminal
