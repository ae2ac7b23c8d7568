"""A quick look at every endpoint: `locust -f loadtests/smoke.py --headless --host URL`."""

from __future__ import annotations

from loadtests.mix import EventsUser, RecommendUser, SearchUser
from loadtests.shapes import SmokeShape

__all__ = ["EventsUser", "RecommendUser", "SearchUser", "SmokeShape"]
