"""Everything of `apps-prod` on a real control plane with the foundation's nodes: admission, placement, change.

What Pod Security, quotas, the scheduler, rollouts and disruption budgets say here they say in production. What a
container would do is not tried (docs/apps.md).
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from infra.config import FoundationConfig
from infra.controlplane import nodes
from infra.controlplane.api import Api, Manifest, RefusedError
from infra.controlplane.harness import Deployed, Figures, Readiness, is_leaving, join, until

ENFORCE = "pod-security.kubernetes.io/enforce"
IMAGE = f"images.invalid/probe@sha256:{'0' * 64}"
GPU = "nvidia.com/gpu"
SERVING_ROLES = {"gateway", "retrieval", "triton", "feature-store", "intake"}


@pytest.fixture
def readiness(api: Api, deployed: Deployed) -> Readiness:
    """Counts from now on."""
    seen = Readiness(api)
    wanted = {(r, s): m["spec"]["replicas"] for r, s, m in deployed.serving()}
    assert until(lambda: all(seen.now(*key) == count for key, count in wanted.items())), deployed.unsettled()
    seen.begin()
    return seen


def site_of_nodes(api: Api) -> dict[str, str]:
    return {n["metadata"]["name"]: n["metadata"]["labels"]["rankbridge.io/site"] for n in api.find("v1", "Node")}


def gpus(pod: Manifest) -> int:
    return sum(int(c.get("resources", {}).get("limits", {}).get(GPU, 0)) for c in pod["spec"]["containers"])


def test_every_object_is_accepted_as_it_is_declared(deployed: Deployed, api: Api, figures: Figures):
    kinds = collections.Counter(m["kind"] for m in deployed.order)
    for manifest in deployed.order:
        metadata = manifest["metadata"]
        api.get(manifest["apiVersion"], manifest["kind"], metadata["name"], metadata.get("namespace", ""))
    for kind, count in kinds.most_common():
        figures.add(f"accepted: {kind}", str(count))
    assert {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget", "ResourceQuota"} <= set(kinds)


def test_a_field_that_kubernetes_does_not_know_is_refused(deployed: Deployed, api: Api):
    service = deployed.named("Service")[0]
    with pytest.raises(RefusedError, match="sessionAfinity"):
        api.apply({**service, "spec": {**service["spec"], "sessionAfinity": "None"}})


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PodMonitor", "PrometheusRule", "ScaledObject"])
def test_foreign_kinds_are_judged_by_their_own_definitions(kind: str, deployed: Deployed, api: Api):
    found = deployed.named(kind)
    assert found, f"apps-prod declares no {kind}"
    with pytest.raises(RefusedError, match="spec"):
        api.apply({**found[0], "spec": "anything"})


def test_pods_are_restricted_in_every_namespace_but_the_one_of_device_plugins(deployed: Deployed, api: Api):
    spec = {"containers": [{"name": "main", "image": IMAGE, "securityContext": {"privileged": True}}]}
    with_rights = []
    for namespace in deployed.named("Namespace"):
        name = namespace["metadata"]["name"]
        if namespace["metadata"]["labels"].get(ENFORCE, "restricted") != "restricted":
            with_rights.append(name)
            continue
        metadata = {"name": "anything", "namespace": name}
        with pytest.raises(RefusedError, match="violates PodSecurity"):
            api.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    assert len(with_rights) == 1, f"only device plugins need rights: {with_rights}"
    there = {m["kind"] for m in deployed.order if m["metadata"].get("namespace") == with_rights[0] and _runs_pods(m)}
    assert there == {"DaemonSet"}


def test_a_namespace_that_says_nothing_is_restricted_too(api: Api, deployed: Deployed):
    assert deployed.order
    spec = {"containers": [{"name": "main", "image": IMAGE}]}
    metadata = {"name": "anything", "namespace": "default"}
    with pytest.raises(RefusedError, match='violates PodSecurity "restricted'):
        api.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})


def _runs_pods(manifest: Manifest) -> bool:
    return "template" in manifest.get("spec", {}) or "jobTemplate" in manifest.get("spec", {})


def test_nothing_waits_for_a_place(deployed: Deployed):
    assert deployed.is_settled(), deployed.unsettled()
    assert [p["metadata"]["name"] for p in deployed.pods() if p["status"]["phase"] == "Pending"] == []


def test_every_pod_runs_at_its_own_site_and_none_on_a_host_of_the_control_plane(
    deployed: Deployed, api: Api, foundation: FoundationConfig
):
    site_of = site_of_nodes(api)
    servers = {host.name for host in foundation.onprem.servers}
    for role, site, manifest in deployed.serving():
        pods = deployed.pods(role, site)
        assert len(pods) == manifest["spec"]["replicas"]
        assert {site_of[p["spec"]["nodeName"]] for p in pods} == {site}, f"{role} of {site} runs elsewhere"
        if role in SERVING_ROLES:
            assert not servers & {p["spec"]["nodeName"] for p in pods}


def test_gpu_pods_run_in_aws_only_each_on_a_gpu_of_its_own_and_gateways_at_both_sites(deployed: Deployed, api: Api):
    site_of = site_of_nodes(api)
    with_gpu = [p for p in deployed.pods() if gpus(p)]
    assert {p["metadata"]["labels"]["rankbridge.io/role"] for p in with_gpu} == {"triton"}
    assert {site_of[p["spec"]["nodeName"]] for p in with_gpu} == {"aws"}
    assert {p["spec"]["runtimeClassName"] for p in with_gpu} == {"nvidia"}
    assert len({p["spec"]["nodeName"] for p in with_gpu}) == len(with_gpu)
    assert {site_of[p["spec"]["nodeName"]] for p in deployed.pods("gateway")} == {"onprem", "aws"}


def test_each_gpu_node_has_its_device_plugin_and_no_other_node_one(deployed: Deployed, api: Api):
    (plugin,) = deployed.named("DaemonSet")
    with_gpu = {n["metadata"]["name"] for n in api.find("v1", "Node") if GPU in n["status"].get("allocatable", {})}
    running = [p["spec"]["nodeName"] for p in api.find("v1", "Pod", plugin["metadata"]["namespace"]) if _runs(p)]
    assert sorted(running) == sorted(with_gpu)


def _runs(pod: Manifest) -> bool:
    return bool(pod["status"].get("phase") == "Running")


def test_a_service_leads_to_the_ready_pods_of_its_role_at_its_site_and_to_no_other(deployed: Deployed, api: Api):
    slices = api.find("discovery.k8s.io/v1", "EndpointSlice")
    behind: dict[str, set[str]] = collections.defaultdict(set)
    for piece in slices:
        for end in piece.get("endpoints") or ():
            if end["conditions"]["ready"]:
                behind[piece["metadata"]["labels"]["kubernetes.io/service-name"]].add(end["targetRef"]["name"])
    served = set()
    for service in deployed.named("Service"):
        labels = service["metadata"]["labels"]
        role, site = labels["rankbridge.io/role"], labels["rankbridge.io/site"]
        if role in SERVING_ROLES:
            served.add((role, site))
            assert behind[service["metadata"]["name"]] == {p["metadata"]["name"] for p in deployed.pods(role, site)}
    assert served == {(r, s) for r, s, _ in deployed.serving() if r in SERVING_ROLES}


def test_expressions_of_admission_policies_compile_and_fit_the_kinds_that_they_are_about(deployed: Deployed, api: Api):
    policies = deployed.named("ValidatingAdmissionPolicy")
    assert policies
    for policy in policies:
        where = policy["apiVersion"], policy["kind"], policy["metadata"]["name"]
        assert until(lambda at=where: "typeChecking" in api.get(*at).get("status", {}))  # type: ignore[misc]  # a default argument binds the loop's value
        assert api.get(*where)["status"]["typeChecking"].get("expressionWarnings", []) == []


def test_replicas_are_spread_over_nodes(deployed: Deployed):
    for role, site, manifest in deployed.serving():
        constraints = manifest["spec"]["template"]["spec"].get("topologySpreadConstraints", ())
        if manifest["spec"]["replicas"] > 1 and any(c["whenUnsatisfiable"] == "DoNotSchedule" for c in constraints):
            used = collections.Counter(p["spec"]["nodeName"] for p in deployed.pods(role, site))
            assert len(used) > 1, f"all of {role} at {site} runs on {used}"


def test_every_quota_has_room_for_what_is_declared_and_refuses_more(deployed: Deployed, api: Api):
    quotas = deployed.named("ResourceQuota")
    assert {q["metadata"]["namespace"] for q in quotas} >= {"rankbridge", "rankbridge-jobs", "rankbridge-platform"}
    size = {"cpu": "10000", "memory": "64Mi", "ephemeral-storage": "64Mi"}
    for quota in quotas:
        assert "requests.cpu" in quota["spec"]["hard"]
        with pytest.raises(RefusedError, match=r"exceeded quota: .*requests.cpu"):
            api.apply(_restricted_pod("greedy", quota["metadata"]["namespace"], size))


def _restricted_pod(name: str, namespace: str, size: Mapping[str, str]) -> Manifest:
    security = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    resources = {"requests": dict(size), "limits": dict(size)}
    container = {"name": "main", "image": IMAGE, "resources": resources, "securityContext": security}
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container]}}


def test_every_quota_lets_each_role_grow_to_its_maximum(deployed: Deployed, figures: Figures):
    highest = {}
    for scaled in deployed.named("ScaledObject"):
        labels = scaled["metadata"]["labels"]
        where = labels["rankbridge.io/role"], labels["rankbridge.io/site"]
        highest[where] = (deployed.workload(*where)["spec"]["replicas"], scaled["spec"]["maxReplicaCount"])
    try:
        for (role, site), (_, most) in highest.items():
            deployed.scale(role, site, most)
        # Pods that find no node yet wait for one; a quota would not let them be made at all.
        made = until(lambda: all(len(deployed.pods(*where)) == most for where, (_, most) in highest.items()))
        assert made, deployed.unsettled()
        figures.add("pods at the highest load", str(len(deployed.pods())), "all let in by their quota")
    finally:
        for (role, site), (usual, _) in highest.items():
            deployed.scale(role, site, usual)
    assert until(deployed.is_settled, 60), deployed.unsettled()


def test_serving_pushes_jobs_off_a_gpu_and_a_job_pushes_nobody(deployed: Deployed, api: Api):
    free = sum(1 for n in api.find("v1", "Node") if GPU in n["status"].get("allocatable", {}))
    free -= len(deployed.pods("triton", "aws"))
    before = deployed.workload("triton", "aws")["spec"]["replicas"]
    jobs = [f"fills-{number}" for number in range(free + 1)]
    try:
        for name in jobs:
            api.apply(_gpu_job_pod(name))
        assert until(lambda: _phases(api, jobs).count("Running") == free), _phases(api, jobs)
        time.sleep(1)
        assert len(deployed.pods("triton", "aws")) == before, "a job that waits takes nobody's place"
        assert _phases(api, jobs).count("Pending") == 1
        deployed.scale("triton", "aws", before + 1)
        assert until(deployed.is_settled), deployed.unsettled()
        assert _phases(api, jobs).count("Running") == free - 1
    finally:
        deployed.scale("triton", "aws", before)
        for name in jobs:
            api.delete("v1", "Pod", name, "rankbridge-jobs")
    assert until(deployed.is_settled, 60), deployed.unsettled()


def _gpu_job_pod(name: str) -> Manifest:
    pod = _restricted_pod(name, "rankbridge-jobs", {"cpu": "100m", "memory": "64Mi", "ephemeral-storage": "64Mi"})
    resources = pod["spec"]["containers"][0]["resources"]
    resources["limits"] = {**resources["limits"], GPU: "1"}
    toleration = {"key": GPU, "operator": "Exists"}
    return {**pod, "spec": {**pod["spec"], "priorityClassName": "rankbridge-jobs", "tolerations": [toleration]}}


def _phases(api: Api, names: list[str]) -> list[str]:
    found = {p["metadata"]["name"]: p for p in api.find("v1", "Pod", "rankbridge-jobs") if not is_leaving(p)}
    return [found[name]["status"].get("phase", "") for name in names if name in found]


def test_a_second_apply_changes_nothing_and_a_third_writes_nothing(deployed: Deployed, api: Api, figures: Figures):
    began = time.monotonic()
    second = [_applied_again(api, manifest) for manifest in deployed.order]
    took = time.monotonic() - began
    changed = [
        f"{m['kind']} {m['metadata']['name']}: {said}"
        for m, (said, _) in zip(deployed.order, second, strict=True)
        if said
    ]
    assert not changed, "\n".join(changed)
    # The server may store an object in another order once, when a controller of its own wrote between two applies.
    figures.add("second apply", f"{took:.1f} s", f"no object changed; {sum(w for _, w in second)} were stored anew")
    third = [_applied_again(api, manifest) for manifest in deployed.order]
    written = [f"{m['kind']} {m['metadata']['name']}" for m, (_, was) in zip(deployed.order, third, strict=True) if was]
    assert not written, written


def _applied_again(api: Api, manifest: Manifest) -> tuple[list[str], bool]:
    """What an apply changed in an object, and whether it was stored anew (its resource version moved)."""
    metadata = manifest["metadata"]
    where = manifest["apiVersion"], manifest["kind"], metadata["name"], metadata.get("namespace", "")
    before, after = api.get(*where), api.apply(manifest)
    was_written = before["metadata"]["resourceVersion"] != after["metadata"]["resourceVersion"]
    parts = {**before, **before["metadata"]}, {**after, **after["metadata"]}
    differing = {k for k in parts[0] | parts[1] if parts[0].get(k) != parts[1].get(k)}
    return sorted(differing - {"resourceVersion", "managedFields", "metadata"}), was_written


def _rolling(deployed: Deployed) -> list[tuple[str, str, int, int]]:
    """Role, site, and the fewest and most pods that a rollout may have, of Deployments with several pods."""
    found = []
    for role, site, manifest in deployed.serving():
        spec = manifest["spec"]
        if manifest["kind"] == "Deployment" and spec["replicas"] > 1:
            rolling = spec["strategy"]["rollingUpdate"]
            floor, ceiling = spec["replicas"] - rolling["maxUnavailable"], spec["replicas"] + rolling["maxSurge"]
            found.append((role, site, floor, ceiling))
    return found


def test_a_rollout_never_has_fewer_pods_ready_than_it_may(
    deployed: Deployed, api: Api, readiness: Readiness, figures: Figures
):
    began = time.monotonic()
    rolling = _rolling(deployed)
    assert rolling
    first = {p["metadata"]["uid"] for role, site, *_ in rolling for p in deployed.pods(role, site)}
    change = {"spec": {"template": {"metadata": {"annotations": {"probe.rankbridge.io/rolled": "once"}}}}}
    for role, site, *_ in rolling:
        metadata = deployed.of("Deployment", role, site)["metadata"]
        api.patch("apps/v1", "Deployment", metadata["name"], metadata["namespace"], change)
    assert until(deployed.is_settled, 90), deployed.unsettled()
    for role, site, floor, ceiling in rolling:
        assert readiness.lowest(role, site) >= floor, f"{role} at {site} had {readiness.lowest(role, site)} ready"
        assert readiness.highest(role, site) <= ceiling
        assert readiness.highest(role, site) > floor
        assert not first & {p["metadata"]["uid"] for p in deployed.pods(role, site)}, "nothing was rolled"
    figures.add("rollout of all", f"{time.monotonic() - began:.1f} s", f"{len(rolling)} deployments side by side")


def drain(api: Api, node: str, seconds: float = 60) -> int:
    """Cordon a node and evict what runs there, as `kubectl drain --ignore-daemonsets` does; how often a budget refused.

    What a budget refuses is asked again until it is allowed.
    """
    api.patch("v1", "Node", node, "", {"spec": {"unschedulable": True}})
    refused, deadline = 0, time.monotonic() + seconds
    while left := [p for p in api.find("v1", "Pod") if p["spec"].get("nodeName") == node and _is_drained(p)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{node} is not empty: {[p['metadata']['name'] for p in left]}")
        for pod in left:
            refused += not api.evict(pod["metadata"]["name"], pod["metadata"]["namespace"])
        time.sleep(0.05)
    return refused


def _is_drained(pod: Manifest) -> bool:
    owners = {o["kind"] for o in pod["metadata"].get("ownerReferences", ())}
    return not is_leaving(pod) and "DaemonSet" not in owners


@contextlib.contextmanager
def uncordoned_after(api: Api, node: str) -> Iterator[None]:
    try:
        yield
    finally:
        api.patch("v1", "Node", node, "", {"spec": {"unschedulable": None}})


def _floors(deployed: Deployed, api: Api, site: str) -> dict[str, int]:
    """Role -> pods that its disruption budget keeps healthy, as the disruption controller reckons."""
    found = {}
    for role in {r for r, s, _ in deployed.serving() if s == site} & SERVING_ROLES:
        metadata = deployed.of("PodDisruptionBudget", role, site)["metadata"]
        budget = api.get("policy/v1", "PodDisruptionBudget", metadata["name"], metadata["namespace"])
        found[role] = int(budget["status"]["desiredHealthy"])
    return found


def _fullest(deployed: Deployed, role: str, site: str) -> str:
    """The node with most pods of a role: where a budget has to say no."""
    (node, _), *_ = collections.Counter(p["spec"]["nodeName"] for p in deployed.pods(role, site)).most_common()
    return str(node)


def _with_volumes(api: Api, node: str) -> set[str]:
    """Roles of pods on a node that keep a volume there."""
    return {
        pod["metadata"]["labels"]["rankbridge.io/role"]
        for pod in api.find("v1", "Pod")
        if pod["spec"].get("nodeName") == node
        and any("persistentVolumeClaim" in v for v in pod["spec"].get("volumes", ()))
    }


def _all_run_on(pods: list[dict[str, Any]], wanted: set[str]) -> bool:
    return bool(pods) and all(p["spec"].get("nodeName") in wanted and p["status"]["phase"] == "Running" for p in pods)


def _vault_host(api: Api) -> str:
    """The host whose directory is the vault's volume."""
    (claim,) = (c for c in api.find("v1", "PersistentVolumeClaim", "rankbridge") if c["metadata"]["name"] == "vault")
    volume = api.get("v1", "PersistentVolume", claim["spec"]["volumeName"])
    (term,) = volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    return str(term["matchExpressions"][0]["values"][0])


