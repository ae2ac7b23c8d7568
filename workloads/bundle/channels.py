"""Channels: the one document per channel that says which release its sites serve, moved by compare-and-swap.

A move reads the pointer, decides, and replaces the very version that it read; whoever comes second is told who won. The
sequence grows by one with each move, backwards too. It knows nothing of bundles but their ids: whether a release may
be pointed to is for `workloads.bundle.registry` to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import msgspec

from workloads.contract.storage import ChannelPointer, Release, channel_key
from workloads.objects.store import Conflict, NotFound, ObjectStore, Unavailable

POINTER_SCHEMA: Final = 1
_PREFIX: Final = "channels/"
_SUFFIX: Final = ".json"

Audit = Callable[..., str]
"""`workloads.privacy.audit.AuditLog.append`: action, actor, subject, detail; returns the head of the chain."""


class RegistryFault(Exception):  # noqa: N818 - as BundleFault
    """What cannot be done with a registry as it is; `fault` says why, `remedy` what to do."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.remedy = remedy


class NoChannel(RegistryFault):
    """Nothing was ever promoted to this channel."""

    def __init__(self, channel: str) -> None:
        super().__init__(
            f"there is no channel {channel!r}", f"promote a bundle: `rankbridge bundle promote ID {channel}`"
        )
        self.channel = channel


class ChannelConflict(RegistryFault):
    """Somebody else moved the channel first; `winner` is the pointer that they left."""

    def __init__(self, winner: ChannelPointer) -> None:
        super().__init__(
            f"{winner.actor} moved {winner.channel} first: it is at sequence {winner.sequence}, "
            f"bundle {winner.current.bundle[:12]} with {len(winner.current.deltas)} deltas",
            "look whether what they did is what you want, and promote again if not",
        )
        self.winner = winner


class Channels:
    """The pointers of one registry. `audit` gets a line before each move, so that the pointer can carry its head."""

    def __init__(
        self,
        objects: ObjectStore,
        *,
        audit: Audit | None = None,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._objects = objects
        self._audit = audit
        self._clock_ms = clock_ms

    def read(self, channel: str) -> tuple[ChannelPointer, str]:
        """The pointer, and the etag that a move replaces. Raises NoChannel; RegistryFault for what is no pointer."""
        key = channel_key(channel)
        try:
            got = self._objects.get(key)
        except NotFound:
            raise NoChannel(channel) from None
        return _decode(key, channel, got.data), got.etag

    def all(self) -> Iterator[ChannelPointer]:
        """Every channel's pointer, by name. Raises RegistryFault at one that cannot be read."""
        for listed in self._objects.list(_PREFIX):
            if listed.key.endswith(_SUFFIX):
                yield self.read(listed.key.removeprefix(_PREFIX).removesuffix(_SUFFIX))[0]

    def promote(self, channel: str, release: Release, actor: str, *, expect: int | None = None) -> ChannelPointer:
        """Let a channel point to a release; where it does already, nothing happens.

        `expect` is the sequence that the caller's decision was made on (0: none yet). Raises ChannelConflict.
        """
        pointer, etag = self._read_or_none(channel)
        if pointer is not None and pointer.current == release and expect in {None, pointer.sequence}:
            return pointer
        if pointer is not None and (pointer.current, pointer.actor, pointer.sequence - 1) == (release, actor, expect):
            return pointer  # the caller's own earlier try; another's would be a race that was lost
        _hold(pointer, expect)
        return self._move(
            pointer,
            etag,
            ChannelPointer(
                channel=channel,
                sequence=1 if pointer is None else pointer.sequence + 1,
                current=release,
                previous=None if pointer is None else pointer.current,
                actor=actor,
                moved_ms=self._clock_ms(),
            ),
            "channel.promote",
        )

    def rollback(self, channel: str, actor: str, *, expect: int | None = None) -> ChannelPointer:
        """Go back to what the channel pointed to before; after a rollback nothing happens, so that it may be repeated.

        Raises NoChannel, ChannelConflict, and RegistryFault where there was nothing before.
        """
        pointer, etag = self.read(channel)
        if pointer.previous is None:
            if pointer.left is not None:
                return pointer
            raise RegistryFault(f"{channel} has had one release only", "promote another one instead")
        _hold(pointer, expect)
        return self._move(
            pointer,
            etag,
            ChannelPointer(
                channel=channel,
                sequence=pointer.sequence + 1,
                current=pointer.previous,
                left=pointer.current,
                actor=actor,
                moved_ms=self._clock_ms(),
            ),
            "channel.rollback",
        )

    def _read_or_none(self, channel: str) -> tuple[ChannelPointer | None, str]:
        try:
            return self.read(channel)
        except NoChannel:
            return None, ""

    def _move(self, before: ChannelPointer | None, etag: str, after: ChannelPointer, action: str) -> ChannelPointer:
        head = self._record(action, after, {"from": before.current.bundle if before else None})
        after = msgspec.structs.replace(after, audit_head=head)
        data = encode(after)
        key = channel_key(after.channel)
        try:
            if before is None:
                self._objects.put_new(key, data)
            else:
                self._objects.replace(key, data, etag)
        except (Conflict, NotFound, Unavailable) as error:
            # The transport may have tried twice, or lost the answer: what stands there now says who won.
            there, _ = self._read_or_none(after.channel)
            if there == after:
                return after
            if isinstance(error, Unavailable) and there == before:
                raise
            if there is None:
                raise RegistryFault(f"{key} was removed meanwhile", "find out by whom, and promote again") from error
            self._record("channel.conflict", after, {"winner": there.actor, "at": there.sequence})
            raise ChannelConflict(there) from None
        return after

    def _record(self, action: str, pointer: ChannelPointer, detail: Mapping[str, str | int | None]) -> str | None:
        if self._audit is None:
            return None
        facts = {
            "sequence": pointer.sequence,
            "bundle": pointer.current.bundle,
            "deltas": len(pointer.current.deltas),
            "last_delta": pointer.current.deltas[-1] if pointer.current.deltas else None,
        }
        return self._audit(action=action, actor=pointer.actor, subject=pointer.channel, detail=facts | dict(detail))


def encode(pointer: ChannelPointer) -> bytes:
    """The bytes of a pointer: sorted keys, two-space indent, one newline at the end."""
    return msgspec.json.format(msgspec.json.encode(pointer, order="deterministic"), indent=2) + b"\n"


def _decode(key: str, channel: str, data: bytes) -> ChannelPointer:
    try:
        pointer = msgspec.json.decode(data, type=ChannelPointer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RegistryFault(f"{key} is no pointer of a channel: {error}", "put back the version before it") from None
    if pointer.schema_version != POINTER_SCHEMA:
        fault = f"{key} has schema version {pointer.schema_version}; this release reads version {POINTER_SCHEMA}"
        raise RegistryFault(fault, "use the release that wrote it")
    if pointer.channel != channel:
        raise RegistryFault(f"{key} is the pointer of {pointer.channel!r}", "put back the version before it")
    return pointer


def _hold(pointer: ChannelPointer | None, expect: int | None) -> None:
    if expect is None or expect == (pointer.sequence if pointer else 0):
        return
    if pointer is None:
        raise RegistryFault(f"the channel is not there, sequence {expect} was expected", "look at it, and decide anew")
    raise ChannelConflict(pointer)
