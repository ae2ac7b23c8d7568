"""What a site serves: a bundle with some deltas on top, and the file by which the agent says so to its neighbours.

The agent of a site owns `<site>/editions.json` and replaces it whole. Retrieval and gateways look at it (a few times a
second) and bring about what it says; what they have reached stands in their `/readyz`. Nothing is commanded, so nothing
is lost when any of them dies: whoever starts reads the file. A flip is three versions of it:

    load [old, new] serve old      Triton has the new one, warm and with parity; until retrieval holds it
    load [old, new] serve new      until every gateway serves it and has no request left on the old one
    load [new]      serve new      the old one stays on disk, for rollback

An edition that a neighbour cannot open is a fault in its `/readyz` and changes nothing else there; the agent then
writes what served before.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from workloads.contract.storage import Digest

EDITIONS_FILE: Final = "editions.json"


class Edition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One bundle with its first `delta` deltas applied: item indices mean the same within an edition only."""

    bundle: Digest
    delta: Annotated[int, msgspec.Meta(ge=0)] = 0

    def __str__(self) -> str:
        """`<12 hex digits>+<deltas>`: as logs, metrics and `/readyz` name it."""
        return f"{self.bundle[:12]}+{self.delta}"


class SiteEditions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`<site>/editions.json`; `serve` is one of `load`.

    Bundles lie at `<site>/bundles/<id>`, their deltas at `<site>/deltas/<bundle id>/<number>-<delta id>/`, numbered
    from 1; a site holds one delta of each number.
    """

    schema_version: int = 1
    revision: int = 0
    """Grows with every version. `/readyz` says which one was brought about: until then, what it says is of before."""
    load: list[Edition]
    """What retrieval holds ready."""
    serve: Edition
    """What gateways answer from."""
    previous: Edition | None = None
    """On disk, verified: what a rollback without the cloud goes to."""
    channel: str | None = None
    sequence: int = 0
    """Of the channel's pointer that this came from; 0 where no channel is watched."""


class RetrievalReadiness(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /readyz` of retrieval: 200 while it holds what gateways answer from."""

    ready: bool
    missing: dict[str, str]
    """What it still waits for, in words."""
    revision: int = 0
    """Of the editions file as far as it is brought about; what could not be opened counts as done."""
    editions: list[str] = []
    """Editions that it answers queries of now."""
    faults: dict[str, str] = {}
    """Editions that it was to hold and could not open, and why; the others serve on."""
