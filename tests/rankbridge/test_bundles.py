"""`rankbridge bundle` and `rankbridge audit`: what is asked is done, and what goes wrong is a line with a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankbridge import cli, interrupts
from rankbridge.bundles import PASSWORD
from rankbridge.cloud import MODELS_BUCKET
from rankbridge.layout import HOME_VARIABLE, Layout
from workloads.bundle.fake import build_fake_bundle
from workloads.contract.sites import SiteName
from workloads.objects.memory import Kind, MemoryObjects

Json = Any


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryObjects:
    """The bucket that `--models-bucket models` stands for."""
    store = MemoryObjects()
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setenv(MODELS_BUCKET, "models")
    monkeypatch.delenv(PASSWORD, raising=False)
    monkeypatch.setattr(interrupts, "listen", lambda: None)  # pytest keeps its own handlers
    monkeypatch.setattr("workloads.objects.s3.S3Objects", lambda bucket, *_: {"models": store}[bucket])
    return store


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.of({HOME_VARIABLE: str(tmp_path / "home")})


@pytest.fixture
def made(objects: MemoryObjects, layout: Layout) -> list[str]:
    """Two bundles on disk, the older first, and a key."""
    assert cli.main(["bundle", "key"]) == 0
    assert objects.calls == []
    return [build_fake_bundle(layout.bundles, items=3, seed=seed).name for seed in (1, 2)]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Json]:
    """Run a command with --json that must work."""

    def run(*arguments: str) -> Json:
        capsys.readouterr()
        assert cli.main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with 2, a fault and a remedy; returns what it said."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert cli.main(arguments) == 2
        said = capsys.readouterr()
        assert said.err.count("error: ") == 1
        assert said.err.count("remedy: ") == 1
        assert "Traceback" not in said.err
        return said.err

    return run


def test_a_bundles_life_at_the_desk(made: list[str], ask: Callable[..., Json], layout: Layout) -> None:
    old, new = made
    assert ask("bundle", "publish", old[:12])["sent"] > 0
    assert ask("bundle", "publish", old[:12])["existed"] is True
    ask("bundle", "publish", new[:12])
    assert ask("bundle", "verify", new[:12])["signer"] == "publisher"
    assert ask("bundle", "promote", old[:12])["sequence"] == 1
    moved = ask("bundle", "promote", new[:12], "stable", "--expect", "1")
    assert (moved["current"]["bundle"], moved["previous"]["bundle"]) == (new, old)
    listed = ask("bundle", "list")
    assert {one["id"]: one["channels"] for one in listed["bundles"]} == {new: ["stable"], old: ["stable (previous)"]}
    assert ask("bundle", "diff", old[:12], new[:12])["files"]
    back = ask("bundle", "rollback")
    assert (back["current"]["bundle"], back["sequence"]) == (old, 3)
    assert ask("bundle", "rollback") == back
    assert ask("bundle", "gc", "--keep", "0", "--dry-run")["bundles"] == []
    audit = ask("audit", "verify")
    assert (audit["faults"], audit["anchors"]) == ([], 1)
    assert audit["entries"] == 5, "two publishes, two promotions, one rollback"
    actions = [json.loads(line)["action"] for line in layout.audit.read_text().splitlines()]
    assert actions == ["bundle.publish", "bundle.publish", "channel.promote", "channel.promote", "channel.rollback"]


def test_a_person_gets_sentences_and_tables(made: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = (one[:12] for one in made)
    for arguments, shown in (
        (("publish", old), "is published"),
        (("publish", new), "is published"),
        (("verify", new), "whole and signed by publisher"),
        (("promote", old), "sequence 1"),
        (("promote", new), f"before that {old}"),
        (("list",), new),
        (("diff", old, new), "item_tables.safetensors"),
        (("rollback",), f"rolled back from {new}"),
        (("gc",), "0 bundles"),
    ):
        capsys.readouterr()
        assert cli.main(["bundle", *arguments]) == 0
        assert shown in capsys.readouterr().out


@pytest.mark.usefixtures("made")
def test_the_key_is_made_once_and_trusted_by_both_sites(layout: Layout) -> None:
    before = layout.publisher_key.read_bytes()
    assert layout.publisher_key.stat().st_mode & 0o777 == 0o600
    assert cli.main(["bundle", "key"]) == 0
    assert layout.publisher_key.read_bytes() == before
    for site in SiteName:
        assert [path.name for path in layout.trust(site).iterdir()] == ["publisher.pub"]


def test_the_keys_password_is_taken_from_the_environment_and_shown_nowhere(
    layout: Layout, objects: MemoryObjects, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PASSWORD, "correct horse battery")
    assert cli.main(["bundle", "key"]) == 0
    bundle = build_fake_bundle(layout.bundles, items=3)
    assert cli.main(["bundle", "publish", bundle.name]) == 0
    monkeypatch.setenv(PASSWORD, "wrong horse battery")
    (bundle.parent / f"{bundle.name}.sig").unlink()
    assert cli.main(["bundle", "publish", bundle.name]) == 2
    said = capfd.readouterr()
    assert "horse" not in said.out + said.err
    assert "horse" not in layout.audit.read_text()
    assert not any(b"horse" in objects.get(key).data for key in objects.keys())  # noqa: SIM118 - a method of the fake


def test_a_lost_race_names_the_winner(made: list[str], refused: Callable[..., str]) -> None:
    for one in made:
        assert cli.main(["bundle", "publish", one]) == 0
    assert cli.main(["bundle", "promote", made[0]]) == 0
    said = refused("bundle", "promote", made[1], "stable", "--expect", "0")
    assert "moved stable first: it is at sequence 1" in said
    assert made[0][:12] in said


def test_what_cannot_be_done_is_told_with_what_to_do(
    made: list[str],
    objects: MemoryObjects,
    layout: Layout,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "is missing" in refused("bundle", "verify", made[0])
    assert "begins with 'ffff'" in refused("bundle", "promote", "ffff")
    assert "no channel" in refused("bundle", "rollback", "canary")
    assert "begins with '0000'" in refused("bundle", "publish", "0000")
    assert cli.main(["bundle", "publish", made[0]]) == 0
    assert "no channel's name" in refused("bundle", "promote", made[0], "Stable!")
    (layout.bundles / made[0] / "ranker.onnx").write_bytes(b"scratched")
    assert "ranker.onnx" in refused("bundle", "publish", made[0])
    objects.revive({1: Kind.ERROR})
    assert "500" in refused("bundle", "list")
    monkeypatch.delenv(MODELS_BUCKET)
    assert "no bucket" in refused("bundle", "list")


def test_without_keys_of_trust_nothing_is_begun(objects: MemoryObjects, refused: Callable[..., str]) -> None:
    assert "holds no public key" in refused("bundle", "list")
    assert objects.calls == []


def test_an_audit_log_that_was_cut_behind_a_channel_is_found_out(
    made: list[str], layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bundle", "publish", made[0]]) == 0
    assert cli.main(["bundle", "promote", made[0]]) == 0
    lines = layout.audit.read_bytes().splitlines(keepends=True)
    layout.audit.write_bytes(b"".join(lines[:-1]))
    capsys.readouterr()
    assert cli.main(["audit", "verify"]) == 1
    assert "channel stable recorded line 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    ["build", "key", "verify", "publish", "promote", "rollback", "list", "diff", "gc"],
)
def test_each_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bundle", command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage:" in shown
    assert "Example:" in shown
