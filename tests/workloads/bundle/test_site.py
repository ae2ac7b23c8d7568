"""A site's directory: the file that says what is served is old or new, and deltas are found by number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workloads.bundle.site import EditionsFault, EditionsWatch, SiteDirectory, read_editions, write_editions
from workloads.bundle.store import BundleFault
from workloads.contract.editions import Edition, SiteEditions

OLD = SiteEditions(revision=1, load=[Edition(bundle="a" * 64)], serve=Edition(bundle="a" * 64))
NEW = SiteEditions(revision=2, load=[Edition(bundle="b" * 64, delta=1)], serve=Edition(bundle="b" * 64, delta=1))


@pytest.fixture
def site(tmp_path: Path) -> SiteDirectory:
    return SiteDirectory(tmp_path / "site")


def test_what_is_written_is_read_and_nothing_is_nothing(site: SiteDirectory):
    assert read_editions(site.editions) is None
    write_editions(site.editions, OLD)
    assert read_editions(site.editions) == OLD
    assert [path.name for path in site.root.iterdir()] == ["editions.json"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "malformed|truncated"),
        ('{"load": [], "serve": {"bundle": "' + "a" * 64 + '"}}', "does not load"),
        ('{"load": [], "serve": {"bundle": "../../etc"}}', "regex"),
        ('{"load": [], "serve": {"bundle": "' + "a" * 64 + '"}, "more": 1}', "unknown field"),
        ('{"schema_version": 2, "load": [], "serve": {"bundle": "' + "a" * 64 + '"}}', "schema version 2"),
    ],
)
def test_a_file_that_says_what_cannot_be_brought_about_is_a_fault_that_names_it(
    site: SiteDirectory, text: str, why: str
):
    site.root.mkdir()
    site.editions.write_text(text)
    with pytest.raises(EditionsFault, match=why):
        read_editions(site.editions)


def test_a_watch_says_each_version_once(site: SiteDirectory):
    watch = EditionsWatch(site.editions)
    assert watch.changed() is None
    for editions in (OLD, NEW, OLD):
        write_editions(site.editions, editions)
        assert watch.changed() == editions
        assert watch.changed() is None
    site.editions.write_text("no json")
    with pytest.raises(EditionsFault):
        watch.changed()
    assert watch.changed() is None
    site.editions.unlink()
    assert watch.changed() is None


def test_a_writer_that_is_killed_at_any_call_leaves_one_version_whole(site: SiteDirectory):
    """The kernel's order: written and forced to disk under another name, then renamed."""
    write_editions(site.editions, OLD)
    program = (
        "import os, sys, pathlib\n"
        "from workloads.bundle import site\n"
        "from workloads.contract.editions import Edition, SiteEditions\n"
        "real, left = os.fsync, [int(sys.argv[2])]\n"
        "def count(fd):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0: os._exit(9)\n"
        "    real(fd)\n"
        "os.fsync = count\n"
        "new = Edition(bundle='b' * 64, delta=1)\n"
        "site.write_editions(pathlib.Path(sys.argv[1]), SiteEditions(revision=2, load=[new], serve=new))\n"
    )
    seen = []
    for calls in range(3):
        command = [sys.executable, "-c", program, str(site.editions), str(calls)]
        seen.append((subprocess.run(command, check=False, env=os.environ).returncode, read_editions(site.editions)))
    assert seen == [(9, OLD), (9, NEW), (0, NEW)]


def test_deltas_are_found_by_number_and_a_gap_is_a_fault(site: SiteDirectory):
    bundle = "a" * 64
    for number in (1, 2, 10):
        site.delta_folder(bundle, number, f"{number:064x}").mkdir(parents=True)
    (site.deltas / bundle / ".fetch-x").mkdir()
    (site.deltas / bundle / f"1-{1:064x}.sig").touch()
    paths = site.delta_paths(Edition(bundle=bundle, delta=2))
    assert [path.name.partition("-")[0] for path in paths] == ["1", "2"]
    assert site.delta_paths(Edition(bundle=bundle)) == []
    with pytest.raises(BundleFault, match="delta 3 of 3 is not there"):
        site.delta_paths(Edition(bundle=bundle, delta=3))
