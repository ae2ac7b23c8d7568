"""Clients that send their event logs. Runs alone: `locust -f loadtests/events.py --host URL`."""

from __future__ import annotations

import time

import msgspec

from loadtests import answers
from loadtests.draws import Shopper
from loadtests.users import Ask, OpenLoopUser
from workloads.contract.slo import TRAFFIC_PER_S, Endpoint


class EventsUser(OpenLoopUser):
    """`POST /v1/events`, a few events of one visit at a time."""

    endpoint = Endpoint.EVENTS
    weight = TRAFFIC_PER_S[Endpoint.EVENTS]

    def ask(self, shopper: Shopper) -> Ask:
        """Events of this moment under new ids."""
        drawn = shopper.events(int(time.time() * 1000))
        ids = tuple(e.event_id for e in drawn.events)
        return Ask(msgspec.json.encode(drawn), size=len(ids), event_ids=ids)

    def read(self, status: int, body: bytes, ask: Ask) -> answers.Reading:
        """An acknowledgement of all of them."""
        return answers.read_events(status, body, sent=ask.size)
