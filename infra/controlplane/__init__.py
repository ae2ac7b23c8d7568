"""Kubernetes on this machine without a kubelet: the real control plane, on loopback, with nodes played by KWOK.

kube-apiserver, kube-scheduler, kube-controller-manager and etcd are built from their Go modules (`go.mod` beside this
file, one each) into `.tools/controlplane/`, started as child processes, and ended with them. Admission, scheduling,
quotas, disruption budgets, rollouts and evictions are Kubernetes' own; what a kubelet would do (containers, network
policies) is not there. Secrets of a control plane are made at its start and lie in its directory, mode 0600.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import yaml

from infra.controlplane.credentials import Credentials, make_credentials

ROOT: Final = Path(__file__).resolve().parents[2]
BINARIES: Final = ROOT / ".tools" / "controlplane"
CRDS: Final = BINARIES / "crds"
"""Definitions of prometheus-operator's and KEDA's kinds, as their Go modules hold them."""
MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "etcd": ("go.etcd.io/etcd/server/v3",),
    "kubernetes": (
        "k8s.io/kubernetes/cmd/kube-apiserver",
        "k8s.io/kubernetes/cmd/kube-controller-manager",
        "k8s.io/kubernetes/cmd/kube-scheduler",
    ),
    "kwok": ("sigs.k8s.io/kwok/cmd/kwok",),
    "kube-score": ("github.com/zegl/kube-score/cmd/kube-score",),
}
"""Module folder beside this file -> the commands that are built from it."""
NAMES: Final[Mapping[str, str]] = {"go.etcd.io/etcd/server/v3": "etcd"}
"""What a command is called where its import path does not say so."""

SERVICE_RANGE: Final = "10.243.0.0/16"
READY_SECONDS: Final = 60
STOP_SECONDS: Final = 10
LEASE_SECONDS: Final = 40


_READY_AGAIN: Final = """
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-ready-again}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
    - {key: .status.phase, operator: In, values: [Running]}
    - {key: '.status.conditions.[] | select( .type == "Ready" ) | .status', operator: NotIn, values: ['True']}
  next:
    statusTemplate: |
      conditions:
      - {type: Ready, status: "True", lastTransitionTime: {{ Now | Quote }}}
