"""What the gateway takes, the intake behind it can take: limits that only hold together."""

from __future__ import annotations

import msgspec

from workloads.contract.events import CONTEXT_KEYS
from workloads.contract.http import BODY_MAX_BYTES, EventsRequest
from workloads.gateway.identity import HomeEdge
from workloads.intake import records
from workloads.intake.app import INTAKE_BODY_MAX_BYTES
from workloads.privacy.vault import MemoryVault


async def test_the_longest_body_that_the_gateway_takes_is_no_longer_than_the_intake_takes():
    # Ids of one character, which the edge makes 35 long, wherever it may.
    raw = [
        {
            "event_id": f"01890a5d-ac96-774b-bcce-{number:012x}",
            "type": "click",
            "timestamp_ms": 1_790_000_000_000,
            "item": "i",
            "user": "u",
            "session": "u",
            "context": dict.fromkeys(CONTEXT_KEYS, "u"),
        }
        for number in range(950)
    ]
    body = msgspec.json.encode({"events": raw})
    assert 0.9 * BODY_MAX_BYTES < len(body) <= BODY_MAX_BYTES
    taken = msgspec.json.decode(body, type=EventsRequest).events
    forwarded = msgspec.msgpack.encode({"events": await HomeEdge(MemoryVault()).events(taken)})
    assert len(forwarded) > 1.5 * len(body)
    assert len(forwarded) <= INTAKE_BODY_MAX_BYTES
    assert len(records.read(forwarded, msgpack=True).rows) == len(raw)
