"""The edge where people become pseudonyms. Nothing behind it sees a raw id: no stage, no neighbour, no log.

At home a user's id is mapped with the site's key. A cloud site has no key: there a user is a pseudonym
already, or the request is refused. Session ids often hold a user's id and are mapped as well; in the cloud
with a secret that is made when the gateway starts and kept nowhere, since a session needs no name that lasts.
"""

from __future__ import annotations

import re
import secrets
from typing import Final, Protocol

import msgspec

from workloads.contract.events import Event
from workloads.contract.http import PSEUDONYM_PATTERN, SESSION_PATTERN
from workloads.gateway.problems import raw_id
from workloads.privacy.pseudonym import KEY_BYTES, PseudonymKey

_PSEUDONYM: Final = re.compile(PSEUDONYM_PATTERN)
_KEYED_SESSION: Final = re.compile(SESSION_PATTERN)


class Edge(Protocol):
    """How ids of people become what may pass."""

    def user(self, user: str, path: str) -> str:
        """The pseudonym for a user met at `path` of the request. Raises Refused where none may be made."""
        ...

    def events(self, events: list[Event]) -> list[Event]:
        """The same events without a raw id. Raises Refused as `user`."""
        ...


class HomeEdge:
    """Maps with the key. What looks like a pseudonym is a user's id here as any other."""

    def __init__(self, key: PseudonymKey) -> None:
        self._key = key

    def user(self, user: str, path: str) -> str:  # noqa: ARG002 - the Edge's signature; nothing is refused at home
        """See `Edge`."""
        return self._key.pseudonym(user)

    def events(self, events: list[Event]) -> list[Event]:
        """See `Edge`. An id that a client put into the context as well is replaced there, too."""
        return [self._without_id(event) for event in events]

    def _without_id(self, event: Event) -> Event:
        mapped: dict[str, str] = {}
        if event.user is not None:
            mapped[event.user] = self._key.pseudonym(event.user)
        session = event.session
        if session is not None:
            session = mapped.get(session) or self._key.session(session)
        if not mapped and session is None:
            return event
        context = event.context
        if context and event.session is not None:
            mapped.setdefault(event.session, session or "")
        if context:
            context = {name: mapped.get(value, value) for name, value in context.items()}
        user = None if event.user is None else mapped[event.user]
        return msgspec.structs.replace(event, user=user, session=session, context=context)


class CloudEdge:
    """Lets pseudonyms pass and refuses every other user; gives sessions that are no keyed ones a name of this process.

    Such names (`s0-...`) group a visit's events while this gateway runs, and lead back to nobody.
    """

    def __init__(self) -> None:
        self._sessions = PseudonymKey(epoch=0, secret=secrets.token_bytes(KEY_BYTES))

    def user(self, user: str, path: str) -> str:
        """See `Edge`."""
        if _PSEUDONYM.fullmatch(user) is None:
            raise raw_id(path)
        return user

    def events(self, events: list[Event]) -> list[Event]:
        """See `Edge`."""
        for place, event in enumerate(events):
            if event.user is not None:
                self.user(event.user, f"$.events[{place}].user")
        return [self._without_raw_session(event) for event in events]

    def _without_raw_session(self, event: Event) -> Event:
        raw = event.session
        if raw is None or _KEYED_SESSION.fullmatch(raw) or _PSEUDONYM.fullmatch(raw):
            return event
        session = self._sessions.session(raw)
        context = {name: session if value == raw else value for name, value in event.context.items()}
        return msgspec.structs.replace(event, session=session, context=context)
