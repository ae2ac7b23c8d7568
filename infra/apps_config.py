"""An apps stack's configuration: which site runs what, from which images; typed and frozen, or refused whole.

`read` takes the raw strings of one stack and gives an `AppsConfig`, or raises `FaultsError` with every fault. A second
region or an edge site is one more entry under `sites`. Pure: nothing here knows Pulumi, files or the environment.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Mapping, Sequence
from typing import Final

from infra import plan
from infra.plan import Fault, FaultsError
from infra.reading import Reader
from infra.rules.kubernetes import TRITON_FLOOR
from workloads.contract.sites import SiteClass, SiteKind

LAYER: Final = "apps"
PLACEHOLDER_REGISTRY: Final = "images.invalid/"
NOT_SHOWN: Final = "<not shown>"
STORE_PASSWORD: Final = "feature-store-password"  # noqa: S105 -- the key's name
_NAME: Final = r"[a-z][a-z0-9-]{0,18}[a-z0-9]"
_IMAGE: Final = r"[a-z0-9][a-z0-9.:-]*(/[a-z0-9._-]+)+@sha256:[0-9a-f]{64}"
_PASSWORD: Final = re.compile(r"[A-Za-z0-9._-]{24,128}")
_QUANTITY_CPU: Final = r"[1-9]\d{0,4}m?"
_QUANTITY_BYTES: Final = r"[1-9]\d{0,4}(Mi|Gi|Ti)"
_PUBLIC_KEY: Final = r"-----BEGIN PUBLIC KEY-----\n[A-Za-z0-9+/=\n]+-----END PUBLIC KEY-----\n?"


class Role(enum.StrEnum):
    """A serving role of a site; the value is part of its objects' names."""

    GATEWAY = "gateway"
    RETRIEVAL = "retrieval"
    TRITON = "triton"
    FEATURE_STORE = "feature-store"
    INTAKE = "intake"
    """With feedback in the same pod: it reads the intake's file."""


class Image(enum.StrEnum):
    """Something that is built or taken over as an image of its own."""

    GATEWAY = "gateway"
    RETRIEVAL = "retrieval"
    TRITON = "triton"
    AGENT = "agent"
    INTAKE = "intake"
    TRAINING = "training"
    OPERATORS = "operators"
    LOAD = "load"
    FEATURE_STORE = "feature-store"
    TENSORRT = "tensorrt"
    DEVICE_PLUGIN = "device-plugin"
    AUTOSCALER = "cluster-autoscaler"
    CREDENTIAL_HELPER = "credential-helper"


class Cluster(enum.StrEnum):
    """Whose credentials reach the cluster: the foundation's, or those of whoever runs Pulumi ($KUBECONFIG)."""

    FOUNDATION = "foundation"
    AMBIENT = "ambient"


class Crds(enum.StrEnum):
    """Kinds of prometheus-operator and KEDA: declared here, there already, or not to be used."""

    INSTALL = "install"
    PRESENT = "present"
    OFF = "off"


class Engine(enum.StrEnum):
    """What scales gateways and Triton."""

    KEDA = "keda"
    HPA = "hpa"


class Sharing(enum.StrEnum):
    """How several pods use one GPU."""

    NONE = "none"
    TIME_SLICING = "time-slicing"
    MIG = "mig"


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a container asks for; memory is limited to just that, processor time to `cpu_limit`."""

    cpu: str
    memory: str
    cpu_limit: str
    scratch: str
    """Ephemeral storage: bundles and caches."""


@dataclasses.dataclass(frozen=True)
class RoleSettings:
    """One role at one site."""

    role: Role
    replicas: int
    maximum: int
    """Equal to `replicas` for a role that is not scaled."""
    resources: Resources
    storage: str = ""
    """Size of its volume, for roles that keep something."""

    @property
    def is_scaled(self) -> bool:
        """Whether the number of pods follows the load."""
        return self.maximum > self.replicas


@dataclasses.dataclass(frozen=True)
class SiteSettings:
    """One site: where its nodes are told by their label, and what runs on them."""

    name: str
    kind: SiteKind
    site_class: SiteClass
    ranks_at: str
    """The site whose Triton ranks; another one only where it was said so."""
    roles: Mapping[Role, RoleSettings]
    storage_class: str
    host: str
    """Host name of the site's ingress."""

    @property
    def has_gpus(self) -> bool:
        """Whether its nodes have GPUs, and the taint that goes with them."""
        return self.site_class is SiteClass.GPU

    @property
    def selector(self) -> dict[str, str]:
        """Labels of its nodes, as the foundation puts them."""
        return {"rankbridge.io/site": self.name}


