"""What machines are told, read as k3s, bash, cloud-init and Kubernetes would."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra import cluster, config
from infra.config import FoundationConfig, HostRole

Fill = Callable[..., tuple[dict[str, str], frozenset[str]]]
FACTS = cluster.JoinFacts("eu-central-1", "group", "joined", "p/aws/token", "artefacts")


@pytest.fixture
def prod(filled: Fill) -> FoundationConfig:
    return config.read("foundation-prod", *filled("foundation-prod"))


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed; the runbook in docs/foundation.md says which packages have the tools")
    return path


def user_data(prod: FoundationConfig, group: int = 0, facts: cluster.JoinFacts = FACTS) -> str:
    return cluster.user_data(prod, prod.clouds[0].site, prod.node_groups[group], facts)


def test_the_overlay_is_told_the_size_of_the_tunnel(prod: FoundationConfig):
    assert json.loads(cluster.flannel(prod).text)["Backend"] == {"Type": "vxlan", "MTU": 1446}


def test_servers_encrypt_secrets_audit_and_admit_restricted_pods_only(prod: FoundationConfig):
    server = cluster.server(prod, prod.onprem.servers[0])
    assert server["secrets-encryption"] is True
    assert server["etcd-snapshot-schedule-cron"] == "0 * * * *"
    arguments = server["kube-apiserver-arg"]
    assert isinstance(arguments, list)
    assert "enable-admission-plugins=NodeRestriction" in arguments
    files = {f.path for f in cluster.host_files(prod, prod.onprem.servers[0])}
    named = {a.partition("=")[2] for a in arguments if "-file=" in a}
    assert named <= files
    defaults = yaml.safe_load(cluster.admission().text)["plugins"][0]["configuration"]["defaults"]
    assert defaults["enforce"] == "restricted"


def test_no_body_of_a_secret_reaches_the_audit_log():
    rules = yaml.safe_load(cluster.audit().text)["rules"]
    bodies = [r for r in rules if r["level"] in ("Request", "RequestResponse")]
    assert all("resources" in r for r in bodies)
    assert not [g for r in bodies for g in r["resources"] if g.get("group", "") == ""]
    assert rules[-1] == {"level": "Metadata"}


def test_a_lone_server_takes_pods_and_one_among_others_does_not(prod: FoundationConfig):
    assert "node-taint" in cluster.server(prod, prod.onprem.servers[0])
    lone = dataclasses.replace(prod, onprem=dataclasses.replace(prod.onprem, hosts=prod.onprem.servers[:1]))
    assert "node-taint" not in cluster.server(lone, lone.onprem.servers[0])


def test_every_node_reserves_room_and_says_where_it_is(prod: FoundationConfig):
    told = [
        cluster.server(prod, prod.onprem.servers[0]),
        cluster.agent(prod, prod.onprem.agents[0]),
        cluster.gpu_config(prod, prod.clouds[0].site, prod.node_groups[0]),
    ]
    for node in told:
        arguments, labels = node["kubelet-arg"], node["node-label"]
        assert isinstance(arguments, list)
        assert isinstance(labels, list)
        assert any(a.startswith("system-reserved=") for a in arguments)
        assert any(label.startswith("topology.kubernetes.io/region=") for label in labels)
        assert any(label.startswith("rankbridge.io/site=") for label in labels)


def test_gpu_nodes_are_tainted(prod: FoundationConfig):
    told = cluster.gpu_config(prod, prod.clouds[0].site, prod.node_groups[0])
    assert told["node-taint"] == ["nvidia.com/gpu=present:NoSchedule"]


def test_user_data_fits_what_ec2_takes(prod: FoundationConfig):
    assert len(user_data(prod).encode()) < cluster.USER_DATA_LIMIT
    with pytest.raises(ValueError, match="EC2 takes 16384"):
        user_data(prod, facts=dataclasses.replace(FACTS, group="g" * 16_000))


def test_the_toolkit_comes_before_k3s_and_the_token_last():
    script = cluster.JOIN_SCRIPT
    order = [
        "nvidia-ctk",
        "/usr/local/bin/k3s",
        "Warmed:*)",
        "provider-id=aws:///",
        "get-secret-value",
        "restart k3s-agent",
    ]
    positions = [script.index(part) for part in order]
    assert positions == sorted(positions)


@given(st.text(max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_no_value_ends_a_line_of_user_data_early(prod: FoundationConfig, text: str):
    document = yaml.safe_load(user_data(prod, facts=dataclasses.replace(FACTS, artefacts=text)))
    (environment,) = (f["content"] for f in document["write_files"] if f["path"] == "/etc/rankbridge/join.env")
    ran = subprocess.run(
        ["bash", "-c", f'{environment}\nprintf %s "$RB_ARTEFACTS"'], capture_output=True, check=False
    ) if "\x00" not in text and text.isprintable() else None  # fmt: skip
    if ran is not None:
        assert ran.stdout.decode() == text


def test_a_node_without_internet_gets_its_images_and_its_login_to_ecr_before_it_joins(
    prod: FoundationConfig, tmp_path: Path
):
    """The join script runs for real, in a root of its own, with AWS and systemd replaced by recorders."""
    root, bin_, calls = tmp_path / "root", tmp_path / "bin", tmp_path / "calls"
    bucket = tmp_path / "bucket"
    for directory in (root / "usr/local/bin", root / "etc/rancher/k3s", bin_, bucket):
        directory.mkdir(parents=True)
    for name in ("k3s", "k3s-airgap-images-amd64.tar.zst", "ecr-credential-provider"):
        (bucket / name).write_text(name)
    fakes = {
        "aws": f'case "$1 $2" in "s3 cp") cp {bucket}/"${{4##*/}}" "$5";; *) echo token;; esac',
        "curl": "echo InService",
        "nvidia-ctk": ":",
        "nvidia-smi": ":",
        "systemctl": ":",
    }
    for name, body in fakes.items():
        (bin_ / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{calls}\n{body}\n')
        (bin_ / name).chmod(0o755)
    script = cluster.JOIN_SCRIPT
    for prefix in ("/etc/", "/usr/local/bin/", "/var/lib/"):
        script = script.replace(prefix, f"{root}{prefix}")
    environment = {
        "PATH": f"{bin_}:/usr/bin:/bin",
        "RB_K3S_SHA256": hashlib.sha256(b"k3s").hexdigest(),
        **{f"RB_{name}": "x" for name in ("GROUP", "LAUNCH_HOOK", "TOKEN_SECRET", "ARTEFACTS", "K3S_VERSION")},
    }

    def run() -> tuple[int, list[str]]:
        calls.write_text("")
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, check=False)
        return done.returncode, calls.read_text().splitlines()

    code, first = run()
    assert code == 0
    images = root / "var/lib/rancher/k3s/agent/images/k3s-airgap-images-amd64.tar.zst"
    provider = root / cluster.CREDENTIALS.lstrip("/") / "bin" / "ecr-credential-provider"
    assert images.exists()
    assert provider.stat().st_mode & 0o777 == 0o755
    copied = [i for i, call in enumerate(first) if call.startswith("aws s3 cp")]
    assert len(copied) == 3
    assert max(copied) < first.index("systemctl restart k3s-agent")
    assert any("--lifecycle-action-result CONTINUE" in call for call in first)
    code, again = run()
    assert code == 0
    assert not [call for call in again if call.startswith("aws s3 cp")]
    provider.unlink()
    (bucket / "ecr-credential-provider").unlink()
    code, failed = run()
    assert code != 0
    assert any("--lifecycle-action-result ABANDON" in call for call in failed)
    assert "systemctl restart k3s-agent" not in failed
    # The provider's name in the kubelet's configuration is its file's.
    files = {f["path"]: f["content"] for f in yaml.safe_load(user_data(prod))["write_files"]}
    (declared,) = yaml.safe_load(files[f"{cluster.CREDENTIALS}/config.yaml"])["providers"]
    assert declared["name"] == provider.name


def check_shell(path: Path, shell: str) -> None:
    parsed = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    found = subprocess.run(
        [tool("shellcheck"), f"--shell={shell}", "--severity=style", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout


def test_the_join_script_is_sound_bash(tmp_path: Path):
    path = tmp_path / "join"
    path.write_text(cluster.JOIN_SCRIPT)
    check_shell(path, "bash")


@pytest.mark.parametrize("airgap", [False, True])
@pytest.mark.parametrize("role", list(HostRole))
def test_a_hosts_script_is_sound_shell(
    prod: FoundationConfig,
    tmp_path: Path,
    role: HostRole,
    airgap: bool,  # noqa: FBT001 -- a table
):
    changed = dataclasses.replace(prod, onprem=dataclasses.replace(prod.onprem, airgap=airgap))
    host = changed.onprem.servers[0] if role is HostRole.SERVER else changed.onprem.agents[0]
    extra = snapshot_files() if role is HostRole.SERVER else ()
    text = cluster.host_script(changed, host, [cluster.File(cluster.AGENT_TOKEN, "t")], extra)
    path = tmp_path / "host"
    path.write_text(text)
    check_shell(path, "sh")


def snapshot_files() -> tuple[cluster.File, ...]:
    return cluster.snapshot_files(
        bucket="snapshots",
        key_alias="alias/x",
        endpoint="https://bucket.vpce-1.s3.eu-central-1.vpce.amazonaws.com",
        region="eu-central-1",
        profile=cluster.roles_anywhere_profile(name="backup", trust_anchor="arn:a", profile="arn:p", role="arn:r"),
    )


def test_snapshots_leave_with_a_certificate_and_no_key():
    text = "".join(f.text for f in snapshot_files())
    assert "credential_process = /usr/local/bin/aws_signing_helper" in text
    assert "aws_secret_access_key" not in text
    assert "s3://snapshots/etcd/%H/" in text


def test_a_host_script_installs_what_it_says_and_a_second_run_changes_nothing(prod: FoundationConfig, tmp_path: Path):
    """The script runs for real, in a root of its own, with systemctl and its like replaced by recorders."""
    root, bin_ = tmp_path / "root", tmp_path / "bin"
    binary = b"#!/bin/sh\n"
    sha256 = hashlib.sha256(binary).hexdigest()
    changed = dataclasses.replace(
        prod,
        k3s=dataclasses.replace(prod.k3s, sha256=sha256),
        onprem=dataclasses.replace(prod.onprem, airgap=True),
    )
    source = root / cluster.AIRGAP.lstrip("/")
    source.mkdir(parents=True)
    (source / "k3s").write_bytes(binary)
    (source / "k3s-airgap-images-amd64.tar.zst").write_bytes(b"images")
    (root / "usr/local/bin").mkdir(parents=True)
    bin_.mkdir()
    calls = tmp_path / "calls"
    for name in ("systemctl", "sysctl", "cloud-init"):
        (bin_ / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{calls}\n')
        (bin_ / name).chmod(0o755)
    script = cluster.host_script(changed, changed.onprem.servers[0], [cluster.File(cluster.SERVER_TOKEN, "hidden")])
    for prefix in ("/etc/", "/usr/local/bin/", "/var/lib/"):
        script = script.replace(prefix, f"{root}{prefix}")

    def run() -> list[str]:
        calls.write_text("")
        environment = {"PATH": f"{bin_}:/usr/bin:/bin"}
        done = subprocess.run(["sh", "-s"], input=script, text=True, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert "hidden" not in done.stdout + done.stderr
        return calls.read_text().splitlines()

    assert "systemctl restart k3s" in run()
    assert (root / "usr/local/bin/k3s").read_bytes() == binary
    token = root / cluster.SERVER_TOKEN.lstrip("/")
    assert token.read_text() == "hidden"
    assert token.stat().st_mode & 0o777 == 0o600
    again = run()
    assert "systemctl restart k3s" not in again
    assert "cloud-init status --wait" in again
    (source / "k3s").write_bytes(b"another")
    (root / "usr/local/bin/k3s").write_bytes(b"another")
    refused = subprocess.run(["sh", "-s"], input=script, text=True, capture_output=True, check=False,
                             env={"PATH": f"{bin_}:/usr/bin:/bin"})  # fmt: skip
    assert refused.returncode != 0
    assert "SHA-256" in refused.stderr


def test_cloud_init_accepts_the_user_data_and_refuses_a_broken_one(prod: FoundationConfig, tmp_path: Path):
    command = tool("cloud-init")

    def check(text: str) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "user-data"
        path.write_text(text)
        return subprocess.run(
            [command, "schema", "--config-file", str(path)], capture_output=True, text=True, check=False
        )

    accepted = check(user_data(prod))
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    assert check(user_data(prod).replace("write_files:", "write_files: 5\nx:")).returncode != 0


@pytest.mark.parametrize("text", ["", "[]", "clusters: []", "clusters: [{}, {}]"])
def test_what_is_no_kubeconfig_is_refused(prod: FoundationConfig, text: str):
    with pytest.raises(ValueError, match="no kubeconfig"):
        cluster.kubeconfig(text, prod)


def test_names_of_files_are_unique_per_host(prod: FoundationConfig):
    for host in prod.onprem.hosts:
        paths: list[Any] = [f.path for f in cluster.host_files(prod, host)]
        assert len(paths) == len(set(paths))
