"""The suite as one self-contained page, and the timelines of one fault for any other page. Draws; decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import jinja2
from markupsafe import Markup

from loadtests.samples import write_whole
from rankbridge import plots
from rankbridge.drills.records import Row, Suite, read
from rankbridge.drills.table import baseline, milliseconds, rungs, seconds

FILE: Final = "faults.html"
_WIDTH: Final = 9.6


class Timelines(NamedTuple):
    """A fault's second by second: slowest hundredth, requests in and out, rungs of the answers."""

    title: str
    latency: Markup
    rate: Markup
    rungs: Markup


def timelines(row: Row) -> Timelines | None:
    """None for a fault that was not made."""
    if row.left_out is not None or not row.windows:
        return None
    fault = (row.fault_s, row.heal_s)
    # A second in which the hundredth-slowest request got no answer has no p99: the line has a gap there.
    p99 = [(one.at_s + 0.5, one.p99_ms) for one in row.windows if one.p99_ms is not None]
    sent = [(one.at_s + 0.5, float(one.requests)) for one in row.windows]
    good = [(one.at_s + 0.5, float(one.requests - one.late)) for one in row.windows]
    slices = [plots.Slice(one.at_s, one.rungs) for one in row.windows]
    name = f"{row.id} {row.title}"
    latency = plots.timeline(
        [plots.Line("p99", p99 or [(0.0, 0.0)], plots.SERIES[0])],
        warmup_s=0.0,
        width=_WIDTH,
        name=f"p99 during {name}",
        fault=fault,
    )
    rate = plots.timeline(
        [plots.Line("sent", sent, plots.MUTED), plots.Line("in time", good, plots.SERIES[1])],
        warmup_s=0.0,
        width=_WIDTH,
        name=f"requests a second during {name}",
        fault=fault,
        unit="/s",
    )
    mix = plots.rung_timeline(slices, bin_s=1.0, warmup_s=0.0, width=_WIDTH, name=f"rungs during {name}", fault=fault)
    # Our own drawings, of numbers and of names in the catalogue.
    return Timelines(name, Markup(latency), Markup(rate), Markup(mix))  # noqa: S704


def vpn_cut(folder: Path) -> Row | None:
    """The row of both tunnels cut, of the suite whose results lie in a folder; None where there is none."""
    found = read(folder)
    return next((row for row in found.rows if row.id == "F2" and row.windows), None) if found else None


def render(suite: Suite) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    here = Path(__file__)
    css = here.parent.with_name("report.css").read_text(encoding="utf-8")
    template = environment.from_string(here.with_name("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        suite=suite,
        css=Markup(css),  # noqa: S704 - our own file
        made=[(row, timelines(row)) for row in suite.rows if row.left_out is None],
        left_out=[row for row in suite.rows if row.left_out is not None],
        baseline=baseline(suite),
        seconds=seconds,
        milliseconds=milliseconds,
        rungs=rungs,
    )


def write(suite: Suite, folder: Path) -> Path:
    """`faults.html`, whole or not at all."""
    path = folder / FILE
    write_whole(path, render(suite).encode())
    return path
