"""What the gateway knows of people: profiles for its answers, the page on which a person reads theirs, and forgetting.

A profile that cannot be read costs an answer its taste and nothing else: the request is served as a cold start that
says so (`profiles_down`). A store that does not answer is not waited for by every request (`ladder.Circuit`). People
come in as pseudonyms but for `forget`, which hands a raw id to the one who can forget it; nothing here logs either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from workloads.bundle.store import Bundle
from workloads.contract.http import BackendState, CategoryInterest, ProfileAnswer
from workloads.contract.tensors import PAD
from workloads.data.definitions import DAY_MS, Touch
from workloads.data.features import ItemTables, Taste, UserState
from workloads.data.profiles import Profile, ProfilesDownError, ProfileStore
from workloads.gateway import problems
from workloads.gateway.identity import Forgetting
from workloads.gateway.ladder import Circuit, Leave, Reason
from workloads.gateway.timing import Clock
from workloads.telemetry import log

INTERESTS_MAX: Final = 50
BAND: Final = (10.0, 90.0)
"""Percentiles of `ProfileAnswer.price_band`."""

_logger = log.get(component="people")


class Known(NamedTuple):
    """What there is to make an answer of; `reason` says why nothing is."""

    touches: Sequence[Touch] = ()
    reason: Reason | None = None


class Catalogue(NamedTuple):
    """What an edition says about items."""

    bundle: Bundle
    tables: ItemTables


class People:
    """The store of profiles as requests see it. One per process, whatever edition it serves."""

    def __init__(self, store: ProfileStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._circuit = Circuit()
        self._fault: str | None = None

    async def known(self, pseudonym: str) -> Known:
        """What the profile says; nothing for somebody unknown, and while the store cannot be read."""
        try:
            profile = await self._profile(pseudonym)
        except ProfilesDownError:
            return Known(reason=Reason.PROFILES_DOWN)
        return Known() if profile is None else Known(profile.touches)

    async def answer(self, pseudonym: str | None, request_id: str, bundle: Bundle, tables: ItemTables) -> ProfileAnswer:
        """What a person may read of themselves. Somebody unknown is a cold start. Raises Refused."""
        try:
            profile = None if pseudonym is None else await self._profile(pseudonym)
            as_of_ms = (await self._store.look_up_watermark()).known_ms
        except ProfilesDownError:
            raise problems.no_profiles() from None
        touches = [] if profile is None else profile.touches
        state = UserState.of(touches, (), self._clock.wall_ms(), bundle.index)
        return profile_answer(request_id, touches, state, as_of_ms, Catalogue(bundle, tables))

    async def forget(self, user: str, forgetting: Forgetting) -> None:
        """Forget a person by the raw id: for good where ids are kept, and here at once. Raises Refused.

        Once the first step is done nobody can compute the person's pseudonym again, so that a profile which cannot be
        reached now is nobody's; the erasure takes it away later.
        """
        pseudonyms = await forgetting.forget(user)
        if not pseudonyms:
            return
        try:
            await asyncio.to_thread(self._store.delete, pseudonyms)
        except ProfilesDownError as error:
            _logger.warning("a forgotten profile is left to the erasure", fault=str(error))

    def state(self) -> BackendState:
        """How the last look into the store went."""
        return BackendState(up=self._fault is None, detail=self._fault or "profiles can be read")

    async def close(self) -> None:
        """Give the store's resources back."""
        await self._store.aclose()

    async def _profile(self, pseudonym: str) -> Profile | None:
        given = self._circuit.leave(self._clock.now_s())
        if given is Leave.NO:
            raise ProfilesDownError(self._fault or "not asked while its circuit is open")
        try:
            profile = await self._store.look_up(pseudonym)
        except ProfilesDownError as error:
            self._circuit.failed(Reason.PROFILES_DOWN, given, self._clock.now_s())
            if self._fault is None:
                _logger.error("profiles cannot be read", fault=str(error))
            self._fault = str(error)
            raise
        except BaseException:
            self._circuit.abandoned(given)
            raise
        self._circuit.succeeded()
        if self._fault is not None:
            _logger.info("profiles can be read again")
            self._fault = None
        return profile


def profile_answer(
    request_id: str, touches: Sequence[Touch], state: UserState, as_of_ms: int, catalogue: Catalogue
) -> ProfileAnswer:
    """`ProfileAnswer` of touches, the longest ago first, and the state made of them, by what the ranker reads."""
    bundle, tables = catalogue
    shares = Taste.of(state, tables, bundle.features.items).affinity
    shares[PAD] = 0.0
    total = float(shares.sum()) or 1.0
    last_ms = np.zeros(len(shares), dtype=np.int64)
    for touch in touches:
        at = bundle.index.get(touch.item, PAD)
        category = int(tables.category[at])
        last_ms[category] = max(int(last_ms[category]), touch.last_ms)
    names = bundle.features.categories
    order = np.argsort(-shares, kind="stable")
    prices = tables.price[state.items]
    prices = prices[prices > 0]
    low, high = np.percentile(prices, BAND).tolist() if len(prices) else (0.0, 0.0)
    newest = max((touch.last_ms for touch in touches), default=None)
    return ProfileAnswer(
        request_id=request_id,
        cold_start=not len(state.items),
        interests=[touch.item for touch in reversed(touches[-INTERESTS_MAX:])],
        categories=[
            CategoryInterest(category=names[at - 1], share=float(shares[at]) / total, last_ms=int(last_ms[at]))
            for at in order.tolist()
            if shares[at] > 0 and at <= len(names)
        ],
        price_band=(low, high) if len(prices) else None,
        recency_days=None if newest is None else max(state.now_ms - newest, 0) / DAY_MS,
        touches=len(touches),
        as_of_ms=as_of_ms,
    )
