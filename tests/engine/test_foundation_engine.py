"""The foundation on a real engine and LocalStack: up, outputs, an empty second preview, drift seen, nothing left.

Needs the `pulumi` CLI with the aws, command and kubernetes plugins, and LocalStack (make localstack-install). The
project is a copy in a temporary directory with a file backend: the checkout is not written to, and no cloud is spoken
to.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from pulumi import automation as auto

from infra import outputs
from infra.emulator import ENVIRONMENT, ROOT, STACK, Emulator, Project, project
from infra.iam import DataClass, Role
from infra.rules import evaluate, preview
from infra.rules.foundation import RULES

pytestmark = [pytest.mark.real_parts, pytest.mark.timeout(1200)]
Client = Callable[[str], Any]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    if shutil.which("pulumi") is None:
        pytest.skip("the pulumi CLI is not on PATH")
    if not (ENVIRONMENT / "bin" / "python").exists():
        pytest.skip("LocalStack is not installed: make localstack-install")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = Emulator(tmp_path_factory.mktemp("localstack"), port)
    started.start()
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def client(emulator: Emulator) -> Client:
    def make(service: str) -> Any:  # noqa: ANN401 -- boto3 makes its clients at run time
        return boto3.client(
            service,
            endpoint_url=emulator.endpoint,
            region_name="eu-central-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",  # noqa: S106 -- the emulator takes anything
            config=Config(retries={"max_attempts": 1}),
        )

    return make


@pytest.fixture(scope="module")
def copied(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return project(tmp_path_factory.mktemp("project"), emulator.endpoint, virtualenv=Path(sys.prefix))


@pytest.fixture(scope="module")
def stack(copied: Project) -> Iterator[auto.Stack]:
    """The stack, brought up; destroyed at the end even when a test failed."""
    options = auto.LocalWorkspaceOptions(env_vars=dict(copied.environment))
    made = auto.create_or_select_stack(stack_name=STACK, work_dir=str(copied.directory), opts=options)
    made.set_all_config({k: auto.ConfigValue(value=v, secret=True) for k, v in copied.secrets.items()})
    try:
        made.up(on_output=_show)
        yield made
    finally:
        made.destroy(on_output=_show)


def _show(line: str) -> None:
    sys.stdout.write(line)


def changes(summary: dict[Any, int] | None) -> dict[str, int]:
    """What an operation would change or changed, without what stays the same."""
    return {str(getattr(k, "value", k)): n for k, n in (summary or {}).items() if str(getattr(k, "value", k)) != "same"}


def test_up_gives_the_outputs_that_the_apps_layer_reads(stack: auto.Stack):
    given = stack.outputs()
    read = outputs.read({k: v.value for k, v in given.items()})
    assert read.environment == "local"
    assert set(read.roles) == {r.value for r in Role}
    assert set(read.buckets) == {d.value for d in DataClass}
    site = read.site("aws")
    assert site.vpc_id
    assert site.vpc_id.startswith("vpc-")
    assert site.queue_url
    assert [g.auto_scaling_group for g in site.node_groups] == ["rankbridge-local-aws-gpu"]
    assert given["vpn_files"].secret
    assert read.vpn_files
    assert "swanctl" in read.vpn_files


@pytest.mark.usefixtures("stack")
def test_what_is_declared_is_there(client: Client):
    groups = client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
    assert [g["AutoScalingGroupName"] for g in groups] == ["rankbridge-local-aws-gpu"]
    assert len(groups[0]["Instances"]) == 1
    buckets = {b["Name"] for b in client("s3").list_buckets()["Buckets"]}
    assert buckets == {f"rankbridge-local-000000000000-{d.value}" for d in DataClass}


def test_a_second_preview_is_empty(stack: auto.Stack):
    assert changes(stack.preview().change_summary) == {}


def test_the_state_holds_no_secret_in_the_clear(stack: auto.Stack, copied: Project):
    state = json.dumps(stack.export_stack().deployment)
    assert not [k for k, v in copied.secrets.items() if v in state]


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
    assert evaluate(RULES, resources) == []


def test_the_policy_pack_lets_the_stack_pass(stack: auto.Stack):
    if not (ROOT / "policy" / ".venv" / "bin" / "python").exists():
        pytest.skip("the policy pack has no environment: make policy-venv")
    stack.preview(policy_packs=[str(ROOT / "policy")])


def test_drift_by_hand_is_seen(stack: auto.Stack, client: Client):
    # Not the models' bucket: object lock keeps its versioning on.
    bucket = f"rankbridge-local-000000000000-{DataClass.DATA.value}"
    # What the emulator reads back otherwise shows without any drift, too: it must not count as having seen it.
    before = changes(stack.preview(refresh=True).change_summary)
    client("s3").put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Suspended"})
    try:
        seen = changes(stack.preview(refresh=True).change_summary)
        assert sum(seen.values()) > sum(before.values())
    finally:
        client("s3").put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})


def test_a_bad_stack_is_refused_with_every_fault_and_touches_nothing(stack: auto.Stack):
    before = len(stack.export_stack().deployment["resources"])
    stack.set_config("rankbridge:vpn.dh_group", auto.ConfigValue("2"), path=True)
    stack.set_config("rankbridge:vpn.cipher", auto.ConfigValue("des"), path=True)
    try:
        with pytest.raises(auto.CommandError) as refused:
            stack.preview()
        assert "vpn.dh_group" in str(refused.value)
        assert "vpn.cipher" in str(refused.value)
    finally:
        stack.remove_config("rankbridge:vpn.dh_group", path=True)
        stack.remove_config("rankbridge:vpn.cipher", path=True)
    assert len(stack.export_stack().deployment["resources"]) == before


def test_a_preview_costs_little_more_than_loading_the_providers(stack: auto.Stack, tmp_path: Path, copied: Project):
    """Preview <= 2.5 times a program that only imports the SDKs and loads the providers, and <= 40 ms a resource."""
    (tmp_path / "infra").mkdir()
    (tmp_path / "stacks").mkdir()
    (tmp_path / "state").mkdir()
    shutil.copy(copied.directory / "Pulumi.yaml", tmp_path / "Pulumi.yaml")
    endpoint = json.loads(stack.get_config("rankbridge:emulator").value)["endpoint"]
    (tmp_path / "infra" / "__main__.py").write_text(
        "import pulumi_aws as aws, pulumi_command, pulumi_kubernetes\n"
        "aws.ec2.Vpc, aws.s3.Bucket, aws.iam.Role, aws.autoscaling.Group, pulumi_command.remote.Command\n"
        "aws.Provider('p', region='eu-central-1', access_key='test', secret_key='test',\n"
        "  skip_credentials_validation=True, skip_metadata_api_check=True,\n"
        f"  endpoints=[aws.ProviderEndpointArgs(sts={endpoint!r})])\n"
    )
    environment = {**copied.environment, "PULUMI_BACKEND_URL": f"file://{tmp_path / 'state'}"}
    options = auto.LocalWorkspaceOptions(env_vars=environment)
    bare = auto.create_or_select_stack(stack_name=STACK, work_dir=str(tmp_path), opts=options)

    def best(of: auto.Stack) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            of.preview()
            times.append(time.perf_counter() - started)
        return min(times)

    least, ours = best(bare), best(stack)
    resources = len(stack.export_stack().deployment["resources"])
    sys.stdout.write(f"preview {ours:.2f} s, providers alone {least:.2f} s, {resources} resources\n")
    assert ours <= 2.5 * least
    assert (ours - least) / resources <= 0.040


def test_destroy_leaves_nothing(stack: auto.Stack, client: Client):
    stack.destroy(on_output=_show)
    assert [r["type"] for r in stack.export_stack().deployment.get("resources", []) if "pulumi:" not in r["type"]] == []
    assert client("s3").list_buckets()["Buckets"] == []
    assert client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"] == []
    ec2 = client("ec2")
    assert [v for v in ec2.describe_vpcs()["Vpcs"] if not v["IsDefault"]] == []
    assert [c for c in ec2.describe_vpn_connections()["VpnConnections"] if c["State"] != "deleted"] == []
    assert [n for n in ec2.describe_nat_gateways()["NatGateways"] if n["State"] != "deleted"] == []
    roles = [r["RoleName"] for r in client("iam").list_roles()["Roles"] if r["RoleName"].startswith("rankbridge-")]
    assert roles == []
    assert client("secretsmanager").list_secrets()["SecretList"] == []


def test_no_stack_file_of_the_checkout_was_written():
    status = subprocess.run(
        ["git", "status", "--porcelain", "infra/stacks"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert status.returncode == 0
    assert status.stdout == ""
