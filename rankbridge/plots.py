"""Plots of a verdict as SVG to be put inline into a page.

Colours leave as CSS variables and fonts as the page's own, so that one drawing serves light and
dark. Drawn by matplotlib's SVG backend without a display. It knows shapes of data, no verdict.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

INK: Final = "#010101"
MUTED: Final = "#010102"
LINE: Final = "#010103"
LIMIT: Final = "#010104"
SERIES: Final = ("#010111", "#010112", "#010113", "#010114")
RUNGS: Final = {"1": "#010121", "2": "#010122", "3": "#010123", "4": "#010124"}
_VARIABLES: Final = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    LIMIT: "--limit",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES, start=1)},
    **{colour: f"--rung-{rung}" for rung, colour in RUNGS.items()},
}
"""Colours that nobody would draw with, and the page's variables that take their place."""

_STYLE: Final[dict[Any, Any]] = {  # matplotlib types its keys one by one
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 1.0,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.pad": 6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_SHOWN_PER_INCH: Final = 110
"""Pixels that an inch of a drawing may take on a page; below that it shrinks with its column."""


_UNWANTED: Final = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<metadata>.*?</metadata>\s*",
        r"<style.*?</style>\s*",  # would hold for the whole page
        r'(?<=<svg)((?: xmlns:xlink| width| height| version)="[^"]*")+',
        r' version="1.1"',
        r'(?<=<g) id="(?!p[0-9a-f]{10})[^"]*"',  # the same in every drawing
        r" font-family: [^;\"]*;",  # the page's font
        r' transform="rotate\(-0 [^"]*"',
        r"<g ?/>\s*",
    )
)
"""What matplotlib writes and a page has no use for."""


