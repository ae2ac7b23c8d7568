"""A verdict as one self-contained page: no script, no request to anywhere, light and dark.

`render` turns a `Verdict` into HTML and needs nothing else. It words and arranges; it decides and
measures nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import jinja2
from markupsafe import Markup

from loadtests.budgets import Budget
from loadtests.gate import BLAMED, LoadResult
from loadtests.measures import OUTSIDE, Measure
from loadtests.samples import write_whole
from rankbridge import plots
from rankbridge.drills import page as faults_page
from rankbridge.drills.records import Row
from rankbridge.verdict import Crossing, Curve, Verdict
from workloads.contract.quality import QualityRow
from workloads.contract.slo import NEW_ITEM_MAX_S, SERVED_AFTER_MAX_S, STUDENT_LOSS_MAX

_ENDPOINT_COLOURS: Final = {
    "/v1/recommend": plots.SERIES[0],
    "/v1/search": plots.SERIES[1],
    "/v1/events": plots.SERIES[2],
}
_RUNG_NAMES: Final = {
    "1": "full ranker",
    "2": "distilled ranker",
    "3": "retrieval score",
    "4": "traditional recommender",
}
_ROW_NAMES: Final = {
    "popularity": "Popularity, all time",
    "popularity_30d": "Popularity, last 30 days",
    "item_knn": "Item-to-item kNN",
    "personal_frequency": "What the person buys most",
    "fused": "All candidate sources, fused",
    "traditional": "Traditional: neighbours, then popularity",
    "two_tower": "Two-tower retrieval",
    "ours": "Ours",
    "oracle": "Oracle (knows the planted truth)",
}
_PROTOCOLS: Final = {
    "novel": "Items new to the person",
    "repeats": "All items, repeats included",
    "search": "The item behind a query",
}
_METRIC_ORDER: Final = ("recall", "ndcg", "hr", "mrr", "coverage")
_CURVES_MAX: Final = 6
_TIMES: Final = "\u00d7"
_UNBREAKABLE: Final = re.compile(r"(?<=\d) (?=(?:%|ms|MiB|s)\b|%)")


class Held(NamedTuple):
    """One budget and what became of it, worded. `held` is None where it was not judged."""

    subject: str
    measured: str
    allowed: str
    held: bool | None


class Tile(NamedTuple):
    """One key figure."""

    label: str
    value: str
    unit: str
    note: str
    held: bool | None


class Segment(NamedTuple):
    """A part of a bar, in percent of the whole."""

    label: str
    percent: float
    style: str
    text: str


class Bar(NamedTuple):
    """One row of a bar chart made of page elements."""

    label: str
    segments: list[Segment]
    text: str


class Cell(NamedTuple):
    """One figure of the quality table."""

    text: str
    best: bool
    percent: float


class QualityLine(NamedTuple):
    """One recommender under one protocol."""

    name: str
    ours: bool
    rung: str
    cells: list[Cell]
    requests: int


class QualityTable(NamedTuple):
    """All recommenders under one protocol."""

    title: str
    metrics: list[str]
    headline: str
    """The metric that gets a bar."""
    lines: list[QualityLine]


class LadderLine(NamedTuple):
    """One rung under one protocol, measured."""

    title: str
    rung: str
    gain: str
    loss: str
    error: str
    auc: str
    requests: int


class Plot(NamedTuple):
    """A drawing, its title and a sentence for whoever cannot see it or wants to know more."""

    title: str
    svg: Markup
    note: str = ""
    colour: str = ""


def render(verdict: Verdict, cut: Row | None = None) -> str:
    """The page as HTML; with the VPN cut's row (`make faults`), its timeline too."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = _number
    environment.filters["prose"] = _prose
    template = environment.from_string(_resource("report.html.j2"))
    load = verdict.load
    return template.render(
        verdict=verdict,
        css=Markup(_resource("report.css")),  # noqa: S704 - our own file
        headline=_headline(verdict),
        tiles=list(_tiles(verdict)),
        tables=list(_quality_tables(verdict)),
        ladder=list(_ladder_lines(verdict)),
        student_may_lose=_percent(STUDENT_LOSS_MAX),
        budgets=list(_held(verdict)),
        latency=list(_latency(load)) if load else [],
        stages=list(_stages(load)) if load else [],
        timelines=list(_timelines(load)) if load else [],
        rungs=list(_rung_bars(load)) if load else [],
        rung_names=_RUNG_NAMES,
        training=list(_training(verdict.curves)),
        reliability=_reliability(verdict),
        memory=list(_memory_bars(verdict)),
        steps=list(_step_bars(verdict)),
        total_seconds=sum(s.seconds for s in verdict.steps),
        figures=_figures,
        cut=cut,
        cut_drawn=faults_page.timelines(cut) if cut is not None else None,
    )


