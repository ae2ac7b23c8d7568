"""Moments at which somebody could have been recommended something, and what was then known of them.

A request is made of a visit with wanted items: at its start, or at a later point of it, which is what
a session's history means online. The state behind it is read by the very class that serves
(`UserState.from_events`), strictly before the moment. It knows neither models nor candidates.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from workloads.contract.tensors import CONTEXT, HISTORY_LENGTH
from workloads.data.features import UserState, user_inputs
from workloads.training.journal import Ints, Journal


@dataclasses.dataclass(frozen=True)
class Requests:
    """R requests in order of time; request r wants `items[offsets[r]:offsets[r + 1]]`, distinct."""

    person: Ints
    time_ms: Ints
    visit: Ints
    offsets: Ints
    items: Ints

    def __len__(self) -> int:
        return len(self.person)

    def wanted(self, request: int) -> Ints:
        """Items of one request."""
        return self.items[self.offsets[request] : self.offsets[request + 1]]

    def take(self, rows: npt.NDArray[Any]) -> Requests:
        """These requests, in this order."""
        parts = [self.wanted(row) for row in rows]
        return Requests(
            person=self.person[rows],
            time_ms=self.time_ms[rows],
            visit=self.visit[rows],
            offsets=np.r_[0, np.cumsum([len(part) for part in parts], dtype=np.int64)].astype(np.int64),
            items=np.concatenate(parts) if parts else np.empty(0, dtype=np.int64),
        )

    def sample(self, count: int, rng: np.random.Generator) -> Requests:
        """At most `count` requests drawn evenly, still in order of time."""
        if len(self) <= count:
            return self
        return self.take(np.sort(rng.choice(len(self), count, replace=False)))


def requests_of(wanted: Journal, *, rng: np.random.Generator | None = None) -> Requests:
    """One request per visit of `wanted` (`Journal.wanted()`), at its start.

    With `rng`, every other visit is asked in its middle instead, before a wanted event drawn at random.
    """
    order = np.lexsort((wanted.time_ms, wanted.visit))
    visit, time, item, person = (array[order] for array in (wanted.visit, wanted.time_ms, wanted.item, wanted.person))
    if not len(order):
        none = np.empty(0, dtype=np.int64)
        return Requests(none, none, none, np.zeros(1, dtype=np.int64), none)
    first = np.flatnonzero(np.r_[True, visit[1:] != visit[:-1]])
    length = np.diff(np.r_[first, len(visit)])
    asked = first.copy()
    if rng is not None:
        middle = rng.random(len(first)) < 0.5
        asked[middle] += (rng.random(int(middle.sum())) * length[middle]).astype(np.int64)
    moment = time[asked]
    later = time >= np.repeat(moment, length)
    owner = np.repeat(np.arange(len(first)), length)[later]
    kept = item[later]
    distinct = np.lexsort((kept, owner))
    owner, kept = owner[distinct], kept[distinct]
    once = np.r_[True, (owner[1:] != owner[:-1]) | (kept[1:] != kept[:-1])]
    owner, kept = owner[once], kept[once]
    offsets = np.searchsorted(owner, np.arange(len(first) + 1))
    by_time = np.lexsort((visit[first], moment))
    return Requests(person[first], moment, visit[first], offsets, kept).take(by_time)


class People:
    """The positive events of each known person, for reading states. Made of `Journal.positives()`."""

    def __init__(self, positives: Journal) -> None:
        order = np.lexsort((positives.time_ms, positives.person))
        order = order[positives.person[order] >= 0]
        self._start = np.searchsorted(positives.person[order], np.arange(positives.people + 1))
        self._item, self._kind, self._time = positives.item[order], positives.kind[order], positives.time_ms[order]

    def state(self, person: int, now_ms: int) -> UserState:
        """What is known of a person strictly before a moment."""
        rows = slice(self._start[person], self._start[person + 1])
        return UserState.from_events(self._item[rows], self._kind[rows], self._time[rows], now_ms)

    def states(self, requests: Requests) -> list[UserState]:
        """The state behind each request."""
        return [self.state(int(p), int(t)) for p, t in zip(requests.person, requests.time_ms, strict=True)]


def tower_inputs(states: list[UserState]) -> dict[str, npt.NDArray[Any]]:
    """The user tower's inputs, one row a state."""
    rows = [user_inputs(s.items, s.strength, s.age_hours, s.context) for s in states]
    shapes = {"history": (0, HISTORY_LENGTH), "history_strength": (0, HISTORY_LENGTH)}
    shapes |= {"history_age_hours": (0, HISTORY_LENGTH), "context": (0, len(CONTEXT))}
    return {
        name: np.concatenate([row[name] for row in rows]) if rows else np.zeros(shape) for name, shape in shapes.items()
    }