def test_draining_a_private_host_moves_what_can_move_and_keeps_every_budget(
    deployed: Deployed, api: Api, foundation: FoundationConfig, readiness: Readiness, figures: Figures
):
    other = _vault_host(api)
    (node,) = {host.name for host in foundation.onprem.agents} - {other}
    floors, bound = _floors(deployed, api, "onprem"), _with_volumes(api, node)
    movable = set(floors) - bound
    assert {"retrieval", "triton"} <= movable
    began = time.monotonic()
    with uncordoned_after(api, node):
        refused = drain(api, node)
        took = time.monotonic() - began
        assert until(lambda: all(_all_run_on(deployed.pods(r, "onprem"), {other}) for r in movable)), (
            deployed.unsettled()
        )
        for role in bound:
            # Its volume is a directory of this host: no other host may take it, and it waits for its own.
            waiting = [p for p in deployed.pods(role, "onprem") if p["status"]["phase"] == "Pending"]
            assert waiting, f"{role} left its volume behind"
    assert until(deployed.is_settled, 60), deployed.unsettled()
    for role in movable:
        assert readiness.lowest(role, "onprem") >= floors[role], f"{role} fell to {readiness.lowest(role, 'onprem')}"
    figures.add("drain of a private host", f"{took:.1f} s", f"budgets said 'not now' {refused} times")


