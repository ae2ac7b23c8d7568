"""The behaviour event as it crosses every border, from a client's log to a metric.

The record checks itself: an `Event` that exists is a valid one. The columnar form of the same
record is `workloads.data.events`; it takes its fields and rules from here.
"""

from __future__ import annotations

import enum
import re
from typing import Annotated

import msgspec

SCHEMA_VERSION = 2
"""Version 2 gave an answer's request id a field of its own; in version 1 clients wrote it into the context."""
REQUEST_ID_IN_CONTEXT = "request_id"
"""Where version 1 has it; the intake lifts it into the field."""

ID_PATTERN = r"^[^\x00-\x1f\x7f\ud800-\udfff]{1,128}$(?!\n)"
"""User, item and session ids: 1 to 128 characters, no control characters.

`$(?!\\n)` is the end of the text in Python, where `$` alone also matches before a last newline, and in ECMAScript,
which JSON Schema speaks.
"""

UUID7_PATTERN = r"^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"
"""RFC 9562 section 5.7, lower case with hyphens."""

ANSWER_PATTERN = r"^[A-Za-z0-9._-]{1,128}$(?!\n)"
"""Ids of answers, `http.REQUEST_ID_PATTERN`."""

QUERY_MAX = 256
EVENTS_PER_BATCH = 1000
TIMESTAMP_MIN_MS = 946_684_800_000  # 2000-01-01: older is a clock fault, not history
TIMESTAMP_MAX_MS = 4_102_444_800_000  # 2100-01-01

CONTEXT_KEYS: frozenset[str] = frozenset(
    {REQUEST_ID_IN_CONTEXT, "surface", "page", "device", "locale", "referrer", "experiment", "variant"}
)
"""What may stand in an event's `context`. The edge drops every other key, so that nothing a client adds one day gets in
by accident: a name, an address, a basket's owner."""
CONTEXT_VALUE_PATTERN = r"^[A-Za-z0-9._:/-]{1,128}$(?!\n)"
"""Values of those keys are names of things, not texts; the edge drops what is neither this nor a known person's id."""

Id = Annotated[str, msgspec.Meta(pattern=ID_PATTERN, min_length=1, max_length=128)]


class EventType(enum.StrEnum):
    """What a person did; in order of rising commitment but for `rating` and `search`."""

    IMPRESSION = "impression"
    CLICK = "click"
    VIEW = "view"
    CART = "cart"
    PURCHASE = "purchase"
    RATING = "rating"
    SEARCH = "search"


POSITIVE_TYPES: frozenset[EventType] = frozenset(
    {EventType.CLICK, EventType.VIEW, EventType.CART, EventType.PURCHASE, EventType.RATING}
)
"""Types that say a person was drawn to an item; a profile's history is made of these."""


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One thing one person did at one moment.

    `event_id` is made by the client, so that a retried send is the same event. Raises ValueError
    with the field's name where fields that need each other do not agree.
    """

    event_id: Annotated[str, msgspec.Meta(pattern=UUID7_PATTERN, max_length=36)]
    type: EventType
    timestamp_ms: Annotated[int, msgspec.Meta(ge=TIMESTAMP_MIN_MS, le=TIMESTAMP_MAX_MS)]
    user: Id | None = None
    item: Id | None = None
    session: Id | None = None
    query: Annotated[str, msgspec.Meta(min_length=1, max_length=QUERY_MAX)] | None = None
    position: Annotated[int, msgspec.Meta(ge=0, le=10_000)] | None = None
    """0-based place in the list that was shown."""
    quantity: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    price: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None
    rating: Annotated[float, msgspec.Meta(ge=0, le=5)] | None = None
    context: dict[str, str] = {}
    request_id: Annotated[str, msgspec.Meta(pattern=ANSWER_PATTERN)] | None = None
    """`request_id` of the answer that showed the item; from version 2."""
    schema_version: Annotated[int, msgspec.Meta(ge=1, le=SCHEMA_VERSION)] = 1
    """Absent means 1 for ever: the first senders did not write it. Who writes a newer form says so."""

    def __post_init__(self) -> None:
        """Rules that hold between fields."""
        if self.type is EventType.SEARCH:
            if self.query is None:
                raise ValueError("query: a search event carries the query that was typed")
        elif self.item is None:
            raise ValueError(f"item: a {self.type.value} event names its item")
        if self.type is EventType.RATING and self.rating is None:
            raise ValueError("rating: a rating event carries its value, 0 to 5")
        if self.request_id is not None and self.request_id in (self.user, self.session):
            raise ValueError("request_id: is the id of an answer, not of a person or a session")
        for name in ("price", "rating"):
            value = getattr(self, name)
            if value is not None and value != value:  # noqa: PLR0124 - NaN is the one value unequal to itself
                raise ValueError(f"{name}: must be a number, not NaN")


def is_uuid7(text: str) -> bool:
    """Whether `text` is a lower-case hyphenated UUID version 7 (RFC 9562)."""
    return re.fullmatch(UUID7_PATTERN, text) is not None