class Line(NamedTuple):
    """One curve; `colour` is one of this module's."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    bold: bool = True


class Limit(NamedTuple):
    """A budget at one quantile: at most `value` at the share `share`."""

    share: float
    value: float
    measured: float | None
    """None: the request at that share failed."""


class StageBar(NamedTuple):
    """p50 and p99 of one stage, and what its p99 may be."""

    name: str
    p50: float
    p99: float
    limit: float | None


class Slice(NamedTuple):
    """One moment of a timeline: answers per rung."""

    at: float
    rungs: Mapping[str, int]


def latency(lines: Sequence[Line], limits: Sequence[Limit], *, name: str) -> str:
    """Milliseconds over the share of requests that stayed within them; the axis gives the tail its room."""

    def draw(axes: Axes) -> None:
        ends = [x for line in lines for x, _ in line.points]
        last = max([0.999, *(limit.share for limit in limits), *ends])
        for line in sorted(lines, key=lambda found: found.bold):
            xs = [_tail(share) for share, _ in line.points]
            ys = [value for _, value in line.points]
            axes.plot(xs, ys, color=line.colour, linewidth=2.2 if line.bold else 1.1, alpha=1 if line.bold else 0.75)
        top = max([*(limit.value for limit in limits), *(limit.measured or 0 for limit in limits)], default=0.0)
        highest = max((y for line in lines for _, y in line.points), default=1.0)
        top = min(max(top * 1.22, highest * 1.05), 2.5 * top) if top else highest * 1.05
        axes.set_ylim(0, top)
        axes.set_xlim(0, _tail(last) + 0.12)
        for limit in limits:
            _limit(axes, limit, top)
        ticks = [share for share in (0.5, 0.95, 0.99, 0.999, 0.9999) if share <= last + 1e-9]
        axes.xaxis.set_major_locator(FixedLocator([_tail(share) for share in ticks]))
        labels = dict(zip((_tail(t) for t in ticks), (f"{t * 100:g}" for t in ticks), strict=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: labels.get(x, "")))
        axes.set_xlabel("% of requests at most this slow")
        _ms_axis(axes)

    return _svg(draw, name=name, height=2.6, width=3.6)


def stages(bars: Sequence[StageBar], *, name: str) -> str:
    """p50 to p99 of each stage in the order of a request, with the budget of each p99."""

    def draw(axes: Axes) -> None:
        highest = max([*(b.p99 for b in bars), *(b.limit or 0 for b in bars)], default=1.0)
        for row, bar in enumerate(reversed(bars)):
            over = bar.limit is not None and bar.p99 > bar.limit
            colour = LIMIT if over else SERIES[0]
            axes.plot([bar.p50, bar.p99], [row, row], color=colour, linewidth=5, alpha=0.35, solid_capstyle="round")
            axes.plot([bar.p50], [row], marker="o", markersize=6, color=colour, linestyle="none")
            axes.plot(
                [bar.p99], [row], marker="o", markersize=6, color=colour, linestyle="none", markerfacecolor="none"
            )
            if bar.limit is not None:
                axes.plot([bar.limit, bar.limit], [row - 0.3, row + 0.3], color=LIMIT, linewidth=2)
            axes.annotate(
                f"{bar.p99:.1f}",
                (bar.p99, row),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
                color=INK,
            )
        axes.set_yticks(range(len(bars)), [b.name for b in reversed(bars)])
        axes.set_ylim(-0.6, len(bars) - 0.4)
        axes.set_xlim(-0.02 * highest, highest * 1.18)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("ms")
        axes.grid(axis="x")
        axes.tick_params(axis="y", labelcolor=INK)

    return _svg(draw, name=name, height=0.85 + 0.34 * len(bars), width=4.2)


def timeline(
    lines: Sequence[Line],
    *,
    warmup_s: float,
    width: float,
    name: str,
    fault: tuple[float, float] | None = None,
    unit: str = "ms",
) -> str:
    """Figures over the run; warm-up is shaded, and so is the time of a fault (from, to), in the colour of limits."""

    def draw(axes: Axes) -> None:
        for line in lines:
            axes.plot(*zip(*line.points, strict=True), color=line.colour, linewidth=1.5)
        values = sorted(y for line in lines for x, y in line.points if x >= warmup_s) or [1.0]
        axes.set_ylim(0, max(values) * 1.1)
        _time_axis(axes, lines, warmup_s, fault)
        _ms_axis(axes, unit)

    return _svg(draw, name=name, height=2.4, width=width)


def rung_timeline(
    slices: Sequence[Slice],
    *,
    bin_s: float,
    warmup_s: float,
    width: float,
    name: str,
    fault: tuple[float, float] | None = None,
) -> str:
    """Share of answers from each rung over the run; the time of a fault is between two lines."""

    def draw(axes: Axes) -> None:
        counts = {round(s.at / bin_s): s.rungs for s in slices}
        bins = range(max(counts) + 1)
        edges = [i * bin_s for i in range(len(bins) + 1)]
        floor = [0.0] * len(bins)
        for rung, colour in RUNGS.items():
            found = [counts.get(i, {}) for i in bins]
            tops = [
                low + 100 * rungs.get(rung, 0) / max(1, sum(rungs.values()))
                for low, rungs in zip(floor, found, strict=True)
            ]
            if tops != floor:
                axes.stairs(tops, edges, baseline=floor, fill=True, color=colour, linewidth=0)
            floor = tops
        axes.set_ylim(0, 100)
        axes.yaxis.set_major_locator(FixedLocator([0, 50, 100]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
        _time_axis(axes, [Line("", [(edges[-1], 0.0)], INK)], warmup_s)
        for at in fault or ():
            axes.axvline(at, color=LIMIT, linewidth=1.2)

    return _svg(draw, name=name, height=1.15, width=width)


def curve(line: Line, *, x_label: str, name: str) -> str:
    """One figure of training over its steps; the newest value is written at its end."""

    def draw(axes: Axes) -> None:
        xs, ys = zip(*line.points, strict=True)
        axes.plot(xs, ys, color=line.colour, linewidth=2)
        axes.plot(xs[-1:], ys[-1:], marker="o", markersize=5, color=line.colour)
        axes.annotate(f"{ys[-1]:.4g}", (xs[-1], ys[-1]), xytext=(-2, 8), textcoords="offset points", ha="right")
        axes.margins(x=0.04, y=0.22)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y")
        axes.set_xlabel(x_label)

    return _svg(draw, name=name, height=1.9, width=3.4)


def reliability(bins: Sequence[tuple[float, float, int]], *, name: str) -> str:
    """Observed over predicted probability per bin; a calibrated ranker lies on the diagonal."""

    def draw(axes: Axes) -> None:
        largest = max([*(p for p, _, _ in bins), *(o for _, o, _ in bins)], default=1.0) * 1.08
        axes.plot([0, largest], [0, largest], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        rows = max((count for _, _, count in bins), default=1)
        axes.plot([p for p, _, _ in bins], [o for _, o, _ in bins], color=SERIES[0], linewidth=1.4, alpha=0.6)
        sizes = [18 + 90 * math.sqrt(count / rows) for _, _, count in bins]
        axes.scatter([p for p, _, _ in bins], [o for _, o, _ in bins], s=sizes, color=SERIES[0], linewidths=0, zorder=3)
        axes.set_xlim(0, largest)
        axes.set_ylim(0, largest)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y")
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("observed share")

    return _svg(draw, name=name, height=2.4, width=3.4)


def _tail(share: float) -> float:
    """Place of a share on an axis that gives each further nine the same room."""
    return -math.log10(1 - min(share, 1 - 1e-9))


def _limit(axes: Axes, limit: Limit, top: float) -> None:
    """A mark that the curve must stay under, and where it passed."""
    x = _tail(limit.share)
    over = limit.measured is None or limit.measured > limit.value
    axes.plot([x - 0.11, x + 0.11], [limit.value] * 2, color=LIMIT, linewidth=2.2)
    axes.plot([x, x], [limit.value, top], color=LIMIT, linewidth=0.8, alpha=0.5, linestyle=(0, (2, 2)))
    _label(axes, f"≤ {limit.value:g}", (x, limit.value), LIMIT if over else MUTED)
    if limit.measured is not None and limit.measured <= top:
        colour = LIMIT if over else INK
        axes.plot([x], [limit.measured], marker="o", markersize=5, color=colour, linestyle="none", zorder=4)
        _label(axes, f"{limit.measured:.1f}", (x, limit.measured), colour, weight="bold")


def _label(axes: Axes, text: str, at: tuple[float, float], colour: str, *, weight: str = "normal") -> None:
    """Above a mark."""
    axes.annotate(
        text, at, xytext=(0, 6), textcoords="offset points", ha="center", fontsize=10, fontweight=weight, color=colour
    )


def _ms_axis(axes: Axes, unit: str = "ms") -> None:
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} {unit}"))
    axes.grid(axis="y")


def _time_axis(axes: Axes, lines: Sequence[Line], warmup_s: float, fault: tuple[float, float] | None = None) -> None:
    xs = [x for line in lines for x, _ in line.points] or [0.0, 1.0]
    axes.set_xlim(0, max(xs))
    if warmup_s > 0:
        axes.axvspan(0, warmup_s, color=MUTED, alpha=0.12, linewidth=0)
    if fault is not None:
        axes.axvspan(*fault, color=LIMIT, alpha=0.12, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} s"))


def _svg(draw: Callable[[Axes], None], *, name: str, height: float, width: float) -> str:
    """The drawing as `<svg>`; `name` says what it shows and keeps its ids apart from other drawings'."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        out = io.StringIO()
        canvas: Any = FigureCanvasSVG(figure)  # its methods carry no types
        canvas.print_svg(out, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _for_page(out.getvalue(), width=round(width * _SHOWN_PER_INCH), name=name)


def _for_page(svg: str, *, width: int, name: str) -> str:
    body = svg[svg.index("<svg") :]
    for unwanted in _UNWANTED:
        body = unwanted.sub("", body)
    body = body.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    opening = f'<svg role="img" aria-label="{html.escape(name)}" style="max-width: {width}px"'
    return body.replace("<svg", opening, 1).strip()