def test_the_host_of_the_vault_is_not_emptied_by_a_drain_because_its_gateways_can_be_nowhere_else(
    deployed: Deployed, api: Api, readiness: Readiness, figures: Figures
):
    node, floor = _vault_host(api), _floors(deployed, api, "onprem")["gateway"]
    with uncordoned_after(api, node):
        with pytest.raises(TimeoutError) as stuck:
            drain(api, node, seconds=5)
        assert "retrieval" not in str(stuck.value)
        assert "triton" not in str(stuck.value)
        assert readiness.now("gateway", "onprem") == floor
    assert until(deployed.is_settled, 60), deployed.unsettled()
    assert readiness.lowest("gateway", "onprem") == floor
    figures.add("drain of the vault's host", "is refused", f"its budget keeps {floor} gateways there (docs/apps.md)")


def test_a_budget_refuses_an_eviction_until_the_one_before_it_is_made_good(
    deployed: Deployed, api: Api, readiness: Readiness, figures: Figures
):
    for role, site, floor, _ in _rolling(deployed):
        pods = deployed.pods(role, site)
        namespace = pods[0]["metadata"]["namespace"]
        answers = [api.evict(pod["metadata"]["name"], namespace) for pod in pods]
        assert answers[0], f"the first pod of {role} at {site} may go"
        assert not all(answers), f"all of {role} at {site} could be evicted at once"
        assert until(deployed.is_settled, 60), deployed.unsettled()
        assert readiness.lowest(role, site) >= floor
        assert api.evict(deployed.pods(role, site)[0]["metadata"]["name"], namespace), "it may go now"
    assert until(deployed.is_settled, 60), deployed.unsettled()
    figures.add("evictions at once", "1 allowed", "of each role and site, the next once its successor is ready")


