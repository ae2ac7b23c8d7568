"""The tables that the terminal shows: how good, what a step down costs, and how fast. The report has the rest."""

from __future__ import annotations

from rich.table import Table

from loadtests.gate import LoadResult
from workloads.contract.quality import QualityReport

_METRICS = ("recall@20", "ndcg@10", "coverage@20")


def quality_table(report: QualityReport) -> Table:
    """Ours beside the traditional recommenders, per protocol."""
    shown = [name for name in _METRICS if any(name in row.metrics for row in report.rows)]
    table = Table(title=f"quality on {report.dataset}")
    for column in ("protocol", "recommender", *shown, "requests"):
        table.add_column(column, justify="left" if column in {"protocol", "recommender"} else "right")
    before = ""
    for row in sorted(report.rows, key=lambda row: row.protocol):
        if before and row.protocol != before:
            table.add_section()
        cells = [f"{row.metrics[name]:.4f}" if name in row.metrics else "" for name in shown]
        table.add_row(
            row.protocol if row.protocol != before else "",
            row.name,
            *cells,
            f"{row.requests:,}",
            style="bold" if row.name == "ours" else None,
        )
        before = row.protocol
    return table


def ladder_table(report: QualityReport) -> Table:
    """What each rung loses against rung 1, per protocol."""
    table = Table(title="the quality ladder, measured")
    for column in ("protocol", "rung", "ndcg@10", "loss", "+-", "AUC", "requests"):
        table.add_column(column, justify="left" if column == "protocol" else "right")
    before = ""
    for row in report.rungs:
        if before and row.protocol != before:
            table.add_section()
        table.add_row(
            row.protocol if row.protocol != before else "",
            str(row.rung),
            f"{row.ndcg_at_10:.4f}",
            f"{row.loss:.1%}",
            f"{row.loss_error:.1%}",
            "" if row.auc is None else f"{row.auc:.4f}",
            f"{row.requests:,}",
        )
        before = row.protocol
    return table


def load_table(result: LoadResult) -> Table:
    """Measured latencies beside their budgets, in milliseconds."""
    budgets = {budget.endpoint: budget for budget in result.budgets.endpoints}
    table = Table(title="latency, ms (budget)")
    for column in ("endpoint", "requests", "p50", "p95", "p99", "failed", "rungs"):
        table.add_column(column, justify="left" if column in {"endpoint", "rungs"} else "right")
    for measured in result.measures.endpoints:
        budget = budgets.get(measured.endpoint)
        cells = [
            _time(value, limit)
            for value, limit in (
                (measured.p50_ms, budget.p50_ms if budget else None),
                (measured.p95_ms, budget.p95_ms if budget else None),
                (measured.p99_ms, budget.p99_ms if budget else None),
            )
        ]
        rungs = ", ".join(f"{rung}: {count}" for rung, count in sorted(measured.rungs.items()))
        table.add_row(measured.endpoint, f"{measured.requests:,}", *cells, str(measured.failed), rungs)
    return table


def _time(value: float | None, limit: float | None) -> str:
    text = "failed" if value is None else f"{value:.1f}"
    if limit is None:
        return text
    held = value is not None and value <= limit
    return f"{text} ({limit:.0f})" if held else f"[red]{text} ({limit:.0f})[/]"
