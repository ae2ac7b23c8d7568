"""Who is behind a pseudonym: a random salt for each user, at home only, and the queue of those who are to be forgotten.

The vault is one SQLite file (mode 0600) beside the folder of keys. It holds raw user ids and salts; names are computed
(`pseudonym.PseudonymKey`). Forgetting a person drops the salt in the same commit that queues the pseudonyms for erasure
(`workloads.erasure`): from that commit on nobody can compute the old names, and a person who comes back gets new ones.
Gateways, jobs and the desk share the file; every change is on disk when its method returns.

Which keys are valid stands in the file, too, so that all processes change over in one commit. A rotation is: `begin`
(a next key), `switch` (new names are made with it, the old key is retiring), `retire` (the old key is destroyed). What
is renamed meanwhile, and where, is not known here. No data library: the gateway imports this.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

import msgspec

from workloads.privacy.pseudonym import (
    FIRST_EPOCH,
    KEY_BYTES,
    SALT_BYTES,
    KeyFileError,
    PseudonymKey,
    destroy_key,
    key_path,
    read_key,
    read_or_create_key,
)

KEY_FOLDER: Final = "key"
"""Beside the vault: `pseudonym-<epoch>.key`."""
_BUSY_S: Final = 10.0
_NOT_LONG_S: Final = 0.5
_SEARCH_BYTES: Final = 1 << 20
_UNSWEPT: Final = "unswept "
"""Before a ticket: a fact that says that copies of this person's salt may be in the file."""
_SWITCHED: Final = "switched"
"""The fact of when the current key began to make names, in ms."""
_SPENT: Final = "spent"
"""Role of a key that is valid no more and is to be destroyed; its row goes when that is done."""
_SCHEMA_VERSION: Final = 2
_SCHEMA: Final = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS people (user TEXT PRIMARY KEY, salt BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS epochs (epoch INTEGER PRIMARY KEY, role TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS erasures (
  place INTEGER PRIMARY KEY, ticket TEXT NOT NULL UNIQUE, asked_ms INTEGER NOT NULL, pseudonyms TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO facts VALUES ('identity', lower(hex(randomblob(8))));
PRAGMA user_version=2;
COMMIT;
"""


class VaultError(Exception):
    """A vault that cannot be used; the message names fault and remedy, and no person."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault
        self.remedy = remedy


class Erasure(msgspec.Struct, frozen=True, kw_only=True):
    """A person who is to be forgotten everywhere: no longer a person here, only names that nobody can make again."""

    ticket: str
    """Random; what the audit log and the person who asked know it by."""
    pseudonyms: list[str]
    """Of every valid epoch."""
    asked_ms: int


class Epochs(msgspec.Struct, frozen=True, kw_only=True):
    """Which keys are valid."""

    current: int
    """New names are made with it."""
    next: int | None = None
    """Made, not in use yet."""
    retiring: int | None = None
    """Names of it are being renamed."""

    @property
    def valid(self) -> tuple[int, ...]:
        """All of them, in order."""
        return tuple(sorted({epoch for epoch in (self.retiring, self.current, self.next) if epoch is not None}))


class Vault(Protocol):
    """The door to who people are. Methods raise VaultError where it cannot be used, KeyFileError for its keys."""

    def pseudonym(self, user: str) -> str | None:
        """The current pseudonym of a user that home knows, or None. Makes nothing; tens of microseconds."""
        ...

    def session(self, session: str) -> str:
        """The name under which a session may be kept."""
        ...

    def admit(self, users: Iterable[str]) -> dict[str, str]:
        """The pseudonyms of these users, after one durable commit with salts for those who are new."""
        ...

    def forget(self, user: str) -> Erasure | None:
        """Drop the user's salt and queue the erasure, in one durable commit; None for somebody unknown."""
        ...

    def queue(self) -> list[Erasure]:
        """Who is to be forgotten, the oldest first."""
        ...

    def done(self, ticket: str) -> None:
        """Take an erasure out of the queue: nothing of the person is left. Unknown tickets are no fault."""
        ...

    def all_users(self) -> Iterator[str]:
        """Raw ids of everybody that home knows."""
        ...

    def close(self) -> None:
        """Give the vault's resources back."""
        ...


class MemoryVault:
    """The fake: salts in a dict, one key."""

    def __init__(self, key: PseudonymKey | None = None) -> None:
        self.key = key if key is not None else PseudonymKey(FIRST_EPOCH, secrets.token_bytes(KEY_BYTES))
        self._salts: dict[str, bytes] = {}
        self._queue: dict[str, Erasure] = {}

    def pseudonym(self, user: str) -> str | None:
        """See `Vault`."""
        salt = self._salts.get(user)
        return None if salt is None else self.key.pseudonym(user, salt)

    def session(self, session: str) -> str:
        """See `Vault`."""
        return self.key.session(session)

    def admit(self, users: Iterable[str]) -> dict[str, str]:
        """See `Vault`."""
        wanted = list(users)
        for user in wanted:
            self._salts.setdefault(user, secrets.token_bytes(SALT_BYTES))
        return {user: self.key.pseudonym(user, self._salts[user]) for user in wanted}

    def forget(self, user: str) -> Erasure | None:
        """See `Vault`."""
        name = self.pseudonym(user)
        if name is None:
            return None
        del self._salts[user]
        erasure = Erasure(ticket=_ticket(), pseudonyms=[name], asked_ms=_now_ms())
        self._queue[erasure.ticket] = erasure
        return erasure

    def queue(self) -> list[Erasure]:
        """See `Vault`."""
        return list(self._queue.values())

    def done(self, ticket: str) -> None:
        """See `Vault`."""
        self._queue.pop(ticket, None)

    def all_users(self) -> Iterator[str]:
        """See `Vault`."""
        yield from list(self._salts)

    def close(self) -> None:
        """See `Vault`."""


class SqliteVault:
    """The vault in a file. One object may be used by several threads; look-ups do not wait for commits.

    `create` makes file and first key where there are none. Raises VaultError, KeyFileError.
    """

    def __init__(self, path: Path, *, create: bool = False, clock: Callable[[], int] | None = None) -> None:
        self.path = path
        self.keys = path.parent / KEY_FOLDER
        self._clock = clock if clock is not None else _now_ms
        self._held: dict[int, PseudonymKey] = {}
        if create:
            _make(path)
        _check(path)
        self._reading, self._writing = threading.Lock(), threading.Lock()
        with _named(path):
            self._writer = self._connect()
            try:
                self._prepare()
                if create and not self._roles():
                    read_or_create_key(key_path(self.keys, FIRST_EPOCH))
                    with self._change() as change:
                        change.execute("INSERT OR IGNORE INTO epochs VALUES (?, 'current')", (FIRST_EPOCH,))
                self._reader = self._connect()
            except BaseException:
                self._writer.close()
                raise
        try:
            self._destroy_spent()  # what a killed `retire` left to be done
            for epoch in self.epochs().valid:
                self.key(epoch)
        except BaseException:
            self.close()
            raise

    # looking up

    def pseudonym(self, user: str) -> str | None:
        """See `Vault`."""
        with self._reading, _named(self.path):
            row = self._reader.execute(
                "SELECT salt, (SELECT epoch FROM epochs WHERE role = 'current') FROM people WHERE user = ?", (user,)
            ).fetchone()
        return None if row is None else self.key(row[1]).pseudonym(user, row[0])

    def session(self, session: str) -> str:
        """See `Vault`."""
        return self.key().session(session)

    def all_users(self) -> Iterator[str]:
        """See `Vault`."""
        with self._reading, _named(self.path):
            rows = self._reader.execute("SELECT user FROM people ORDER BY user").fetchall()
        yield from (user for (user,) in rows)

    def key(self, epoch: int | None = None) -> PseudonymKey:
        """The key of a valid epoch, None for the current one. Raises KeyFileError."""
        if epoch is None:
            epoch = self.epochs().current
        held = self._held.get(epoch)
        if held is None:
            held = self._held[epoch] = read_key(key_path(self.keys, epoch))
        return held

    @property
    def identity(self) -> str:
        """Random, made with the vault: tells homes apart, stays over changes of keys, and says nothing of either."""
        with self._reading, _named(self.path):
            return str(self._reader.execute("SELECT value FROM facts WHERE name = 'identity'").fetchone()[0])

    def epochs(self) -> Epochs:
        """Which keys are valid now."""
        with self._reading, _named(self.path):
            roles = self._roles(self._reader)
        if "current" not in roles:
            raise VaultError(f"{self.path}: knows no key", "prepare the data on this machine first")
        return Epochs(current=roles["current"], next=roles.get("next"), retiring=roles.get("retiring"))

    # people come and go

    def admit(self, users: Iterable[str]) -> dict[str, str]:
        """See `Vault`."""
        wanted = list(dict.fromkeys(users))
        with self._writing, _named(self.path), self._change() as change:
            change.executemany(
                "INSERT INTO people VALUES (?, ?) ON CONFLICT (user) DO NOTHING",
                ((user, secrets.token_bytes(SALT_BYTES)) for user in wanted),
            )
            key = self.key(self._roles(change)["current"])
            salts: dict[str, bytes] = {}
            for start in range(0, len(wanted), 500):
                part = wanted[start : start + 500]
                marks = ",".join("?" * len(part))
                salts.update(change.execute(f"SELECT user, salt FROM people WHERE user IN ({marks})", part))  # noqa: S608 - question marks only
        return {user: key.pseudonym(user, salts[user]) for user in wanted}

    def forget(self, user: str) -> Erasure | None:
        """See `Vault`."""
        with self._writing, _named(self.path):
            with self._change() as change:
                row = change.execute("SELECT salt FROM people WHERE user = ?", (user,)).fetchone()
                if row is None:
                    return None
                names = [self.key(epoch).pseudonym(user, row[0]) for epoch in sorted(self._roles(change).values())]
                erasure = Erasure(ticket=_ticket(), pseudonyms=names, asked_ms=self._clock())
                change.execute("DELETE FROM people WHERE user = ?", (user,))
                change.execute(
                    "INSERT INTO erasures (ticket, asked_ms, pseudonyms) VALUES (?, ?, ?)",
                    (erasure.ticket, erasure.asked_ms, " ".join(names)),
                )
                change.execute("INSERT INTO facts VALUES (?, '')", (_UNSWEPT + erasure.ticket,))
            self._sweep(erasure.ticket, row[0])  # the person is forgotten; `done` insists
        return erasure

    def queue(self) -> list[Erasure]:
        """See `Vault`."""
        with self._reading, _named(self.path):
            rows = self._reader.execute("SELECT ticket, pseudonyms, asked_ms FROM erasures ORDER BY place").fetchall()
        return [Erasure(ticket=ticket, pseudonyms=names.split(), asked_ms=asked) for ticket, names, asked in rows]

    def done(self, ticket: str) -> None:
        """See `Vault`."""
        mark = _UNSWEPT + ticket
        with self._writing, _named(self.path):
            if self._writer.execute("SELECT 1 FROM facts WHERE name = ?", (mark,)).fetchone():
                self._writer.execute("VACUUM")
            self._truncate_log(insist=True)  # before the entry goes: what fails here is tried again
            with self._change() as change:
                change.execute("DELETE FROM erasures WHERE ticket = ?", (ticket,))
                change.execute("DELETE FROM facts WHERE name = ?", (mark,))
            self._truncate_log(insist=True)

    # keys come and go

    def begin(self) -> Epochs:
        """Make the next key; nothing is named with it yet. Where there is one already, nothing changes."""
        now = self.epochs()
        if now.retiring is not None:
            raise VaultError(f"key {now.retiring} is still retiring", "finish that rotation first")
        if now.next is None:
            read_or_create_key(key_path(self.keys, now.current + 1))
            with self._writing, _named(self.path), self._change() as change:
                change.execute("INSERT OR IGNORE INTO epochs VALUES (?, 'next')", (now.current + 1,))
        return self.epochs()

    def switch(self) -> Epochs:
        """From this commit on names are made with the next key, in every process; the current one is retiring."""
        with self._writing, _named(self.path), self._change() as change:
            if "next" in self._roles(change):
                change.execute("UPDATE epochs SET role = 'retiring' WHERE role = 'current'")
                change.execute("UPDATE epochs SET role = 'current' WHERE role = 'next'")
                change.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (_SWITCHED, str(self._clock())))
        return self.epochs()

    @property
    def switched_ms(self) -> int | None:
        """When the last `switch` was; None before the first, and for one by a release that did not write it down."""
        with self._reading, _named(self.path):
            row = self._reader.execute("SELECT value FROM facts WHERE name = ?", (_SWITCHED,)).fetchone()
        return None if row is None else int(row[0])

    def retire(self) -> Epochs:
        """Destroy the retiring key: nobody can make or follow a name of its epoch any more.

        It is valid no more before its file goes, so that a kill in between leaves no vault that asks for a key that
        is not there; whoever opens it next destroys what is left.
        """
        self._destroy_spent()
        with self._writing, _named(self.path), self._change() as change:
            change.execute("UPDATE epochs SET role = ? WHERE role = 'retiring'", (_SPENT,))
        self._destroy_spent()
        return self.epochs()

    def _destroy_spent(self) -> None:
        with self._writing, _named(self.path):
            spent = [epoch for (epoch,) in self._writer.execute("SELECT epoch FROM epochs WHERE role = ?", (_SPENT,))]
            for epoch in spent:
                destroy_key(key_path(self.keys, epoch))
                self._held.pop(epoch, None)
                with self._change() as change:
                    change.execute("DELETE FROM epochs WHERE epoch = ? AND role = ?", (epoch, _SPENT))

    def renamed(self, old: int, new: int) -> dict[str, str]:
        """Everybody's pseudonym of epoch `old` to that of epoch `new`; both keys must be there."""
        with self._reading, _named(self.path):
            rows = self._reader.execute("SELECT user, salt FROM people").fetchall()
        before, after = self.key(old), self.key(new)
        return {before.pseudonym(user, salt): after.pseudonym(user, salt) for user, salt in rows}

    def close(self) -> None:
        """See `Vault`."""
        for name in ("_reader", "_writer"):
            connection = getattr(self, name, None)
            if connection is not None:
                connection.close()

    # the file

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=_BUSY_S, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA secure_delete=ON")
        connection.execute("PRAGMA temp_store=MEMORY")  # a rewrite puts nobody's salt on another disk
        return connection

    def _prepare(self) -> None:
        settings = tuple(
            self._writer.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "secure_delete")
        )
        if settings != ("wal", 2, 1):
            raise VaultError(f"{self.path}: cannot be kept durably here ({settings})", "put it on a local disk")
        version = int(self._writer.execute("PRAGMA user_version").fetchone()[0])
        if version > _SCHEMA_VERSION:
            raise VaultError(f"{self.path}: has schema {version}", "use the release that wrote it")
        if version < _SCHEMA_VERSION:
            self._writer.executescript(_SCHEMA)

    def _roles(self, connection: sqlite3.Connection | None = None) -> Mapping[str, int]:
        """Of every key that is valid."""
        rows = (connection or self._writer).execute("SELECT role, epoch FROM epochs WHERE role <> ?", (_SPENT,))
        return dict(rows.fetchall())

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction, on disk when the block ends. The caller holds `_writing`, or is alone."""
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield self._writer
        except BaseException:
            self._writer.execute("ROLLBACK")
            raise
        self._writer.execute("COMMIT")

    def _sweep(self, ticket: str, salt: bytes) -> None:
        """Leave no copy of a salt that was deleted.

        secure_delete zeroes what is deleted, but a page that SQLite rebuilt may keep a copy of a row that moved to
        another: of one person in thousands. So the file is searched for either half, and rewritten where there is one.
        What cannot be known now, `done` does for the mark that stays.
        """
        if not self._truncate_log(insist=False):
            return
        if _is_in(self.path, (salt[: SALT_BYTES // 2], salt[SALT_BYTES // 2 :])):
            self._writer.execute("VACUUM")
            if not self._truncate_log(insist=False):
                return
        with self._change() as change:
            change.execute("DELETE FROM facts WHERE name = ?", (_UNSWEPT + ticket,))

    def _truncate_log(self, *, insist: bool) -> bool:
        """Old pages lie in the write-ahead log until it is moved into the file; a reader may hold that up.

        Whether it was done; with `insist` it was, or VaultError is raised.
        """
        wait_s = _BUSY_S if insist else _NOT_LONG_S
        self._writer.execute(f"PRAGMA busy_timeout={wait_s * 1000:.0f}")
        try:
            (busy, *_) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            self._writer.execute(f"PRAGMA busy_timeout={_BUSY_S * 1000:.0f}")
        if busy and insist:
            raise VaultError(f"{self.path}: a reader holds on to its log", "end the process that keeps it open")
        return not busy


def _is_in(path: Path, needles: Iterable[bytes]) -> bool:
    """Whether one of the needles, of one length, is anywhere in a file."""
    wanted, before = list(needles), b""
    with path.open("rb") as file:
        while block := file.read(_SEARCH_BYTES):
            if any(needle in before + block for needle in wanted):
                return True
            before = block[-max(map(len, wanted)) :]
    return False


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check(path: Path) -> None:
    try:
        state = path.lstat()
    except FileNotFoundError:
        raise VaultError(f"{path}: no such vault", "prepare the data on this machine first") from None
    if not stat.S_ISREG(state.st_mode):
        raise VaultError(f"{path}: is no file", "give the vault itself, not a link")
    mode = stat.S_IMODE(state.st_mode)
    if mode & 0o077:
        raise VaultError(f"{path}: mode {mode:04o} lets others read it", "run chmod 600 on it")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise VaultError(f"{path}: {error}", "see the disk, and who else uses the file") from None


def _ticket() -> str:
    return f"erasure-{secrets.token_hex(8)}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


__all__ = ["Epochs", "Erasure", "KeyFileError", "MemoryVault", "SqliteVault", "Vault", "VaultError"]
