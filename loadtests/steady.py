"""The promised traffic for two minutes: `locust -f loadtests/steady.py --headless --host URL`."""

from __future__ import annotations

from loadtests.mix import EventsUser, RecommendUser, SearchUser
from loadtests.shapes import SteadyShape

__all__ = ["EventsUser", "RecommendUser", "SearchUser", "SteadyShape"]
