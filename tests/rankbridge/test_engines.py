"""An engine is what builds an image here, whatever is installed; what it is asked makes the same bytes each time."""

from __future__ import annotations

import itertools
import stat
from pathlib import Path

import pytest

from rankbridge import engines
from rankbridge.engines import Buildah, Docker, Order
from rankbridge.faults import DeskError
from rankbridge.references import Reference

CLIENT_WITHOUT_ENGINE = """#!/bin/sh
echo 'Cannot connect to the Docker daemon' >&2
exit 1
"""
BUILDER = """#!/bin/sh
case "$1 $STORAGE_DRIVER" in
  "build vfs") echo "built"; exit 0 ;;
  "build "*) echo "overlay is not supported here" >&2; exit 125 ;;
  "inspect "*) printf 'abc\\n{"layers": [{"size": 7}, {"size": 3}]}'; exit 0 ;;
esac
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with a Docker client that has no engine, and a buildah whose store works only as vfs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in (("docker", CLIENT_WITHOUT_ENGINE), ("buildah", BUILDER)):
        (folder / name).write_text(script)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in ("STORAGE_DRIVER", "BUILDAH_ISOLATION"):
        monkeypatch.delenv(name, raising=False)
    return folder


def order(tmp_path: Path) -> Order:
    return Order(
        context=tmp_path,
        dockerfile=tmp_path / "Dockerfile",
        reference="localhost/x/gateway:t",
        target="gateway",
        arguments={"BASE": "localhost/base:1"},
        secrets={"certificates": Path("/etc/ca.pem")},
        epoch=1_790_000_000,
    )


@pytest.mark.usefixtures("installed")
def test_a_client_without_an_engine_is_passed_over_for_what_really_builds(tmp_path: Path) -> None:
    found = engines.find(engines.candidates(), tmp_path / "log")
    assert found.name == "buildah (vfs)"
    assert "Cannot connect to the Docker daemon" in (tmp_path / "log").read_text()


def test_where_nothing_builds_each_one_says_why(installed: Path, tmp_path: Path) -> None:
    with pytest.raises(DeskError, match="nothing here can build") as raised:
        engines.find(engines.candidates()[:2], tmp_path / "log")
    assert raised.value.detail == (
        "docker: Cannot connect to the Docker daemon",
        "buildah: overlay is not supported here",
    )
    (installed / "docker").unlink()
    (installed / "buildah").unlink()
    assert [one for one in engines.candidates() if one.name.startswith(str(installed))] == []


@pytest.mark.usefixtures("installed")
def test_the_one_that_is_asked_for_is_the_only_one_tried(tmp_path: Path) -> None:
    with pytest.raises(DeskError) as raised:
        engines.find(engines.candidates(), tmp_path / "log", "docker")
    assert raised.value.detail == ("docker: Cannot connect to the Docker daemon",)


@pytest.mark.usefixtures("installed")
def test_what_was_built_is_told_with_identity_and_size(tmp_path: Path) -> None:
    ticks = iter((10.0, 14.5))
    made = engines.build(Buildah("vfs"), order(tmp_path), tmp_path / "log", clock=lambda: next(ticks))
    assert (made.identity, made.size_bytes, made.seconds) == ("sha256:abc", 10, 4.5)


@pytest.mark.usefixtures("installed")
def test_a_failed_build_shows_its_last_lines_and_where_the_rest_is(tmp_path: Path) -> None:
    with pytest.raises(DeskError, match="exit code 125") as raised:
        engines.build(Buildah(), order(tmp_path), tmp_path / "log")
    assert raised.value.detail == ("overlay is not supported here",)
    assert str(tmp_path / "log") in raised.value.remedy


@pytest.mark.parametrize("engine", [Docker(), Buildah(), Buildah("vfs")], ids=lambda one: one.name)
def test_every_engine_is_asked_for_the_target_by_date_with_secrets_that_no_layer_keeps(
    engine: engines.Engine, tmp_path: Path
) -> None:
    command = engine.command(order(tmp_path))
    assert command[1] == "build"
    assert command[-1] == str(tmp_path)
    pairs = list(itertools.pairwise(command))
    for pair in (
        ("--target", "gateway"),
        ("--tag", "localhost/x/gateway:t"),
        ("--build-arg", "BASE=localhost/base:1"),
        ("--secret", "id=certificates,src=/etc/ca.pem"),
    ):
        assert pair in pairs
    assert any("1790000000" in word for word in command)


def test_only_a_registry_on_this_machine_is_spoken_to_in_clear() -> None:
    near, far = Reference.parse("127.0.0.1:5000/x/gateway:t"), Reference.parse("r.example/x/gateway:t")
    assert "--tls-verify=false" in Buildah().push("here", near)[0]
    assert "--tls-verify=false" not in Buildah().push("here", far)[0]
    assert Docker().push("here", far)[-1] == ["docker", "push", "r.example/x/gateway:t"]
