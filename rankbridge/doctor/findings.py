"""What one check found, and what all of them amount to. Knows no check."""

from __future__ import annotations

import enum
from collections.abc import Iterable

import msgspec
from rich.markup import escape
from rich.table import Table

from rankbridge.faults import ExitCode


class Verdict(enum.StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    """It works now; somebody should look at it."""
    FAULT = "fault"
    SKIPPED = "skipped"
    """It does not apply here; `measured` says why."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the doctor's table. Texts are for people, one sentence at most each."""

    name: str
    verdict: Verdict
    measured: str
    expected: str = ""
    remedy: str = ""


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """`rankbridge doctor --json`."""

    schema_version: int = 1
    healthy: bool
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> Findings:
        """Healthy is without a fault."""
        found = tuple(findings)
        return cls(healthy=all(one.verdict is not Verdict.FAULT for one in found), findings=found)

    @property
    def exit_code(self) -> ExitCode:
        """0 without a fault, else 1."""
        return ExitCode.OK if self.healthy else ExitCode.VERDICT_FAILED


def ok(name: str, measured: str, expected: str = "") -> Finding:
    """It is as it should be."""
    return Finding(name=name, verdict=Verdict.OK, measured=measured, expected=expected)


def warn(name: str, measured: str, expected: str, remedy: str) -> Finding:
    """It works, and not as planned."""
    return Finding(name=name, verdict=Verdict.WARN, measured=measured, expected=expected, remedy=remedy)


def fault(name: str, measured: str, expected: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(name=name, verdict=Verdict.FAULT, measured=measured, expected=expected, remedy=remedy)


def skipped(name: str, why: str) -> Finding:
    """It does not apply."""
    return Finding(name=name, verdict=Verdict.SKIPPED, measured=why)


_COLOURS = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAULT: "bold red", Verdict.SKIPPED: "dim"}


def table(found: Findings) -> Table:
    """One line per check, and under a bad one what to do."""
    made = Table()
    for column in ("check", "verdict", "measured", "expected"):
        made.add_column(column, overflow="fold")
    for one in found.findings:
        colour = _COLOURS[one.verdict]
        made.add_row(
            escape(one.name),
            f"[{colour}]{one.verdict.value}[/]",
            escape(one.measured) + (f"\n[bold]remedy:[/] {escape(one.remedy)}" if one.remedy else ""),
            escape(one.expected),
        )
    return made