"""
"""What KWOK's own stages leave out: a kubelet that comes back reports its pods anew, which the control plane had
called unready meanwhile."""


class ControlPlaneError(RuntimeError):
    """Something is missing or did not come up; the message says what to do."""


def command_name(package: str) -> str:
    """The file that a Go command is built to."""
    return NAMES.get(package, package.rpartition("/")[2])


def missing_binaries() -> list[str]:
    """Commands and definitions that are not built yet, or were built from other versions."""
    from infra.controlplane.build import crds_are_current, is_current  # noqa: PLC0415 - the build is not needed to run

    return [folder for folder in MODULES if not is_current(folder)] + ([] if crds_are_current() else ["crds"])


@dataclasses.dataclass
class ControlPlane:
    """One control plane and its directory (`kubeconfig`, `logs/`, credentials, etcd's data)."""

    home: Path
    binaries: Path = BINARIES
    service_range: str = SERVICE_RANGE
    node_monitor_grace_s: int = 50
    """How long a node may be silent before it counts as lost: Kubernetes' own default."""
    autoscaler_sync_s: int = 15
    """How often the autoscaler of pods looks: Kubernetes' own default."""
    pod_start_ms: int = 0
    """How long a pod is scheduled before KWOK calls it ready."""
    admission: str = ""
    """An AdmissionConfiguration, such as the foundation's."""
    runtime_config: Sequence[str] = ()
    _children: dict[str, subprocess.Popen[bytes]] = dataclasses.field(default_factory=dict)
    _ports: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def kubeconfig(self) -> Path:
        """For an administrator (`system:masters`)."""
        return self.home / "admin.kubeconfig"

    @property
    def front_proxy_ca(self) -> Path:
        """Who signs the certificate that the API server shows to servers behind it."""
        return self.home / "credentials" / "front-proxy-ca.crt"

    @property
    def server(self) -> str:
        """URL of the API server."""
        return f"https://127.0.0.1:{self._ports['apiserver']}"

    def start(self) -> float:
        """Start everything and wait until pods can be scheduled; the seconds that it took. Raises ControlPlaneError."""
        missing = [name for folder in MODULES for name in map(command_name, MODULES[folder])]
        missing = [name for name in missing if name != "kube-score" and not (self.binaries / name).exists()]
        if missing:
            raise ControlPlaneError(f"{', '.join(missing)} not built: make cluster-tools (needs Go; 15 minutes once)")
        began = time.monotonic()
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.home / "logs").mkdir(exist_ok=True)
        names = ("etcd", "etcd-peer", "apiserver", "controller-manager", "scheduler", "kwok")
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        credentials = make_credentials(self.home / "credentials")
        try:
            self._start_etcd()
            self._start_apiserver(credentials)
            self._await("apiserver", "/readyz")
            for name in ("controller-manager", "scheduler", "kwok"):
                self._kubeconfig(name, credentials)
            self._start_controller_manager(credentials)
            self._start_scheduler()
            self._start_kwok()
            self._await("controller-manager", "/healthz")
            self._await("scheduler", "/healthz")
        except BaseException:
            self.stop()
            raise
        return time.monotonic() - began

    def stop(self) -> None:
        """End all children; those that do not go are killed. etcd goes last."""
        last = ("scheduler", "controller-manager", "apiserver", "etcd")
        order = [name for name in self._children if name not in last]
        order += [name for name in last if name in self._children]
        for name in order:
            child = self._children[name]
            # kube-apiserver waits a minute for watchers when it is asked politely, and there is nothing to save. A
            # frozen part hears nothing until it goes on.
            child.send_signal(signal.SIGKILL if name == "apiserver" else signal.SIGTERM)
            child.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + STOP_SECONDS
        for name in order:
            child = self._children.pop(name)
            try:
                child.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def pid(self, name: str) -> int:
        """Process id of a part (`apiserver`, `kwok`, ...): tests that stop a part need it."""
        return self._children[name].pid

    def freeze(self, name: str) -> None:
        """Stop a part where it stands (SIGSTOP): a stopped `kwok` is a site whose heartbeats end."""
        self._children[name].send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """Let a stopped part go on."""
        self._children[name].send_signal(signal.SIGCONT)

    def start_kwok(self, name: str, selector: str) -> None:
        """A second KWOK for the nodes with a label (`key=value`), so that a site's heartbeats can end by themselves."""
        self._launch(
            name,
            "kwok",
            f"--kubeconfig={self.home / 'kwok.kubeconfig'}",
            f"--config={self._stages()}",
            "--manage-all-nodes=false",
            f"--manage-nodes-with-label-selector={selector}",
            f"--node-lease-duration-seconds={LEASE_SECONDS}",
            "--enable-crds=",
        )

    def _stages(self) -> Path:
        """KWOK's stages, with the time that a pod takes to become ready."""
        stages = list(yaml.safe_load_all((self.binaries / "stages.yaml").read_text()))
        for stage in stages:
            if stage["metadata"]["name"] == "pod-ready" and self.pod_start_ms:
                stage["spec"]["delay"] = {"durationMilliseconds": self.pod_start_ms}
        stages.append(yaml.safe_load(_READY_AGAIN))
        path, new = self.home / "stages.yaml", self.home / "stages.new"
        new.write_text(yaml.safe_dump_all(stages))
        new.replace(path)  # a KWOK that was started just before may be reading it
        return path

    def stop_part(self, name: str) -> None:
        """Kill one part for good."""
        child = self._children.pop(name)
        child.kill()
        child.wait()

    def _start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{self._ports[name]}" for name in ("etcd", "etcd-peer"))
        data = self.home / "etcd"
        shutil.rmtree(data, ignore_errors=True)
        self._launch(
            "etcd",
            "etcd",
            f"--data-dir={data}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",  # it is thrown away with the test
            "--log-level=warn",
        )

    def _start_apiserver(self, credentials: Credentials) -> None:
        tokens = self.home / "tokens.csv"
        groups = {"admin": "system:masters", "controller-manager": "system:masters", "kwok": "system:masters"}
        lines = [f"{credentials.tokens[name]},{name},{name},{group}" for name, group in groups.items()]
        lines.append(f"{credentials.tokens['scheduler']},system:kube-scheduler,scheduler,")
        _write_private(tokens, "\n".join(lines) + "\n")
        self._kubeconfig("admin", credentials)
        c = credentials
        self._launch(
            "apiserver",
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._ports['etcd']}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._ports['apiserver']}",
            f"--tls-cert-file={c.serving_certificate}",
            f"--tls-private-key-file={c.serving_key}",
            f"--token-auth-file={tokens}",
            f"--service-account-key-file={c.service_account_public}",
            f"--service-account-signing-key-file={c.service_account_key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={self.service_range}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            # A loopback address may not stand in the endpoints of `kubernetes.default`.
            "--endpoint-reconciler-type=none",
            f"--requestheader-client-ca-file={c.front_proxy_ca}",
            "--requestheader-allowed-names=front-proxy",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-username-headers=X-Remote-User",
            f"--proxy-client-cert-file={c.front_proxy_certificate}",
            f"--proxy-client-key-file={c.front_proxy_key}",
            "--shutdown-delay-duration=0s",
            *([f"--admission-control-config-file={self._admission()}"] if self.admission else []),
            *([f"--runtime-config={','.join(self.runtime_config)}"] if self.runtime_config else []),
        )

    def _admission(self) -> Path:
        path = self.home / "admission.yaml"
        path.write_text(self.admission)
        return path

    def _start_controller_manager(self, credentials: Credentials) -> None:
        self._launch(
            "controller-manager",
            "kube-controller-manager",
            f"--kubeconfig={self.home / 'controller-manager.kubeconfig'}",
            f"--service-account-private-key-file={credentials.service_account_key}",
            f"--root-ca-file={credentials.ca}",
            "--use-service-account-credentials=false",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._ports['controller-manager']}",
            f"--node-monitor-grace-period={self.node_monitor_grace_s}s",
            f"--horizontal-pod-autoscaler-sync-period={self.autoscaler_sync_s}s",
            "--authorization-always-allow-paths=/healthz",
        )

    def _start_scheduler(self) -> None:
        self._launch(
            "scheduler",
            "kube-scheduler",
            f"--kubeconfig={self.home / 'scheduler.kubeconfig'}",
            f"--authentication-kubeconfig={self.home / 'controller-manager.kubeconfig'}",
            f"--authorization-kubeconfig={self.home / 'controller-manager.kubeconfig'}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._ports['scheduler']}",
            "--authorization-always-allow-paths=/healthz",
        )

    def _start_kwok(self) -> None:
        self.start_kwok("kwok", "rankbridge.io/played-by=kwok")

    def _launch(self, name: str, command: str, *arguments: str) -> None:
        log = (self.home / "logs" / f"{name}.log").open("wb")
        try:
            # Their own session: a terminal's Ctrl-C is for the test, which ends them in order.
            self._children[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", str(self.binaries / command), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.home)},
            )
        finally:
            log.close()

    def _await(self, name: str, path: str) -> None:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # its own certificate, on loopback, asked only whether it is there
        deadline = time.monotonic() + READY_SECONDS
        said = ""
        while time.monotonic() < deadline:
            if self._children[name].poll() is not None:
                break
            connection = http.client.HTTPSConnection("127.0.0.1", self._ports[name], timeout=5, context=context)
            try:
                connection.request("GET", path, headers=self._authorization(name))
                answer = connection.getresponse()
                said = answer.read().decode(errors="replace")
                if answer.status == 200:
                    return
            except OSError as error:
                said = str(error)
            finally:
                connection.close()
            time.sleep(0.05)
        tail = (self.home / "logs" / f"{name}.log").read_text(errors="replace")[-1500:]
        raise ControlPlaneError(f"{name} did not come up ({said[:200]}); the end of its log:\n{tail}")

    def _authorization(self, name: str) -> dict[str, str]:
        if name != "apiserver":
            return {}
        token = yaml.safe_load(self.kubeconfig.read_text())["users"][0]["user"]["token"]
        return {"Authorization": f"Bearer {token}"}

    def _kubeconfig(self, name: str, credentials: Credentials) -> None:
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "here", "cluster": {"server": self.server, "certificate-authority": str(credentials.ca)}}
            ],
            "users": [{"name": name, "user": {"token": credentials.tokens[name]}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": name}}],
            "current-context": "here",
        }
        _write_private(self.home / f"{name}.kubeconfig", yaml.safe_dump(document))


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
