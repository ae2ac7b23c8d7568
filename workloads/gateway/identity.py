"""The edge where people become pseudonyms. Nothing behind it sees a raw id: no stage, no neighbour, no log.

At home a user is looked up in the vault: who asks for something makes nobody known, who does something (an event) is
admitted, on disk, before the event goes on. A cloud site has no vault: there a user is a pseudonym already, or the
request is refused. Session ids often hold a user's id and are mapped as well; in the cloud with a secret that is made
when the gateway starts and kept nowhere, since a session needs no name that lasts. Of an event's context only what the
contract names passes, at both kinds of site.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import msgspec

from workloads.contract.events import CONTEXT_KEYS, CONTEXT_VALUE_PATTERN, Event
from workloads.contract.http import PSEUDONYM_PATTERN, SESSION_PATTERN
from workloads.gateway import problems
from workloads.gateway.problems import raw_id
from workloads.privacy.pseudonym import KEY_BYTES, KeyFileError, PseudonymKey
from workloads.privacy.vault import Vault, VaultError
from workloads.telemetry import log

_PSEUDONYM: Final = re.compile(PSEUDONYM_PATTERN)
_KEYED_SESSION: Final = re.compile(SESSION_PATTERN)
_CONTEXT_VALUE: Final = re.compile(CONTEXT_VALUE_PATTERN)
_logger = log.get(component="identity")


class Edge(Protocol):
    """How ids of people become what may pass."""

    def user(self, user: str, path: str) -> str | None:
        """The pseudonym for a user met at `path` of the request, None for somebody of whom nothing is known.

        Raises Refused where the user may not be named here.
        """
        ...

    async def events(self, events: list[Event]) -> list[Event]:
        """The same events without a raw id; their users are known from now on. Raises Refused as `user`."""
        ...


class Forgetting(Protocol):
    """How a person is forgotten, at home only."""

    async def forget(self, user: str) -> list[str]:
        """Forget a user by raw id: when this returns, nobody can make the pseudonyms again and the erasure is queued.

        The answer is those pseudonyms, for who must remove something at once (an online profile); empty for somebody
        unknown. Raises Refused when it is not known to be on disk.
        """
        ...


class HomeEdge:
    """Looks up in the vault, and admits. What looks like a pseudonym is a user's id here as any other.

    `on_dropped` is told how many entries of contexts did not pass. Also `Forgetting`.
    """

    def __init__(self, vault: Vault, on_dropped: Callable[[int], object] = lambda _: None) -> None:
        self._vault = vault
        self._admissions = _Admissions(vault)
        self._on_dropped = on_dropped

    def user(self, user: str, path: str) -> str | None:  # noqa: ARG002 - the Edge's signature; nothing is refused here
        """See `Edge`. While the vault cannot be read everybody is somebody new: an answer is better than none."""
        try:
            return self._vault.pseudonym(user)
        except (VaultError, KeyFileError) as error:
            _logger.error("users cannot be looked up", fault=error.fault, remedy=error.remedy)
            return None

    async def events(self, events: list[Event]) -> list[Event]:
        """See `Edge`. An id that a client put into the context as well is replaced there, too."""
        names: dict[str, str] = {}
        new: set[str] = set()
        try:
            for event in events:
                user = event.user
                if user is not None and user not in names and user not in new:
                    name = self._vault.pseudonym(user)
                    if name is None:
                        new.add(user)
                    else:
                        names[user] = name
            if new:
                names.update(await self._admissions.admit(new))
            sessions = {session: self._vault.session(session) for event in events if (session := event.session)}
        except (VaultError, KeyFileError) as error:
            _logger.error("users cannot be admitted", fault=error.fault, remedy=error.remedy)
            raise problems.not_acknowledged("New users cannot be written down now") from None
        return [self._without_id(event, names, sessions) for event in events]

    async def forget(self, user: str) -> list[str]:
        """See `Forgetting`."""
        try:
            erasure = await asyncio.to_thread(self._vault.forget, user)
        except (VaultError, KeyFileError) as error:
            _logger.error("a user cannot be forgotten", fault=error.fault, remedy=error.remedy)
            raise problems.not_forgotten() from None
        return [] if erasure is None else erasure.pseudonyms

    def _without_id(self, event: Event, names: dict[str, str], sessions: dict[str, str]) -> Event:
        if event.user is None and event.session is None and not event.context:
            return event
        known: dict[str, str] = {}
        if event.user is not None:
            known[event.user] = names[event.user]
        if event.session is not None:
            known.setdefault(event.session, sessions[event.session])
        return msgspec.structs.replace(
            event,
            user=None if event.user is None else known[event.user],
            session=None if event.session is None else known[event.session],
            context=_passing(event.context, known, self._on_dropped),
        )


class _Admissions:
    """Puts the new users of requests that come at once into one commit, off the event loop."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._turn = asyncio.Lock()
        self._waiting: set[str] = set()
        self._batch: asyncio.Task[dict[str, str]] | None = None

    async def admit(self, users: Iterable[str]) -> dict[str, str]:
        """Pseudonyms of at least these users, who are on disk."""
        self._waiting.update(users)
        if self._batch is None:
            self._batch = asyncio.create_task(self._commit())
        # A request that is given up leaves the commit to the others who wait for it.
        return await asyncio.shield(self._batch)

    async def _commit(self) -> dict[str, str]:
        async with self._turn:
            users, self._waiting, self._batch = self._waiting, set(), None
            return await asyncio.to_thread(self._vault.admit, users)


def _passing(context: dict[str, str], known: dict[str, str], on_dropped: Callable[[int], object]) -> dict[str, str]:
    """What of a context may pass, with ids of people replaced."""
    if not context:
        return context
    passed = {}
    for key in context.keys() & CONTEXT_KEYS:
        value = known.get(context[key], context[key])
        if _CONTEXT_VALUE.fullmatch(value):
            passed[key] = value
    if len(passed) < len(context):
        on_dropped(len(context) - len(passed))
    return passed


class CloudEdge:
    """Lets pseudonyms pass and refuses every other user; gives sessions that are no keyed ones a name of this process.

    Such names (`s0-...`) group a visit's events while this gateway runs, and lead back to nobody.
    """

    def __init__(self, on_dropped: Callable[[int], object] = lambda _: None) -> None:
        self._on_dropped = on_dropped
        self._sessions = PseudonymKey(epoch=0, secret=secrets.token_bytes(KEY_BYTES))

    def user(self, user: str, path: str) -> str:
        """See `Edge`."""
        if _PSEUDONYM.fullmatch(user) is None:
            raise raw_id(path)
        return user

    async def events(self, events: list[Event]) -> list[Event]:
        """See `Edge`."""
        for place, event in enumerate(events):
            if event.user is not None:
                self.user(event.user, f"$.events[{place}].user")
        return [self._without_raw_session(event) for event in events]

    def _without_raw_session(self, event: Event) -> Event:
        raw = event.session
        if raw is None or _KEYED_SESSION.fullmatch(raw) or _PSEUDONYM.fullmatch(raw):
            known: dict[str, str] = {}
        else:
            known = {raw: self._sessions.session(raw)}
        if not known and not event.context:
            return event
        return msgspec.structs.replace(
            event,
            session=raw if raw is None else known.get(raw, raw),
            context=_passing(event.context, known, self._on_dropped),
        )