def write(verdict: Verdict, path: Path) -> None:
    """`report.html`, whole or not at all. A VPN cut that `make faults` left in the same folder is drawn in it."""
    write_whole(path, render(verdict, faults_page.vpn_cut(path.parent)).encode())


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


# words


def _headline(verdict: Verdict) -> str:
    judged = [h for h in _held(verdict) if h.held is not None]
    failed = len(verdict.breaches)
    if verdict.passed:
        return f"All {len(judged)} budgets held."
    return f"{failed} promise{'s were' if failed > 1 else ' was'} not kept."


def _prose(sentence: str) -> str:
    """With figures and their units on one line."""
    return _UNBREAKABLE.sub("\u00a0", sentence)


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f")


def _figures(value: float) -> str:
    """A figure of unknown size in three or four digits."""
    return _number(value) if abs(value) >= 1000 else f"{value:.4g}"


def _ms(value: float | None) -> str:
    return "failed" if value is None else f"{value:.1f}"


def _percent(share: float) -> str:
    return f"{share * 100:.3g}"


def _seconds(value: float) -> str:
    if value < 90:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{int(value // 60)} min {value % 60:02.0f} s"


def _measures(load: LoadResult) -> dict[str, Measure]:
    return {m.endpoint: m for m in load.measures.endpoints}


# key figures


def _tiles(verdict: Verdict) -> Iterable[Tile]:
    if verdict.load is not None:
        found = _measures(verdict.load)
        for budget in verdict.load.budgets.endpoints:
            measure = found.get(budget.endpoint)
            if measure is None or budget.p99_ms is None:
                continue
            yield Tile(
                label=f"{budget.endpoint} p99",
                value=_ms(measure.p99_ms),
                unit="ms" if measure.p99_ms is not None else "",
                note=f"allowed {budget.p99_ms:g}, {_number(measure.requests)} samples",
                held=_within(measure.p99_ms, budget.p99_ms),
            )
        failed = sum(m.failed for m in found.values())
        requests = sum(m.requests for m in found.values())
        yield Tile("Errors", _number(failed), "", f"of {_number(requests)} requests", failed == 0 and requests > 0)
        yield from _ladder_tile(verdict.load)
    yield from _quality_tile(verdict)
    if verdict.memory is not None:
        memory = verdict.memory
        yield Tile(
            label="Memory of serving",
            value=_number(memory.total_mb),
            unit="MiB",
            note=f"PSS, allowed {_number(memory.allowed_mb)}",
            held=memory.total_mb <= memory.allowed_mb,
        )
    if verdict.crossing is not None and verdict.crossing.served_after_s:
        slowest = max(verdict.crossing.served_after_s.values())
        allowed = f"at both sites, allowed {SERVED_AFTER_MAX_S:.0f}"
        yield Tile("Published to served", f"{slowest:.1f}", "s", allowed, slowest <= SERVED_AFTER_MAX_S)
    if verdict.steps:
        total = sum(s.seconds for s in verdict.steps)
        yield Tile("Data to verdict", _seconds(total), "", f"on {verdict.machine.cores} cores", None)


def _ladder_tile(load: LoadResult) -> Iterable[Tile]:
    judged = {b.endpoint for b in load.budgets.endpoints if b.below_best_share is not None}
    laddered = [m for m in load.measures.endpoints if m.answers and m.endpoint in judged]
    answers = sum(m.answers for m in laddered)
    if answers:
        below = sum(m.below_best for m in laddered)
        breached = any(b.what == "rung_mix" for b in load.breaches)
        yield Tile("Stepped down", _percent(below / answers), "%", "of answers; allowed 1 % per endpoint", not breached)


def _quality_tile(verdict: Verdict) -> Iterable[Tile]:
    if verdict.quality is None:
        return
    ours = verdict.quality.metric("ours", "novel", "recall@20")
    knn = verdict.quality.metric("item_knn", "novel", "recall@20")
    if ours is not None:
        beside = f"item-to-item kNN {knn:.4f}" if knn is not None else "kNN was not measured"
        held = all(c.held for c in verdict.quality_checks)
        yield Tile("Recall@20, novel items", f"{ours:.4f}", "", beside, held)


def _within(measured: float | None, allowed: float) -> bool:
    return measured is not None and measured <= allowed


# every budget


def _held(verdict: Verdict) -> Iterable[Held]:
    for check in verdict.quality_checks:
        wanted = check.budget
        yield Held(
            f"{wanted.metric} of {wanted.row} against {wanted.other} ({wanted.protocol})",
            f"{check.ratio:.2f} {_TIMES}" if check.ratio is not None else "not measured",
            f"≥ {wanted.at_least:g} {_TIMES}",
            check.held,
        )
    if verdict.load is not None:
        load, found = verdict.load, _measures(verdict.load)
        for budget in load.budgets.endpoints:
            yield from _held_endpoint(budget, found.get(budget.endpoint))
        yield Held(
            "Lateness of the load generator, p99",
            f"{load.measures.lateness_p99_ms:.1f} ms",
            f"≤ {load.budgets.lateness_p99_ms:g} ms",
            load.measures.lateness_p99_ms <= load.budgets.lateness_p99_ms,
        )
    if verdict.memory is not None:
        yield Held(
            "Memory of all serving processes (PSS)",
            f"{_number(verdict.memory.total_mb)} MiB",
            f"≤ {_number(verdict.memory.allowed_mb)} MiB",
            verdict.memory.total_mb <= verdict.memory.allowed_mb,
        )
    if verdict.durability is not None:
        yield Held(
            "Acknowledged events that are not in the store",
            f"{verdict.durability.lost} of {_number(verdict.durability.acknowledged)}",
            "0",
            verdict.durability.lost == 0,
        )
    if verdict.crossing is not None:
        yield from _held_crossing(verdict.crossing)


def _held_crossing(crossing: Crossing) -> Iterable[Held]:
    promises = (
        ("Channel moved to bundle served", crossing.served_after_s, SERVED_AFTER_MAX_S),
        ("New item's file to new item in answers", crossing.new_item_after_s, NEW_ITEM_MAX_S),
    )
    for subject, seconds, allowed in promises:
        for site, measured in seconds.items():
            yield Held(f"{subject}, {site}", f"{measured:.1f} s", f"≤ {allowed:g} s", measured <= allowed)
    if crossing.lake is not None:
        same = crossing.lake.difference is None
        found = f"{_number(crossing.lake.events)} in both" if same else "they differ"
        yield Held("Events of the intake's spool that are in the lake", found, "all, once each", same)


def _held_endpoint(budget: Budget, measure: Measure | None) -> Iterable[Held]:
    name = budget.endpoint
    if measure is None:
        yield Held(f"{name} requests", "0", f"≥ {_number(budget.min_samples)}", held=False)
        return
    yield Held(
        f"{name} requests",
        _number(measure.requests),
        f"≥ {_number(budget.min_samples)}",
        measure.requests >= budget.min_samples,
    )
    if budget.at_least_per_s is not None:
        rate = measure.offered_per_s
        yield Held(
            f"{name} requests offered", f"{rate:.1f}/s", f"≥ {budget.at_least_per_s:g}/s", rate >= budget.at_least_per_s
        )
    share = measure.failed / measure.requests
    yield Held(
        f"{name} errors",
        f"{measure.failed} ({_percent(share)} %)",
        f"≤ {_percent(budget.error_share)} %",
        share <= budget.error_share,
    )
    for quantile, limit in _quantiles(budget, measure).items():
        measured = f"{_ms(limit.measured)} ms" if limit.measured is not None else "failed"
        yield Held(f"{name} {quantile}", measured, f"≤ {limit.value:g} ms", _within(limit.measured, limit.value))
    for stage, allowed in budget.stage_p99_ms.items():
        timed = measure.stage(stage)
        yield Held(
            f"{name} stage {stage}, p99",
            f"{timed.p99_ms:.1f} ms" if timed is not None else "not passed",
            f"≤ {allowed:g} ms",
            timed.p99_ms <= allowed if timed is not None else None,
        )
    if budget.below_best_share is not None:
        below = measure.below_best / measure.answers if measure.answers else None
        yield Held(
            f"{name} answers below the best rung",
            f"{_percent(below)} %" if below is not None else "no answers",
            f"≤ {_percent(budget.below_best_share)} %",
            below is not None and below <= budget.below_best_share,
        )
    if budget.ranked_at_least is not None:
        yield Held(
            f"{name} candidates ranked, fewest",
            str(measure.ranked_min) if measure.ranked_min is not None else "not told",
            f"≥ {budget.ranked_at_least}",
            measure.ranked_min >= budget.ranked_at_least if measure.ranked_min is not None else None,
        )


# quality


def _quality_tables(verdict: Verdict) -> Iterable[QualityTable]:
    if verdict.quality is None:
        return
    for protocol, title in _PROTOCOLS.items():
        rows = [r for r in verdict.quality.rows if r.protocol == protocol]
        if rows:
            yield _quality_table(title, rows)


def _quality_table(title: str, rows: Sequence[QualityRow]) -> QualityTable:
    metrics = sorted({m for row in rows for m in row.metrics}, key=_metric_order)
    # an oracle shows what could be known; it is no competitor
    best = {m: max((r.metrics.get(m, 0.0) for r in rows if r.name != "oracle"), default=0.0) for m in metrics}
    top = {m: max((r.metrics.get(m, 0.0) for r in rows), default=0.0) for m in metrics}
    lines = [
        QualityLine(
            name=_ROW_NAMES.get(row.name, row.name.replace("_", " ")),
            ours=row.name == "ours",
            rung=str(row.rung) if row.rung is not None else "",
            cells=[_cell(row.metrics.get(m), best[m], top[m], row.name) for m in metrics],
            requests=row.requests,
        )
        for row in rows
    ]
    headline = "recall@20" if "recall@20" in metrics else next(iter(metrics), "")
    return QualityTable(title, metrics, headline, lines)


def _ladder_lines(verdict: Verdict) -> Iterable[LadderLine]:
    """What a step down costs; the title stands at a protocol's first rung."""
    before = ""
    for row in verdict.quality.rungs if verdict.quality is not None else ():
        yield LadderLine(
            title=_PROTOCOLS[row.protocol] if row.protocol != before else "",
            rung=f"{row.rung} {_RUNG_NAMES[str(row.rung)]}",
            gain=f"{row.ndcg_at_10:.4f}",
            loss=f"{row.loss:.1%}",
            error=f"{row.loss_error:.1%}",
            auc="" if row.auc is None else f"{row.auc:.4f}",
            requests=row.requests,
        )
        before = row.protocol


def _cell(value: float | None, best: float, top: float, name: str) -> Cell:
    if value is None:
        return Cell("", best=False, percent=0.0)
    return Cell(f"{value:.4f}", best=value == best and name != "oracle", percent=100 * value / top if top else 0.0)


def _metric_order(metric: str) -> tuple[int, int, str]:
    family, _, cut = metric.partition("@")
    place = _METRIC_ORDER.index(family) if family in _METRIC_ORDER else len(_METRIC_ORDER)
    return place, int(cut) if cut.isdigit() else 0, metric


def _training(found: Sequence[Curve]) -> Iterable[Plot]:
    for i, curve in enumerate(found[:_CURVES_MAX]):
        title = f"{curve.stage}: {curve.figure}"
        line = plots.Line(curve.figure, curve.points, plots.SERIES[i % 2])
        svg = plots.curve(line, x_label=curve.unit or "steps", name=f"Training, {title}")
        yield Plot(title, _svg(svg))


def _reliability(verdict: Verdict) -> Plot | None:
    if verdict.quality is None or not verdict.quality.ranker.reliability:
        return None
    ranker = verdict.quality.ranker
    note = (
        f"AUC {ranker.auc:.4f}, log-loss {ranker.log_loss:.4f}, calibration {ranker.calibration:.3f} "
        f"(1 is calibrated), base rate {ranker.base_rate:.4f}, {_number(ranker.rows)} rows of the test period"
    )
    svg = plots.reliability(ranker.reliability, name="Calibration of the ranker")
    return Plot("Does the ranker's probability mean what it says?", _svg(svg), note)


# time


def _quantiles(budget: Budget, measure: Measure) -> dict[str, plots.Limit]:
    wanted = {
        "p50": (0.5, budget.p50_ms, measure.p50_ms),
        "p95": (0.95, budget.p95_ms, measure.p95_ms),
        "p99": (0.99, budget.p99_ms, measure.p99_ms),
    }
    return {
        name: plots.Limit(share, limit, found) for name, (share, limit, found) in wanted.items() if limit is not None
    }


def _ordered(load: LoadResult) -> list[Measure]:
    """In the order of the budgets; what has none comes last."""
    order = [b.endpoint for b in load.budgets.endpoints]
    known = [*order, *(m.endpoint for m in load.measures.endpoints)]
    return sorted(load.measures.endpoints, key=lambda m: known.index(m.endpoint))


def _latency(load: LoadResult) -> Iterable[Plot]:
    budgets = {b.endpoint: b for b in load.budgets.endpoints}
    for measure in _ordered(load):
        budget = budgets.get(measure.endpoint)
        colour = _ENDPOINT_COLOURS.get(measure.endpoint, plots.SERIES[3])
        sites = [m for m in load.measures.sites if m.endpoint == measure.endpoint]
        lines = [plots.Line("all sites", measure.curve, colour)]
        if len(sites) > 1:
            lines += [plots.Line(m.site or "", m.curve, plots.MUTED, bold=False) for m in sites]
        limits = list(_quantiles(budget, measure).values()) if budget is not None else []
        svg = plots.latency(lines, limits, name=f"Latency of {measure.endpoint}")
        each = ", ".join(f"{m.site} {_ms(m.p99_ms)} ms ({_number(m.requests)})" for m in sites)
        slowest = f"Slowest answer {measure.max_ms:.0f} ms. " if measure.max_ms is not None else ""
        yield Plot(measure.endpoint, _svg(svg), f"{slowest}p99 by site: {each}")


def _stages(load: LoadResult) -> Iterable[Plot]:
    budgets = {b.endpoint: b for b in load.budgets.endpoints}
    for measure in _ordered(load):
        if not measure.stages:
            continue
        budget = budgets.get(measure.endpoint)
        allowed: Mapping[str, float] = budget.stage_p99_ms if budget is not None else {}
        bars = [plots.StageBar(s.stage, s.p50_ms, s.p99_ms, allowed.get(s.stage)) for s in measure.stages]
        over = [b for b in bars if b.limit is not None and b.p99 > b.limit]
        note = (
            "; ".join(f"{BLAMED.get(b.name, b.name)} is over its budget: {b.p99:.1f} of {b.limit:g} ms" for b in over)
            or f"Every stage is within its budget; {OUTSIDE} is network, encoding and queues"
        )
        svg = plots.stages(bars, name=f"Stages of {measure.endpoint}")
        yield Plot(measure.endpoint, _svg(svg), note[0].upper() + note[1:] + ".")


def _timelines(load: LoadResult) -> Iterable[tuple[str, list[Plot]]]:
    """The same drawings twice, for a wide page and for a narrow one."""
    timeline, warmup = load.measures.timeline, load.header.warmup_s
    endpoints = sorted({b.endpoint for b in timeline})
    lines = []
    for endpoint in endpoints:
        points = [(b.at_s, b.p95_ms) for b in timeline if b.endpoint == endpoint and b.p95_ms is not None]
        if len(points) > 1:
            lines.append(plots.Line(endpoint, points, _ENDPOINT_COLOURS.get(endpoint, plots.SERIES[3])))
    ladders = [e for e in endpoints if any(b.rungs for b in timeline if b.endpoint == e)]
    bin_s = load.measures.bin_s
    for size, width in (("wide", 11.0), ("narrow", 4.2)):
        drawn = []
        if lines:
            svg = plots.timeline(lines, warmup_s=warmup, width=width, name=f"p95 over the run, {size}")
            drawn.append(Plot(f"p95 in each {'second' if bin_s == 1 else f'{bin_s:g} seconds'}", _svg(svg)))
        for endpoint in ladders:
            slices = [plots.Slice(b.at_s, b.rungs) for b in timeline if b.endpoint == endpoint and b.rungs]
            name = f"Answers of {endpoint} by rung"
            svg = plots.rung_timeline(slices, bin_s=bin_s, warmup_s=warmup, width=width, name=f"{name}, {size}")
            drawn.append(Plot(name, _svg(svg)))
        yield size, drawn


def _rung_bars(load: LoadResult) -> Iterable[Bar]:
    best = {t.site: t.best_rung for t in load.header.targets}
    for measure in load.measures.sites:
        if measure.answers:
            segments = [
                Segment(
                    f"rung {rung}, {_RUNG_NAMES.get(rung, '')}",
                    100 * count / measure.answers,
                    f"rung-{rung}",
                    f"{_percent(count / measure.answers)} %",
                )
                for rung, count in measure.rungs.items()
            ]
            wanted = best.get(measure.site or "", {}).get(measure.endpoint)
            said = [f"best is {wanted}"] if wanted is not None else []
            said += [f"{reason} {count}" for reason, count in measure.reasons.items()]
            yield Bar(f"{measure.endpoint} {measure.site}", segments, ", ".join(said))


# cost


def _memory_bars(verdict: Verdict) -> Iterable[Bar]:
    if verdict.memory is None:
        return
    largest = max((p.pss_mb for p in verdict.memory.processes), default=1.0)
    for process in sorted(verdict.memory.processes, key=lambda p: (p.site != "onprem", -p.pss_mb)):
        style = "series-1" if process.site == "onprem" else "series-2"
        segment = Segment(process.role, 100 * process.pss_mb / largest, style, "")
        yield Bar(f"{process.site} {process.role}", [segment], f"{_number(process.pss_mb)} MiB")


def _step_bars(verdict: Verdict) -> Iterable[Bar]:
    total = sum(s.seconds for s in verdict.steps) or 1.0
    ends = [0.0]
    for step in verdict.steps:
        ends.append(ends[-1] + 100 * step.seconds / total)
    for step, (start, end) in zip(verdict.steps, pairwise(ends), strict=True):
        gap = Segment("", start, "gap", "")
        note = f"{_seconds(step.seconds)}{', ' + step.note if step.note else ''}"
        yield Bar(step.name, [gap, Segment(step.name, end - start, "series-1", "")], note)


def _svg(drawing: str) -> Markup:
    return Markup(drawing)  # noqa: S704 - drawn by `plots`, which escapes what it is given
