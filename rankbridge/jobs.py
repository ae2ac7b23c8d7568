"""Runs one job (`python -m workloads.X`) to its end and shows its progress.

A job writes JSON lines on stdout (`workloads.telemetry.progress`); here they become bars on a terminal or
occasional plain lines in a log. Everything a job says also goes to its log file. It knows no job's meaning.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rankbridge import processes
from rankbridge.faults import DeskError
from rankbridge.interrupts import Interrupted, shield
from workloads.telemetry.progress import FaultLine, NoteLine, ProgressLine, ResultLine, parse

STOP_WITHIN_S: Final = 30.0
"""How long an interrupted job may take to write what the next run goes on from."""
_PLAIN_EVERY_S: Final = 10.0


class View(Protocol):
    """Shows a job's lines to a person; the one door to the terminal. The fake is a list of lines."""

    def progress(self, line: ProgressLine) -> None:
        """A stage has come this far."""

    def note(self, line: NoteLine) -> None:
        """One fact."""


class PlainView:
    """For logs: the first and the last line of each stage, and one every ten seconds between."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._last: dict[str, float] = {}
        self._ended: set[str] = set()

    def progress(self, line: ProgressLine) -> None:
        """See View."""
        now, ended = self._clock(), line.done >= line.total
        if line.stage in self._ended:
            return
        if ended:
            self._ended.add(line.stage)
        elif now - self._last.get(line.stage, -_PLAIN_EVERY_S) < _PLAIN_EVERY_S:
            return
        self._last[line.stage] = now
        share = 100.0 * line.done / line.total if line.total else 100.0
        self._say(f"  {line.stage}: {share:3.0f} %{_figures(line.figures)}")

    def note(self, line: NoteLine) -> None:
        """See View."""
        self._say(f"  {line.stage}: {line.text}{_figures(line.figures)}")


class BarView:
    """For terminals: a bar per stage with its newest figures, notes above."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def progress(self, line: ProgressLine) -> None:
        """See View."""
        task = self._tasks.get(line.stage)
        if task is None:
            task = self._tasks[line.stage] = self._progress.add_task(escape(line.stage), total=line.total, figures="")
        figures = escape(_figures(line.figures))
        self._progress.update(task, completed=line.done, total=line.total, figures=figures)

    def note(self, line: NoteLine) -> None:
        """See View."""
        self._progress.console.print(
            escape(f"  {line.stage}: {line.text}{_figures(line.figures)}"), style="dim", highlight=False
        )


@contextlib.contextmanager
def viewing(console: Console) -> Iterator[View]:
    """Bars where a person watches, lines where a file does."""
    if not console.is_terminal:
        yield PlainView(lambda text: console.print(escape(text), soft_wrap=True, highlight=False))
        return
    bars = Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[figures]}"),
        console=console,
    )
    with bars:
        yield BarView(bars)


def run(
    module: str,
    arguments: Sequence[str],
    *,
    log: Path,
    view: View,
    root: Path,
    append: bool = False,
    environment: Mapping[str, str] | None = None,
    entry: Sequence[str] = (),
) -> ResultLine:
    """Run `python -m MODULE ARGUMENTS` and return its result line; `entry` comes before the command line.

    Raises DeskError with the job's own fault and remedy, or with the end of its log when it had no time to
    say one. Raises Interrupted once the job, told to stop the same way, has ended.
    """
    command = [*entry, sys.executable, "-m", module, *arguments]
    return follow(command, title=module, log=log, view=view, root=root, append=append, environment=environment)


def follow(
    command: Sequence[str],
    *,
    title: str,
    log: Path,
    view: View,
    root: Path,
    append: bool = False,
    environment: Mapping[str, str] | None = None,
) -> ResultLine:
    """As `run`, for any command that writes progress lines.

    `append` keeps what the log held before; `environment` is the desk's own unless it is given.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a" if append else "w", encoding="utf-8", buffering=1) as record:
        with shield():
            # The tether ends a job whose desk was killed; its own session keeps a terminal's Ctrl-C for the desk.
            job = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=record,
                text=True,
                encoding="utf-8",
                errors="replace",
                cwd=root,
                env=dict(environment) if environment is not None else None,
                start_new_session=True,
            )
        try:
            last = _read(job, record.write, view)
            code = job.wait()
            if job.stdout is not None:
                job.stdout.close()
        except BaseException as error:
            with shield():
                _stop(job, error.number if isinstance(error, Interrupted) else signal.SIGTERM, record)
            raise
    if isinstance(last, FaultLine):
        raise DeskError(last.fault, last.remedy)
    if code != 0 or last is None:
        ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        what = f"{title} ended with {ending}" if code else f"{title} ended without a result"
        evidence = tuple(text for text in processes.tail(log, lines=200) if parse(text) is None)
        raise DeskError(what, f"its whole log is {log}", detail=evidence[-processes.TAIL_LINES :])
    return last


def _read(job: subprocess.Popen[str], record: Callable[[str], int], view: View) -> ResultLine | FaultLine | None:
    """Show and record every line; the last one that ends a job."""
    last: ResultLine | FaultLine | None = None
    for text in job.stdout or ():
        record(text)
        line = parse(text)
        if isinstance(line, ProgressLine):
            view.progress(line)
        elif isinstance(line, NoteLine):
            view.note(line)
        elif line is not None:
            last = line
    return last


def _stop(job: subprocess.Popen[str], number: signal.Signals, record: TextIO) -> None:
    """Pass the signal on, give the job time to leave a state to go on from, then end it for good.

    What it still says is read to the end: a job whose reader is gone dies at its next line, before its checkpoint.
    """
    with contextlib.suppress(ProcessLookupError):
        job.send_signal(number)
    try:
        said, _ = job.communicate(timeout=STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        job.kill()
        said, _ = job.communicate()
    record.write(said or "")


def _figures(figures: dict[str, float]) -> str:
    """` loss 0.123 auc 0.7` after a line; nothing when there are none."""
    words = [f"{name} {value:,.0f}" if abs(value) >= 1000 else f"{name} {value:.4g}" for name, value in figures.items()]
    return "  " + "  ".join(words) if words else ""
