"""Each image holds what its modules import, in the project's versions, and torch only where it is trained with."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import grimp
import pytest
import yaml

from infra import apps_config, stackfile
from rankbridge import cli
from rankbridge.faults import DeskError
from rankbridge.images import DEPLOYABLES, Deployable, Source, Upstream
from rankbridge.layout import Layout

ROOT = Layout.of({}).root
LOCKS = ROOT / "images" / "requirements"
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^ ;\\]+)", re.MULTILINE)
NAMED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)", re.MULTILINE)

ASKED_FOR_BY_OTHERS = {
    "uvloop": "uvicorn loads it by name",
    "httptools": "as uvloop",
    "pyopenssl": "model-signing imports it without saying so",
    "onnxscript": "torch's exporter imports it without saying so",
    "httpx": "lightkube's client, whose errors are ours to catch",
}
NEVER_LOADED = {
    ("agent", "onnxruntime"): "ranker_backend.py is not imported: its file runs inside Triton",
    ("retrieval", "redis"): "imported when a shared store of profiles is opened, which retrieval never does",
}
NOT_FROM_A_LOCK = {"triton_python_backend_utils": "the file is copied to Triton's repository, and imported there"}


def deployables(*, built: bool = True) -> list[object]:
    """Every deployable as a parameter; those whose modules are not written yet are skipped."""

    def is_there(one: Deployable) -> bool:
        return all(importlib.util.find_spec(module) is not None for module in one.modules)

    skip = pytest.mark.skip(reason="its modules are not in this checkout yet")
    return [pytest.param(one, id=one.name, marks=() if is_there(one) or not built else (skip,)) for one in DEPLOYABLES]


def pins(path: Path) -> dict[str, set[str]]:
    """Every version of each distribution that a lock names; markers choose among several."""
    found: dict[str, set[str]] = {}
    for name, version in PIN.findall(path.read_text()):
        found.setdefault(name, set()).add(version)
    return found


@functools.cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        "workloads", "loadtests", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


@functools.cache
def imported(one: Deployable) -> frozenset[str]:
    """Third-party packages that a deployable's modules import, late imports too, and all that those import."""
    reached = set()
    for module in one.modules:
        reached |= graph().find_upstream_modules(module, as_package=True)
    own = {"workloads", "loadtests", *sys.stdlib_module_names, *NOT_FROM_A_LOCK}
    names = {name for name in reached if name.partition(".")[0] not in own}
    return frozenset(name for name in names if (one.name, name) not in NEVER_LOADED)


def distributions(package: str) -> set[str]:
    return {
        re.sub(r"[-_.]+", "-", name).lower() for name in importlib.metadata.packages_distributions().get(package, ())
    }


@pytest.mark.parametrize("one", deployables(built=False))
def test_every_version_in_an_image_is_the_projects(one: Deployable) -> None:
    project = pins(ROOT / "requirements" / "project.txt")
    lock = pins(LOCKS / f"{one.name}.txt")
    assert lock
    assert {name: versions - project.get(name, set()) for name, versions in lock.items()} == {
        name: set() for name in lock
    }


@pytest.mark.parametrize("one", deployables(built=False))
def test_every_pin_of_an_image_has_a_hash_and_every_name_is_locked(one: Deployable) -> None:
    text = (LOCKS / f"{one.name}.txt").read_text()
    blocks = re.split(r"\n(?=[a-z0-9])", text)
    assert all("--hash=sha256:" in block for block in blocks)
    asked = {name.lower() for name in NAMED.findall((LOCKS / f"{one.name}.in").read_text())}
    assert asked <= set(pins(LOCKS / f"{one.name}.txt"))


@pytest.mark.parametrize("one", deployables())
def test_an_image_holds_everything_that_its_modules_import(one: Deployable) -> None:
    lock = set(pins(LOCKS / f"{one.name}.txt"))
    assert {package for package in imported(one) if not distributions(package) & lock} == set()


@pytest.mark.parametrize("one", deployables())
def test_an_image_asks_for_nothing_that_its_modules_do_not_import(one: Deployable) -> None:
    asked = {name.lower() for name in NAMED.findall((LOCKS / f"{one.name}.in").read_text())}
    used = {name for package in imported(one) for name in distributions(package)}
    assert asked - used - set(ASKED_FOR_BY_OTHERS) == set()


