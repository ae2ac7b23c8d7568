"""What a machine is told so that it becomes a node: k3s configuration, admission and audit files, scripts, user data.

Pure: values in, text out. Nothing secret is in any file or user data rendered here; tokens travel through stdin of an
SSH command (on-prem, `infra.onprem`) or are fetched by the node's own role (cloud). Every YAML and JSON text is written
by a serialiser, so that no value can end a line early.

Sources: k3s documentation, "Server/Agent configuration reference", "CIS hardening guide", "Air-gap install" and
"NVIDIA container runtime"; cloud-provider-aws, "Credential Provider"; flannel's Documentation/backends.md (the vxlan
backend's MTU is that of the outer packet); Amazon EC2 Auto Scaling, "Retrieve the target lifecycle state through
instance metadata".
"""

from __future__ import annotations

import base64
import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final

import yaml

from infra.config import FoundationConfig, Host, HostRole, NodeGroup
from infra.plan import NODE_PREFIX, Site

API_PORT: Final = 6_443
KUBELET_PORT: Final = 10_250
VXLAN_PORT: Final = 8_472
USER_DATA_LIMIT: Final = 16_384
"""Bytes that EC2 takes before encoding."""

CONFIG: Final = "/etc/rancher/k3s/config.yaml"
FLANNEL: Final = "/etc/rancher/k3s/flannel.json"
ADMISSION: Final = "/etc/rancher/k3s/admission.yaml"
AUDIT: Final = "/etc/rancher/k3s/audit.yaml"
SERVER_TOKEN: Final = "/etc/rancher/k3s/server-token"  # noqa: S105 -- a path
AGENT_TOKEN: Final = "/etc/rancher/k3s/agent-token"  # noqa: S105 -- a path
CREDENTIALS: Final = "/var/lib/rancher/credentialprovider"
"""Where k3s looks for the kubelet's credential providers, and for their configuration."""
SYSCTL: Final = "/etc/sysctl.d/90-kubelet.conf"
AIRGAP: Final = "/var/lib/rankbridge/k3s"
"""Where an operator puts the binary and the image archive of an air-gapped host."""

GPU_TAINT: Final = "nvidia.com/gpu=present:NoSchedule"
CONTROL_PLANE_TAINT: Final = "CriticalAddonsOnly=true:NoExecute"

_RESERVED: Final = (
    "kube-reserved=cpu=250m,memory=512Mi,ephemeral-storage=1Gi",
    "system-reserved=cpu=250m,memory=512Mi,ephemeral-storage=1Gi",
    "eviction-hard=memory.available<200Mi,nodefs.available<10%,imagefs.available<10%",
)


@dataclasses.dataclass(frozen=True)
class File:
    """A file on a node. `mode` is octal text."""

    path: str
    text: str
    mode: str = "0600"


def to_yaml(document: object) -> str:
    """YAML in the order given."""
    return yaml.safe_dump(document, sort_keys=False, width=1_000)


def flannel(config: FoundationConfig) -> File:
    """The overlay with the outer packet's size stated: flannel cannot see the tunnel behind its interface."""
    document = {
        "Network": str(config.network.pods),
        "EnableIPv4": True,
        "EnableIPv6": False,
        "Backend": {"Type": "vxlan", "MTU": config.network.mtu},
    }
    return File(FLANNEL, json.dumps(document, indent=1) + "\n")


def admission() -> File:
    """Pod Security `restricted` wherever a namespace does not say otherwise."""
    return File(
        ADMISSION,
        to_yaml(
            {
                "apiVersion": "apiserver.config.k8s.io/v1",
                "kind": "AdmissionConfiguration",
                "plugins": [
                    {
                        "name": "PodSecurity",
                        "configuration": {
                            "apiVersion": "pod-security.admission.config.k8s.io/v1",
                            "kind": "PodSecurityConfiguration",
                            "defaults": {
                                "enforce": "restricted",
                                "enforce-version": "latest",
                                "audit": "restricted",
                                "audit-version": "latest",
                                "warn": "restricted",
                                "warn-version": "latest",
                            },
                            "exemptions": {"usernames": [], "runtimeClasses": [], "namespaces": ["kube-system"]},
                        },
                    }
                ],
            }
        ),
    )


