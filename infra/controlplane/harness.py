"""What a suite on the control plane shares: machines that join, what was deployed, and figures for its end.

It knows Kubernetes and our labels of role and site; what is deployed is told to it.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from infra.controlplane.api import Api, Manifest
from infra.edges import ROLE_LABEL, SITE_LABEL

Eventually = Callable[..., bool]


def until(true: Callable[[], Any], seconds: float = 30, every: float = 0.1) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(every)
    return bool(true())


@dataclasses.dataclass
class Figures:
    """What was measured: (what, value, how much is allowed or what it is measured on)."""

    rows: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def add(self, what: str, value: str, bound: str = "") -> None:
        """One more row."""
        self.rows.append((what, value, bound))

    def lines(self) -> list[str]:
        """The rows as a table."""
        what, value = (max((len(row[column]) for row in self.rows), default=0) for column in range(2))
        return [f"{row[0]:<{what}}  {row[1]:>{value}}  {row[2]}".rstrip() for row in self.rows]


def condition(thing: Manifest, kind: str) -> str:
    """The status of a condition: `True`, `False`, `Unknown`, or nothing where it was never stated."""
    conditions = thing.get("status", {}).get("conditions") or ()
    return next((c["status"] for c in conditions if c["type"] == kind), "")


def is_ready(thing: Manifest) -> bool:
    """Whether a node or pod says that it is ready."""
    return condition(thing, "Ready") == "True"


def is_leaving(thing: Manifest) -> bool:
    """Whether an object is being deleted."""
    return bool(thing["metadata"].get("deletionTimestamp"))


def _has_counted(budget: Manifest) -> bool:
    """Whether a disruption budget knows its pods: all well, no eviction it still waits to see, the room reckoned."""
    status = budget.get("status", {})
    healthy, desired = status.get("currentHealthy", 0), status.get("desiredHealthy", 0)
    return bool(
        status.get("observedGeneration") == budget["metadata"]["generation"]
        and healthy == status.get("expectedPods")
        and status.get("disruptionsAllowed") == max(0, healthy - desired)
        and not status.get("disruptedPods")
    )


def join(api: Api, node: Manifest) -> None:
    """A machine becomes a node: the object, and its size, which is a status."""
    api.apply({k: v for k, v in node.items() if k != "status"}, manager="kubelet")
    bare = {**{k: node[k] for k in ("apiVersion", "kind", "status")}, "metadata": {"name": node["metadata"]["name"]}}
    api.apply(bare, manager="kubelet", status=True)


def observe(api: Api, kinds: Mapping[tuple[str, str], Callable[[str, Manifest], None]]) -> None:
    """Call back with each event and object of some (API version, kind), in threads, until the API server ends."""

    def run(api_version: str, kind: str, look: Callable[[str, Manifest], None]) -> None:
        for event, thing in api.watch(api_version, kind):
            look(event, thing)

    for (api_version, kind), look in kinds.items():
        threading.Thread(target=run, args=(api_version, kind, look), name=f"watch {kind}", daemon=True).start()


class Readiness:
    """How many pods of each role and site are ready and stay; the fewest and the most since `begin`."""

    def __init__(self, api: Api) -> None:
        self._ready: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
        self._all: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
        self._lowest: dict[tuple[str, str], int] = {}
        self._highest: dict[tuple[str, str], int] = {}
        self._counts = False
        observe(api, {("v1", "Pod"): self._look})

    def begin(self) -> None:
        """Start from what is there now."""
        self._lowest = {key: len(names) for key, names in self._ready.items()}
        self._highest = {key: len(names) for key, names in self._all.items()}
        self._counts = True

    def now(self, role: str, site: str) -> int:
        """Ready ones at this moment, as the watch tells it."""
        return len(self._ready[role, site])

    def lowest(self, role: str, site: str) -> int:
        """The fewest ready ones. Raises KeyError for what was never seen."""
        return self._lowest[role, site]

    def highest(self, role: str, site: str) -> int:
        """The most that stay, ready or not. Raises KeyError for what was never seen."""
        return self._highest[role, site]

    def _look(self, event: str, pod: Manifest) -> None:
        labels, name = pod["metadata"].get("labels", {}), pod["metadata"]["name"]
        key = labels.get(ROLE_LABEL, ""), labels.get(SITE_LABEL, "")
        stays = event != "DELETED" and not is_leaving(pod)
        (self._all[key].add if stays else self._all[key].discard)(name)
        (self._ready[key].add if stays and is_ready(pod) else self._ready[key].discard)(name)
        if self._counts:
            self._lowest[key] = min(self._lowest.get(key, 0), len(self._ready[key]))
            self._highest[key] = max(self._highest.get(key, 0), len(self._all[key]))


@dataclasses.dataclass(frozen=True)
class Deployed:
    """What was applied, in `order`, and how it is now."""

    api: Api
    order: Sequence[Manifest]

    def named(self, kind: str) -> list[Manifest]:
        """The declared manifests of a kind."""
        return [m for m in self.order if m["kind"] == kind]

    def of(self, kind: str, role: str, site: str) -> Manifest:
        """The declared manifest of a kind for a role at a site. Raises LookupError."""
        for manifest in self.named(kind):
            labels = manifest["metadata"].get("labels", {})
            if (labels.get(ROLE_LABEL), labels.get(SITE_LABEL)) == (role, site):
                return manifest
        raise LookupError(f"no {kind} of {role} at {site} is declared")

    def serving(self) -> Iterator[tuple[str, str, Manifest]]:
        """Role, site and manifest of each Deployment and StatefulSet."""
        for manifest in self.named("Deployment") + self.named("StatefulSet"):
            labels = manifest["spec"]["template"]["metadata"]["labels"]
            yield labels[ROLE_LABEL], labels[SITE_LABEL], manifest

    def pods(self, role: str = "", site: str = "") -> list[dict[str, Any]]:
        """Pods that are to stay, by role and site."""
        selector = ",".join(f"{k}={v}" for k, v in ((ROLE_LABEL, role), (SITE_LABEL, site)) if v)
        return [p for p in self.api.find("v1", "Pod", selector=selector) if not is_leaving(p)]

    def workload(self, role: str, site: str) -> dict[str, Any]:
        """The Deployment or StatefulSet of a role at a site, as it is now. Raises LookupError."""
        selector = f"{ROLE_LABEL}={role},{SITE_LABEL}={site}"
        for kind in ("Deployment", "StatefulSet"):
            for found in self.api.find("apps/v1", kind, selector=selector):
                return found
        raise LookupError(f"no workload of {role} at {site}")

    def scale(self, role: str, site: str, replicas: int) -> None:
        """Set the number of pods, as a scaler does."""
        workload = self.workload(role, site)
        metadata = workload["metadata"]
        change = {"spec": {"replicas": replicas}}
        self.api.patch("apps/v1", workload["kind"], metadata["name"], metadata["namespace"], change)

    def is_settled(self) -> bool:
        """Whether every workload in our namespaces has all the pods that it wants, ready and of its newest template.

        Its disruption budgets have counted them, too: their controller comes to that a moment after the pods are ready.
        """
        ours = {m["metadata"]["namespace"] for _, _, m in self.serving()}
        for kind in ("Deployment", "StatefulSet"):
            for found in self.api.find("apps/v1", kind):
                if found["metadata"]["namespace"] not in ours:
                    continue
                status, wanted = found.get("status", {}), found["spec"].get("replicas", 1)
                counts = [status.get(k, 0) for k in ("replicas", "readyReplicas", "updatedReplicas")]
                if status.get("observedGeneration") != found["metadata"]["generation"] or counts != [wanted] * 3:
                    return False
        budgets = [b for b in self.api.find("policy/v1", "PodDisruptionBudget") if b["metadata"]["namespace"] in ours]
        return all(_has_counted(budget) for budget in budgets)

    def unsettled(self) -> str:
        """Why pods are missing or wait, in Kubernetes' own words."""
        said = [
            f"{found['metadata']['name']}: {c['message']}"
            for found in self.api.find("apps/v1", "ReplicaSet")
            for c in found.get("status", {}).get("conditions") or ()
            if c["type"] == "ReplicaFailure"
        ]
        for pod in self.api.find("v1", "Pod"):
            phase = pod["status"].get("phase", "")
            if phase in ("Pending", "Running") and not is_ready(pod):
                messages = [c.get("message", "") for c in pod["status"].get("conditions") or ()]
                said.append(f"{pod['metadata']['name']}: {' '.join([phase, *filter(None, messages)])}, not ready")
        return "\n".join(said)
