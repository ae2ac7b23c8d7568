"""What every source hands over: events with raw ids, a catalogue, and an account of what was done to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import polars as pl

from workloads.data.cleaning import RuleCount
from workloads.data.dataset import Protocol
from workloads.data.events import EventLog, RowFaults
from workloads.data.split import Boundaries
from workloads.data.truth import Truth

Note = Callable[[str], None]


@dataclass(frozen=True)
class SourceData:
    """A source before cleaning, split and pseudonyms. Users and sessions are raw: this never leaves memory."""

    name: str
    source: str
    log: EventLog
    items: pl.DataFrame
    protocol: Protocol
    rules: list[RuleCount] = field(default_factory=list)
    faults: RowFaults = field(default_factory=RowFaults)
    cut: Boundaries | None = None
    """Given where the source itself says what is train and what is test."""
    truth: Truth | None = None
    parameters: dict[str, int | float | str] = field(default_factory=dict)
    pseudonymous: bool = False
    """Whether users and sessions are pseudonyms already, and stay as they are."""
    clocks: pl.DataFrame | None = None
    """`event_id`, `happened_ms`, `received_ms` of events that were not received when they happened: a log is in the
    order in which events were known, and profiles tell when they happened, too."""
    spool_seq: int = 0
    """Number of the newest row of the intake's spool that is in it: profiles made of it go on from there."""