def audit() -> File:
    """Who did what, without the contents: bodies of secrets never reach a log."""
    quiet = ["nodes", "nodes/status", "endpoints", "services", "services/status"]
    return File(
        AUDIT,
        to_yaml(
            {
                "apiVersion": "audit.k8s.io/v1",
                "kind": "Policy",
                "omitStages": ["RequestReceived"],
                "rules": [
                    {"level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*", "/version"]},
                    {"level": "None", "resources": [{"group": "coordination.k8s.io", "resources": ["leases"]}]},
                    {
                        "level": "None",
                        "users": ["system:kube-proxy", "system:kube-scheduler", "system:kube-controller-manager"],
                        "verbs": ["get", "list", "watch"],
                        "resources": [{"group": "", "resources": quiet}],
                    },
                    {
                        "level": "RequestResponse",
                        "verbs": ["create", "update", "patch", "delete"],
                        "resources": [{"group": "rbac.authorization.k8s.io"}],
                    },
                    {"level": "Metadata"},
                ],
            }
        ),
    )


def kernel() -> File:
    """What the kubelet wants of the kernel when it may not change it (protect-kernel-defaults)."""
    text = "vm.panic_on_oom=0\nvm.overcommit_memory=1\nkernel.panic=10\nkernel.panic_on_oops=1\n"
    return File(SYSCTL, text, "0644")


def _labels(site: Site, **more: str) -> list[str]:
    return [f"{k}={v}" for k, v in {**site.labels(), **more}.items()]


def server(config: FoundationConfig, host: Host) -> dict[str, object]:
    """k3s configuration of a control-plane host. The first server founds the etcd cluster, the others join it."""
    servers = config.onprem.servers
    first = servers[0]
    joining = {"cluster-init": True} if host == first else {"server": f"https://{first.address}:{API_PORT}"}
    names = dict.fromkeys([str(config.k3s.api), *(str(s.address) for s in servers), *(s.name for s in servers)])
    return {
        **joining,
        "node-name": host.name,
        "node-ip": str(host.address),
        "token-file": SERVER_TOKEN,
        "agent-token-file": AGENT_TOKEN,
        "tls-san": list(names),
        "cluster-cidr": str(config.network.pods),
        "service-cidr": str(config.network.services),
        "cluster-dns": str(config.network.services.network_address + 10),
        "flannel-backend": "vxlan",
        "flannel-conf": FLANNEL,
        "secrets-encryption": True,
        "protect-kernel-defaults": True,
        "write-kubeconfig-mode": "0600",
        "etcd-snapshot-schedule-cron": "0 * * * *",
        "etcd-snapshot-retention": 48,
        "kube-apiserver-arg": [
            "enable-admission-plugins=NodeRestriction",
            f"admission-control-config-file={ADMISSION}",
            f"audit-policy-file={AUDIT}",
            "audit-log-path=/var/lib/rancher/k3s/server/logs/audit.log",
            "audit-log-maxage=30",
            "audit-log-maxbackup=10",
            "audit-log-maxsize=100",
        ],
        "kube-controller-manager-arg": [f"node-cidr-mask-size={NODE_PREFIX}"],
        "kubelet-arg": list(_RESERVED),
        "node-label": _labels(host.site),
        # A lone server has to run pods as well.
        **({"node-taint": [CONTROL_PLANE_TAINT]} if config.onprem.agents else {}),
    }