def test_draining_a_gpu_node_moves_triton_to_another_gpu_and_keeps_every_budget(
    deployed: Deployed, api: Api, readiness: Readiness, figures: Figures
):
    node = _fullest(deployed, "triton", "aws")
    others = {n["metadata"]["name"] for n in api.find("v1", "Node", selector="rankbridge.io/site=aws")} - {node}
    floors = _floors(deployed, api, "aws")
    began = time.monotonic()
    with uncordoned_after(api, node):
        refused = drain(api, node)
        took = time.monotonic() - began
        assert until(lambda: _all_run_on(deployed.pods("triton", "aws"), others)), deployed.unsettled()
        assert until(deployed.is_settled, 60), deployed.unsettled()
    for role, floor in floors.items():
        assert readiness.lowest(role, "aws") >= floor, f"{role} fell to {readiness.lowest(role, 'aws')}"
    figures.add("drain of a GPU node", f"{took:.1f} s", f"budgets said 'not now' {refused} times")


def test_pods_that_find_no_gpu_wait_until_a_new_node_brings_one(
    deployed: Deployed, api: Api, foundation: FoundationConfig, figures: Figures
):
    before = deployed.workload("triton", "aws")["spec"]["replicas"]
    there = sum(1 for n in api.find("v1", "Node") if GPU in n["status"].get("allocatable", {}))
    (fresh,) = nodes.gpu_nodes(foundation, "gpu-burst", 1)
    name = fresh["metadata"]["name"]
    try:
        deployed.scale("triton", "aws", there + 1)
        assert until(lambda: len(deployed.pods("triton", "aws")) == there + 1)
        assert until(lambda: _waiting(deployed), 10)
        time.sleep(2)  # those that wait go nowhere else: not to a node without a GPU, and not home
        waiting = _waiting(deployed)
        assert any("Insufficient nvidia.com/gpu" in str(p["status"]["conditions"]) for p in waiting)
        began = time.monotonic()
        join(api, fresh)
        assert until(lambda: len(_waiting(deployed)) == len(waiting) - 1, 30), deployed.unsettled()
        assert until(lambda: _running_on(deployed, name), 30), deployed.unsettled()
        figures.add("a waiting GPU pod runs on a new node after", f"{time.monotonic() - began:.1f} s")
    finally:
        deployed.scale("triton", "aws", before)
        until(deployed.is_settled)
        drain(api, name)
        api.delete("v1", "Node", name)
    assert until(deployed.is_settled, 60), deployed.unsettled()


def _running_on(deployed: Deployed, node: str) -> list[dict[str, Any]]:
    return [
        p
        for p in deployed.pods("triton", "aws")
        if p["spec"].get("nodeName") == node and p["status"]["phase"] == "Running"
    ]


def _waiting(deployed: Deployed) -> list[dict[str, Any]]:
    return [
        p
        for p in deployed.pods("triton", "aws")
        if any(c["type"] == "PodScheduled" and c["status"] == "False" for c in p["status"].get("conditions", ()))
    ]
