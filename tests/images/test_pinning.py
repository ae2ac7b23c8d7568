"""Digests come from a registry, all of them or none, and only into the lines that they belong to."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
import yaml

from infra import stackfile
from rankbridge import cli, images, registries
from rankbridge.faults import DeskError
from rankbridge.references import Reference
from rankbridge.registries import Registries

STACK = """# Production.
config:
  rankbridge:channel: production   # promoted by hand
  rankbridge:images:
    # ours
    gateway: images.invalid/rankbridge/gateway@sha256:{zeros}
    triton: nvcr.io/nvidia/tritonserver@sha256:{ones}  # 26.07
  rankbridge:sites:
    - name: onprem
"""


class Held(Protocol):
    """The registry of conftest.py, as far as these tests know it."""

    host: str
    auth: str
    login: tuple[str, str]
    asked: list[str]
    digest: Callable[[bytes], str | None]

    def hold(self, name: str, tag: str) -> str: ...


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stackfile, "STACKS", tmp_path)
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    path = tmp_path / "Pulumi.apps-prod.yaml"
    path.write_text(STACK.format(zeros="0" * 64, ones="1" * 64))
    return path


def log_in(tmp_path: Path, host: str, word: str) -> None:
    (tmp_path / "docker").mkdir()
    auth = base64.b64encode(word.encode()).decode()
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def pin(*words: str) -> int:
    return cli.main(["images", "pin", *words, "--tag", "t1"])


@pytest.mark.parametrize("auth", ["", "basic", "bearer"])
def test_a_pin_is_what_the_registry_says_and_changes_one_line(
    registry: Held, stack: Path, tmp_path: Path, auth: str
) -> None:
    registry.auth = auth
    log_in(tmp_path, registry.host, ":".join(registry.login))
    digest = registry.hold("team/gateway", "t1")
    before = stack.read_text()
    assert pin("gateway", "--registry", f"{registry.host}/team", "--stack", "apps-prod") == 0
    line = f"    gateway: images.invalid/rankbridge/gateway@sha256:{'0' * 64}\n"
    assert stack.read_text() == before.replace(line, f"    gateway: {registry.host}/team/gateway@{digest}\n")


def test_an_image_that_is_not_pinned_yet_comes_behind_the_others(registry: Held, stack: Path) -> None:
    digest = registry.hold("team/retrieval", "t1")
    assert pin("retrieval", "--registry", f"{registry.host}/team", "--stack", "apps-prod") == 0
    lines = stack.read_text().splitlines()
    at = lines.index(f"    retrieval: {registry.host}/team/retrieval@{digest}")
    assert lines[at - 1].endswith("# 26.07")
    assert lines[at + 1] == "  rankbridge:sites:"


def test_one_image_that_is_missing_leaves_the_stack_as_it_was(
    registry: Held, stack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.hold("team/gateway", "t1")
    before = stack.read_bytes()
    assert pin("gateway", "agent", "intake", "--registry", f"{registry.host}/team", "--stack", "apps-prod") == 2
    assert stack.read_bytes() == before
    said = capsys.readouterr().err
    assert "no team/agent:t1" in said
    assert "no team/intake:t1" in said
    assert "gateway" not in said


def test_images_of_others_are_asked_for_where_they_were_copied_to(registry: Held, stack: Path) -> None:
    digest = registry.hold("team/triton", "26.07-py3")
    assert pin("triton", "--mirrored", "--registry", f"{registry.host}/team", "--stack", "apps-prod") == 0
    assert yaml.safe_load(stack.read_text())["config"][images.KEY]["triton"] == f"{registry.host}/team/triton@{digest}"


@pytest.mark.parametrize("header", [None, "sha256:" + "0" * 64, "sha256:short", "sha512:" + "ab" * 64])
def test_an_answer_without_a_real_digest_is_refused(
    registry: Held, stack: Path, header: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.hold("team/gateway", "t1")
    registry.digest = lambda _: header
    before = stack.read_bytes()
    assert pin("gateway", "--registry", f"{registry.host}/team", "--stack", "apps-prod") == 2
    assert stack.read_bytes() == before
    assert "gives no digest" in capsys.readouterr().err


@pytest.mark.usefixtures("stack")
@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_a_wrong_password_is_said_and_never_shown(
    registry: Held, tmp_path: Path, auth: str, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.auth = auth
    registry.hold("team/gateway", "t1")
    log_in(tmp_path, registry.host, "deploy:not-the-word")
    assert pin("gateway", "--registry", f"{registry.host}/team", "--stack", "apps-prod") == 2
    said = capsys.readouterr().err
    assert "does not let us see" in said
    assert "docker login" in said
    assert "not-the-word" not in said


@pytest.mark.usefixtures("stack")
def test_placeholders_and_registries_that_are_away_are_refused(
    registry: Held, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pin("gateway", "--registry", "images.invalid/rankbridge", "--stack", "apps-prod") == 2
    assert "is a placeholder" in capsys.readouterr().err
    assert pin("gateway", "--registry", "127.0.0.1:9/team", "--stack", "apps-prod") == 2
    assert "cannot ask 127.0.0.1:9" in capsys.readouterr().err
    assert registry.asked == []


@pytest.mark.usefixtures("stack")
@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--registry", "r.example/x"], "not said what to pin"),
        (["--bases", "--stack", "apps-prod"], "not said what to pin"),
        (["--stack", "foundation-prod", "--registry", "r.example/x"], "no stack of deployments"),
        (["--stack", "apps-elsewhere", "--registry", "r.example/x"], "no stack of deployments"),
        (["--stack", "apps-prod"], "no registry is named"),
        (["toaster", "--stack", "apps-prod"], "no image is called toaster"),
        (["gateway", "--registry", "just-a-word", "--stack", "apps-prod"], "names no image"),
    ],
)
def test_what_cannot_be_pinned_is_one_line_with_a_remedy(
    words: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pin(*words) == 2
    said = capsys.readouterr().err
    assert fault in said
    assert "remedy:" in said


def test_bases_are_pinned_beside_their_tags_and_can_be_pinned_again(registry: Held, tmp_path: Path) -> None:
    path = tmp_path / "upstream.yaml"
    path.write_text(f"# why\nbases:\n  # a base\n  python: {registry.host}/library/python:3.11\ntaken: {{}}\n")
    for tag in ("3.11", "3.11"):
        digest = registry.hold("library/python", tag)
        with registries.client() as client:
            images.pin_bases(Registries(client, lambda _: None), images.Upstream.read(path))
        expected = f"  python: {registry.host}/library/python:3.11@{digest}\n"
        assert path.read_text() == f"# why\nbases:\n  # a base\n{expected}taken: {{}}\n"


def test_a_password_is_never_sent_in_clear_to_another_machine(registry: Held) -> None:
    def challenge(host: str) -> str:
        return f'Bearer realm="http://{host}/token",service="x"'

    with registries.client() as client:
        client.event_hooks["response"] = [lambda r: r.headers.update({"www-authenticate": challenge("192.0.2.1")})]
        registry.auth = "bearer"
        with pytest.raises(DeskError, match="in clear"):
            Registries(client, lambda _: ("deploy", "word")).digest(Reference.parse(f"{registry.host}/team/x:t"))


def test_a_credential_helper_is_asked_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-vault"
    helper.write_text('#!/bin/sh\nread host\necho "{\\"Username\\": \\"AWS\\", \\"Secret\\": \\"for-$host\\"}"\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"credHelpers": {"r.example": "vault", "s.example": "missing"}}))
    find = registries.logins([tmp_path / "none.json", path])
    assert find("r.example") == ("AWS", "for-r.example")
    assert find("t.example") is None
    with pytest.raises(DeskError, match="docker-credential-missing"):
        find("s.example")


@pytest.mark.parametrize("name", sorted(p.name for p in Path(stackfile.__file__).parent.glob("stacks/Pulumi.apps-*")))
def test_the_projects_own_stacks_can_be_pinned_without_touching_another_byte(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    shutil.copy(Path(stackfile.__file__).parent / "stacks" / name, path)
    before = path.read_text()
    pins = {one.name: f"r.example/x/{one.name}@sha256:{'ab' * 32}" for one in images.DEPLOYABLES}
    images.write_pins(path, pins)
    after = path.read_text()
    assert {k: v for k, v in yaml.safe_load(after)["config"][images.KEY].items() if k in pins} == pins
    assert unpinned(after) == unpinned(before)


def unpinned(text: str) -> list[str]:
    return [line for line in text.splitlines() if "@sha256:" not in line and images.KEY not in line]


@pytest.mark.parametrize(
    "section",
    ["", "  rankbridge:images:\n", "  rankbridge:images: {}\n", "  rankbridge:images: {agent: a}\n"],
    ids=["absent", "null", "empty", "in one line"],
)
def test_a_section_that_is_not_there_or_empty_is_written(section: str) -> None:
    text = f"config:\n  a:b: |\n    block\n{section}  c:d: 1 # why\n"
    after = stackfile.with_images(text, {"gateway": "g"})
    held = {"agent": "a"} if "agent" in section else {}
    assert yaml.safe_load(after)["config"] == {"a:b": "block\n", "c:d": 1, images.KEY: {**held, "gateway": "g"}}
    assert "# why" in after


def test_a_file_that_is_no_stack_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "Pulumi.apps-x.yaml"
    for text in ("[]", "config: {}\n", "config:\n  rankbridge:images: [a]\n", "config: {a: [}\n"):
        path.write_text(text)
        with pytest.raises(DeskError, match="cannot pin"):
            images.write_pins(path, {"gateway": "g"})
        assert path.read_text() == text
