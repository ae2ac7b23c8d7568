"""What an agent must still know after a restart: the newest pointer that it saw, and what was asked for by hand.

    <site>/channel.json    written by the agent: an older pointer that somebody puts back moves nobody
    <site>/hold.json       written by `rollback`, answered by the agent: what to serve until the channel moves on

Both are replaced whole. A file that cannot be read counts as none: the channel is asked again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec

from workloads.bundle.site import replace_file
from workloads.contract.editions import Edition

CHANNEL_FILE: Final = "channel.json"
HOLD_FILE: Final = "hold.json"


class Seen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The newest pointer of the channel that this site watches."""

    channel: str | None
    sequence: Annotated[int, msgspec.Meta(ge=0)]


class Hold(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Serve this, whatever the channel says, until it says something newer than `sequence`."""

    edition: Edition
    sequence: Annotated[int, msgspec.Meta(ge=0)]
    refused: str | None = None
    """The agent's answer, where it could not."""


def read_seen(site: Path) -> Seen | None:
    """See `Seen`; None when there is none that can be read."""
    try:
        return msgspec.json.decode((site / CHANNEL_FILE).read_bytes(), type=Seen)
    except (OSError, ValueError):
        return None


def write_seen(site: Path, seen: Seen) -> None:
    """Raises OSError."""
    replace_file(site / CHANNEL_FILE, msgspec.json.encode(seen) + b"\n")


def read_hold(site: Path) -> Hold | None:
    """See `Hold`; None when there is none that can be read."""
    try:
        return msgspec.json.decode((site / HOLD_FILE).read_bytes(), type=Hold)
    except (OSError, ValueError):
        return None


def write_hold(site: Path, hold: Hold | None) -> None:
    """Ask, answer, or with None let go. Raises OSError."""
    if hold is None:
        (site / HOLD_FILE).unlink(missing_ok=True)
    else:
        replace_file(site / HOLD_FILE, msgspec.json.encode(hold) + b"\n")
