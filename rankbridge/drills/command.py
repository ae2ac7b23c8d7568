"""`rankbridge faults`: chosen faults on both sites of this home, one table, one page, one exit code."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.markup import escape

from loadtests.samples import write_whole
from rankbridge import cloud as clouds
from rankbridge import jobs, report, verdict
from rankbridge.cloud import CloudForm
from rankbridge.drills import catalogue, page, records
from rankbridge.drills.records import Suite
from rankbridge.drills.sites import Sites
from rankbridge.drills.suite import DriverProcess, FaultSuite
from rankbridge.drills.table import baseline, checks_table, faults_table, markdown
from rankbridge.layout import Layout

_BASELINE: Final = "RANKBRIDGE_BASELINE"


def run(
    layout: Layout,
    *,
    names: Sequence[str],
    out: Path,
    cut_s: float,
    real_tunnels: bool,
    ports: Sequence[str],
    seed: int,
    counts_only: bool,
    console: Console,
) -> bool:
    """Whether every fault that was made held its expectations. Raises DeskError, Interrupted.

    With `counts_only` those that hang on the machine's speed are shown and do not judge.
    """
    faults = [catalogue.lasting(fault, cut_s) for fault in catalogue.chosen(names)]
    form = None if clouds.check(CloudForm.LOCALSTACK, os.environ) else CloudForm.LOCALSTACK
    kubernetes = kubernetes_s(layout)

    def say(text: str) -> None:
        console.print(f"  {escape(text)}", soft_wrap=True)

    def keep(found: Suite) -> None:
        records.write(msgspec.structs.replace(found, kubernetes_s=kubernetes), out)

    way = "two real tunnels" if real_tunnels else "a relay"
    with jobs.viewing(console) as view:
        console.print(
            f"[bold]faults[/]: both sites come up, everything between them passes {way}; {len(faults)} to make"
        )
        with Sites(
            layout, ports=ports, cloud_form=form, real_tunnels=real_tunnels, view=view, say=say, seed=seed
        ) as ground:
            driver = DriverProcess(out.absolute() / "drives", layout.root)
            found = FaultSuite(ground, driver, say=say, seed=seed, form=ground.form.name).run(faults, keep)
    found = msgspec.structs.replace(found, kubernetes_s=kubernetes)
    records.write(found, out)
    made = page.write(found, out)
    write_whole(out / "faults.md", markdown(found).encode())
    with contextlib.suppress(OSError, ValueError):  # no rehearsal has left its verdict here
        report.write(verdict.read(out / "verdict.json"), out / "report.html")
    console.print()
    console.print(faults_table(found))
    if not found.passed:
        console.print(checks_table(found))
    for line in baseline(found):
        console.print(escape(line), soft_wrap=True)
    good = found.counted if counts_only else found.passed
    word = "[bold green]passed[/]" if good else "[bold red]failed[/]"
    by = " by what was counted; times are shown and were not judged" if counts_only else ""
    console.print(f"faults: {word}{by}   {escape(str(made))}")
    return good


def kubernetes_s(layout: Layout) -> dict[str, float]:
    """What `make test-cluster` measured of Kubernetes alone; nothing where it did not run here."""
    file = Path(os.environ.get(_BASELINE, layout.root / ".rankbridge" / "cluster" / "baseline.json"))
    with contextlib.suppress(OSError, ValueError, KeyError):
        return {str(what): float(value) for what, value in json.loads(file.read_text())["seconds"].items()}
    return {}