@dataclasses.dataclass(frozen=True)
class Autoscaling:
    """When more pods are wanted."""

    engine: Engine
    prometheus: str
    """Where KEDA asks."""
    in_flight: int
    """Requests in flight for each gateway."""
    queue_us: int
    """Microseconds that a request may wait in Triton's queue."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """How GPUs are shared."""

    sharing: Sharing
    replicas: int
    """Pods on one GPU when it is time-sliced."""
    mig_profile: str

    @property
    def resource(self) -> str:
        """What a pod asks for."""
        return f"nvidia.com/mig-{self.mig_profile}" if self.sharing is Sharing.MIG else "nvidia.com/gpu"


@dataclasses.dataclass(frozen=True)
class Jobs:
    """What is run from time to time."""

    site: str
    """A site with GPUs."""
    dataset: str
    workers: int
    gpu_types: tuple[str, ...]
    """Instance types that TensorRT engines are built for."""
    evaluation: str
    """Cron schedule."""
    load_workers: int


@dataclasses.dataclass(frozen=True)
class AppsConfig:
    """Everything an apps stack is told, checked."""

    environment: str
    foundation: str
    """Full name of the foundation's stack."""
    cluster: Cluster
    crds: Crds
    crd_files: Mapping[str, str]
    """Path to SHA-256, for `install`."""
    channel: str
    triton_release: str
    images: Mapping[Image, str]
    signers: Mapping[str, str]
    """Name to public key (PEM) of those whose bundles are served."""
    sites: tuple[SiteSettings, ...]
    autoscaling: Autoscaling
    gpu: Gpu
    jobs: Jobs
    ingress_class: str
    tls_secret: str
    aws_endpoint: str
    """An emulator's address for pods; empty where AWS is real."""

    @property
    def home(self) -> SiteSettings:
        """The site of events, profiles and the vault."""
        return next(s for s in self.sites if s.kind is SiteKind.HOME)

    def site(self, name: str) -> SiteSettings:
        """A site by its name; raises KeyError."""
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)


_DEFAULTS: Final[Mapping[Role, tuple[int, Resources, str]]] = {
    Role.GATEWAY: (2, Resources("1", "1Gi", "2", "4Gi"), "5Gi"),
    Role.RETRIEVAL: (2, Resources("1", "2Gi", "2", "4Gi"), ""),
    Role.TRITON: (2, Resources("2", "4Gi", "4", "8Gi"), ""),
    Role.FEATURE_STORE: (1, Resources("500m", "2Gi", "1", "1Gi"), "10Gi"),
    Role.INTAKE: (1, Resources("500m", "1Gi", "1", "1Gi"), "50Gi"),
}
"""Replicas, resources and volume of a role that says nothing else. The gateway's volume is home's vault."""
_SINGLE: Final = frozenset({Role.FEATURE_STORE, Role.INTAKE})
"""Roles that one process does: it owns its volume."""
_HOME_ONLY: Final = _SINGLE
_SCALED: Final = frozenset({Role.GATEWAY, Role.TRITON})