def agent(config: FoundationConfig, host: Host) -> dict[str, object]:
    """k3s configuration of a private host that only runs pods."""
    return {
        "node-name": host.name,
        "node-ip": str(host.address),
        "server": f"https://{config.k3s.api}:{API_PORT}",
        "token-file": AGENT_TOKEN,
        "flannel-conf": FLANNEL,
        "protect-kernel-defaults": True,
        "kubelet-arg": list(_RESERVED),
        "node-label": _labels(host.site),
    }


def host_files(config: FoundationConfig, host: Host) -> tuple[File, ...]:
    """Every file of a private host that holds no secret."""
    if host.role is HostRole.SERVER:
        return (File(CONFIG, to_yaml(server(config, host))), flannel(config), admission(), audit(), kernel())
    return (File(CONFIG, to_yaml(agent(config, host))), flannel(config), kernel())


def unit(role: HostRole) -> str:
    """The systemd unit, as the k3s installer writes it."""
    name = "k3s" if role is HostRole.SERVER else "k3s-agent"
    return f"""\
[Unit]
Description=Lightweight Kubernetes ({name})
Documentation=https://k3s.io
Wants=network-online.target
After=network-online.target

[Install]
WantedBy=multi-user.target

[Service]
Type={"notify" if role is HostRole.SERVER else "exec"}
KillMode=process
Delegate=yes
LimitNOFILE=1048576
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
TimeoutStartSec=0
Restart=always
RestartSec=5s
ExecStartPre=-/sbin/modprobe br_netfilter
ExecStartPre=-/sbin/modprobe overlay
ExecStart=/usr/local/bin/k3s {role.value}
"""


def host_script(config: FoundationConfig, host: Host, secrets: Sequence[File], extra: Sequence[File] = ()) -> str:
    """The script that makes a host what its files say; fed to a root shell's stdin, because it holds the tokens.

    It may run any number of times: it restarts k3s only when a file or the binary changed.
    """
    name = "k3s" if host.role is HostRole.SERVER else "k3s-agent"
    service = File(f"/etc/systemd/system/{name}.service", unit(host.role), "0644")
    everything = (*host_files(config, host), *extra, *secrets, service)
    puts = "\n".join(
        f"put {shlex.quote(f.path)} {f.mode} {base64.b64encode(f.text.encode()).decode()}" for f in everything
    )
    return _HOST_SCRIPT.format(
        puts=puts,
        name=name,
        sha256=config.k3s.sha256,
        url=shlex.quote(config.k3s.binary_url),
        airgap="yes" if config.onprem.airgap else "no",
        directory=AIRGAP,
        timers=" ".join(PurePosixPath(f.path).name for f in extra if f.path.endswith(".timer")),
    )


_HOST_SCRIPT: Final = """\
set -eu
umask 077
airgap={airgap}
timers='{timers}'
changed=no

if command -v cloud-init >/dev/null 2>&1; then
    # 2 is "done, with recoverable errors"
    cloud-init status --wait >/dev/null || [ $? -eq 2 ]
fi

put() {{
    mkdir -p "$(dirname "$1")"
    printf %s "$3" | base64 -d >"$1.new"
    chmod "$2" "$1.new"
    if cmp -s "$1.new" "$1"; then
        rm "$1.new"
    else
        mv "$1.new" "$1"
        changed=yes
    fi
}}

is_k3s() {{
    [ -f "$1" ] && echo "{sha256}  $1" | sha256sum -c - >/dev/null 2>&1
}}

{puts}

if ! is_k3s /usr/local/bin/k3s; then
    if [ "$airgap" = yes ]; then
        cp {directory}/k3s /usr/local/bin/k3s.new
        mkdir -p /var/lib/rancher/k3s/agent/images
        cp {directory}/k3s-airgap-images-amd64.tar.zst /var/lib/rancher/k3s/agent/images/
    else
        curl -fsSL --retry 5 --proto =https -o /usr/local/bin/k3s.new {url}
    fi
    if ! is_k3s /usr/local/bin/k3s.new; then
        rm -f /usr/local/bin/k3s.new
        echo "k3s: the binary's SHA-256 is not the pinned one" >&2
        exit 1
    fi
    chmod 0755 /usr/local/bin/k3s.new
    mv /usr/local/bin/k3s.new /usr/local/bin/k3s
    ln -sf k3s /usr/local/bin/kubectl
    changed=yes
fi

sysctl -q -p {sysctl}
systemctl daemon-reload
systemctl enable --quiet {name}
if [ $changed = yes ]; then
    systemctl restart {name}
fi
systemctl is-active --quiet {name} || systemctl start {name}
for timer in $timers; do
    systemctl enable --quiet --now "$timer"
done
""".replace("{sysctl}", SYSCTL)


