"""What home knows about a person's taste, by pseudonym: the online store that the gateway reads and feedback writes.

Two real stores behind one door: `SqliteProfiles`, a file in WAL mode that gateways read while the feedback process
writes, and `redis_profiles.RedisProfiles` for gateways on many machines. A batch of signs is applied whole or not at
all, together with the watermark (the last place of the spool that is in), so that a batch which comes again after a
crash changes nothing. How a store is first filled from a data set is `workloads.data.profile_builder`; this module
loads no data library, because the gateway imports it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self
from urllib.parse import urlsplit

import msgspec

from workloads.data.definitions import (
    TOUCHES_MAX,
    ItemActivity,
    Sign,
    Touch,
    in_order,
    split_remembered,
    touched,
)

if TYPE_CHECKING:
    from workloads.data.redis_profiles import RedisProfiles

__all__ = ["TOUCHES_MAX", "ItemActivity", "Profile", "ProfileStore", "Sign", "Touch", "open_profiles"]

FORMAT: Final = "rankbridge-profiles-2"
FORGOTTEN_MS: Final = 30 * 86_400_000
"""How long a store remembers that a pseudonym was forgotten, so that events still under way do not bring it back."""
LOOK_UP_TIMEOUT_S: Final = 0.02
"""How long a gateway waits for the store before it answers without the profile."""
USERNAME_VARIABLE: Final = "RANKBRIDGE_REDIS_USERNAME"
PASSWORD_VARIABLE: Final = "RANKBRIDGE_REDIS_PASSWORD"  # noqa: S105 - the variable's name, no password
_BUSY_S: Final = 5.0


class Profile(msgspec.Struct, frozen=True):
    """A person's latest touches, the item touched longest ago first; items are distinct."""

    pseudonym: str
    touches: list[Touch]


class Watermark(msgspec.Struct, frozen=True, array_like=True):
    """How far a store has come: the last event of the spool that is in it, and when that was received."""

    seq: int = 0
    known_ms: int = 0


START: Final = Watermark()


class ProfilesDownError(Exception):
    """The store cannot be read or written now. The message names no person."""


class ProfileStoreError(ValueError):
    """What is no profile store, or must not be used as one; the message names the remedy."""


class ProfileStore(Protocol):
    """The one door to profiles. Every method but `close` raises ProfilesDownError while the store cannot be used."""

    def get(self, pseudonym: str) -> Profile | None:
        """The profile, or None for somebody unknown."""
        ...

    async def look_up(self, pseudonym: str) -> Profile | None:
        """The same for an event loop: it waits for nobody longer than LOOK_UP_TIMEOUT_S."""
        ...

    def activity(self, item: str) -> ItemActivity | None:
        """What people did with an item since the store was filled; None where nobody did anything."""
        ...

    def apply(self, signs: Sequence[Sign], watermark: Watermark) -> int:
        """Take signs in order of `seq`, all or none, up to `watermark`; the number that were new.

        Signs at or below the store's own watermark are in already, and those of a person who was forgotten after they
        were received are left out.
        """
        ...

    def delete(self, pseudonyms: Sequence[str]) -> int:
        """Forget these people at once; the number that were known.

        What is applied later of events received before now does not bring them back.
        """
        ...

    def copy(self, names: Mapping[str, str]) -> int:
        """Give people a second pseudonym, old to new; what is there under the new one stays. The number made."""
        ...

    def watermark(self) -> Watermark:
        """How far the store has come."""
        ...

    async def look_up_watermark(self) -> Watermark:
        """The same for an event loop, as `look_up`."""
        ...

    def close(self) -> None:
        """Give the store's resources back."""
        ...

    async def aclose(self) -> None:
        """`close` from inside the event loop that looked up."""
        ...


def now_ms() -> int:
    """The wall clock."""
    return time.time_ns() // 1_000_000


def tombstone(pseudonym: str) -> str:
    """What is remembered of a forgotten pseudonym: it can be recognised when it comes, and not read."""
    return hashlib.sha256(b"rankbridge/forgotten\x00" + pseudonym.encode()).hexdigest()[:32]


# --- what becomes of a batch, wherever it is kept -------------------------------------------------

encode: Final = msgspec.msgpack.Encoder().encode
decode_touches: Final = msgspec.msgpack.Decoder(list[Touch]).decode
decode_activity: Final = msgspec.msgpack.Decoder(ItemActivity).decode
decode_watermark: Final = msgspec.msgpack.Decoder(Watermark).decode


