"""The apps on a real engine and a real control plane: up, an empty second preview, a scaler left alone, nothing left.

Needs the `pulumi` CLI with the aws, command and kubernetes plugins, LocalStack (make localstack-install) and the
control plane (make cluster-tools). `apps-local` reads `foundation-local`, brought up on LocalStack, by its
StackReference. Nodes are played: no image is pulled, and pods are ready because KWOK says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pulumi import automation as auto

from infra import apps_config, apps_manifests, cluster, config, paper, recording, stackfile
from infra.controlplane import ControlPlane, missing_binaries, nodes, volumes
from infra.controlplane.api import Api, RefusedError
from infra.controlplane.harness import Deployed, is_ready, join, until
from infra.emulator import STACK as FOUNDATION
from infra.emulator import Emulator, Project, project
from infra.rules import evaluate, kubernetes, preview

STACK = "apps-local"
GPU_NODES = 3
pytestmark = [
    pytest.mark.real_parts,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("pulumi") is None, reason="the pulumi CLI is not on PATH"),
]


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    if missing := missing_binaries():
        pytest.skip(f"{', '.join(missing)} not built: make cluster-tools")
    started = ControlPlane(tmp_path_factory.mktemp("controlplane"), admission=cluster.admission().text)
    started.start()
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def api(plane: ControlPlane) -> Iterator[Api]:
    """A cluster with nodes at both sites and a storage class: all that apps-local asks of one."""
    local = config.read(FOUNDATION, *paper.sample(FOUNDATION))
    private = config.read("foundation-prod", *paper.sample("foundation-prod"))  # the local one has no hosts
    with Api(plane.kubeconfig) as opened:
        for site in local.sites:
            plane.start_kwok(f"kwok-{site.name}", f"rankbridge.io/site={site.name}")
        for node in [*nodes.private_nodes(private), *nodes.gpu_nodes(local, "gpu", GPU_NODES)]:
            join(opened, node)
        assert until(lambda: all(is_ready(node) for node in opened.find("v1", "Node"))), "nodes do not become ready"
        opened.apply(volumes.storage_class("standard"))
        with volumes.Provisioner(opened):
            yield opened


@pytest.fixture(scope="module")
def copied(plane: ControlPlane, emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with both stack files, pointed at what runs here."""
    made = project(tmp_path_factory.mktemp("project"), emulator.endpoint, virtualenv=Path(sys.prefix))
    document = yaml.safe_load((stackfile.STACKS / f"Pulumi.{STACK}.yaml").read_text())
    document["config"]["rankbridge:aws_endpoint"] = emulator.endpoint
    document["config"]["rankbridge:signers"] = {"publisher": paper.SAMPLE_SIGNER}
    (made.directory / "stacks" / f"Pulumi.{STACK}.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return Project(made.directory, {**made.environment, "KUBECONFIG": str(plane.kubeconfig)}, made.secrets)


def selected(copied: Project, name: str, secrets: dict[str, str]) -> auto.Stack:
    options = auto.LocalWorkspaceOptions(env_vars=dict(copied.environment))
    made = auto.create_or_select_stack(stack_name=name, work_dir=str(copied.directory), opts=options)
    made.set_all_config({k: auto.ConfigValue(value=v, secret=True) for k, v in secrets.items()})
    return made


PASSWORD_KEY = f"rankbridge:{apps_config.STORE_PASSWORD}"
PASSWORD = stackfile.sample_secrets([apps_config.STORE_PASSWORD])[apps_config.STORE_PASSWORD]


@pytest.fixture(scope="module")
def foundation(copied: Project) -> Iterator[auto.Stack]:
    made = selected(copied, FOUNDATION, dict(copied.secrets))
    try:
        made.up(on_output=_show)
        yield made
    finally:
        made.destroy(on_output=_show)


@pytest.fixture(scope="module")
def stack(copied: Project, foundation: auto.Stack, api: Api) -> Iterator[auto.Stack]:
    """The stack, brought up; destroyed at the end even when a test failed."""
    assert foundation.outputs()
    assert api.find("v1", "Node")
    made = selected(copied, STACK, {PASSWORD_KEY: PASSWORD})
    try:
        made.up(on_output=_show)
        yield made
    finally:
        made.destroy(on_output=_show)


def _show(line: str) -> None:
    sys.stdout.write(line)


def changes(summary: Mapping[Any, int] | None) -> dict[str, int]:
    """What an operation would change or changed, without what stays the same."""
    return {str(getattr(k, "value", k)): n for k, n in (summary or {}).items() if str(getattr(k, "value", k)) != "same"}


def recorded() -> recording.Recording:
    return paper.record_apps(STACK)


def test_up_brings_everything_that_is_declared_and_all_of_it_runs(stack: auto.Stack, api: Api):
    declared = apps_manifests.manifests(recorded())
    for manifest in declared:
        metadata = manifest["metadata"]
        api.get(manifest["apiVersion"], manifest["kind"], metadata["name"], metadata.get("namespace", ""))
    deployed = Deployed(api, list(declared))
    assert until(deployed.is_settled, 60), deployed.unsettled()
    assert {p["metadata"]["labels"]["rankbridge.io/site"] for p in deployed.pods("gateway")} == {"onprem", "aws"}
    assert set(stack.outputs()["hosts"].value) == {"onprem", "aws"}


def test_a_second_preview_is_empty(stack: auto.Stack):
    assert changes(stack.preview().change_summary) == {}


def test_a_scaler_is_left_alone_by_the_next_update(stack: auto.Stack, api: Api):
    scaled = api.find("autoscaling/v2", "HorizontalPodAutoscaler")
    assert scaled
    target, namespace = scaled[0]["spec"]["scaleTargetRef"]["name"], scaled[0]["metadata"]["namespace"]
    before = api.get("apps/v1", "Deployment", target, namespace)["spec"]["replicas"]
    api.patch("apps/v1", "Deployment", target, namespace, {"spec": {"replicas": before + 1}})
    assert changes(stack.up(on_output=_show).summary.resource_changes) == {}
    assert api.get("apps/v1", "Deployment", target, namespace)["spec"]["replicas"] == before + 1


def test_the_state_holds_no_secret_in_the_clear(stack: auto.Stack):
    assert PASSWORD not in json.dumps(stack.export_stack().deployment)


@pytest.mark.usefixtures("stack")
def test_the_rules_hold_for_the_engines_own_preview(copied: Project):
    printed = subprocess.run(
        ["pulumi", "preview", "--json", "--show-sames", "--stack", STACK, "--non-interactive"],
        cwd=copied.directory,
        env={**os.environ, **copied.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert printed.returncode == 0, printed.stderr[-2000:]
    document = json.loads(printed.stdout)
    assert preview.unseen(document) == 0
    resources = preview.resources(document)
    assert len(resources) > 100
    assert evaluate(kubernetes.RULES, resources) == []


def test_destroy_leaves_nothing(stack: auto.Stack, api: Api):
    declared = apps_manifests.manifests(recorded())
    stack.destroy(on_output=_show)
    assert [r["type"] for r in stack.export_stack().deployment.get("resources", []) if "pulumi:" not in r["type"]] == []
    left = []
    for manifest in declared:
        metadata = manifest["metadata"]
        try:
            api.get(manifest["apiVersion"], manifest["kind"], metadata["name"], metadata.get("namespace", ""))
        except RefusedError as error:
            assert error.status == 404, error  # noqa: PT017 -- anything else is no absence
        else:
            left.append(f"{manifest['kind']} {metadata['name']}")
    assert left == []
    # Claims of StatefulSets are kept on purpose, but not beyond their namespace.
    assert until(lambda: not api.find("v1", "PersistentVolumeClaim"))
