"""Jobs of `apps-prod`, started by hand as an operator does: admitted, placed where they belong, run to their end."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from infra.config import FoundationConfig
from infra.controlplane import nodes
from infra.controlplane.api import Api, Manifest
from infra.controlplane.harness import Deployed, Figures, condition, join, until

GPU_TYPE = "rankbridge.io/gpu-type"
GPU = "nvidia.com/gpu"


@pytest.fixture(scope="module")
def burst(api: Api, deployed: Deployed, foundation: FoundationConfig) -> Iterator[dict[str, Manifest]]:
    """A node of each GPU type, by name."""
    assert deployed.order
    types = next(len(g.types) for g in foundation.node_groups if g.name == "gpu-burst")
    fresh = nodes.gpu_nodes(foundation, "gpu-burst", types)
    for node in fresh:
        join(api, node)
    yield {n["metadata"]["name"]: n for n in fresh}
    for node in fresh:
        api.delete("v1", "Node", node["metadata"]["name"])


def started_by_hand(api: Api, template: Manifest) -> dict[str, Any]:
    """What `kubectl create job --from=cronjob/...` makes."""
    metadata = template["metadata"]
    return api.apply(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": f"{metadata['name']}-by-hand", "namespace": metadata["namespace"]},
            "spec": template["spec"]["jobTemplate"]["spec"],
        }
    )


def has_ended(api: Api, job: Manifest) -> bool:
    metadata = job["metadata"]
    return condition(api.get("batch/v1", "Job", metadata["name"], metadata["namespace"]), "Complete") == "True"


def why(api: Api, job: Manifest) -> str:
    """What Kubernetes says about a job that does not end."""
    namespace = job["metadata"]["namespace"]
    said = [
        f"{e['involvedObject']['name']}: {e['message']}" for e in api.find("v1", "Event", namespace) if "message" in e
    ]
    return "\n".join(said[-10:])


def test_every_job_is_admitted_runs_where_it_belongs_and_ends(
    deployed: Deployed, api: Api, burst: dict[str, Manifest], figures: Figures
):
    there = {n["metadata"]["name"]: n["metadata"]["labels"] for n in api.find("v1", "Node")}
    assert burst.keys() <= there.keys()
    templates = deployed.named("CronJob")
    roles = set()
    for template in templates:
        pod_template = template["spec"]["jobTemplate"]["spec"]["template"]
        spec, labels = pod_template["spec"], pod_template["metadata"]["labels"]
        roles.add(labels["rankbridge.io/role"])
        job = started_by_hand(api, template)
        name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
        assert until(functools.partial(has_ended, api, job), 30), f"{name}: {why(api, job)}"
        pods = api.find("v1", "Pod", namespace, f"batch.kubernetes.io/job-name={name}")
        assert len(pods) == job["spec"].get("completions", 1)
        for pod in pods:
            node = there[pod["spec"]["nodeName"]]
            assert node["rankbridge.io/site"] == labels["rankbridge.io/site"]
            if wanted := spec.get("nodeSelector", {}).get(GPU_TYPE):
                assert node[GPU_TYPE] == wanted
            if any(GPU in c.get("resources", {}).get("limits", {}) for c in spec["containers"]):
                assert node["nvidia.com/gpu.present"] == "true"
        api.delete("batch/v1", "Job", name, namespace)
    assert roles >= {"training", "tensorrt", "index", "evaluation", "load-master", "load-worker"}
    figures.add("jobs run to their end", str(len(templates)), "started by hand, one after another")
