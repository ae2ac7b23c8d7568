"""Reads one answer and says what is wrong with it.

Pure; it sees a status and bytes and knows nothing of sockets or clocks. Errors are a few words of
low variety, so that equal faults can be counted together.
"""

from __future__ import annotations

import msgspec

from workloads.contract.http import EventsAnswer, ItemsAnswer, Problem, Served

_items: msgspec.json.Decoder[ItemsAnswer] = msgspec.json.Decoder(ItemsAnswer)
_events: msgspec.json.Decoder[EventsAnswer] = msgspec.json.Decoder(EventsAnswer)
_problem: msgspec.json.Decoder[Problem] = msgspec.json.Decoder(Problem)

OK = 200
ERROR_MAX = 160


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer held. `error` is None when it was right."""

    error: str | None = None
    served: Served | None = None
    problem: str | None = None
    """Type of the problem (RFC 9457) by which it was refused; None where it was not, or not in that form."""


def read_items(status: int, body: bytes, *, k: int) -> Reading:
    """An answer of recommend, search or similar: `k` different items and how they were made."""
    if status != OK:
        return _refusal(status, body)
    try:
        answer = _items.decode(body)
    except msgspec.DecodeError as fault:
        return Reading(error=_cut(f"not an ItemsAnswer: {fault}"))
    names = [i.item for i in answer.items]
    if len(names) != k:
        return Reading(error=f"{len(names)} items instead of {k}", served=answer.served)
    if len(set(names)) != len(names):
        return Reading(error="an item was answered twice", served=answer.served)
    return Reading(served=answer.served)


def read_events(status: int, body: bytes, *, sent: int) -> Reading:
    """An acknowledgement of `sent` events that nobody sent before."""
    if status != OK:
        return _refusal(status, body)
    try:
        answer = _events.decode(body)
    except msgspec.DecodeError as fault:
        return Reading(error=_cut(f"not an EventsAnswer: {fault}"))
    if answer.accepted != sent or answer.duplicates:
        return Reading(error=f"{answer.accepted} accepted, {answer.duplicates} duplicates of {sent} new events")
    return Reading()


def _refusal(status: int, body: bytes) -> Reading:
    try:
        problem = _problem.decode(body)
    except msgspec.DecodeError:
        return Reading(error=f"http {status}")
    return Reading(error=_cut(f"http {status}: {problem.title}"), problem=problem.type)


def _cut(text: str) -> str:
    return text if len(text) <= ERROR_MAX else text[: ERROR_MAX - 3] + "..."
