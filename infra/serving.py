"""What runs in the pods of each serving role: the very command lines of the desk, with a cluster's addresses.

Each pod that serves a bundle has an agent beside it, which brings the bundle of the site's channel onto the pod's own
volume, verified, and writes `editions.json` there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pulumi_kubernetes as k8s
from pulumi import Input, Output

from infra import pods, service
from infra.apps_config import AppsConfig, Crds, Engine, Image, Resources, Role, RoleSettings, SiteSettings
from infra.edges import REDIS_PORT, SERVING
from infra.pods import Access, Probes, mount
from infra.rules.kubernetes import TRITON_RELEASE
from infra.service import ServiceArgs
from workloads.contract.editions import EDITIONS_FILE
from workloads.contract.sites import PORTS, Listener, SiteKind

SITE_DIR: Final = "/var/lib/rankbridge/site"
HOME_DIR: Final = "/var/lib/rankbridge/home"
VAULT_DIR: Final = "/var/lib/rankbridge/vault"
TRUST_DIR: Final = "/etc/rankbridge/trust"
STORE_DIR: Final = "/data"
SIGNERS: Final = "signers"
STORE_SECRET: Final = "feature-store"  # noqa: S105 -- the secret's name
DRAIN_S: Final = 10
"""Endpoints are forgotten everywhere in less."""
_AGENT: Final = Resources("100m", "512Mi", "1", "1Gi")
_FEEDBACK: Final = Resources("250m", "1Gi", "1", "1Gi")


def name(site: str, role: Role) -> str:
    """Name of a role's objects at a site."""
    return f"{site}-{role.value}"


def host(site: str, role: Role, *, every_pod: bool = False) -> str:
    """DNS name of a role's Service at a site; `every_pod` is the headless one."""
    return f"{name(site, role)}{'-pods' if every_pod else ''}.{SERVING}.svc"


def listen(listener: Listener) -> list[str]:
    """Where a server of ours listens: on the pod's address."""
    return ["--listen", f"0.0.0.0:{PORTS[listener]}"]


def module(name: str, *arguments: Input[str]) -> list[Input[str]]:
    """A deployable's command."""
    return ["python", "-m", f"workloads.{name}", *arguments]