class Rows:
    """People's and items' rows that a batch changes, read before and written after. Knows no store."""

    def __init__(
        self,
        people: Mapping[str, tuple[bytes | None, bytes | None]],
        items: Mapping[str, bytes | None],
        forgotten: Mapping[str, int],
    ) -> None:
        """`people` gives (latest, older) of a person."""
        self._touches: dict[str, dict[str, Touch]] = {}
        for pseudonym, (latest, older) in people.items():
            kept = (decode_touches(older) if older else []) + (decode_touches(latest) if latest else [])
            self._touches[pseudonym] = {touch.item: touch for touch in kept}
        self._items = {item: decode_activity(row) if row else ItemActivity() for item, row in items.items()}
        self._forgotten = forgotten
        self._changed: set[str] = set()

    def take(self, signs: Iterable[Sign]) -> int:
        """The number of signs that were taken."""
        taken = 0
        for sign in signs:
            if sign.known_ms <= self._forgotten.get(sign.pseudonym, -1):
                continue
            touches = self._touches[sign.pseudonym]
            before = touches.get(sign.item)
            touches[sign.item] = touched(before, sign)
            activity = self._items[sign.item]
            activity.add(sign, is_new_person=before is None)
            activity.forget_before(sign.known_ms)
            self._changed.add(sign.pseudonym)
            taken += 1
        return taken

    def people(self) -> Iterator[tuple[str, bytes, bytes]]:
        """(pseudonym, latest, older) of those who changed; `older` is empty where there are none."""
        for pseudonym in self._changed:
            yield pseudonym, *rows_of(in_order(self._touches[pseudonym].values()))

    def items(self) -> Iterator[tuple[str, bytes]]:
        """(item, activity) of all that somebody touched."""
        for item, activity in self._items.items():
            if activity.first_ms:
                yield item, encode(activity)


def rows_of(touches: Sequence[Touch]) -> tuple[bytes, bytes]:
    """(latest, older) of touches in order; `older` is empty where there are none."""
    older, latest = split_remembered(touches)
    return encode(latest), encode(older) if older else b""


class MemoryProfiles:
    """The fake: everything in dicts, by the same arithmetic. `fault` makes every call fail with it."""

    def __init__(self, profiles: Iterable[Profile] = (), *, clock_ms: Callable[[], int] = now_ms) -> None:
        self._people = {profile.pseudonym: (encode(profile.touches), b"") for profile in profiles}
        self._items: dict[str, bytes] = {}
        self._forgotten: dict[str, int] = {}
        self._watermark = Watermark()
        self._clock_ms = clock_ms
        self.fault: str | None = None

    def _usable(self) -> None:
        if self.fault is not None:
            raise ProfilesDownError(self.fault)

    def get(self, pseudonym: str) -> Profile | None:
        """See `ProfileStore`."""
        self._usable()
        row = self._people.get(pseudonym)
        return None if row is None else Profile(pseudonym, decode_touches(row[0]))

    async def look_up(self, pseudonym: str) -> Profile | None:
        """See `ProfileStore`."""
        return self.get(pseudonym)

    def activity(self, item: str) -> ItemActivity | None:
        """See `ProfileStore`."""
        self._usable()
        row = self._items.get(item)
        return None if row is None else decode_activity(row)

    def apply(self, signs: Sequence[Sign], watermark: Watermark) -> int:
        """See `ProfileStore`."""
        self._usable()
        new = [sign for sign in signs if sign.seq > self._watermark.seq]
        rows = Rows(
            {sign.pseudonym: self._people.get(sign.pseudonym, (None, None)) for sign in new},
            {sign.item: self._items.get(sign.item) for sign in new},
            self._forgotten,
        )
        taken = rows.take(new)
        self._people.update({pseudonym: (latest, older) for pseudonym, latest, older in rows.people()})
        self._items.update(rows.items())
        if watermark.seq > self._watermark.seq:
            self._watermark = watermark
        return taken

    def delete(self, pseudonyms: Sequence[str]) -> int:
        """See `ProfileStore`."""
        self._usable()
        self._forgotten.update(dict.fromkeys(pseudonyms, self._clock_ms()))
        return sum(self._people.pop(pseudonym, None) is not None for pseudonym in pseudonyms)

    def copy(self, names: Mapping[str, str]) -> int:
        """See `ProfileStore`."""
        self._usable()
        made = {new: self._people[old] for old, new in names.items() if old in self._people and new not in self._people}
        self._people.update(made)
        return len(made)

    def watermark(self) -> Watermark:
        """See `ProfileStore`."""
        self._usable()
        return self._watermark

    async def look_up_watermark(self) -> Watermark:
        """See `ProfileStore`."""
        return self.watermark()

    def close(self) -> None:
        """See `ProfileStore`."""

    async def aclose(self) -> None:
        """See `ProfileStore`."""