def read(
    stack: str, values: Mapping[str, str], secrets: frozenset[str] = frozenset(), *, namespace: str = plan.PROJECT
) -> AppsConfig:
    """The configuration of `stack` from its raw values (`namespace:key` -> string, structured ones as JSON).

    `secrets` names the keys that the stack file holds encrypted. Raises FaultsError with everything that is wrong.
    """
    faults: list[Fault] = []
    own = {k.partition(":")[2]: v for k, v in values.items() if k.startswith(f"{namespace}:")}
    encrypted = {k.partition(":")[2] for k in secrets if k.startswith(f"{namespace}:")}
    layer, _, environment = stack.partition("-")
    if layer != LAYER or not re.fullmatch(r"[a-z]{2,10}", environment):
        faults.append(Fault("stack", stack, "named apps-<environment>, such as apps-dev"))
    password = own.pop(STORE_PASSWORD, None)
    faults += _password_faults(password, is_encrypted=STORE_PASSWORD in encrypted)
    faults += [Fault(k, NOT_SHOWN, "plain text: it is no secret") for k in sorted(encrypted & set(own))]
    root = Reader("", {k: _decoded(v) for k, v in own.items() if k not in encrypted}, faults)
    is_local = environment == "local"

    foundation = root.text(
        "foundation",
        r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+/foundation-[a-z]{2,10}",
        "the full name of the foundation's stack, such as organization/rankbridge/foundation-prod",
    )
    if foundation and not foundation.endswith(f"/foundation-{environment}"):
        root.fault("foundation", foundation, f"the foundation of the same environment, .../foundation-{environment}")
    cluster = root.choice("cluster", Cluster, Cluster.FOUNDATION)
    if cluster is Cluster.AMBIENT and environment == "prod":
        root.fault("cluster", cluster.value, "foundation: prod goes to its own cluster and nowhere else")
    crds = root.choice("crds", Crds, Crds.PRESENT)
    crd_files = _texts(root, "crd_files", r".+\.ya?ml", r"[0-9a-f]{64}", "a mapping of file to its SHA-256")
    if (crds is Crds.INSTALL) != bool(crd_files):
        root.fault("crd_files", len(crd_files) or None, "given with `crds: install`, and only then")
    channel = root.text("channel", r"[a-z][a-z0-9-]{0,39}", "the name of a channel of the registry")
    release = _release(root)
    aws_endpoint = root.text("aws_endpoint", r"https?://[a-z0-9.:-]+", "the URL of an emulator", "")
    if aws_endpoint and not is_local:
        root.fault("aws_endpoint", aws_endpoint, "removed: only local has an emulator")
    images = _images(root, placeholders=is_local)
    signers = _texts(root, "signers", _NAME, _PUBLIC_KEY, "a mapping of name to public key (PEM)")
    if not signers:
        root.fault("signers", None, "at least one name and public key (PEM): agents take nothing from anybody else")
    sites = _sites(root)
    autoscaling = _autoscaling(root, crds)
    gpu = _gpu(root)
    jobs = _jobs(root, sites)
    ingress = root.section("ingress")
    ingress_class = ingress.text("class", _NAME, "an ingress class", "traefik")
    tls_secret = ingress.text("tls_secret", _NAME, "name of the secret with certificate and key", "gateway-tls")
    ingress.finish()
    root.finish()
    if faults:
        raise FaultsError(faults)
    return AppsConfig(
        environment=environment,
        foundation=foundation,
        cluster=cluster,
        crds=crds,
        crd_files=crd_files,
        channel=channel,
        triton_release=release,
        images=images,
        signers=signers,
        sites=sites,
        autoscaling=autoscaling,
        gpu=gpu,
        jobs=jobs,
        ingress_class=ingress_class,
        tls_secret=tls_secret,
        aws_endpoint=aws_endpoint,
    )


