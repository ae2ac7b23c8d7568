"""Layer 2, the apps: everything that runs on the cluster which a foundation stack declared.

The foundation is read through one StackReference. Everything that can be wrong in a stack file is refused before the
first resource is declared; what contradicts the foundation, as soon as its outputs are known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pulumi
import pulumi_kubernetes as k8s
import yaml
from pulumi import Output, ResourceOptions
from pulumi.runtime import config as runtime_config

from infra import apps_config, edges, outputs, platform, pods, serving
from infra.apps_config import AppsConfig, Cluster, Crds, Role, SiteSettings
from infra.edges import SERVING, Party, Place, World
from infra.iam import DataClass
from infra.iam import Role as AwsRole
from infra.jobs import Jobs, JobsArgs
from infra.observability import Observability
from infra.outputs import FoundationOutputs
from infra.platform import Platform, PlatformArgs
from infra.pods import Access
from infra.service import Service, claim_spec
from infra.serving import Serving
from workloads.contract.sites import SiteKind

ROOT: Final = Path(__file__).resolve().parents[1]


def declare() -> None:
    """Declare the apps of the current stack."""
    values = {**runtime_config.get_config_env(), **runtime_config.CONFIG.get()}
    encrypted = {
        *runtime_config.get_config_secret_keys_env(),
        *(k for k in values if runtime_config.is_config_secret(k)),
    }
    settings = apps_config.read(pulumi.get_stack(), values, frozenset(encrypted))
    Apps(settings, pulumi.Config().require_secret(apps_config.STORE_PASSWORD)).export()


class Apps:
    """The whole of one stack, in the order in which its parts need each other."""

    def __init__(self, settings: AppsConfig, store_password: Output[str]) -> None:
        self.settings = settings
        reference = pulumi.StackReference(settings.foundation)
        self.foundation = self._read(reference)
        self.provider = self._provider(reference)
        inside = ResourceOptions(provider=self.provider)
        crds = self._crds(inside)
        self.platform = Platform(
            "platform",
            PlatformArgs(settings, self.foundation, self._policy, self._access),
            ResourceOptions(provider=self.provider, depends_on=crds),
        )
        after = ResourceOptions(provider=self.provider, depends_on=[*crds, *self.platform.namespaces])
        self._shared(store_password, after)
        makes = Serving(settings, self._of(_bucket_of(DataClass.MODELS)), self._access(AwsRole.AGENT))
        for site in settings.sites:
            for role in (r for r in Role if r in site.roles):
                args = makes.args(site, site.roles[role], self._policy(Party(role.value), site.name))
                Service(serving.name(site.name, role), args, after)
            self._ingress(site, after)
        Observability("observability", settings.sites, kinds=settings.crds is not Crds.OFF, opts=after)
        data, models = self._of(_bucket_of(DataClass.DATA)), self._of(_bucket_of(DataClass.MODELS))
        Jobs("jobs", JobsArgs(settings, data, models, self._policy, self._access), after)

    def _read(self, reference: pulumi.StackReference) -> Output[FoundationOutputs]:
        # Without the secret ones: a kubeconfig among them would make secrets of all.
        plain = Output.all(**{name: reference.get_output(name) for name in _PLAIN})
        return plain.apply(lambda values: checked(self.settings, outputs.read(values)))

    def _of(self, ask: Any) -> Output[Any]:  # noqa: ANN401 -- a function of the foundation, of any type
        return self.foundation.apply(ask)

    def _provider(self, reference: pulumi.StackReference) -> k8s.Provider:
        if self.settings.cluster is Cluster.AMBIENT:
            return k8s.Provider("kubernetes", enable_server_side_apply=True)
        kubeconfig: Output[str] = Output.secret(reference.require_output("kubeconfig"))
        return k8s.Provider("kubernetes", kubeconfig=kubeconfig, enable_server_side_apply=True)

    def _access(self, role: AwsRole) -> Access:
        return Access(
            role.value,
            self._of(lambda f: _cloud(f).region),
            self._of(lambda f: _cloud(f).s3_endpoint_url or ""),
            [] if self.settings.aws_endpoint else self._of(lambda f: platform.identity_command(role, f)),
            self.settings.aws_endpoint,
            self.settings.images,
        )

    def _policy(self, party: Party, site: str) -> Output[Any]:
        return self._of(lambda f: edges.policy(world(self.settings, f), party, site))

    def _crds(self, opts: ResourceOptions) -> Sequence[pulumi.Resource]:
        """Kinds of others, from files that the operator put there and whose digests the stack file holds."""
        if self.settings.crds is not Crds.INSTALL:
            return ()
        return [
            k8s.apiextensions.v1.CustomResourceDefinition(
                document["metadata"]["name"],
                metadata={"name": document["metadata"]["name"], "labels": pods.MANAGED},
                spec=document["spec"],
                # Destroying a definition destroys everything of its kind, ours or not.
                opts=ResourceOptions(provider=opts.provider, retain_on_delete=True),
            )
            for path, digest in self.settings.crd_files.items()
            for document in definitions(ROOT / path, digest)
        ]

    def _shared(self, store_password: Output[str], opts: ResourceOptions) -> None:
        """What several services use: signers' keys, the store's password, home's vault."""
        settings = self.settings

        def meta(name: str) -> k8s.meta.v1.ObjectMetaArgs:
            return k8s.meta.v1.ObjectMetaArgs(name=name, namespace=SERVING, labels=pods.MANAGED)

        k8s.core.v1.ConfigMap(
            serving.SIGNERS,
            metadata=meta(serving.SIGNERS),
            data={f"{name}.pub": key for name, key in settings.signers.items()},
            opts=opts,
        )
        k8s.core.v1.Secret(
            serving.STORE_SECRET,
            metadata=meta(serving.STORE_SECRET),
            string_data=serving.store_secret(store_password),
            type="Opaque",
            opts=opts,
        )
        home = settings.home
        k8s.core.v1.PersistentVolumeClaim(
            "vault",
            metadata=k8s.meta.v1.ObjectMetaArgs(
                name="vault",
                namespace=SERVING,
                labels=pods.MANAGED,
                # It may wait for its first pod, which this update starts later.
                annotations={"pulumi.com/skipAwait": "true"},
            ),
            spec=claim_spec(home.storage_class, home.roles[Role.GATEWAY].storage),
            # Who is behind a pseudonym is nowhere else.
            opts=ResourceOptions(provider=opts.provider, depends_on=opts.depends_on, protect=_protects(settings)),
        )

    def _ingress(self, site: SiteSettings, opts: ResourceOptions) -> None:
        settings, name = self.settings, serving.name(site.name, Role.GATEWAY)
        backend = k8s.networking.v1.IngressBackendArgs(
            service=k8s.networking.v1.IngressServiceBackendArgs(
                name=name, port=k8s.networking.v1.ServiceBackendPortArgs(name="http")
            )
        )
        # Only the API: health and metrics are not the world's.
        path = k8s.networking.v1.HTTPIngressPathArgs(path="/v1", path_type="Prefix", backend=backend)
        k8s.networking.v1.Ingress(
            name,
            metadata=k8s.meta.v1.ObjectMetaArgs(
                name=name,
                namespace=SERVING,
                labels=pods.labels(Role.GATEWAY.value, site.name),
                annotations={"pulumi.com/skipAwait": "true"},
            ),
            spec=k8s.networking.v1.IngressSpecArgs(
                ingress_class_name=settings.ingress_class,
                tls=[k8s.networking.v1.IngressTLSArgs(hosts=[site.host], secret_name=settings.tls_secret)],
                rules=[
                    k8s.networking.v1.IngressRuleArgs(
                        host=site.host, http=k8s.networking.v1.HTTPIngressRuleValueArgs(paths=[path])
                    )
                ],
            ),
            opts=opts,
        )

    def export(self) -> None:
        """Export where each site is reached."""
        pulumi.export("hosts", {site.name: f"https://{site.host}" for site in self.settings.sites})
        pulumi.export("images", {image.value: digest for image, digest in self.settings.images.items()})


