"""What crosses between home and the cloud in a rehearsal: the bundle's way to both sites, and a new item's, timed.

Signs and publishes as `rankbridge bundle` does, moves the channel, and asks the gateways, as anybody could, from when
on they answer with it. Starts no process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from rankbridge import bundles
from rankbridge import cloud as clouds
from rankbridge.cloud import Cloud
from rankbridge.layout import Layout
from workloads.bundle.registry import Registry
from workloads.bundle.store import open_bundle
from workloads.contract.http import ItemsAnswer, Readiness
from workloads.contract.sites import HOME, SITES
from workloads.contract.slo import Endpoint, Rung
from workloads.contract.storage import STABLE, ChannelPointer, Release

ACTOR: Final = "rehearsal"
LOOK_EVERY_S: Final = 0.1
GIVE_UP_S: Final = 120.0
"""A site that has not got there until then is written down with this."""
NEW_ITEM: Final = "rehearsal-new-item"
"""Id of the item that a rehearsal adds to the catalogue."""
NEW_WORD: Final = "Quillonberry"
"""Stands in its title: a word that no catalogue has."""
_TIMEOUT_S: Final = 5.0


class NewItem(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the file that `python -m workloads.delta` reads."""

    item: str
    title: str
    description: str
    category: str
    price: float | None
    image: list[float]
    in_stock: bool = True


@dataclasses.dataclass(frozen=True)
class Publisher:
    """Publishes from one home of state into one cloud."""

    layout: Layout
    cloud: Cloud
    channel: str = STABLE

    def publish(self, bundle: Path) -> None:
        """Sign a bundle and bring it into the registry; no channel moves. Raises DeskError."""
        with bundles.told():
            bundles.trusted_key(self.layout)
        signature = bundles.sign(self.layout, bundle)
        with bundles.told():
            self._registry().publish(bundle, signature, actor=ACTOR)

    def promote(self, bundle: str) -> ChannelPointer:
        """Let the channel point to a published bundle. Raises DeskError."""
        with bundles.told():
            return self._registry().promote(self.channel, Release(bundle=bundle), ACTOR)

    def add_arguments(self, items: Path) -> list[str]:
        """Command line of the job that puts new items on top of what the channel serves.

        It works where the bundle was made: the copy there is good and signed, and a second one would stay for ever.
        """
        return [
            *("add", "--items", str(items), "--work", str(self.layout.training_home)),
            *("--channel", self.channel, "--models-bucket", self.cloud.models_bucket),
            *("--key", str(self.layout.publisher_key), "--trust", str(self.layout.trust(HOME.name))),
            *("--actor", ACTOR, "--audit", str(self.layout.audit)),
        ]

    def _registry(self) -> Registry:
        client = clouds.s3(self.cloud) if self.cloud.settings else None
        return bundles.registry(self.layout, self.cloud.models_bucket, client=client)


def empty_sites(layout: Layout) -> None:
    """Let both sites know nothing: no bundle, and no pointer of a channel that a forgotten cloud had."""
    for site in SITES:
        folder = layout.site(site)
        for name in ("editions.json", "channel.json", "hold.json"):
            (folder / name).unlink(missing_ok=True)


def served_after(gateways: Mapping[str, str], bundle: str, since: float, *, delta: int = 0) -> dict[str, float]:
    """Seconds from `since` (monotonic) until each site's gateway says that it serves this edition."""

    def serves(url: str) -> bool:
        with contextlib.suppress(msgspec.DecodeError):
            found = msgspec.json.decode(_get(url + "/readyz"), type=Readiness)
            return (found.bundle, found.delta) == (bundle[:12], delta)
        return False

    return _when(gateways, serves, since)


def new_item_like(bundle: Path, path: Path) -> tuple[NewItem, str]:
    """Write a file with one item that the catalogue does not have, and the most popular item that it resembles.

    It is told from that by one word more: whoever likes the one is to be shown the other, whatever else the shop has.
    """
    opened = open_bundle(bundle)
    twin = int(opened.tables["popularity"].argmax())
    price = float(opened.tables["price"][twin])
    item = NewItem(
        item=NEW_ITEM,
        title=f"{opened.titles[twin]} {NEW_WORD}".strip(),
        description=opened.text("description")[twin],
        category=opened.categories[twin],
        price=price if price > 0 else None,
        image=opened.images()[twin],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(item) + b"\n")
    return item, opened.item_ids[twin]


def found_after(gateways: Mapping[str, str], item: NewItem, twin: str, since: float) -> dict[str, float]:
    """Seconds until each site has the new item in its answers to who searches for it and to who looks at its twin.

    A person who likes the twin is recommended it, too, wherever the ranker answers: a lower rung promises no more
    than its own order.
    """

    def found(url: str) -> bool:
        searched = _asked(url, Endpoint.SEARCH, {"query": item.title})
        similar = _asked(url, Endpoint.SIMILAR, {"item": twin, "k": 100})
        recommended = _asked(url, Endpoint.RECOMMEND, {"history": [twin], "k": 100})
        if searched is None or similar is None or recommended is None:
            return False
        ranked = recommended.served.rung == Rung.FULL_RANKER
        wanted = [searched, similar, *([recommended] if ranked else [])]
        return all(item.item in {one.item for one in answer.items} for answer in wanted)

    return _when(gateways, found, since)


def _when(urls: Mapping[str, str], holds: Callable[[str], bool], since: float) -> dict[str, float]:
    """Seconds from `since` until it holds at each site; GIVE_UP_S where it did not until then."""
    seconds: dict[str, float] = {}
    while len(seconds) < len(urls) and time.monotonic() - since < GIVE_UP_S:
        for site, url in urls.items():
            if site not in seconds and holds(url):
                seconds[site] = time.monotonic() - since
        time.sleep(LOOK_EVERY_S)
    return {site: seconds.get(site, GIVE_UP_S) for site in urls}


def _asked(url: str, endpoint: Endpoint, body: Mapping[str, str | int | Sequence[str]]) -> ItemsAnswer | None:
    """The answer; None where there is none."""
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(_post(url + endpoint, body), type=ItemsAnswer)
    return None


def _get(url: str) -> bytes:
    return _ask("GET", url, None)


def _post(url: str, body: object) -> bytes:
    return _ask("POST", url, msgspec.json.encode(body))


def _ask(method: str, url: str, body: bytes | None) -> bytes:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    try:
        connection.request(method, parts.path, body, {"content-type": "application/json"} if body else {})
        return connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return b""
    finally:
        connection.close()
