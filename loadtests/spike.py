"""A sudden tripling of the traffic: `locust -f loadtests/spike.py --headless --host URL`."""

from __future__ import annotations

from loadtests.mix import EventsUser, RecommendUser, SearchUser
from loadtests.shapes import SpikeShape

__all__ = ["EventsUser", "RecommendUser", "SearchUser", "SpikeShape"]
