"""Users who search. Runs alone: `locust -f loadtests/search.py --host URL`."""

from __future__ import annotations

import msgspec

from loadtests.draws import Shopper
from loadtests.users import Ask, OpenLoopUser
from workloads.contract.slo import TRAFFIC_PER_S, Endpoint


class SearchUser(OpenLoopUser):
    """`POST /v1/search`."""

    endpoint = Endpoint.SEARCH
    weight = TRAFFIC_PER_S[Endpoint.SEARCH]

    def ask(self, shopper: Shopper) -> Ask:
        """One of the catalogue's queries."""
        drawn = shopper.search()
        return Ask(msgspec.json.encode(drawn), size=drawn.k)