# --- SQLite ---------------------------------------------------------------------------------------

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS profiles (pseudonym TEXT PRIMARY KEY, touches BLOB NOT NULL, older BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS items (item TEXT PRIMARY KEY, activity BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS forgotten (mark TEXT PRIMARY KEY, at_ms INTEGER NOT NULL) WITHOUT ROWID;
"""


class SqliteProfiles:
    """Profiles in one file, made by `write_profiles`.

    WAL, so that readers in other processes wait for no writer; synchronous=FULL, so that what was applied or forgotten
    stays so after a power cut. Reading and writing have a connection each; calls of one kind must not overlap, so two
    threads read through two stores. Raises ProfileStoreError for a file that is none.
    """

    def __init__(self, path: Path, *, clock_ms: Callable[[], int] = now_ms) -> None:
        if not path.is_file():
            raise ProfileStoreError(f"{path}: no such profile store; prepare a data set first")
        self._path = path
        self._clock_ms = clock_ms
        self._writer: sqlite3.Connection | None = None
        self._writing = threading.Lock()
        try:
            self._reader = _connect(path, "ro")
        except sqlite3.Error as error:
            raise ProfileStoreError(f"{path}: cannot be opened ({error}); see who may read it") from None
        try:
            self.meta: Mapping[str, str] = dict(self._reader.execute("SELECT name, value FROM meta"))
        except sqlite3.DatabaseError as error:
            self._reader.close()
            raise ProfileStoreError(f"{path}: not a profile store ({error}); prepare the data set again") from None
        if self.meta.get("format") != FORMAT:
            self._reader.close()
            found = self.meta.get("format")
            raise ProfileStoreError(f"{path}: format {found!r}, not {FORMAT!r}; prepare the data set again")
        # Readers meet a lock only while a last writer closes the file; an event loop must not sit that out.
        self._reader.execute(f"PRAGMA busy_timeout={round(LOOK_UP_TIMEOUT_S * 1000)}")

    def get(self, pseudonym: str) -> Profile | None:
        """See `ProfileStore`."""
        row = self._one("SELECT touches FROM profiles WHERE pseudonym = ?", pseudonym)
        try:
            return None if row is None else Profile(pseudonym, decode_touches(row[0]))
        except msgspec.DecodeError as error:
            raise ProfilesDownError(f"{self._path.name}: a profile cannot be read ({error})") from None

    async def look_up(self, pseudonym: str) -> Profile | None:
        """See `ProfileStore`. Tens of microseconds: less than it costs to ask another thread."""
        return self.get(pseudonym)

    def activity(self, item: str) -> ItemActivity | None:
        """See `ProfileStore`."""
        row = self._one("SELECT activity FROM items WHERE item = ?", item)
        return None if row is None else decode_activity(row[0])

    def watermark(self) -> Watermark:
        """See `ProfileStore`."""
        row = self._one("SELECT value FROM meta WHERE name = 'watermark'")
        return Watermark() if row is None else decode_watermark(row[0])

    def apply(self, signs: Sequence[Sign], watermark: Watermark) -> int:
        """See `ProfileStore`."""
        with self._transaction() as connection:
            before = _watermark_in(connection)
            new = [sign for sign in signs if sign.seq > before.seq]
            people, items = {sign.pseudonym for sign in new}, {sign.item for sign in new}
            one = connection.execute
            rows = Rows(
                {
                    who: one("SELECT touches, older FROM profiles WHERE pseudonym = ?", (who,)).fetchone()
                    or (None, None)
                    for who in people
                },
                {
                    item: (one("SELECT activity FROM items WHERE item = ?", (item,)).fetchone() or (None,))[0]
                    for item in items
                },
                {
                    who: row[0]
                    for who in people
                    if (row := one("SELECT at_ms FROM forgotten WHERE mark = ?", (tombstone(who),)).fetchone())
                },
            )
            taken = rows.take(new)
            connection.executemany("INSERT OR REPLACE INTO profiles VALUES (?, ?, ?)", rows.people())
            connection.executemany("INSERT OR REPLACE INTO items VALUES (?, ?)", rows.items())
            if watermark.seq > before.seq:
                one("INSERT OR REPLACE INTO meta VALUES ('watermark', ?)", (encode(watermark),))
        return taken

    def delete(self, pseudonyms: Sequence[str]) -> int:
        """See `ProfileStore`."""
        at = self._clock_ms()
        with self._transaction() as connection:
            connection.execute("DELETE FROM forgotten WHERE at_ms < ?", (at - FORGOTTEN_MS,))
            marks = [(tombstone(who), at) for who in pseudonyms]
            connection.executemany("INSERT OR REPLACE INTO forgotten VALUES (?, ?)", marks)
            known = sum(
                connection.execute("DELETE FROM profiles WHERE pseudonym = ?", (who,)).rowcount
                for who in dict.fromkeys(pseudonyms)
            )
        with self._writing:  # else the write-ahead log would go on holding them
            try:
                (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.Error as error:
                raise ProfilesDownError(f"{self._path.name}: {error}") from None
        if busy:
            raise ProfilesDownError(f"{self._path.name}: a reader holds deleted profiles in its log; delete again")
        return known

    def copy(self, names: Mapping[str, str]) -> int:
        """See `ProfileStore`."""
        with self._transaction() as connection:
            return sum(
                connection.execute(
                    "INSERT OR IGNORE INTO profiles SELECT ?, touches, older FROM profiles WHERE pseudonym = ?",
                    (new, old),
                ).rowcount
                for old, new in names.items()
            )

    def fill(
        self,
        profiles: Iterable[Profile],
        meta: Mapping[str, str],
        *,
        items: Iterable[tuple[str, ItemActivity]] = (),
        watermark: Watermark = START,
    ) -> int:
        """Put these profiles in the place of all that is there, in one transaction; the number that were written.

        The watermark goes back to the given one: what the spool has beyond it is applied again, on top. People who
        were forgotten stay so.
        """
        with self._transaction() as connection:
            forgotten = {mark for (mark,) in connection.execute("SELECT mark FROM forgotten")}
            for table in ("profiles", "items", "meta"):
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - names are ours
            connection.executemany(
                "INSERT INTO profiles VALUES (?, ?, ?)",
                (
                    (profile.pseudonym, *rows_of(profile.touches))
                    for profile in profiles
                    if tombstone(profile.pseudonym) not in forgotten
                ),
            )
            connection.executemany("INSERT INTO items VALUES (?, ?)", ((item, encode(row)) for item, row in items))
            kept = {"dataset": "", **meta, "format": FORMAT, "watermark": encode(watermark)}
            connection.executemany("INSERT INTO meta VALUES (?, ?)", kept.items())
            return int(connection.execute("SELECT count(*) FROM profiles").fetchone()[0])

    def everybody(self) -> Iterator[Profile]:
        """All profiles with all touches that are remembered, in order of pseudonym."""
        rows = self._reader.execute("SELECT pseudonym, touches, older FROM profiles ORDER BY pseudonym")
        for pseudonym, latest, older in rows:
            yield Profile(pseudonym, (decode_touches(older) if older else []) + decode_touches(latest))

    def items(self) -> Iterator[tuple[str, ItemActivity]]:
        """What people did with each item, in order of id."""
        for item, activity in self._reader.execute("SELECT item, activity FROM items ORDER BY item"):
            yield item, decode_activity(activity)

    def _one(self, query: str, *parameters: str) -> Any:  # noqa: ANN401 - a row is what the query says
        try:
            return self._reader.execute(query, parameters).fetchone()
        except sqlite3.Error as error:
            raise ProfilesDownError(f"{self._path.name}: {error}") from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._writing:
            try:
                if self._writer is None:
                    self._writer = _connect(self._path, "rw")
                connection = self._writer
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                raise ProfilesDownError(f"{self._path.name}: {error}") from None
            try:
                yield connection
                connection.execute("COMMIT")
            except sqlite3.Error as error:
                _roll_back(connection)
                raise ProfilesDownError(f"{self._path.name}: {error}") from None
            except BaseException:
                _roll_back(connection)
                raise

    def __len__(self) -> int:
        return int(self._reader.execute("SELECT count(*) FROM profiles").fetchone()[0])

    def close(self) -> None:
        """See `ProfileStore`."""
        self._reader.close()
        with self._writing:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    async def look_up_watermark(self) -> Watermark:
        """See `ProfileStore`."""
        return self.watermark()

    async def aclose(self) -> None:
        """See `ProfileStore`."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(
        uri, uri=True, check_same_thread=False, isolation_level=None, timeout=_BUSY_S, cached_statements=16
    )
    if mode == "rw":
        connection.execute("PRAGMA synchronous=FULL")
        # What is deleted must not stay readable in the file's free pages.
        connection.execute("PRAGMA secure_delete=ON")
    return connection


def _roll_back(connection: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.Error):
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _watermark_in(connection: sqlite3.Connection) -> Watermark:
    row = connection.execute("SELECT value FROM meta WHERE name = 'watermark'").fetchone()
    return Watermark() if row is None else decode_watermark(row[0])


def write_profiles(
    path: Path,
    profiles: Iterable[Profile],
    meta: Mapping[str, str],
    *,
    items: Iterable[tuple[str, ItemActivity]] = (),
    watermark: Watermark = START,
) -> int:
    """Fill the store at `path`, in place if there is one: who reads it meanwhile sees all of the old or all of the new.

    `meta` is kept beside them; `dataset` in it says which data set they are of, `watermark` what of the spool is in it.
    A profile may have more than TOUCHES_MAX touches: the older ones keep their counts. Returns the number of profiles.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if filled_from(path) is not None:
        with SqliteProfiles(path) as store:
            return store.fill(profiles, meta, items=items, watermark=watermark)
    # There is none, or what nobody could read: a new file takes its place.
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as connection:
            connection.executescript(f"PRAGMA journal_mode=WAL; BEGIN; {_SCHEMA}")
            connection.execute("INSERT INTO meta VALUES ('format', ?)", (FORMAT,))
            connection.execute("COMMIT")
        with SqliteProfiles(draft) as store:
            count = store.fill(profiles, meta, items=items, watermark=watermark)
        # A log of the file that was there before would be read into the new one.
        for leftover in (f"{path.name}-wal", f"{path.name}-shm"):
            path.with_name(leftover).unlink(missing_ok=True)
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        for leftover in (draft.name, f"{draft.name}-wal", f"{draft.name}-shm"):
            draft.with_name(leftover).unlink(missing_ok=True)
        raise
    return count


def filled_from(path: Path) -> str | None:
    """The data set that the store at `path` was filled from; None where there is no whole store."""
    if not path.is_file():
        return None
    try:
        with contextlib.closing(_connect(path, "rw")) as connection:  # to leave nothing behind that was not there
            meta = dict(connection.execute("SELECT name, value FROM meta WHERE name IN ('format', 'dataset')"))
            page: int = connection.execute("PRAGMA page_size").fetchone()[0]
            whole = connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
            whole = whole and path.stat().st_size % page == 0  # a cut last page is read as zeros, and is no fault to it
    except sqlite3.Error:
        return None
    return str(meta["dataset"]) if whole and meta.get("format") == FORMAT and "dataset" in meta else None


def refill_mark(path: Path, old: str, new: str) -> None:
    """Say that the store at `path` was filled from `new`, where it says `old`: the same data set with fewer rows."""
    if filled_from(path) == old:
        with contextlib.closing(_connect(path, "rw")) as connection:
            connection.execute("UPDATE meta SET value = ? WHERE name = 'dataset'", (new,))


# --- which of them --------------------------------------------------------------------------------


def open_profiles(
    where: str, environ: Mapping[str, str], *, clock_ms: Callable[[], int] = now_ms
) -> SqliteProfiles | RedisProfiles:
    """The store at a path, or at `redis://host:port/db` (`rediss:` for TLS).

    Redis' credentials are the environment's RANKBRIDGE_REDIS_USERNAME and RANKBRIDGE_REDIS_PASSWORD. Raises
    ProfileStoreError for an address that holds some: a command line is no place for secrets.
    """
    parts = urlsplit(where)
    if parts.scheme not in {"redis", "rediss"}:
        return SqliteProfiles(Path(where), clock_ms=clock_ms)
    if parts.username is not None or parts.password is not None:
        raise ProfileStoreError(
            f"{parts.scheme}://...@{parts.hostname}: everybody on this machine can read a command line; "
            f"give credentials as ${USERNAME_VARIABLE} and ${PASSWORD_VARIABLE}"
        )
    database = parts.path.strip("/") or "0"
    try:
        port = parts.port or 6379
    except ValueError:
        port = 0
    if not parts.hostname or not port or not database.isdecimal() or parts.query or parts.fragment:
        raise ProfileStoreError(f"{where}: no address of a Redis; write redis://host:port/0")
    from workloads.data.redis_profiles import RedisProfiles  # noqa: PLC0415 - 10 MB that a gateway with a file does not need

    return RedisProfiles(
        parts.hostname,
        port,
        int(database),
        username=environ.get(USERNAME_VARIABLE),
        password=environ.get(PASSWORD_VARIABLE),
        tls=parts.scheme == "rediss",
        clock_ms=clock_ms,
    )