def kubeconfig(text: str, config: FoundationConfig) -> str:
    """The admin kubeconfig of the first server, pointing at the cluster's address instead of at itself.

    Raises ValueError when the text is no kubeconfig with one cluster.
    """
    document = yaml.safe_load(text)
    try:
        (cluster,) = document["clusters"]
        cluster["cluster"]["server"] = f"https://{config.k3s.api}:{API_PORT}"
    except (KeyError, TypeError, ValueError):
        raise ValueError("the first server's k3s.yaml is no kubeconfig with one cluster") from None
    return to_yaml(document)


# Cloud nodes


@dataclasses.dataclass(frozen=True)
class JoinFacts:
    """What a cloud node's user data states: names and addresses only, nothing secret."""

    region: str
    group: str
    """Name of the Auto Scaling group."""
    launch_hook: str
    token_secret: str
    """Name of the agent token in Secrets Manager; the node reads it with its own role."""
    artefacts: str
    """Bucket that holds, under `k3s/<version>/`, k3s, its image archive and `ecr-credential-provider`."""
    aws_endpoint: str | None = None
    """Only where AWS is an emulator."""


def node_labels(site: Site, group: NodeGroup) -> dict[str, str]:
    """Labels of a GPU node that are known before it starts; zone and purchase are added by the node."""
    labels = site.labels()
    del labels["topology.kubernetes.io/zone"]
    return {**labels, "rankbridge.io/node-group": group.name, "nvidia.com/gpu.present": "true"}


def gpu_config(config: FoundationConfig, site: Site, group: NodeGroup) -> dict[str, object]:
    """k3s configuration of a GPU node, without what the node alone knows."""
    return {
        "server": f"https://{config.k3s.api}:{API_PORT}",
        "token-file": AGENT_TOKEN,
        "flannel-conf": FLANNEL,
        "protect-kernel-defaults": True,
        "kubelet-arg": list(_RESERVED),
        "node-label": [f"{k}={v}" for k, v in node_labels(site, group).items()],
        "node-taint": [GPU_TAINT],
    }


def registry_credentials() -> File:
    """How a cloud node's kubelet logs in to ECR: by its role, through a provider beside the kubelet."""
    document = {
        "apiVersion": "kubelet.config.k8s.io/v1",
        "kind": "CredentialProviderConfig",
        "providers": [
            {
                "name": "ecr-credential-provider",
                "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
                "matchImages": ["*.dkr.ecr.*.amazonaws.com"],
                "defaultCacheDuration": "12h",
            }
        ],
    }
    return File(f"{CREDENTIALS}/config.yaml", to_yaml(document))


def environment(config: FoundationConfig, facts: JoinFacts) -> str:
    """The join script's environment file."""
    values = {
        "AWS_DEFAULT_REGION": facts.region,
        "RB_GROUP": facts.group,
        "RB_LAUNCH_HOOK": facts.launch_hook,
        "RB_TOKEN_SECRET": facts.token_secret,
        "RB_ARTEFACTS": facts.artefacts,
        "RB_K3S_VERSION": config.k3s.version,
        "RB_K3S_SHA256": config.k3s.sha256,
    }
    if facts.aws_endpoint is not None:
        values["AWS_ENDPOINT_URL"] = facts.aws_endpoint
    return "".join(f"{k}={shlex.quote(v)}\n" for k, v in values.items())