def _decoded(value: str) -> object:
    if value[:1] not in "[{" and value not in ("true", "false"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _password_faults(password: str | None, *, is_encrypted: bool) -> list[Fault]:
    form = "24 to 128 letters, digits, dots, underscores or hyphens"
    remedy = f"{form}; set it with: pulumi config set --secret {plan.PROJECT}:{STORE_PASSWORD}"
    if password is None:
        return [Fault(STORE_PASSWORD, "nothing", remedy)]
    if not is_encrypted:
        return [Fault(STORE_PASSWORD, NOT_SHOWN, f"encrypted, it lies in plain text: replace it, and take {remedy}")]
    return [] if _PASSWORD.fullmatch(password) else [Fault(STORE_PASSWORD, NOT_SHOWN, remedy)]


def _texts(root: Reader, key: str, name: str, value: str, allowed: str) -> dict[str, str]:
    """A mapping of names to texts, both of a form; empty when it is not given."""
    section = root.section(key, optional=True)
    found = {}
    for entry in section.keys():  # noqa: SIM118 -- not a mapping: reading the keys marks them as known
        if not re.fullmatch(name, entry):
            section.fault(entry, "(as a key)", allowed)
        found[entry] = section.text(entry, value, allowed)
    return found


def _release(root: Reader) -> str:
    release = root.text("triton_release", r"\d\d\.\d\d", "the release of the Triton image, such as 26.07, in quotes")
    if release and tuple(map(int, release.split("."))) < TRITON_FLOOR:
        floor = ".".join(f"{part:02}" for part in TRITON_FLOOR)
        root.fault("triton_release", release, f"{floor} or newer: older ones have known vulnerabilities")
    return release


def _images(root: Reader, *, placeholders: bool) -> dict[Image, str]:
    section = root.section("images", optional=True)
    form = "registry/name@sha256:<64 hex digits>; `rankbridge images pin` writes it"
    images = {}
    for image in Image:
        value = section.text(image.value, _IMAGE, form)
        if value.startswith(PLACEHOLDER_REGISTRY) and not placeholders:
            section.fault(image.value, value, f"a real image, {form}")
        images[image] = value
    section.finish()
    return images


def _sites(root: Reader) -> tuple[SiteSettings, ...]:
    sites = []
    keyed = []
    for entry in root.sections("sites"):
        name = entry.text("name", _NAME, "2 to 20 lower-case letters, digits or hyphens, as in the foundation")
        keyed.append((entry.key("name"), name))
        kind = entry.choice("kind", SiteKind, SiteKind.CLOUD)
        site_class = entry.choice("class", SiteClass, SiteClass.CPU)
        ranks_at = entry.text("ranks_at", _NAME, "the name of a site with Triton", name)
        storage_class = entry.text("storage_class", r"[a-z0-9][a-z0-9.-]*", "a storage class", "local-path")
        host = entry.text("host", r"[a-z0-9-]+(\.[a-z0-9-]+)+", "the host name that clients use")
        roles = _roles(entry, kind)
        entry.finish()
        sites.append(SiteSettings(name, kind, site_class, ranks_at, roles, storage_class, host))
    root.faults += plan.repeated(keyed, "a name of its own")
    root.faults += plan.repeated(
        [(f"sites ({s.name}).host", s.host) for s in sites if s.host], "a host name of its own"
    )
    homes = sum(s.kind is SiteKind.HOME for s in sites)
    if homes != 1:
        root.fault("sites", f"{homes} of kind home", "a list with exactly one home")
    ranking = [s.name for s in sites if Role.TRITON in s.roles]
    for site in sites:
        if site.ranks_at not in ranking:
            named = f"sites ({site.name}).ranks_at"
            root.fault(named, site.ranks_at, "a site with the role triton: " + ", ".join(ranking))
    return tuple(sites)


def _roles(entry: Reader, kind: SiteKind) -> dict[Role, RoleSettings]:
    section = entry.section("roles")
    roles = {}
    for name in section.keys():  # noqa: SIM118 -- as above
        role = next((r for r in Role if r.value == name), None)
        if role is None:
            section.fault(name, "(unknown role)", "one of " + ", ".join(r.value for r in Role))
            continue
        if role in _HOME_ONLY and kind is not SiteKind.HOME:
            section.fault(name, "(as a role)", "removed: events and profiles of people stay at home")
        roles[role] = _role(section.section(name), role)
    needed = {Role.GATEWAY, Role.RETRIEVAL} | (set(Role) if kind is SiteKind.HOME else set())
    for role in sorted(needed - set(roles)):
        section.fault(role.value, None, f"given, `{role.value}: {{}}` at the least: a {kind.value} site has one")
    return roles


def _role(entry: Reader, role: Role) -> RoleSettings:
    count, usual, volume = _DEFAULTS[role]
    top = 1 if role in _SINGLE else 100
    low = 1 if role in _SINGLE else 2
    replicas = entry.number("replicas", low, top, count, "warm, always")
    maximum = replicas
    if role in _SCALED:
        maximum = entry.number("max", replicas, 100, replicas, "at the highest load, from replicas up")
    cpu = entry.text("cpu", _QUANTITY_CPU, "processors, such as 500m or 2", usual.cpu)
    resources = Resources(
        cpu=cpu,
        memory=entry.text("memory", _QUANTITY_BYTES, "bytes, such as 2Gi", usual.memory),
        cpu_limit=entry.text("cpu_limit", _QUANTITY_CPU, "processors, such as 4", usual.cpu_limit),
        scratch=entry.text("scratch", _QUANTITY_BYTES, "bytes, such as 4Gi", usual.scratch),
    )
    if millicores(resources.cpu_limit) < millicores(cpu):
        entry.fault("cpu_limit", resources.cpu_limit, f"not below cpu, {cpu}")
    storage = entry.text("storage", _QUANTITY_BYTES, "bytes, such as 50Gi", volume) if volume else ""
    entry.finish()
    return RoleSettings(role, replicas, maximum, resources, storage)


def _autoscaling(root: Reader, crds: Crds) -> Autoscaling:
    section = root.section("autoscaling", optional=True)
    engine = section.choice("engine", Engine, Engine.HPA if crds is Crds.OFF else Engine.KEDA)
    if engine is Engine.KEDA and crds is Crds.OFF:
        section.fault("engine", engine.value, "hpa: with `crds: off` there is no ScaledObject")
    prometheus = section.text(
        "prometheus", r"https?://[a-z0-9.:-]+", "Prometheus' URL", "http://prometheus-operated.monitoring:9090"
    )
    in_flight = section.number("in_flight", 1, 10_000, 24, "requests in flight for each gateway")
    queue_us = section.number("queue_us", 100, 1_000_000, 5_000, "microseconds in Triton's queue")
    section.finish()
    return Autoscaling(engine, prometheus, in_flight, queue_us)


def _gpu(root: Reader) -> Gpu:
    section = root.section("gpu", optional=True)
    sharing = section.choice("sharing", Sharing, Sharing.NONE)
    replicas = section.number("replicas", 1, 48, 1, "pods on one GPU when it is time-sliced")
    profile = section.text("mig_profile", r"\d+g\.\d+gb", "a MIG profile such as 1g.10gb", "")
    if (sharing is Sharing.TIME_SLICING) != (replicas > 1):
        section.fault("replicas", replicas, "2 or more with time-slicing, and only there")
    if (sharing is Sharing.MIG) != bool(profile):
        section.fault("mig_profile", profile or None, "given with mig, and only there")
    section.finish()
    return Gpu(sharing, replicas, profile)


def _jobs(root: Reader, sites: Sequence[SiteSettings]) -> Jobs:
    section = root.section("jobs")
    with_gpus = [s.name for s in sites if s.has_gpus]
    site = section.text("site", _NAME, "the name of a site with GPUs")
    if site and site not in with_gpus:
        section.fault("site", site, "a site of class gpu: " + ", ".join(with_gpus))
    dataset = section.text("dataset", r"[a-z0-9][a-z0-9._-]{0,99}", "the name of a replicated data set")
    workers = section.number("workers", 1, 64, 1, "pods of a training")
    types = section.texts("gpu_types", r"[a-z0-9-]+\.[a-z0-9]+", "a list of different instance types", optional=False)
    evaluation = section.text("evaluation", r"[\d*,/-]+( [\d*,/-]+){4}", "a cron schedule in quotes", "30 2 * * *")
    load_workers = section.number("load_workers", 1, 64, 2)
    section.finish()
    return Jobs(site, dataset, workers, types, evaluation, load_workers)


def millicores(quantity: str) -> int:
    """`500m` or `2` as thousandths of a processor."""
    return int(quantity[:-1]) if quantity.endswith("m") else int(quantity) * 1000


def mebibytes(quantity: str) -> int:
    """`512Mi`, `4Gi` or `1Ti` in MiB."""
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024, "Ti": 1024 * 1024}[quantity[-2:]]
