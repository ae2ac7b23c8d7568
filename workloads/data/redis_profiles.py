"""Profiles in Redis, for gateways on many machines. The door, and what becomes of a batch: `data.profiles`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from workloads.data.definitions import ItemActivity, Sign
from workloads.data.profiles import (
    FORGOTTEN_MS,
    FORMAT,
    LOOK_UP_TIMEOUT_S,
    START,
    Profile,
    ProfilesDownError,
    Rows,
    Watermark,
    decode_activity,
    decode_touches,
    decode_watermark,
    encode,
    now_ms,
    rows_of,
    tombstone,
)

_WRITE_TIMEOUT_S: Final = 5.0
_PREFIX: Final = "rankbridge:"
_WATERMARK: Final = f"{_PREFIX}watermark"
_EPOCH: Final = f"{_PREFIX}epoch"
"""Changed by every deletion: a batch that was being put together meanwhile is put together again."""
_META: Final = f"{_PREFIX}meta"
_RETRIES: Final = 20
_FILL_AT_ONCE: Final = 1000


class RedisProfiles:
    """Profiles in Redis, one server or one with replicas (no cluster: a batch is one MULTI over many keys).

    Reading is one GET. A batch reads all its rows in one round trip and writes them in another, conditional on nobody
    else's having written. Nothing is connected before the first call.
    """

    def __init__(
        self,
        host: str,
        port: int,
        database: int = 0,
        *,
        username: str | None = None,
        password: str | None = None,
        tls: bool = False,
        clock_ms: Callable[[], int] = now_ms,
    ) -> None:
        self._where = f"redis at {host}:{port}"
        self._clock_ms = clock_ms
        common: dict[str, Any] = {
            "host": host,
            "port": port,
            "db": database,
            "username": username,
            "password": password,
            "ssl": tls,
        }
        self._redis = redis.Redis(
            **common,
            socket_timeout=_WRITE_TIMEOUT_S,
            socket_connect_timeout=1.0,
            retry=Retry(NoBackoff(), 1),  # once: a connection that the server closed while it was idle
        )
        self._online = redis.asyncio.Redis(
            **common,
            socket_timeout=LOOK_UP_TIMEOUT_S,
            socket_connect_timeout=LOOK_UP_TIMEOUT_S,
            retry=AsyncRetry(NoBackoff(), 1),
            max_connections=64,
        )

    def get(self, pseudonym: str) -> Profile | None:
        """See `ProfileStore`."""
        with self._told():
            return _profile(pseudonym, self._redis.get(_latest(pseudonym)))

    async def look_up(self, pseudonym: str) -> Profile | None:
        """See `ProfileStore`."""
        async with self._told_online():
            return _profile(pseudonym, await self._online.get(_latest(pseudonym)))

    async def look_up_watermark(self) -> Watermark:
        """See `ProfileStore`."""
        async with self._told_online():
            return _watermark_of(await self._online.get(_WATERMARK))

    def activity(self, item: str) -> ItemActivity | None:
        """See `ProfileStore`."""
        with self._told():
            row = _bytes(self._redis.get(_item(item)))
            return None if row is None else decode_activity(row)

    def watermark(self) -> Watermark:
        """See `ProfileStore`."""
        with self._told():
            return _watermark_of(self._redis.get(_WATERMARK))

    def apply(self, signs: Sequence[Sign], watermark: Watermark) -> int:
        """See `ProfileStore`."""
        with self._told():
            for _ in range(_RETRIES):
                with self._redis.pipeline(transaction=True) as pipe, contextlib.suppress(redis.WatchError):
                    return self._apply(pipe, signs, watermark)
        raise ProfilesDownError(f"{self._where}: others keep writing; run one feedback process only")

    @staticmethod
    def _apply(pipe: Any, signs: Sequence[Sign], watermark: Watermark) -> int:  # noqa: ANN401 - redis.client.Pipeline, whose types follow its mode
        pipe.watch(_WATERMARK, _EPOCH)
        before = _watermark_of(pipe.get(_WATERMARK))
        new = [sign for sign in signs if sign.seq > before.seq]
        people = list(dict.fromkeys(sign.pseudonym for sign in new))
        items = list(dict.fromkeys(sign.item for sign in new))
        names = (*map(_latest, people), *map(_older, people), *map(_forgotten, people), *map(_item, items))
        found = pipe.mget(names) if names else []
        count = len(people)
        latest, older, forgotten = found[:count], found[count : 2 * count], found[2 * count : 3 * count]
        rows = Rows(
            dict(zip(people, zip(latest, older, strict=True), strict=True)),
            dict(zip(items, found[3 * count :], strict=True)),
            {who: int(at) for who, at in zip(people, forgotten, strict=True) if at is not None},
        )
        taken = rows.take(new)
        pipe.multi()
        for who, kept, rest in rows.people():
            pipe.set(_latest(who), kept)
            if rest:
                pipe.set(_older(who), rest)
        for item, activity in rows.items():
            pipe.set(_item(item), activity)
        if watermark.seq > before.seq:
            pipe.set(_WATERMARK, encode(watermark))
        pipe.execute()
        return taken

    def delete(self, pseudonyms: Sequence[str]) -> int:
        """See `ProfileStore`."""
        if not pseudonyms:
            return 0
        at = self._clock_ms()
        distinct = list(dict.fromkeys(pseudonyms))
        with self._told(), self._redis.pipeline(transaction=True) as pipe:
            pipe.incr(_EPOCH)
            for who in distinct:
                pipe.set(_forgotten(who), at, px=FORGOTTEN_MS)
            pipe.delete(*map(_older, distinct))
            pipe.delete(*map(_latest, distinct))
            return int(pipe.execute()[-1])

    def copy(self, names: Mapping[str, str]) -> int:
        """See `ProfileStore`."""
        made = 0
        with self._told(), self._redis.pipeline(transaction=False) as pipe:
            pairs = list(names.items())
            for start in range(0, len(pairs), _FILL_AT_ONCE):
                for old, new in pairs[start : start + _FILL_AT_ONCE]:
                    pipe.copy(_older(old), _older(new))
                    pipe.copy(_latest(old), _latest(new))
                made += sum(int(done) for done in pipe.execute()[1::2])
        return made

    def fill(
        self,
        profiles: Iterable[Profile],
        meta: Mapping[str, str],
        *,
        items: Iterable[tuple[str, ItemActivity]] = (),
        watermark: Watermark = START,
    ) -> int:
        """Put these profiles beside and over what is there, in steps; the number that were written.

        Who was in the store and is not among them stays; people who were forgotten stay so. The watermark goes back to
        the given one, at the end.
        """
        count = 0
        with self._told(), self._redis.pipeline(transaction=False) as pipe:
            for some in _batches(profiles, _FILL_AT_ONCE):
                forgotten = self._redis.mget([_forgotten(profile.pseudonym) for profile in some])
                for profile, mark in zip(some, forgotten, strict=True):
                    if mark is not None:
                        continue
                    latest, older = rows_of(profile.touches)
                    pipe.set(_latest(profile.pseudonym), latest)
                    if older:
                        pipe.set(_older(profile.pseudonym), older)
                    else:
                        pipe.delete(_older(profile.pseudonym))
                    count += 1
                pipe.execute()
            for item, activity in items:
                pipe.set(_item(item), encode(activity))
            pipe.set(_META, encode({**meta, "format": FORMAT}))
            pipe.set(_WATERMARK, encode(watermark))
            pipe.incr(_EPOCH)
            pipe.execute()
        return count

    def close(self) -> None:
        """See `ProfileStore`. Connections of `look_up` belong to its event loop: `aclose` closes them."""
        self._redis.close()

    async def aclose(self) -> None:
        """`close`, and the connections of `look_up`, from inside the event loop that made them."""
        self.close()
        with contextlib.suppress(redis.RedisError, OSError):
            await self._online.aclose()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Redis' and the network's faults as ours."""
        try:
            yield
        except redis.WatchError:
            raise
        except (redis.RedisError, OSError, msgspec.DecodeError) as error:
            raise ProfilesDownError(f"{self._where}: {_said(error)}") from None

    @contextlib.asynccontextmanager
    async def _told_online(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(LOOK_UP_TIMEOUT_S):
                yield
        except (redis.RedisError, OSError, msgspec.DecodeError) as error:  # TimeoutError is an OSError
            raise ProfilesDownError(f"{self._where}: {_said(error)}") from None


def _batches(profiles: Iterable[Profile], size: int) -> Iterator[list[Profile]]:
    given = iter(profiles)
    while some := list(itertools.islice(given, size)):
        yield some


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _latest(pseudonym: str) -> str:
    return f"{_PREFIX}latest:{pseudonym}"


def _older(pseudonym: str) -> str:
    return f"{_PREFIX}older:{pseudonym}"


def _forgotten(pseudonym: str) -> str:
    return f"{_PREFIX}forgotten:{tombstone(pseudonym)}"


def _item(item: str) -> str:
    return f"{_PREFIX}item:{item}"


def _bytes(row: bytes | str | None) -> bytes | None:
    """What Redis gave; text comes only from a client that was told to decode, which ours is not."""
    return row.encode() if isinstance(row, str) else row


def _profile(pseudonym: str, found: bytes | str | None) -> Profile | None:
    row = _bytes(found)
    return None if row is None else Profile(pseudonym, decode_touches(row))


def _watermark_of(found: bytes | str | None) -> Watermark:
    row = _bytes(found)
    return Watermark() if row is None else decode_watermark(row)
