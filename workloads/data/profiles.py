"""What home knows about a person's taste, by pseudonym: a profile, and the store it is looked up in.

The store is one SQLite file, read-only to the gateway; a lookup takes tens of microseconds. How
profiles are made from a data set is `workloads.data.profile_builder`; this module loads no data
library, because the gateway imports it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Protocol, Self

import msgspec

from workloads.contract.events import EventType

TOUCHES_MAX: Final = 300
"""Distinct items that a profile keeps: the latest ones."""

FORMAT: Final = "rankbridge-profiles-1"


class Touch(msgspec.Struct, frozen=True, array_like=True):
    """One item a person was drawn to. `type` is the strongest of the positive events on it."""

    item: str
    type: EventType
    count: int
    """Positive events on the item."""
    bought: int
    """Purchase events among them."""
    last_ms: int


class Profile(msgspec.Struct, frozen=True):
    """A person's touches, the item touched longest ago first; items are distinct."""

    pseudonym: str
    touches: list[Touch]


class ProfileStore(Protocol):
    """The one door to profiles."""

    def get(self, pseudonym: str) -> Profile | None:
        """The profile, or None for somebody unknown."""
        ...

    def close(self) -> None:
        """Give the store's resources back."""
        ...


class ProfileStoreError(ValueError):
    """A file that is no profile store; the message names the remedy."""


class MemoryProfiles:
    """The fake: profiles in a dict."""

    def __init__(self, profiles: Iterable[Profile] = ()) -> None:
        self._profiles = {profile.pseudonym: profile for profile in profiles}

    def get(self, pseudonym: str) -> Profile | None:
        """See `ProfileStore`."""
        return self._profiles.get(pseudonym)

    def close(self) -> None:
        """See `ProfileStore`."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Touch])


class SqliteProfiles:
    """Profiles in a file made by `write_profiles`, opened read-only.

    The file is never changed in place (a new one is renamed over it), so it is opened as immutable:
    no locks are taken, and an open store keeps answering from the file it was opened on. One
    connection; share it between threads only if calls do not overlap.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ProfileStoreError(f"{path}: no such profile store; prepare a data set first")
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        self._connection = sqlite3.connect(uri, uri=True, check_same_thread=False, cached_statements=4)
        try:
            self.meta: Mapping[str, str] = dict(self._connection.execute("SELECT name, value FROM meta"))
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ProfileStoreError(f"{path}: not a profile store ({error}); prepare the data set again") from None
        if self.meta.get("format") != FORMAT:
            self._connection.close()
            found = self.meta.get("format")
            raise ProfileStoreError(f"{path}: format {found!r}, not {FORMAT!r}; prepare the data set again")

    def get(self, pseudonym: str) -> Profile | None:
        """See `ProfileStore`."""
        row = self._connection.execute("SELECT touches FROM profiles WHERE pseudonym = ?", (pseudonym,)).fetchone()
        return None if row is None else Profile(pseudonym, _decoder.decode(row[0]))

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM profiles").fetchone()[0])

    def close(self) -> None:
        """See `ProfileStore`."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_profiles(path: Path, profiles: Iterable[Profile], meta: Mapping[str, str]) -> int:
    """Make the store at `path` in one step (temporary file, fsync, rename); returns the number of profiles.

    `meta` is kept beside them; `dataset` in it says which data set they are of.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        connection = sqlite3.connect(draft)
        try:
            # The file is new and is thrown away unless the whole of it is written.
            connection.executescript(
                "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA page_size=4096;"
                "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;"
                "CREATE TABLE profiles (pseudonym TEXT PRIMARY KEY, touches BLOB NOT NULL);"
            )
            connection.executemany("INSERT INTO meta VALUES (?, ?)", {**meta, "format": FORMAT}.items())
            connection.executemany(
                "INSERT INTO profiles VALUES (?, ?)",
                ((profile.pseudonym, _encoder.encode(profile.touches)) for profile in profiles),
            )
            count = int(connection.execute("SELECT count(*) FROM profiles").fetchone()[0])
            connection.commit()
        finally:
            connection.close()
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return count