@dataclasses.dataclass(frozen=True)
class Serving:
    """Makes the arguments of every role's `Service`."""

    config: AppsConfig
    models_bucket: Input[str]
    access: Access
    """How agents reach the models bucket."""

    def args(self, site: SiteSettings, settings: RoleSettings, policy: Input[Any]) -> ServiceArgs:
        """A role at a site; watched where prometheus-operator's kinds are."""
        made = self._made(site, settings, policy)
        return made if self.config.crds is not Crds.OFF else dataclasses.replace(made, metrics=())

    def _made(self, site: SiteSettings, settings: RoleSettings, policy: Input[Any]) -> ServiceArgs:
        match settings.role:
            case Role.GATEWAY:
                return self._gateway(site, settings, policy)
            case Role.RETRIEVAL:
                return self._retrieval(site, settings, policy)
            case Role.TRITON:
                return self._triton(site, settings, policy)
            case Role.FEATURE_STORE:
                return self._feature_store(site, settings, policy)
            case Role.INTAKE:
                return self._intake(site, settings, policy)

    def _agent(self, site: SiteSettings, settings: RoleSettings, addresses: Sequence[str], *, ready: bool) -> Any:  # noqa: ANN401 -- a typed container of an SDK whose constructors mypy sees as Any
        """The sidecar; `addresses` are the flags that name its neighbours."""
        # A site that ranks elsewhere renders what that site's Triton runs.
        ranking = self.config.site(site.ranks_at).site_class.value
        command = module(
            "agent",
            *("run", "--site", site.name, "--site-class", ranking, "--site-dir", SITE_DIR, "--trust", TRUST_DIR),
            *("--channel", self.config.channel, "--models-bucket", self.models_bucket),
            *addresses,
            *listen(Listener.AGENT),
        )
        return pods.container(
            "agent",
            self.config.images[Image.AGENT],
            command,
            dataclasses.replace(_AGENT, scratch=settings.resources.scratch),
            ports={"agent": PORTS[Listener.AGENT]},
            probes=Probes("agent", ready="/readyz" if ready else None),
            env=[*pods.SERVING_ENV, *self.access.env()],
            mounts=[
                mount("site", SITE_DIR),
                mount("tmp", pods.SCRATCH),
                mount("trust", TRUST_DIR, read_only=True),
            ],
            always=True,
        )

    def _bundle_volumes(self, settings: RoleSettings) -> list[k8s.core.v1.VolumeArgs]:
        return [
            pods.scratch("site", settings.resources.scratch),
            pods.scratch("tmp", "256Mi"),
            pods.config_volume("trust", SIGNERS),
            *self.access.volumes(),
        ]

    def _near(self, site: SiteSettings, *, retrieval: str = "", gateway: str = "", triton: str = "") -> list[str]:
        """The agent's neighbours: within its pod by loopback, else every pod of the site's role."""
        at = triton or f"{host(site.ranks_at, Role.TRITON, every_pod=True)}:{PORTS[Listener.TRITON_HTTP]}"
        flags = ["--triton", at]
        if retrieval:
            flags += ["--retrieval", retrieval]
        if gateway:
            flags += ["--gateway", gateway]
        return flags

    def _peer(self, site: SiteSettings) -> list[str]:
        """The gateway that ranks what this site's Triton cannot in time: the first whose site has another Triton."""
        for other in self.config.sites:
            if other.ranks_at != site.ranks_at:
                return [f"--peer={other.name}=http://{host(other.name, Role.GATEWAY)}:{PORTS[Listener.GATEWAY]}"]
        return []

    def _gateway(self, site: SiteSettings, settings: RoleSettings, policy: Input[Any]) -> ServiceArgs:
        config, is_home = self.config, site.kind is SiteKind.HOME
        home = config.home.name
        command = module(
            "gateway",
            *("--site", site.name, "--site-kind", site.kind.value, *listen(Listener.GATEWAY)),
            *("--editions", f"{SITE_DIR}/{EDITIONS_FILE}"),
            *("--retrieval", f"http://{host(site.name, Role.RETRIEVAL)}:{PORTS[Listener.RETRIEVAL]}"),
            *("--triton", f"{host(site.ranks_at, Role.TRITON)}:{PORTS[Listener.TRITON_HTTP]}"),
            *("--intake", f"http://{host(home, Role.INTAKE)}:{PORTS[Listener.INTAKE]}"),
            *self._peer(site),
        )
        mounts = [mount("site", SITE_DIR, read_only=True), mount("tmp", pods.SCRATCH)]
        volumes = self._bundle_volumes(settings)
        env = list(pods.SERVING_ENV)
        if is_home:
            command += ["--profiles", f"redis://{host(home, Role.FEATURE_STORE)}:{REDIS_PORT}/0"]
            command += ["--vault", f"{VAULT_DIR}/vault.sqlite"]
            mounts.append(mount("vault", VAULT_DIR))
            env.append(_store_password("RANKBRIDGE_REDIS_PASSWORD"))
            claim = k8s.core.v1.PersistentVolumeClaimVolumeSourceArgs(claim_name="vault")
            volumes.append(k8s.core.v1.VolumeArgs(name="vault", persistent_volume_claim=claim))
        near = self._near(
            site,
            retrieval=f"http://{host(site.name, Role.RETRIEVAL, every_pod=True)}:{PORTS[Listener.RETRIEVAL]}",
            gateway=f"http://127.0.0.1:{PORTS[Listener.GATEWAY]}",
        )
        ports = {"http": PORTS[Listener.GATEWAY]}
        main = pods.container(
            "gateway",
            config.images[Image.GATEWAY],
            command,
            settings.resources,
            ports=ports,
            probes=Probes("http"),
            env=env,
            mounts=mounts,
            drain_s=DRAIN_S,
        )
        return ServiceArgs(
            site,
            settings,
            [main],
            [*self.access.init(), self._agent(site, settings, near, ready=False)],
            volumes,
            {**ports, "agent": PORTS[Listener.AGENT]},
            policy,
            scaling=self._scaling(site, settings, config.autoscaling.in_flight),
            shares_a_node=is_home,
            metrics=("http",),
            exceptions={"deployment-has-host-podantiaffinity": "home's gateways are where the vault's volume is"}
            if is_home
            else {},
        )

    def _retrieval(self, site: SiteSettings, settings: RoleSettings, policy: Input[Any]) -> ServiceArgs:
        ports = {"http": PORTS[Listener.RETRIEVAL]}
        editions = ("--editions", f"{SITE_DIR}/{EDITIONS_FILE}")
        main = pods.container(
            "retrieval",
            self.config.images[Image.RETRIEVAL],
            module("retrieval", "--site", site.name, *listen(Listener.RETRIEVAL), *editions),
            settings.resources,
            ports=ports,
            probes=Probes("http"),
            env=pods.SERVING_ENV,
            mounts=[mount("site", SITE_DIR, read_only=True), mount("tmp", pods.SCRATCH)],
            drain_s=DRAIN_S,
        )
        near = self._near(site, retrieval=f"http://127.0.0.1:{PORTS[Listener.RETRIEVAL]}")
        return ServiceArgs(
            site,
            settings,
            [main],
            [*self.access.init(), self._agent(site, settings, near, ready=False)],
            self._bundle_volumes(settings),
            {**ports, "agent": PORTS[Listener.AGENT]},
            policy,
            metrics=("http",),
        )

    def _triton(self, site: SiteSettings, settings: RoleSettings, policy: Input[Any]) -> ServiceArgs:
        config = self.config
        ports = {
            "http": PORTS[Listener.TRITON_HTTP],
            "grpc": PORTS[Listener.TRITON_GRPC],
            "metrics": PORTS[Listener.TRITON_METRICS],
        }
        # Explicit control and nothing loaded: the agent says what, from files that it has verified.
        command = [
            "tritonserver",
            f"--id={site.name}",
            f"--model-repository={SITE_DIR}/triton",
            "--model-control-mode=explicit",
            "--disable-auto-complete-config",
            "--exit-timeout-secs=3",
            f"--http-port={ports['http']}",
            f"--grpc-port={ports['grpc']}",
            f"--metrics-port={ports['metrics']}",
            f"--allow-gpu-metrics={'true' if site.has_gpus else 'false'}",
            "--log-format=ISO8601",
        ]
        main = pods.container(
            "triton",
            config.images[Image.TRITON],
            command,
            settings.resources,
            ports=ports,
            probes=Probes("http", live="/v2/health/live", ready="/v2/health/ready", startup_s=300),
            mounts=[
                mount("site", SITE_DIR, read_only=True),
                mount("cache", "/var/cache/rankbridge"),
                mount("shm", "/dev/shm"),  # noqa: S108 -- the backend's shared memory, a volume of the pod's own
                mount("tmp", pods.SCRATCH),
            ],
            extended={config.gpu.resource: "1"} if site.has_gpus else None,
            drain_s=DRAIN_S,
        )
        near = self._near(site, triton=f"127.0.0.1:{ports['http']}")
        # It refuses to start without its repository, into which the agent puts models later.
        folder = pods.container(
            "repository",
            config.images[Image.AGENT],
            ["python", "-c", f"import pathlib; pathlib.Path('{SITE_DIR}/triton').mkdir(parents=True, exist_ok=True)"],
            Resources("10m", "64Mi", "200m", "64Mi"),
            mounts=[mount("site", SITE_DIR)],
        )
        return ServiceArgs(
            site,
            settings,
            [main],
            [folder, *self.access.init(), self._agent(site, settings, near, ready=True)],
            [
                *self._bundle_volumes(settings),
                pods.scratch("cache", "4Gi"),
                pods.scratch("shm", "1Gi", medium="Memory"),
            ],
            {**ports, "agent": PORTS[Listener.AGENT]},
            policy,
            scaling=self._scaling(site, settings, config.autoscaling.queue_us),
            runtime_class="nvidia" if site.has_gpus else "",
            waits_s=service.HOLDER_WAITS_S if site.has_gpus else service.GATEWAY_WAITS_S,
            metrics=("metrics",),
            annotations={TRITON_RELEASE: config.triton_release},
        )

    def _feature_store(self, site: SiteSettings, settings: RoleSettings, policy: Input[Any]) -> ServiceArgs:
        ports = {"redis": REDIS_PORT}
        # The password is never an argument: `auth.conf` is a file of the secret.
        command = ["redis-server", "/etc/rankbridge/store/auth.conf", "--dir", STORE_DIR, "--port", str(REDIS_PORT)]
        command += ["--appendonly", "yes", "--appendfsync", "everysec", "--protected-mode", "yes"]
        main = pods.container(
            "redis",
            self.config.images[Image.FEATURE_STORE],
            command,
            settings.resources,
            ports=ports,
            mounts=[mount("data", STORE_DIR), mount("auth", "/etc/rankbridge/store", read_only=True)],
        )
        answers = k8s.core.v1.TCPSocketActionArgs(port="redis")
        main.readiness_probe = k8s.core.v1.ProbeArgs(tcp_socket=answers, period_seconds=5, failure_threshold=3)
        main.liveness_probe = k8s.core.v1.ProbeArgs(tcp_socket=answers, period_seconds=10, failure_threshold=6)
        secret = k8s.core.v1.SecretVolumeSourceArgs(
            secret_name=STORE_SECRET,
            default_mode=0o440,
            items=[k8s.core.v1.KeyToPathArgs(key="auth.conf", path="auth.conf")],
        )
        return ServiceArgs(
            site,
            settings,
            [main],
            [],
            [k8s.core.v1.VolumeArgs(name="auth", secret=secret)],
            ports,
            policy,
            claim="data",
            waits_s=service.HOLDER_WAITS_S,
            exceptions={"pod-probes-identical": "it has one port, and nothing else to ask without the password"},
        )

    def _intake(self, site: SiteSettings, settings: RoleSettings, policy: Input[Any]) -> ServiceArgs:
        ports = {"http": PORTS[Listener.INTAKE], "feedback": PORTS[Listener.FEEDBACK]}
        home = [mount("home", HOME_DIR), mount("tmp", pods.SCRATCH)]
        intake = pods.container(
            "intake",
            self.config.images[Image.INTAKE],
            module("intake", *listen(Listener.INTAKE), "--store", f"{HOME_DIR}/events.sqlite"),
            settings.resources,
            ports={"http": ports["http"]},
            probes=Probes("http"),
            env=pods.SERVING_ENV,
            mounts=home,
            drain_s=DRAIN_S,
        )
        feedback = pods.container(
            "feedback",
            self.config.images[Image.INTAKE],
            module(
                "feedback",
                *("run", *listen(Listener.FEEDBACK), "--spool", f"{HOME_DIR}/events.sqlite"),
                *("--profiles", f"redis://{host(site.name, Role.FEATURE_STORE)}:{REDIS_PORT}/0"),
                *("--lake", f"{HOME_DIR}/lake", "--trim", f"http://127.0.0.1:{ports['http']}"),
            ),
            _FEEDBACK,
            ports={"feedback": ports["feedback"]},
            # Late profiles must not keep events from being taken in.
            probes=Probes("feedback", ready=None),
            env=[*pods.SERVING_ENV, _store_password("RANKBRIDGE_REDIS_PASSWORD")],
            mounts=home,
        )
        return ServiceArgs(
            site,
            settings,
            [intake, feedback],
            [],
            [pods.scratch("tmp", "256Mi")],
            ports,
            policy,
            claim="home",
            waits_s=service.HOLDER_WAITS_S,
            metrics=("http", "feedback"),
        )

    def _scaling(self, site: SiteSettings, settings: RoleSettings, target: int) -> service.Scaling | None:
        if not settings.is_scaled:
            return None
        scaler = self.config.autoscaling
        prometheus = scaler.prometheus if scaler.engine is Engine.KEDA else ""
        return service.scaled(settings.role, site.name, target=target, prometheus=prometheus)


def _store_password(variable_name: str) -> k8s.core.v1.EnvVarArgs:
    """The feature store's password, from its secret."""
    return k8s.core.v1.EnvVarArgs(
        name=variable_name,
        value_from=k8s.core.v1.EnvVarSourceArgs(
            secret_key_ref=k8s.core.v1.SecretKeySelectorArgs(name=STORE_SECRET, key="password")
        ),
    )


def store_secret(password: Output[str]) -> Mapping[str, Input[str]]:
    """What the feature store's secret holds: the password, and Redis' own way of being told it."""
    return {"password": password, "auth.conf": password.apply(lambda text: f"requirepass {text}\n")}
