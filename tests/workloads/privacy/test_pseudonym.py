"""The key that hides people: made once, kept private, refused when others could read it."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.contract.http import PSEUDONYM_PATTERN
from workloads.privacy.pseudonym import KeyFileError, PseudonymKey, read_key, read_or_create_key

KEY = PseudonymKey(epoch=1, secret=bytes(range(32)))
SALT = bytes(range(16))


def test_a_pseudonym_is_the_first_half_of_a_keyed_hash_in_its_own_domain():
    expected = hmac.new(bytes(range(32)), b"rankbridge/user\x00" + SALT + b"ada", hashlib.sha256).hexdigest()[:32]
    assert KEY.pseudonym("ada", SALT) == f"p1-{expected}"


@given(st.text(min_size=1, max_size=128))
def test_any_user_gets_a_stable_pseudonym_of_the_contract_form(user: str):
    assert re.fullmatch(PSEUDONYM_PATTERN, KEY.pseudonym(user, SALT))
    assert KEY.pseudonym(user, SALT) == KEY.pseudonym(user, SALT)


@given(st.sets(st.text(min_size=1, max_size=20), min_size=2, max_size=50))
def test_different_users_never_share_a_pseudonym(users: set[str]):
    assert len({KEY.pseudonym(user, SALT) for user in users}) == len(users)


def test_key_epoch_and_domain_each_change_the_name():
    other = PseudonymKey(epoch=1, secret=bytes(32))
    later = PseudonymKey(epoch=2, secret=KEY.secret)
    assert KEY.pseudonym("ada", SALT) != other.pseudonym("ada", SALT)
    assert later.pseudonym("ada", SALT).startswith("p2-")
    assert KEY.session("ada")[3:] != KEY.pseudonym("ada", SALT)[3:]


def test_the_secret_is_in_no_representation():
    assert KEY.secret.hex() not in repr(KEY)
    assert repr(KEY.secret) not in repr(KEY)
    assert KEY.secret.hex() not in KEY.fingerprint


def test_a_new_key_is_private_and_read_back_the_same(tmp_path: Path):
    path = tmp_path / "key" / "pseudonym-1.key"
    made = read_or_create_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_size == 32
    assert read_or_create_key(path) == read_key(path) == made
    assert [entry.name for entry in path.parent.iterdir()] == ["pseudonym-1.key"]


def test_a_restrictive_or_generous_umask_changes_nothing(tmp_path: Path):
    before = os.umask(0)
    try:
        read_or_create_key(tmp_path / "pseudonym-1.key")
    finally:
        os.umask(before)
    assert (tmp_path / "pseudonym-1.key").stat().st_mode & 0o777 == 0o600


def test_processes_that_start_at_once_end_up_with_one_key(tmp_path: Path):
    path = tmp_path / "pseudonym-1.key"
    gate = threading.Barrier(8)
    keys: list[PseudonymKey] = []

    def start() -> None:
        gate.wait()
        keys.append(read_or_create_key(path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({key.secret for key in keys}) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["pseudonym-1.key"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_key_that_others_may_read_is_refused_with_the_remedy(tmp_path: Path, mode: int):
    path = tmp_path / "pseudonym-1.key"
    read_or_create_key(path)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=r"lets others read it; run chmod 600"):
        read_key(path)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_the_wrong_size_is_refused(tmp_path: Path, size: int):
    path = tmp_path / "pseudonym-1.key"
    path.touch(mode=0o600)
    path.write_bytes(bytes(size))
    with pytest.raises(KeyFileError, match="bytes instead of 32"):
        read_or_create_key(path)


def test_missing_misnamed_and_linked_keys_are_refused(tmp_path: Path):
    with pytest.raises(KeyFileError, match="no such key; prepare the data"):
        read_key(tmp_path / "pseudonym-1.key")
    with pytest.raises(KeyFileError, match="is called pseudonym-<epoch>"):
        read_key(tmp_path / "secret.key")
    read_or_create_key(tmp_path / "pseudonym-1.key")
    (tmp_path / "pseudonym-2.key").symlink_to(tmp_path / "pseudonym-1.key")
    with pytest.raises(KeyFileError, match="cannot be read"):
        read_key(tmp_path / "pseudonym-2.key")


def test_the_epoch_is_the_file_names(tmp_path: Path):
    assert read_or_create_key(tmp_path / "pseudonym-12.key").pseudonym("ada", SALT).startswith("p12-")


def test_the_gateways_modules_load_no_data_library():
    code = (
        "import sys, workloads.privacy.pseudonym, workloads.privacy.vault, workloads.data.profiles;"
        "print(sorted({'numpy', 'polars', 'pyarrow', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