def test_only_training_holds_torch_and_no_image_holds_the_desks_tools() -> None:
    held = {one.name: set(pins(LOCKS / f"{one.name}.txt")) for one in DEPLOYABLES}
    assert {name for name, lock in held.items() if "torch" in lock} == {"training"}
    assert {name for name, lock in held.items() if lock & {"pulumi", "mypy", "ruff", "typer"}} == set()
    assert {name for name, lock in held.items() if "locust" in lock} == {"load"}


def test_the_dockerfile_has_a_target_with_its_own_lock_for_each_image_and_no_other() -> None:
    text = (ROOT / "images" / "Dockerfile").read_text()
    assert re.findall(r"^FROM runtime AS (\S+)$", text, re.MULTILINE) == [one.name for one in DEPLOYABLES]
    for one in DEPLOYABLES:
        stage = text.partition(f"FROM runtime AS {one.name}\n")[2].partition("\nFROM ")[0]
        assert f"COPY --from={one.name}-packages /opt/rankbridge /opt/rankbridge" in stage
        assert f"packages.sh /build/locks/{one.name}.txt" in text.partition(f"AS {one.name}-packages\n")[2][:300]
    assert {path.stem for path in LOCKS.iterdir()} == {one.name for one in DEPLOYABLES}


def test_nothing_is_built_on_an_image_without_a_name_from_outside_and_nothing_shipped_runs_as_root() -> None:
    text = (ROOT / "images" / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+) AS (\S+)", text, re.MULTILINE)
    stages = {name for _, name in bases}
    assert {base for base, _ in bases if base not in stages} == {"${BASE}"}
    assert "\nARG BASE=images.invalid/" in text
    assert text.count("\nUSER ") == 1
    assert "USER 65532:65532" in text.partition("AS runtime\n")[2].partition("\nFROM ")[0]


def test_the_build_sees_code_and_locks_and_nothing_else_of_the_checkout() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line for line in lines[2:] if line.startswith("!")} == {
        "!workloads",
        "!loadtests",
        "!requirements/tools.txt",
        "!images/packages.sh",
        "!images/requirements/*.txt",
    }


def test_every_image_that_stacks_deploy_is_built_here_or_taken_from_a_named_place() -> None:
    upstream = Upstream.read(ROOT / "images" / "upstream.yaml")
    known = {one.name for one in DEPLOYABLES} | set(upstream.taken)
    assert known == {image.value for image in apps_config.Image}


def test_the_triton_that_is_taken_is_the_release_that_every_stack_names() -> None:
    upstream = Upstream.read(ROOT / "images" / "upstream.yaml")
    for path in stackfile.STACKS.glob("Pulumi.apps-*.yaml"):
        release = yaml.safe_load(path.read_text())["config"]["rankbridge:triton_release"]
        assert {upstream.taken[name].tag for name in ("triton", "tensorrt")} == {f"{release}-py3"}, path.name


def test_no_digest_is_in_the_list_of_what_is_taken() -> None:
    upstream = Upstream.read(ROOT / "images" / "upstream.yaml")
    assert {name for name, reference in upstream.taken.items() if reference.digest} == set()


@pytest.mark.parametrize(
    ("base", "fault"),
    [
        ("docker.io/library/python:3.11-slim-bookworm", "not pinned by digest"),
        ("images.invalid/base@sha256:" + "ab" * 32, "not pinned by digest"),
        ("docker.io/library/python@sha256:" + "0" * 64, "not pinned by digest"),
        ("python", "names no image"),
    ],
)
def test_a_base_that_could_be_another_one_tomorrow_is_refused(
    base: str, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["images", "build", "gateway", "--base", base]) == 2
    said = capsys.readouterr().err
    assert fault in said
    assert "remedy:" in said


def test_the_list_says_what_each_image_is_and_which_are_placeholders(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["images", "list", "--stack", "apps-local"]) == 0
    said = capsys.readouterr().out
    assert "workloads.gateway" in said
    assert "placeholder" in said
    assert "cluster-autoscaler" in said


def test_an_image_knows_the_revision_it_was_made_of(tmp_path: Path) -> None:
    source = Source.of(ROOT)
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", source.revision)
    assert source.tag[:12] == source.revision[:12]
    assert Source("ab" * 20 + "-dirty").tag == "ab" * 6 + "-dirty"
    with pytest.raises(DeskError, match="no git checkout"):
        Source.of(tmp_path)
