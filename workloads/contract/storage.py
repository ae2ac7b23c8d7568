"""Where things lie in the object store: the keys of both buckets, and the one document that moves.

Two buckets (`infra.storage`): *data* takes what may leave home, *models* what was published. Objects lie under their
digest and never change; a channel is the only key that is ever written twice, always by compare-and-swap. Pure names
and records; who reads and writes is `workloads.objects` and those above it.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

DIGEST_PATTERN = r"^[0-9a-f]{64}$(?!\n)"
CHANNEL_PATTERN = r"^[a-z][a-z0-9-]{0,31}$(?!\n)"
"""Names of channels, which become keys and file names."""
STABLE: Final = "stable"
CANARY: Final = "canary"

Digest = Annotated[str, msgspec.Meta(pattern=DIGEST_PATTERN)]
Channel = Annotated[str, msgspec.Meta(pattern=CHANNEL_PATTERN)]

# models bucket


def object_key(digest: str) -> str:
    """A file of any bundle or delta, under the sha256 of its bytes."""
    return f"objects/sha256/{digest}"


def manifest_key(bundle: str) -> str:
    """A bundle's manifest, under its id (the sha256 of the manifest's bytes)."""
    return f"manifests/{bundle}.json"


def signature_key(bundle: str) -> str:
    """The signature over the bundle: an OpenSSF model-signing bundle."""
    return f"manifests/{bundle}.sig"


def delta_key(delta: str) -> str:
    """A delta's manifest, under its id."""
    return f"deltas/{delta}.json"


def delta_signature_key(delta: str) -> str:
    """The signature over a delta."""
    return f"deltas/{delta}.sig"


def channel_key(channel: str) -> str:
    """The pointer of a channel. Raises ValueError for a name that no channel may have."""
    if re.fullmatch(CHANNEL_PATTERN, channel) is None:
        raise ValueError(f"{channel!r} is no channel's name: a to z, 0 to 9 and hyphens, a letter first, 32 at most")
    return f"channels/{channel}.json"


class Release(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bundle and the deltas on top of it, in order."""

    bundle: Digest
    deltas: list[Digest] = []


class ChannelPointer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`channels/<name>.json`: what sites that watch the channel serve. Replaced whole, by compare-and-swap.

    `sequence` grows by one with each change, also with a rollback: a reader never goes back to a smaller one, so an
    old copy of the document that somebody puts back moves nobody.
    """

    schema_version: int = 1
    channel: Channel
    sequence: Annotated[int, msgspec.Meta(ge=1)]
    current: Release
    previous: Release | None = None
    """What a rollback goes to; sites keep it. None at first, and after a rollback."""
    left: Release | None = None
    """What the last move, a rollback, went away from; so that a rollback that is asked for twice happens once."""
    actor: str
    """Who moved it last, as the audit log names them."""
    moved_ms: int
    audit_head: str | None = None
    """Head of the publisher's audit chain when it was moved: the chain cannot be cut short behind it."""


# data bucket


def replica_object_key(digest: str) -> str:
    """A packed part of a replica, under its digest."""
    return f"replica/objects/sha256/{digest}"


def replica_manifest_key(dataset: str) -> str:
    """The manifest of a replicated data set, by the data set's directory name; written last."""
    return f"replica/manifests/{dataset}.json"
