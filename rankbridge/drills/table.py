"""The suite's one table: what was done, when it was seen and over, and what became of requests."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from rankbridge.drills.records import Phase, Row, Suite


def faults_table(suite: Suite) -> Table:
    """A row per fault; those that were left out say why."""
    capacity = suite.capacity
    table = Table(
        title=f"faults ({suite.form}; home answers {capacity.in_time_per_s:.0f}/s in time, "
        f"{capacity.peak_per_s:.0f}/s at most)"
    )
    for column in ("fault", "", "seen in", "recovered in", "p99 during, ms", "rungs during", "ledger", "verdict"):
        table.add_column(column, justify="right" if column in {"seen in", "recovered in", "p99 during, ms"} else "left")
    for row in suite.rows:
        if row.left_out is not None:
            table.add_row(row.id, escape(row.title), "", "", "", "", escape(row.left_out), "[dim]left out[/]")
            continue
        table.add_row(
            row.id,
            escape(row.title),
            seconds(row.seen_after_s, "not seen"),
            seconds(row.recovered_after_s, "never"),
            milliseconds(row.during),
            rungs(row.during),
            escape(row.ledger.said() if row.ledger is not None else ""),
            "[green]passed[/]" if row.passed else "[red]FAILED[/]",
        )
    return table


def checks_table(suite: Suite) -> Table:
    """What did not hold: measured beside its bound."""
    table = Table(title="what did not hold")
    for column in ("fault", "what", "measured", "bound"):
        table.add_column(column)
    for row in suite.rows:
        for check in row.checks:
            if not check.held:
                table.add_row(row.id, escape(check.what), f"[red]{escape(check.measured)}[/]", escape(check.bound))
    return table


def baseline(suite: Suite) -> list[str]:
    """What Kubernetes alone does about a lost site, beside what the request path did about a cut."""
    cut: Row | None = next((row for row in suite.rows if row.id == "F2" and row.left_out is None), None)
    lines = []
    if cut is not None:
        lines.append(f"both tunnels cut, in the request path: seen in {seconds(cut.seen_after_s, 'no answer at all')}")
    lines += [
        f"a lost site, Kubernetes alone: {what} after {after:.0f} s" for what, after in suite.kubernetes_s.items()
    ]
    return lines


def seconds(value: float | None, otherwise: str) -> str:
    """`0.35 s`."""
    return otherwise if value is None else f"{value:.2f} s"


def milliseconds(phase: Phase | None) -> str:
    """p99 of a phase."""
    if phase is None or not phase.requests:
        return ""
    return "failed" if phase.p99_ms is None else f"{phase.p99_ms:.0f}"


def rungs(phase: Phase | None) -> str:
    """`1: 62 %, 3: 38 %`."""
    if phase is None or not phase.rungs:
        return ""
    whole = sum(phase.rungs.values())
    return ", ".join(f"{rung}: {count / whole:.0%}" for rung, count in phase.rungs.items())


def markdown(suite: Suite) -> str:
    """The same for a document."""
    lines = [
        "| fault | seen in | recovered in | p99 before, during, after (ms) | recommended at rung | ledger | |",
        "|---|---:|---:|---:|---|---|---|",
    ]
    for row in suite.rows:
        if row.left_out is not None:
            lines.append(f"| {row.id} {row.title} | | | | | {row.left_out} | left out |")
            continue
        cells = [
            f"{row.id} {row.title}",
            seconds(row.seen_after_s, "not seen"),
            seconds(row.recovered_after_s, "never"),
            ", ".join(milliseconds(phase) for phase in (row.before, row.during, row.after)),
            rungs(row.during),
            row.ledger.said() if row.ledger is not None else "",
            "passed" if row.passed else "FAILED",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
