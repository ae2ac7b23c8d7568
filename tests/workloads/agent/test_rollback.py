"""Going back by hand: which edition is meant, what is waited for, and what is said when it does not come."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from workloads.agent import memory
from workloads.agent.__main__ import main
from workloads.agent.memory import Hold, Seen
from workloads.bundle.site import SiteDirectory, write_editions
from workloads.contract.editions import Edition, SiteEditions
from workloads.telemetry.progress import FaultLine, Line, ResultLine, parse


@pytest.fixture
def site(tmp_path: Path, made: Path, other: Path) -> SiteDirectory:
    """A site on `other` that came from `made`."""
    site = SiteDirectory(tmp_path / "site")
    for bundle in (made, other):
        shutil.copytree(bundle, site.bundle(bundle.name))
    new, old = Edition(bundle=other.name), Edition(bundle=made.name)
    write_editions(site.editions, SiteEditions(load=[new], serve=new, previous=old, channel="stable", sequence=7))
    memory.write_seen(site.root, Seen(channel="stable", sequence=7))
    return site


Said = Callable[[], Line | None]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: parse(capsys.readouterr().out.strip().splitlines()[-1])


def _go(site: SiteDirectory, *more: str) -> int:
    return main(["rollback", "--site-dir", str(site.root), *more])


def test_a_wish_that_no_agent_brings_about_stays_and_says_what_to_do(site: SiteDirectory, said: Said, made: Path):
    assert _go(site, "--wait-s", "0") == 2
    assert memory.read_hold(site.root) == Hold(edition=Edition(bundle=made.name), sequence=7)
    line = said()
    assert isinstance(line, FaultLine)
    assert "not served after 0 s" in line.fault
    assert "start it" in line.remedy


def test_it_ends_when_the_edition_is_served_alone(site: SiteDirectory, said: Said, made: Path, other: Path):
    back, ahead = Edition(bundle=made.name), Edition(bundle=other.name)
    write_editions(site.editions, SiteEditions(load=[back], serve=back, previous=ahead))
    assert _go(site, "--to", made.name[:8], "--wait-s", "5") == 0
    line = said()
    assert isinstance(line, ResultLine)
    assert line.made == {"edition": f"{made.name[:12]}+0"}


def test_going_back_again_does_not_go_forward_to_what_was_left(
    site: SiteDirectory, said: Said, made: Path, other: Path
):
    back, ahead = Edition(bundle=made.name), Edition(bundle=other.name)
    assert _go(site, "--wait-s", "0") == 2  # the agent is slow
    write_editions(site.editions, SiteEditions(load=[back], serve=back, previous=ahead))
    assert _go(site, "--wait-s", "0") == 0
    assert _go(site, "--wait-s", "0") == 0
    line = said()
    assert isinstance(line, ResultLine)
    assert line.made == {"edition": f"{made.name[:12]}+0"}
    assert memory.read_hold(site.root) == Hold(edition=back, sequence=7)


def test_what_is_served_is_held_when_it_is_asked_for_because_the_agent_may_be_bringing_another(
    site: SiteDirectory, other: Path
):
    assert _go(site, "--to", other.name[:8], "--wait-s", "0") == 0
    assert memory.read_hold(site.root) == Hold(edition=Edition(bundle=other.name), sequence=7)


def test_a_wish_that_was_refused_is_not_asked_for_again(site: SiteDirectory, made: Path, other: Path):
    there = Edition(bundle=other.name)
    memory.write_hold(site.root, Hold(edition=there, sequence=7, refused="content: damaged"))
    assert _go(site, "--wait-s", "0") == 2
    assert memory.read_hold(site.root) == Hold(edition=Edition(bundle=made.name), sequence=7)


def test_a_refusal_of_the_agent_is_the_fault(
    site: SiteDirectory, said: Said, made: Path, monkeypatch: pytest.MonkeyPatch
):
    answer = Hold(edition=Edition(bundle=made.name), sequence=7, refused="content: ranker.onnx: was altered")
    monkeypatch.setattr(memory, "read_hold", lambda _: answer)
    assert _go(site) == 2
    line = said()
    assert isinstance(line, FaultLine)
    assert "ranker.onnx: was altered" in line.fault


@pytest.mark.parametrize("to", ["ffffffff", "", "../..", "f+x"])
def test_what_is_not_on_disk_is_named_with_what_is(site: SiteDirectory, said: Said, to: str, made: Path):
    assert _go(site, "--to", to) == 2
    line = said()
    assert isinstance(line, FaultLine)
    assert made.name[:12] in line.remedy
    assert memory.read_hold(site.root) is None


def test_deltas_that_are_not_on_disk_are_a_fault(site: SiteDirectory, said: Said, made: Path):
    assert _go(site, "--to", f"{made.name}+2") == 2
    line = said()
    assert isinstance(line, FaultLine)
    assert "delta 1 of 2 is not there" in line.fault


def test_a_site_that_serves_nothing_has_nowhere_to_go_back_to(tmp_path: Path, said: Said):
    assert main(["rollback", "--site-dir", str(tmp_path)]) == 2
    line = said()
    assert isinstance(line, FaultLine)
    assert "serves nothing" in line.fault


def test_resuming_lets_go(site: SiteDirectory, said: Said):
    _go(site, "--wait-s", "0")
    assert main(["resume", "--site-dir", str(site.root)]) == 0
    assert memory.read_hold(site.root) is None
    assert isinstance(said(), ResultLine)
