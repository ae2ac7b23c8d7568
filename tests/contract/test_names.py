"""Names of channels, bundles, models and sites come from an allow-list, wherever they enter: none leaves its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from workloads.bundle.store import find
from workloads.contract import storage
from workloads.contract.editions import Edition
from workloads.contract.sites import site_name

HOSTILE = [
    *(
        "",
        ".",
        "..",
        "../../etc/passwd",
        "stable/../x",
        "/stable",
        "stable/",
        "a b",
        "stable\n",
        "\nstable",
        "stable\x00",
    ),
    *("Stable", "stäble", "\uff53table", "-stable", "stable%2f..", "$(id)", "a" * 65, "*", "stable;id", "s" * 10_000),
]
NO_DIGESTS = [*HOSTILE, "A" * 64, "g" * 64, "a" * 63, "a" * 64 + "\n", "a" * 64 + "/..", "\u0661" * 64]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_channel_has_such_a_name_in_a_key_or_in_a_document(name: str):
    with pytest.raises(ValueError, match="no channel's name"):
        storage.channel_key(name)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(name, storage.Channel)


@pytest.mark.parametrize("name", NO_DIGESTS)
def test_no_edition_names_a_folder_outside_its_site_or_a_model_that_is_not_ours(name: str):
    for kind in (Edition, storage.Release):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"bundle": name}, kind)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"bundle": "a" * 64, "deltas": [name]}, storage.Release)


@pytest.mark.parametrize("name", [name for name in HOSTILE if name])
def test_a_bundle_is_found_by_its_ids_beginning_and_never_by_a_path(tmp_path: Path, name: str):
    (tmp_path / "outside").mkdir()
    (tmp_path / "bundles").mkdir()
    with pytest.raises(LookupError):
        find(tmp_path / "bundles", name)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_site_has_such_a_name(name: str):
    with pytest.raises(ValueError, match="no name of a site"):
        site_name(name)


@pytest.mark.parametrize("name", ["../../x", "a b", "stable/../x", "$(id)", "stable\n"])
def test_an_agent_refuses_a_channel_that_cannot_be_before_it_asks_anybody(tmp_path: Path, name: str):
    (tmp_path / "trust").mkdir()
    words = ["fetch", "--site", "onprem", "--site-dir", str(tmp_path), "--channel", name, "--models-bucket", "b"]
    ended = subprocess.run(
        [sys.executable, "-m", "workloads.agent", *words], capture_output=True, check=False, timeout=60
    )
    assert ended.returncode == 2, ended.stderr.decode()
    assert b"Traceback" not in ended.stderr
    assert "channel" in ended.stdout.decode() + ended.stderr.decode()
