"""Every rule of the apps fires on what it is there for, and on nothing else of a good stack."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from infra.recording import Recording
from infra.rules import UNKNOWN, Resource, evaluate
from infra.rules import kubernetes as rules

Inputs = dict[str, Any]
Change = Callable[[Inputs], object]


def pod(inputs: Inputs) -> Inputs:
    found: Inputs = inputs["spec"]["template"]
    return found


def main(inputs: Inputs) -> Inputs:
    found: Inputs = pod(inputs)["spec"]["containers"][0]
    return found


def replace_in_command(old: str, new: str) -> Change:
    return lambda i: main(i).update(command=[new if part == old else part for part in main(i)["command"]])


EXPLICIT = "--model-control-mode=explicit"
TRITON, GATEWAY, PLUGIN = (
    (rules.DEPLOYMENT, "aws-triton"),
    (rules.DEPLOYMENT, "aws-gateway"),
    (rules.DAEMON_SET, "device-plugin"),
)
SERVICE, SPACE, DENY = (
    (rules.SERVICE, "aws-triton"),
    (rules.NAMESPACE, "rankbridge"),
    (rules.NETWORK_POLICY, "rankbridge-default-deny"),
)

CASES: list[tuple[str, tuple[str, str], Change]] = [
    ("digest-pinned", GATEWAY, lambda i: main(i).update(image="registry.example.com/gateway:latest")),
    (
        "digest-pinned",
        GATEWAY,
        lambda i: pod(i)["spec"]["initContainers"][0].update(image="registry.example.com/agent:1.2"),
    ),
    ("triton-release", TRITON, lambda i: pod(i)["metadata"]["annotations"].update({rules.TRITON_RELEASE: "25.12"})),
    ("triton-release", TRITON, lambda i: pod(i)["metadata"]["annotations"].pop(rules.TRITON_RELEASE)),
    ("triton-explicit", TRITON, replace_in_command(EXPLICIT, "--model-control-mode=poll")),
    ("triton-explicit", TRITON, lambda i: main(i)["command"].remove(EXPLICIT)),
    ("inside-only", SERVICE, lambda i: i["spec"].update(type="NodePort")),
    ("inside-only", SERVICE, lambda i: i["spec"].update(type="LoadBalancer")),
    ("inside-only", SERVICE, lambda i: i["spec"].update(externalIPs=["203.0.113.1"])),
    ("probed", GATEWAY, lambda i: main(i).pop("livenessProbe")),
    ("probed", GATEWAY, lambda i: main(i).pop("readinessProbe")),
    ("probed", PLUGIN, lambda i: pod(i)["metadata"]["annotations"].pop("rankbridge.io/why-pod-probes")),
    ("limited", GATEWAY, lambda i: main(i)["resources"]["limits"].pop("memory")),
    ("limited", GATEWAY, lambda i: main(i)["resources"]["requests"].pop("cpu")),
    ("limited", GATEWAY, lambda i: main(i)["resources"]["limits"].update(memory="64Gi")),
    ("locked-down", GATEWAY, lambda i: main(i)["securityContext"].update(readOnlyRootFilesystem=False)),
    ("locked-down", GATEWAY, lambda i: main(i)["securityContext"].pop("runAsNonRoot")),
    ("locked-down", GATEWAY, lambda i: main(i)["securityContext"].pop("allowPrivilegeEscalation")),
    ("locked-down", GATEWAY, lambda i: main(i)["securityContext"]["capabilities"].update(add=["NET_ADMIN"])),
    ("locked-down", GATEWAY, lambda i: main(i)["securityContext"].pop("seccompProfile")),
    ("locked-down", GATEWAY, lambda i: main(i)["securityContext"].update(privileged=True)),
    ("locked-down", PLUGIN, lambda i: pod(i)["metadata"]["annotations"].pop("rankbridge.io/why-root")),
    ("off-the-host", GATEWAY, lambda i: pod(i)["spec"].update(hostNetwork=True)),
    ("off-the-host", GATEWAY, lambda i: main(i)["ports"][0].update(hostPort=80)),
    ("off-the-host", GATEWAY, lambda i: pod(i)["spec"]["volumes"].append({"name": "x", "hostPath": {"path": "/"}})),
    ("off-the-host", PLUGIN, lambda i: pod(i)["metadata"]["annotations"].pop("rankbridge.io/why-host-path")),
    ("spread", GATEWAY, lambda i: pod(i)["spec"].pop("topologySpreadConstraints")),
    ("budgeted", (rules.BUDGET, "aws-gateway"), lambda i: i["spec"]["selector"]["matchLabels"].update(x="y")),
    ("budgeted", (rules.BUDGET, "aws-gateway"), lambda i: i["metadata"].update(namespace="elsewhere")),
    ("default-deny", DENY, lambda i: i["spec"].update(egress=[{}])),
    ("default-deny", DENY, lambda i: i["spec"].update(policyTypes=["Ingress"])),
    ("default-deny", DENY, lambda i: i["spec"].update(podSelector={"matchLabels": {"x": "y"}})),
    ("restricted-namespace", SPACE, lambda i: i["metadata"]["labels"].update({rules.ENFORCE: "baseline"})),
    ("restricted-namespace", SPACE, lambda i: i["metadata"]["labels"].pop(rules.ENFORCE)),
]


def changed(run: Recording, where: tuple[str, str], change: Change) -> list[Resource]:
    found = []
    hit = 0
    for resource in run.rules_view():
        if (resource.type, resource.name) == where:
            hit += 1
            inputs = json.loads(json.dumps(resource.inputs))
            change(inputs)
            assert inputs != resource.inputs
            found.append(Resource(resource.type, resource.name, inputs))
        else:
            found.append(resource)
    assert hit == 1, where
    return found


@pytest.mark.parametrize(("rule", "where", "change"), CASES, ids=[f"{n}: {c[0]}" for n, c in enumerate(CASES)])
def test_a_rule_fires_alone(apps: Callable[..., Recording], rule: str, where: tuple[str, str], change: Change):
    assert {v.rule for v in evaluate(rules.RULES, changed(apps(), where, change))} == {rule}


def test_every_rule_is_seen_to_fire():
    assert {rule for rule, _, _ in CASES} == {rule.name for rule in rules.RULES}


def test_a_cron_job_is_judged_by_the_pod_that_it_makes(apps: Callable[..., Recording]):
    def change(inputs: Inputs) -> None:
        inputs["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["image"] = "training:1"

    violations = evaluate(rules.RULES, changed(apps(), (rules.CRON_JOB, "training"), change))
    assert [(v.rule, v.name) for v in violations] == [("digest-pinned", "training")]


def test_what_is_not_known_yet_passes(apps: Callable[..., Recording]):
    resource = copy.deepcopy(next(r for r in apps().rules_view() if (r.type, r.name) == GATEWAY))
    template = Resource(resource.type, resource.name, {**resource.inputs, "spec": UNKNOWN})
    single = [rule for rule in rules.RULES if rule.check is not None]
    assert evaluate(single, [template]) == []
