"""People have a salt each; whoever is forgotten cannot be named again, not even by home."""

from __future__ import annotations

import collections
import contextlib
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from workloads.contract.http import PSEUDONYM_PATTERN
from workloads.privacy.pseudonym import KeyFileError, PseudonymKey, destroy_key, key_path
from workloads.privacy.vault import Epochs, MemoryVault, SqliteVault, Vault, VaultError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "onprem" / "vault.sqlite"


@pytest.fixture
def vault(path: Path) -> Iterator[SqliteVault]:
    made = SqliteVault(path, create=True)
    yield made
    made.close()


@pytest.fixture(params=["memory", "sqlite"])
def any_vault(request: pytest.FixtureRequest, path: Path) -> Iterator[Vault]:
    made: Vault = MemoryVault() if request.param == "memory" else SqliteVault(path, create=True)
    yield made
    made.close()


def _bytes_of(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def test_looking_up_makes_nobody(any_vault: Vault):
    assert any_vault.pseudonym("ada") is None
    assert list(any_vault.all_users()) == []


def test_who_is_admitted_keeps_a_name_of_the_contract(any_vault: Vault):
    names = any_vault.admit(["ada", "bob", "ada"])
    assert list(names) == ["ada", "bob"]
    assert len(set(names.values())) == 2
    assert all(re.fullmatch(PSEUDONYM_PATTERN, name) for name in names.values())
    assert any_vault.admit(["bob", "eve"])["bob"] == names["bob"] == any_vault.pseudonym("bob")
    assert sorted(any_vault.all_users()) == ["ada", "bob", "eve"]


def test_a_forgotten_person_is_queued_and_comes_back_as_somebody_else(any_vault: Vault):
    before = any_vault.admit(["ada", "bob"])
    erasure = any_vault.forget("ada")
    assert erasure is not None
    assert erasure.pseudonyms == [before["ada"]]
    assert any_vault.pseudonym("ada") is None
    assert any_vault.queue() == [erasure]
    assert any_vault.admit(["ada"])["ada"] != before["ada"]
    assert any_vault.pseudonym("bob") == before["bob"]
    any_vault.done(erasure.ticket)
    any_vault.done(erasure.ticket)
    assert any_vault.queue() == []


def test_forgetting_somebody_unknown_asks_for_nothing(any_vault: Vault):
    assert any_vault.forget("nobody") is None
    assert any_vault.queue() == []


def test_the_same_user_has_another_name_in_another_home(tmp_path: Path):
    names = set()
    for home in ("one", "two"):
        vault = SqliteVault(tmp_path / home / "vault.sqlite", create=True)
        key_path(vault.keys, 1).write_bytes(bytes(32))
        vault.close()
        again = SqliteVault(tmp_path / home / "vault.sqlite")
        names.add(again.admit(["ada"])["ada"])
        again.close()
    assert len(names) == 2


def test_everything_is_private_and_there_again_after_a_restart(path: Path, vault: SqliteVault):
    name = vault.admit(["ada"])["ada"]
    files = [file for file in path.parent.rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    again = SqliteVault(path)
    assert again.pseudonym("ada") == name
    again.close()


def test_no_byte_of_a_forgotten_person_stays_in_the_file_or_its_log(path: Path, vault: SqliteVault):
    vault.admit([f"user-{number}" for number in range(2000)])
    name = vault.admit(["ada.lovelace"])["ada.lovelace"]
    (salt,) = sqlite3.connect(path).execute("SELECT salt FROM people WHERE user = 'ada.lovelace'").fetchone()
    assert b"ada.lovelace" in _bytes_of(path.parent)
    erasure = vault.forget("ada.lovelace")
    assert erasure is not None
    left = _bytes_of(path.parent)
    assert b"ada.lovelace" not in left
    assert salt not in left
    assert name.encode() in left  # in the queue, until it is erased everywhere
    vault.done(erasure.ticket)
    assert name.encode() not in _bytes_of(path.parent)


def _with_stale_copies(path: Path, vault: SqliteVault) -> dict[str, bytes]:
    """Salts, by user, that are in the file more than once: SQLite moved their rows to another page."""
    vault.admit(f"u{number * 7919 % 100_003}{'x' * (number * 37 % 150)}" for number in range(12_000))
    vault.done("nobody's")  # the log goes into the file
    with contextlib.closing(sqlite3.connect(path)) as connection:
        salts = dict(connection.execute("SELECT salt, user FROM people"))
    data = path.read_bytes()
    found = collections.Counter(data[at : at + 16] for at in range(len(data) - 15) if data[at : at + 16] in salts)
    return {salts[salt]: salt for salt, times in found.items() if times > 1}


@pytest.mark.parametrize("killed", [False, True])
def test_no_copy_of_a_salt_that_the_file_kept_aside_outlives_its_person(
    path: Path, vault: SqliteVault, monkeypatch: pytest.MonkeyPatch, *, killed: bool
):
    doubled = _with_stale_copies(path, vault)
    assert doubled, "nothing was tried: choose other lengths"
    if killed:  # after the commit
        monkeypatch.setattr(SqliteVault, "_sweep", lambda *_: None)
    tickets = [erasure.ticket for user in doubled if (erasure := vault.forget(user)) is not None]
    if not killed:
        assert [user for user, salt in doubled.items() if salt in _bytes_of(path.parent)] == []
    for ticket in tickets:
        vault.done(ticket)
    assert [user for user, salt in doubled.items() if salt in _bytes_of(path.parent)] == []


def test_a_reader_cannot_keep_a_person_from_being_forgotten_only_the_end_waits_for_it(
    path: Path, vault: SqliteVault, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("workloads.privacy.vault._BUSY_S", 0.2)
    monkeypatch.setattr("workloads.privacy.vault._NOT_LONG_S", 0.05)
    vault.admit(["ada"])
    reader = sqlite3.connect(path)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM people").fetchall()
    erasure = vault.forget("ada")
    assert erasure is not None
    assert vault.pseudonym("ada") is None
    with pytest.raises(VaultError, match="a reader holds on"):
        vault.done(erasure.ticket)
    reader.close()
    vault.done(erasure.ticket)
    assert b"ada" not in _bytes_of(path.parent)


def test_a_killed_process_leaves_who_was_admitted_and_forgets_who_was_forgotten(path: Path, vault: SqliteVault):
    code = (
        "import os, pathlib, sys; from workloads.privacy.vault import SqliteVault;"
        "vault = SqliteVault(pathlib.Path(sys.argv[1]));"
        "vault.admit(['ada', 'bob']); vault.forget('bob'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert vault.pseudonym("ada") is not None
    assert vault.pseudonym("bob") is None
    assert len(vault.queue()) == 1


def test_threads_that_admit_the_same_person_at_once_agree(path: Path, vault: SqliteVault):
    vaults = [vault, SqliteVault(path)]
    found: list[str] = []

    def admit(which: SqliteVault) -> None:
        for number in range(20):
            found.append(which.admit([f"user-{number}"])[f"user-{number}"])  # noqa: PERF401 - both must take turns

    threads = [threading.Thread(target=admit, args=(which,)) for which in vaults for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    vaults[1].close()
    assert len(found) == 80
    assert len(set(found)) == 20


# rotation


def test_a_new_key_is_used_only_from_the_switch_on_and_by_every_process(path: Path, vault: SqliteVault):
    other = SqliteVault(path)
    first = vault.admit(["ada"])["ada"]
    session = vault.session("visit")
    assert vault.begin() == vault.begin() == Epochs(current=1, next=2)
    assert other.pseudonym("ada") == first
    assert vault.switch() == vault.switch() == Epochs(current=2, retiring=1)
    second = other.pseudonym("ada")
    assert second is not None
    assert second.startswith("p2-")
    assert other.session("visit").startswith("s2-")
    assert other.session("visit")[3:] != session[3:]
    assert vault.renamed(1, 2) == {first: second}
    other.close()


def test_who_is_forgotten_during_a_rotation_is_queued_under_both_names(vault: SqliteVault):
    first = vault.admit(["ada"])["ada"]
    vault.begin()
    vault.switch()
    second = vault.pseudonym("ada")
    erasure = vault.forget("ada")
    assert erasure is not None
    assert erasure.pseudonyms == [first, second]


def test_the_retired_key_is_destroyed_and_its_names_cannot_be_made_again(path: Path, vault: SqliteVault):
    vault.admit(["ada"])
    secret = key_path(vault.keys, 1).read_bytes()
    vault.begin()
    vault.switch()
    assert vault.retire() == vault.retire() == Epochs(current=2)
    assert secret not in _bytes_of(path.parent)
    assert [file.name for file in vault.keys.iterdir()] == ["pseudonym-2.key"]
    with pytest.raises(KeyFileError, match="no such key"):
        vault.renamed(1, 2)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("destroyed", [False, True])
def test_a_kill_while_a_key_is_destroyed_leaves_a_vault_that_opens_and_ends_it(
    destroyed: bool,  # noqa: FBT001 - a parameter of the test
    path: Path,
    vault: SqliteVault,
    monkeypatch: pytest.MonkeyPatch,
):
    vault.admit(["ada"])
    vault.begin()
    vault.switch()

    def dies(key: Path) -> bool:
        if destroyed:
            destroy_key(key)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("workloads.privacy.vault.destroy_key", dies)
        with pytest.raises(Killed):
            vault.retire()
    other = SqliteVault(path)  # as a gateway that is started again
    assert other.epochs() == Epochs(current=2)
    assert [file.name for file in vault.keys.iterdir()] == ["pseudonym-2.key"]
    erasure = other.forget("ada")
    assert erasure is not None
    assert len(erasure.pseudonyms) == 1
    assert other.begin() == Epochs(current=2, next=3)
    other.switch()
    assert other.retire() == Epochs(current=3)
    other.close()


def test_when_names_changed_is_known_and_not_when_their_key_was_made(path: Path):
    moments = iter([1_000, 2_000, 3_000])
    vault = SqliteVault(path, create=True, clock=lambda: next(moments))
    assert vault.switched_ms is None
    vault.begin()
    assert vault.switched_ms is None
    vault.switch()
    assert vault.switched_ms == 1_000
    vault.switch()  # nothing to switch to
    assert vault.switched_ms == 1_000
    vault.close()


def test_a_second_rotation_waits_for_the_end_of_the_first(vault: SqliteVault):
    vault.begin()
    vault.switch()
    with pytest.raises(VaultError, match="key 1 is still retiring; finish"):
        vault.begin()
    vault.retire()
    assert vault.begin() == Epochs(current=2, next=3)


# what is refused


def test_a_missing_vault_is_not_made_by_looking(path: Path):
    with pytest.raises(VaultError, match="no such vault; prepare the data"):
        SqliteVault(path)
    assert not path.exists()


@pytest.mark.usefixtures("vault")
def test_a_vault_that_others_may_read_is_refused(path: Path):
    path.chmod(0o640)
    with pytest.raises(VaultError, match="lets others read it; run chmod 600"):
        SqliteVault(path)


def test_a_vault_without_its_key_is_refused(path: Path, vault: SqliteVault):
    key_path(vault.keys, 1).unlink()
    with pytest.raises(KeyFileError, match="no such key"):
        SqliteVault(path)


@pytest.mark.usefixtures("vault")
def test_a_link_and_a_file_of_something_else_are_refused(path: Path):
    path.with_name("link.sqlite").symlink_to(path)
    with pytest.raises(VaultError, match="is no file"):
        SqliteVault(path.with_name("link.sqlite"))
    other = path.with_name("other.sqlite")
    other.touch(mode=0o600)
    other.write_bytes(b"not a database, but long enough to be read as one" * 20)
    with pytest.raises(VaultError, match="not a database"):
        SqliteVault(other)


def test_a_vault_of_a_newer_release_is_refused(path: Path, vault: SqliteVault):
    vault.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=9")
    connection.close()
    with pytest.raises(VaultError, match="schema 9; use the release"):
        SqliteVault(path)


def test_no_fault_names_a_person(path: Path, vault: SqliteVault):
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE people")
    connection.close()
    with pytest.raises(VaultError) as caught:
        vault.pseudonym("ada.lovelace")
    assert "ada" not in str(caught.value)


def test_a_salt_of_another_length_is_refused():
    with pytest.raises(ValueError, match="16 bytes"):
        PseudonymKey(1, bytes(32)).pseudonym("ada", b"short")


def test_a_homes_identity_is_its_own_and_outlives_its_keys(tmp_path: Path, vault: SqliteVault):
    other = SqliteVault(tmp_path / "other" / "vault.sqlite", create=True)
    mine = vault.identity
    assert mine != other.identity
    vault.begin()
    vault.switch()
    vault.retire()
    assert vault.identity == mine
    other.close()
