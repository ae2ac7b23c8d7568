"""Runs one of the Locust suites headless against gateways and returns what its gate judged.

The suites and the gate are `loadtests`' own and work without this: `locust -f loadtests/mix.py`. Here a run
gets a place for its files, a progress bar, and an end when the desk is told to stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from loadtests.gate import EXIT_BREACHED, EXIT_PASSED, LoadResult
from rankbridge import processes
from rankbridge.faults import DeskError
from rankbridge.interrupts import shield
from rankbridge.jobs import View
from workloads.contract.slo import P99_SAMPLES, TRAFFIC_PER_S
from workloads.telemetry.progress import ProgressLine

SUITES: Final = ("mix", "recommend", "search", "events", "smoke", "spike", "steady")
MIX_PER_S: Final = sum(TRAFFIC_PER_S.values())
WARMUP_S: Final = 8.0
_STOP_WITHIN_S: Final = 15.0
_LATE_S: Final = 60.0
"""Locust may take this much longer than the run: it starts, waits for answers under way, and judges."""
_POLL_S: Final = 0.2


def seconds_for(samples: int, rate: float) -> float:
    """How long the mix must run at `rate` requests a second until its rarest endpoint has `samples`.

    Arrivals are Poisson: a margin of five standard deviations keeps chance from failing a run.
    """
    share = min(TRAFFIC_PER_S.values()) / MIX_PER_S
    return math.ceil((samples + 5 * math.sqrt(samples)) / (rate * share))


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """What to send where. `seconds` is the judged part, after warm-up."""

    host: str
    also_host: str | None = None
    also_share: float = 0.25
    suite: str = "mix"
    rate: float = MIX_PER_S
    seconds: float | None = None
    warmup: float = WARMUP_S
    min_samples: int | None = None
    """For a small run; None keeps to the promise, with its minimum of samples and its rate."""
    seed: int = 1

    @property
    def judged_seconds(self) -> float:
        """`seconds`, or as long as the promised number of samples takes."""
        return self.seconds if self.seconds is not None else seconds_for(self.min_samples or P99_SAMPLES, self.rate)

    @property
    def total_seconds(self) -> int:
        """With warm-up; Locust counts whole seconds."""
        return math.ceil(self.judged_seconds + self.warmup)


@dataclasses.dataclass(frozen=True)
class LoadFiles:
    """What a run leaves in a folder."""

    folder: Path

    @property
    def samples(self) -> Path:
        """Every sample, JSON lines."""
        return self.folder / "samples.jsonl"

    @property
    def gate(self) -> Path:
        """The gate's result."""
        return self.folder / "load.json"

    @property
    def acknowledged(self) -> Path:
        """Ids of acknowledged events, one a line."""
        return self.folder / "acknowledged.txt"

    @property
    def log(self) -> Path:
        """What Locust said."""
        return self.folder / "locust.log"


def command(plan: LoadPlan, files: LoadFiles, root: Path) -> list[str]:
    """Locust's command line for a plan."""
    # About one request a second for each user: Locust shares the users out by the mix's weights.
    users = max(1, round(plan.rate))
    words = [
        *(sys.executable, "-m", "locust", "-f", str(root / "loadtests" / f"{plan.suite}.py")),
        *("--headless", "--only-summary", "--host", plan.host),
        *("--users", str(users), "--spawn-rate", str(users), "--run-time", f"{plan.total_seconds}s"),
        *("--rate-per-user", repr(plan.rate / users), "--warmup", repr(plan.warmup), "--seed", str(plan.seed)),
        *("--samples", str(files.samples), "--gate-out", str(files.gate)),
        *("--acknowledged", str(files.acknowledged)),
    ]
    if plan.also_host:
        words += ["--also-host", plan.also_host, "--also-share", repr(plan.also_share)]
    if plan.min_samples is not None:
        words += ["--min-samples", str(plan.min_samples)]
    return words


def run(plan: LoadPlan, files: LoadFiles, *, root: Path, view: View) -> LoadResult:
    """Send the load and return what the gate judged; breaches are in it, no error.

    Raises DeskError when the run could not be done, Interrupted once Locust has ended.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    for path in (files.samples, files.gate, files.acknowledged):
        path.unlink(missing_ok=True)
    with files.log.open("w") as log:
        with shield():
            locust = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command(plan, files, root)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=root,
                env=_environment(),
                start_new_session=True,
            )
        try:
            code = _wait(locust, plan, view)
        except BaseException:
            with shield():
                _stop(locust)
            raise
    if code not in {EXIT_PASSED, EXIT_BREACHED} or not files.gate.exists():
        detail = processes.tail(files.log)
        raise DeskError(f"the load run ended with code {code}", f"its whole log is {files.log}", detail=detail)
    return msgspec.json.decode(files.gate.read_bytes(), type=LoadResult)


def _environment() -> dict[str, str]:
    """Ours without Locust's own variables: a run is what its command line says."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}


def _wait(locust: subprocess.Popen[bytes], plan: LoadPlan, view: View) -> int:
    began = time.monotonic()
    total = plan.total_seconds
    while (code := locust.poll()) is None:
        gone = time.monotonic() - began
        if gone > total + _LATE_S:
            raise DeskError(f"Locust did not end {_LATE_S:.0f} s after the run", "is the machine overloaded?")
        view.progress(ProgressLine(stage="load", done=min(round(gone), total - 1), total=total, unit="s"))
        time.sleep(_POLL_S)
    view.progress(ProgressLine(stage="load", done=total, total=total, unit="s"))
    return code


def _stop(locust: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        locust.send_signal(signal.SIGTERM)
    try:
        locust.wait(_STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        locust.kill()
        locust.wait()
