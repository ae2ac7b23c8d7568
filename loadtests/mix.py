"""The shop's traffic: 40 recommend, 10 search, 10 events.

`locust -f loadtests/mix.py --host http://127.0.10.1:8080 -u 60 -r 60 -t 2m`: 60 users at one request a
second each is the traffic that the targets are promised for. Add `--also-host` for the second site.
"""

from __future__ import annotations

from loadtests.events import EventsUser
from loadtests.recommend import RecommendUser
from loadtests.search import SearchUser

__all__ = ["EventsUser", "RecommendUser", "SearchUser"]