_PLAIN: Final = (
    "schema_version",
    *(f for f in FoundationOutputs.__dataclass_fields__ if f not in outputs.SECRET),
)


def _protects(settings: AppsConfig) -> bool:
    return settings.environment == "prod"


def _bucket_of(data: DataClass) -> Any:  # noqa: ANN401 -- a function for `Output.apply`
    return lambda foundation: foundation.buckets[data.value]


def _cloud(foundation: FoundationOutputs) -> outputs.SiteOutputs:
    """The cloud site that has the buckets: the foundation's first."""
    return next(s for s in foundation.sites if s.kind == SiteKind.CLOUD.value)


def checked(settings: AppsConfig, foundation: FoundationOutputs) -> FoundationOutputs:
    """The foundation's outputs. Raises ValueError with everything in which the stack file contradicts them."""
    there = {s.name: s for s in foundation.sites}
    faults = [f"it has no site {s.name}" for s in settings.sites if s.name not in there]
    faults += [
        f"{s.name} is {there[s.name].kind} there and {s.kind.value} here"
        for s in settings.sites
        if s.name in there and there[s.name].kind != s.kind.value
    ]
    faults += [
        f"{s.name} has no GPU nodes there"
        for s in settings.sites
        if s.has_gpus and s.name in there and not there[s.name].node_groups
    ]
    if foundation.environment != settings.environment:
        faults.append(f"it is {foundation.environment}, this stack {settings.environment}")
    if faults:
        raise ValueError(f"{settings.foundation}: {'; '.join(faults)}. Correct `sites`, or the foundation first")
    return foundation


def world(settings: AppsConfig, foundation: FoundationOutputs) -> World:
    """Sites and ranges for the table of edges."""
    home = next(s for s in foundation.sites if s.kind == SiteKind.HOME.value)
    places = tuple(Place(s.name, s.kind, s.ranks_at) for s in settings.sites)
    if settings.aws_endpoint:
        at = urlsplit(settings.aws_endpoint)
        return World(places, (home.cidr,), (f"{at.hostname}/32",), at.port or 443)
    return World(places, (home.cidr,), tuple(s.cidr for s in foundation.sites if s.kind == SiteKind.CLOUD.value))


def definitions(path: Path, sha256: str) -> list[dict[str, Any]]:
    """The CustomResourceDefinitions of a file. Raises ValueError for another digest or another kind."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path.name}: its SHA-256 is {found}, the stack file says {sha256}: read it, and correct one")
    documents = [d for d in yaml.safe_load_all(content) if d]
    if strange := {str(d.get("kind")) for d in documents} - {"CustomResourceDefinition"}:
        raise ValueError(f"{path.name}: holds {', '.join(sorted(strange))} beside definitions: leave only those")
    return documents