def user_data(config: FoundationConfig, site: Site, group: NodeGroup, facts: JoinFacts) -> str:
    """The cloud-config of a GPU node. Raises ValueError beyond EC2's limit."""
    files = (
        File(CONFIG, to_yaml(gpu_config(config, site, group))),
        flannel(config),
        kernel(),
        registry_credentials(),
        File("/etc/rankbridge/join.env", environment(config, facts)),
        File(JOIN_SCRIPT_PATH, JOIN_SCRIPT, "0755"),
        File("/etc/systemd/system/k3s-agent.service", unit(HostRole.AGENT), "0644"),
        File("/etc/systemd/system/rankbridge-join.service", _JOIN_UNIT, "0644"),
    )
    document: Mapping[str, object] = {
        "write_files": [
            {"path": f.path, "permissions": f.mode, "owner": "root:root", "content": f.text} for f in files
        ],
        "runcmd": [
            ["sysctl", "-q", "-p", SYSCTL],
            ["systemctl", "daemon-reload"],
            ["systemctl", "enable", "--now", "--no-block", "rankbridge-join.service"],
        ],
    }
    text = "#cloud-config\n" + to_yaml(document)
    if len(text.encode()) > USER_DATA_LIMIT:
        raise ValueError(f"user data of {group.name} has {len(text.encode())} bytes; EC2 takes {USER_DATA_LIMIT}")
    return text


JOIN_SCRIPT_PATH: Final = "/usr/local/sbin/rankbridge-join"

_JOIN_UNIT: Final = f"""\
[Unit]
Description=Join the rankbridge cluster, at every boot: a node from a warm pool is stopped before it joins
Wants=network-online.target
After=network-online.target

[Install]
WantedBy=multi-user.target

[Service]
Type=oneshot
EnvironmentFile=/etc/rankbridge/join.env
ExecStart={JOIN_SCRIPT_PATH}
"""

JOIN_SCRIPT: Final = r"""#!/bin/bash
# Makes this instance a node, or has it replaced. Safe to run at every boot.
set -Eeuo pipefail
umask 077

imds() {
    local token
    token=$(curl -fsS -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' http://169.254.169.254/latest/api/token)
    curl -fsS -H "X-aws-ec2-metadata-token: $token" "http://169.254.169.254/latest/meta-data/$1"
}

instance=$(imds instance-id)

answer_hook() {
    aws autoscaling complete-lifecycle-action --auto-scaling-group-name "$RB_GROUP" \
        --lifecycle-hook-name "$RB_LAUNCH_HOOK" --instance-id "$instance" --lifecycle-action-result "$1" || true
}
trap 'answer_hook ABANDON' ERR

# k3s looks for the NVIDIA runtime once, when it starts: the toolkit comes first.
if ! command -v nvidia-ctk >/dev/null; then
    apt-get update -q && apt-get install -qy nvidia-container-toolkit
fi
nvidia-smi --list-gpus

is_k3s() {
    echo "$RB_K3S_SHA256  $1" | sha256sum -c - >/dev/null 2>&1
}
artefact() {
    aws s3 cp --only-show-errors "s3://$RB_ARTEFACTS/k3s/$RB_K3S_VERSION/$1" "$2"
}
# Without these no pod starts: the sandbox's image is on Docker Hub, ours are in ECR, and both want more than a role.
images=/var/lib/rancher/k3s/agent/images/k3s-airgap-images-amd64.tar.zst
provider=/var/lib/rancher/credentialprovider/bin/ecr-credential-provider
mkdir -p "${images%/*}" "${provider%/*}"
if ! [ -x "$provider" ]; then
    artefact "${images##*/}" "$images"
    artefact "${provider##*/}" "$provider.new"
    chmod 0755 "$provider.new"
    mv "$provider.new" "$provider"
fi
if ! is_k3s /usr/local/bin/k3s; then
    artefact k3s /usr/local/bin/k3s.new
    is_k3s /usr/local/bin/k3s.new
    chmod 0755 /usr/local/bin/k3s.new
    mv /usr/local/bin/k3s.new /usr/local/bin/k3s
fi

case $(imds autoscaling/target-lifecycle-state) in
Warmed:*)
    # Prepared, and stopped until it is needed.
    answer_hook CONTINUE
    exit 0
    ;;
esac

zone=$(imds placement/availability-zone)
lifecycle=$(imds instance-life-cycle)
type=$(imds instance-type)
address=$(imds local-ipv4)
mkdir -p /etc/rancher/k3s/config.yaml.d
cat >/etc/rancher/k3s/config.yaml.d/instance.yaml <<YAML
node-name: $instance
node-ip: $address
kubelet-arg+:
  - provider-id=aws:///$zone/$instance
node-label+:
  - topology.kubernetes.io/zone=$zone
  - rankbridge.io/lifecycle=$lifecycle
  - rankbridge.io/gpu-type=$type
YAML

aws secretsmanager get-secret-value --secret-id "$RB_TOKEN_SECRET" --query SecretString --output text \
    >/etc/rancher/k3s/agent-token

systemctl enable --quiet k3s-agent
systemctl restart k3s-agent
for _ in $(seq 120); do
    if curl -fsS http://127.0.0.1:10248/healthz >/dev/null 2>&1; then
        answer_hook CONTINUE
        exit 0
    fi
    sleep 2
done
echo "the kubelet did not become healthy within four minutes" >&2
false
"""


