"""Users who ask for recommendations. Runs alone: `locust -f loadtests/recommend.py --host URL`."""

from __future__ import annotations

import msgspec

from loadtests.draws import Shopper
from loadtests.users import Ask, OpenLoopUser
from workloads.contract.slo import TRAFFIC_PER_S, Endpoint


class RecommendUser(OpenLoopUser):
    """`POST /v1/recommend`."""

    endpoint = Endpoint.RECOMMEND
    weight = TRAFFIC_PER_S[Endpoint.RECOMMEND]

    def ask(self, shopper: Shopper) -> Ask:
        """For a person of the shop, or for a stranger's session."""
        drawn = shopper.recommend()
        return Ask(msgspec.json.encode(drawn), size=drawn.k)
