"""The routing policy beside balancers and optimum, in simulated time: a table, a file and a drawing.

Service times come from a bench's `service-times.json`; a route that it does not have is drawn from a lognormal, and the
output says which. It starts nothing and measures nothing: it plays.
"""

from __future__ import annotations

import dataclasses
import io
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import msgspec
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.table import Table

from loadtests.samples import write_whole
from rankbridge.faults import DeskError
from workloads.contract.slo import ANSWER_RESERVE_MS, DEADLINE_MS, STAGE_P99_MS, Endpoint, Stage
from workloads.gateway.router import Route
from workloads.gateway.simulator import Backend, Comparison, Condition, Fault, Recorded, compare, requests

OURS: Final = "rankbridge"
LEFT_MS: Final = DEADLINE_MS[Endpoint.RECOMMEND] - ANSWER_RESERVE_MS - STAGE_P99_MS[Stage.CANDIDATES]
"""For ranking, when candidates took all that they may."""
LOADS: Final = (0.3, 0.6, 0.9, 1.2)
"""Of what the home ranker can do."""
HOME, CLOUD, STUDENT = Route("onprem", 1), Route("aws", 1), Route("onprem", 2)
_DRAWN_MS: Final[Mapping[Route, float]] = {HOME: 4.0, CLOUD: 2.0, STUDENT: 0.8}
"""Median of a route that was not measured."""
_SPREAD: Final = 0.3
_TAKEN: Final = 5000
_STYLE: Final[dict[Any, Any]] = {  # matplotlib types its keys one by one
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_COLOURS: Final = ("#1565c0", "#e08a00", "#2e8b57", "#8e5bb5")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to play."""

    recorded: Path | None = None
    loads: Sequence[float] = LOADS
    seconds: float = 30.0
    left_ms: float = LEFT_MS
    cloud_price: float = 5.0
    """Of a call to aws, when one at home costs 1; the student's costs a fifth of that."""
    way_ms: float = 10.0
    """To aws and back."""
    workers: int = 1
    """Of the home ranker."""
    fault: Condition | None = None
    """What the home ranker suffers in the middle third."""
    seed: int = 1
    out: Path = Path("out")


class PolicyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One policy at one load."""

    name: str
    p50_ms: float
    p95_ms: float
    p99_ms: float
    late_share: float
    cost_per_1000: float
    rungs: dict[int, float]
    """Share of answers."""
    hedge_share: float


class LoadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Every policy on the same requests."""

    load: float
    """Of what the home ranker can do."""
    rate: float
    requests: int
    policies: list[PolicyFigures]
    least_cost_per_1000: float
    clairvoyant_per_1000: float
    calibration: list[tuple[float, float, int, int]]
    """Of ours: predicted from, to (ms), calls, calls that took no longer than predicted."""


class SimulationResult(msgspec.Struct, frozen=True, kw_only=True):
    """`simulation.json`."""

    schema_version: int = 1
    left_ms: float
    service_times: dict[str, str]
    """Per route, where its service times are from."""
    fault: str | None
    loads: list[LoadFigures]


def run(options: Options, console: Console) -> SimulationResult:
    """Play every load, print, and write `simulation.json` and `simulation.svg` to `options.out`.

    Raises DeskError when recorded service times cannot be read.
    """
    backends, sources = _backends(options)
    capacity = 1000.0 * backends[0].workers * len(backends[0].service_ms) / math.fsum(backends[0].service_ms)
    loads = []
    with console.status("playing") as status:
        for load in options.loads:
            status.update(f"playing {load:g} times what the home ranker can do")
            loads.append(_play(options, backends, load, load * capacity))
    result = SimulationResult(
        left_ms=options.left_ms,
        service_times=sources,
        fault=None if options.fault is None else options.fault.value,
        loads=loads,
    )
    write_whole(options.out / "simulation.json", msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    write_whole(options.out / "simulation.svg", draw(result))
    show(result, console)
    return result


def _backends(options: Options) -> tuple[list[Backend], dict[str, str]]:
    measured: Mapping[str, Sequence[float]] = {}
    said = ""
    if options.recorded is not None:
        try:
            recorded = msgspec.json.decode(options.recorded.read_bytes(), type=Recorded)
        except (OSError, msgspec.DecodeError) as error:
            remedy = "name the service-times.json that `rankbridge bench` wrote"
            raise DeskError(f"cannot read {options.recorded}: {error}", remedy) from None
        measured, said = recorded.ms, recorded.measured
    chance = random.Random(options.seed)  # noqa: S311 - reproducible on purpose
    times: dict[Route, Sequence[float]] = {}
    sources = {}
    for route, median in _DRAWN_MS.items():
        name = f"{route.site}/{route.rung}"
        found = measured.get(name)
        times[route] = found or [chance.lognormvariate(math.log(median), _SPREAD) for _ in range(_TAKEN)]
        sources[name] = said if found else f"drawn: lognormal, median {median:g} ms, sigma {_SPREAD:g}"
    backends = [
        Backend(HOME, times[HOME], workers=options.workers, price=1.0),
        Backend(CLOUD, times[CLOUD], workers=8, price=options.cloud_price, way_ms=options.way_ms),
        Backend(STUDENT, times[STUDENT], workers=1, price=0.2),
    ]
    return backends, sources


def _play(options: Options, backends: Sequence[Backend], load: float, rate: float) -> LoadFigures:
    chance = random.Random(options.seed)  # noqa: S311 - as above
    asked = requests(backends, rate=rate, seconds=options.seconds, left_ms=options.left_ms, random=chance)
    faults = []
    if options.fault is not None:
        faults.append(Fault(HOME, options.fault, options.seconds / 3.0, 2.0 * options.seconds / 3.0))
    found = compare(backends, asked, chance=lambda: random.Random(options.seed), faults=faults)  # noqa: S311 - as above
    return LoadFigures(
        load=load,
        rate=rate,
        requests=len(asked),
        policies=_figures(found),
        least_cost_per_1000=found.least_cost_per_1000,
        clairvoyant_per_1000=found.clairvoyant_per_1000,
        calibration=[(row.above_ms, row.up_to_ms, row.calls, row.within) for row in found.calibration.rows()],
    )


def _figures(found: Comparison) -> list[PolicyFigures]:
    return [
        PolicyFigures(
            name=row.name,
            p50_ms=row.outcomes.quantile_ms(0.5),
            p95_ms=row.outcomes.quantile_ms(0.95),
            p99_ms=row.outcomes.quantile_ms(0.99),
            late_share=row.outcomes.late_share,
            cost_per_1000=row.outcomes.cost_per_1000,
            rungs={rung: row.outcomes.rung_share(rung) for rung in (1, 2, 3)},
            hedge_share=row.outcomes.hedges / max(1, len(row.outcomes.answers)),
        )
        for row in found.rows
    ]


def show(result: SimulationResult, console: Console) -> None:
    """The figures as a table."""
    for route, source in result.service_times.items():
        console.print(f"{route}: {source}", highlight=False, markup=False)
    fault = f", the home ranker {result.fault} in the middle third" if result.fault else ""
    table = Table(title=f"{result.left_ms:g} ms for ranking{fault}; cost of 1,000 answers; late, rungs and hedges in %")
    table.add_column("load", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for name in ("p50 ms", "p95 ms", "p99 ms", "late", "cost", "of least", "rung 1", "rung 2", "rung 3", "hedges"):
        table.add_column(name, justify="right")
    for at in result.loads:
        for place, row in enumerate(at.policies):
            table.add_row(
                f"{at.load:g} ({at.rate:.0f}/s)" if not place else "",
                row.name,
                *(f"{ms:.1f}" for ms in (row.p50_ms, row.p95_ms, row.p99_ms)),
                f"{100 * row.late_share:.2f}",
                f"{row.cost_per_1000:,.0f}",
                f"{row.cost_per_1000 / at.least_cost_per_1000:.2f}",
                *(f"{100 * row.rungs[rung]:.2f}" for rung in (1, 2, 3)),
                f"{100 * row.hedge_share:.2f}",
                style="bold" if row.name == OURS else None,
            )
        table.add_row(
            "",
            "least cost",
            *[""] * 4,
            f"{at.least_cost_per_1000:,.0f}",
            "1.00",
            *[""] * 4,
            style="dim",
            end_section=True,
        )
    console.print(table)
    console.print(
        "least cost: the plan that knows every arrival, and takes each call for a mean one; a plan that knew each "
        "call's own time could do with "
        + ", ".join(f"{at.clairvoyant_per_1000:,.0f} at {at.load:g}" for at in result.loads),
        highlight=False,
    )
    calls, within = _kept(result)
    if calls:
        console.print(f"calls that took no longer than predicted: {100 * within / calls:.1f} %", highlight=False)


def _kept(result: SimulationResult) -> tuple[int, int]:
    rows = [row for at in result.loads for row in at.calibration]
    return sum(row[2] for row in rows), sum(row[3] for row in rows)


def draw(result: SimulationResult) -> bytes:
    """Cost and tail over load, and whether predictions came true, as a whole SVG file."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "simulation"}):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        cost, tail, kept = figure.subplots(1, 3)
        loads = [at.load for at in result.loads]
        for place, colour in enumerate(_COLOURS[: len(result.loads[0].policies)]):
            rows = [at.policies[place] for at in result.loads]
            width = 2.4 if rows[0].name == OURS else 1.2
            cost.plot(
                loads, [r.cost_per_1000 for r in rows], color=colour, linewidth=width, marker="o", label=rows[0].name
            )
            tail.plot(loads, [r.p99_ms for r in rows], color=colour, linewidth=width, marker="o")
        least = [at.least_cost_per_1000 for at in result.loads]
        cost.plot(loads, least, color="#555555", linestyle="--", linewidth=1, label="least cost")
        cost.set(title="cost of 1,000 answers", xlabel="load, of what the home ranker can do", ylim=(0, None))
        cost.legend(frameon=False, fontsize=8, loc="lower left", ncols=2)
        tail.axhline(result.left_ms, color="#c62828", linewidth=1)
        tail.set(
            title="p99, ms (line: what there is)",
            xlabel="load, of what the home ranker can do",
            ylim=(0, 1.1 * result.left_ms),
        )
        totals: dict[float, tuple[int, int]] = {}
        for _, up_to, calls, within in (row for at in result.loads for row in at.calibration):
            before = totals.get(up_to, (0, 0))
            totals[up_to] = before[0] + calls, before[1] + within
        shares = [(up_to, within / calls) for up_to, (calls, within) in sorted(totals.items()) if calls >= 20]
        kept.plot([x for x, _ in shares], [y for _, y in shares], color=_COLOURS[0], marker="o")
        kept.axhline(0.95, color="#555555", linestyle="--", linewidth=1)
        kept.set_xscale("log", base=2)
        kept.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        kept.set(title="share of calls within prediction", xlabel="predicted, ms, up to", ylim=(0.5, 1.01))
        out = io.StringIO()
        canvas: Any = FigureCanvasSVG(figure)  # its methods carry no types
        canvas.print_svg(out, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return out.getvalue().encode()