# etcd snapshots leave the site

SNAPSHOT_TIMER: Final = "rankbridge-snapshots.timer"


def snapshot_files(*, bucket: str, key_alias: str, endpoint: str, region: str, profile: str) -> tuple[File, ...]:
    """The hourly copy of etcd's snapshots to S3, with a certificate instead of a key (IAM Roles Anywhere)."""
    command = (
        "/usr/local/bin/aws s3 sync --only-show-errors --sse aws:kms "
        f"--sse-kms-key-id {shlex.quote(key_alias)} --endpoint-url {shlex.quote(endpoint)} "
        f"/var/lib/rancher/k3s/server/db/snapshots s3://{bucket}/etcd/%H/"
    )
    service = f"""\
[Unit]
Description=Copy etcd snapshots to S3

[Service]
Type=oneshot
Environment=AWS_CONFIG_FILE=/etc/rankbridge/aws-config AWS_PROFILE=backup AWS_REGION={region}
ExecStart={command}
"""
    timer = """\
[Unit]
Description=Copy etcd snapshots to S3 ten minutes after they are taken

[Timer]
OnCalendar=*-*-* *:10:00
RandomizedDelaySec=120
Persistent=true

[Install]
WantedBy=timers.target
"""
    return (
        File("/etc/rankbridge/aws-config", profile),
        File("/etc/systemd/system/rankbridge-snapshots.service", service, "0644"),
        File(f"/etc/systemd/system/{SNAPSHOT_TIMER}", timer, "0644"),
    )


def roles_anywhere_profile(*, name: str, trust_anchor: str, profile: str, role: str) -> str:
    """An AWS configuration file whose credentials come from the host's certificate.

    The helper is AWS's aws_signing_helper; certificate and key are the host's own, issued by the trust anchor's CA.
    """
    helper = (
        "/usr/local/bin/aws_signing_helper credential-process "
        "--certificate /etc/rankbridge/identity.crt --private-key /etc/rankbridge/identity.key "
        f"--trust-anchor-arn {trust_anchor} --profile-arn {profile} --role-arn {role}"
    )
    return f"[profile {name}]\ncredential_process = {helper}\n"
