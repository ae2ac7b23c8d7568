"""What the gateway takes, the intake behind it can take: limits that only hold together."""

from __future__ import annotations

import msgspec

from workloads.contract.http import BODY_MAX_BYTES, EventsRequest
from workloads.gateway.identity import HomeEdge
from workloads.intake import records
from workloads.intake.app import INTAKE_BODY_MAX_BYTES
from workloads.privacy.pseudonym import PseudonymKey


def test_the_longest_body_that_the_gateway_takes_is_no_longer_than_the_intake_takes():
    raw = {
        "event_id": "01890a5d-ac96-774b-bcce-b302099a8057",
        "type": "click",
        "timestamp_ms": 1_790_000_000_000,
        "item": "i",
        "user": "u",
        "session": "u",
        "context": {f"{place:x}": "u" for place in range(24_000)},
    }
    body = msgspec.json.encode({"events": [raw]})
    assert 0.9 * BODY_MAX_BYTES < len(body) <= BODY_MAX_BYTES
    events = HomeEdge(PseudonymKey(1, b"k" * 32)).events(msgspec.json.decode(body, type=EventsRequest).events)
    forwarded = msgspec.msgpack.encode({"events": events})
    assert len(forwarded) <= INTAKE_BODY_MAX_BYTES
    assert len(records.read(forwarded, msgpack=True).rows) == 1
