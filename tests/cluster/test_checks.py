"""What a control plane does not judge: kube-score over every manifest, and who may reach whom.

Played nodes enforce no NetworkPolicy, so the policies that the API server accepted are evaluated by a pure function
against the one table of edges (`infra.edges`).
"""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest
import yaml

from infra import apps, apps_config, edges, outputs, paper
from infra.apps_config import AppsConfig
from infra.controlplane import BINARIES
from infra.controlplane.api import Api, Manifest
from infra.controlplane.harness import Deployed, Figures
from infra.edges import Endpoint, Party
from infra.pods import IGNORED_CHECKS, reason_key

KUBERNETES = "v1.34"
"""What the foundation declares (k3s)."""
FINE = 10
REASON_WORDS = 3


def score(manifests: Sequence[Manifest]) -> list[tuple[str, str]]:
    """(check, object) of everything that kube-score does not find in order."""
    arguments = ["--kubernetes-version", KUBERNETES, "--output-format", "json"]
    done = subprocess.run(
        [BINARIES / "kube-score", "score", *arguments, "-"],
        input=yaml.safe_dump_all(manifests),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    judged: list[dict[str, Any]] = json.loads(done.stdout)
    return [
        (check["check"]["id"], f"{thing['type_meta']['kind']} {thing['object_meta']['name']}")
        for thing in judged
        for check in thing["checks"]
        if not check["skipped"] and check["grade"] < FINE
    ]


def exceptions(manifests: Sequence[Manifest]) -> list[tuple[str, str, str]]:
    """(check, object, reason) of every exception that a manifest or its pods make."""
    found = []
    for manifest in manifests:
        spec = manifest.get("spec", {})
        templates = [spec.get("template"), spec.get("jobTemplate", {}).get("spec", {}).get("template")]
        for metadata in [manifest["metadata"], *(t["metadata"] for t in templates if isinstance(t, dict))]:
            notes = metadata.get("annotations") or {}
            name = f"{manifest['kind']} {manifest['metadata']['name']}"
            ignored = [check for check in notes.get(IGNORED_CHECKS, "").split(",") if check]
            found += [(check, name, notes.get(reason_key(check), "")) for check in ignored]
    return found


@pytest.fixture(scope="module")
def plain(manifests: Sequence[Manifest]) -> list[Manifest]:
    """Manifests as JSON has them."""
    found: list[Manifest] = json.loads(json.dumps(manifests))
    return found


@pytest.mark.usefixtures("plane")
def test_kube_score_finds_everything_in_order(plain: list[Manifest], figures: Figures):
    assert score(plain) == []
    figures.add("kube-score", f"{len(plain)} manifests", f"{len({c for c, *_ in exceptions(plain)})} checks excepted")


@pytest.mark.usefixtures("plane")
def test_every_exception_names_a_check_and_has_its_reason(plain: list[Manifest]):
    said = subprocess.run([BINARIES / "kube-score", "list"], capture_output=True, text=True, timeout=60, check=True)
    known = {row[0] for row in csv.reader(said.stdout.splitlines())}
    made = exceptions(plain)
    assert made
    assert {check for check, *_ in made} <= known
    assert [one for one in made if len(one[2].split()) < REASON_WORDS] == []


@pytest.mark.usefixtures("plane")
def test_kube_score_would_have_said_so(plain: list[Manifest]):
    gateway = next(m for m in plain if m["kind"] == "Deployment" and m["metadata"]["name"].endswith("-gateway"))
    broken = json.loads(json.dumps(gateway))
    container = broken["spec"]["template"]["spec"]["containers"][0]
    container["image"] = "gateway:latest"
    del container["resources"], container["securityContext"]
    others = [m for m in plain if m is not gateway]
    assert {"container-image-tag", "container-resources", "container-security-context-readonlyrootfilesystem"} <= {
        check for check, _ in score([*others, broken])
    }


# Edges


@pytest.fixture(scope="module")
def settings() -> AppsConfig:
    return apps_config.read("apps-prod", *paper.sample_apps("apps-prod"))


@pytest.fixture(scope="module")
def world(settings: AppsConfig) -> edges.World:
    below = paper.recording.record("foundation-prod", *paper.sample("foundation-prod"))
    return apps.world(settings, outputs.read(below.outputs))


def ours(deployed: Deployed) -> dict[tuple[Party, str], Endpoint]:
    """Everything of ours that has pods: those that run, and those of jobs, which are not run here."""
    found = {}
    for manifest in deployed.order:
        spec = manifest.get("spec", {})
        for template in (spec.get("template"), spec.get("jobTemplate", {}).get("spec", {}).get("template")):
            if isinstance(template, dict) and "containers" in template.get("spec", {}):
                labels = template["metadata"]["labels"]
                where = Party(labels[edges.ROLE_LABEL]), labels.get(edges.SITE_LABEL, "")
                found[where] = Endpoint(manifest["metadata"]["namespace"], labels)
    return found


def others(world: edges.World) -> dict[tuple[Party, str], Endpoint]:
    """What is the cluster's or outside, as a packet shows it."""
    found = {(party, ""): Endpoint(where, marks) for party, (where, marks) in edges.OTHERS.items()}
    for party in edges.OUTSIDE:
        first = world.outside(party)[0].partition("/")[0].rpartition(".")[0]
        found[party, ""] = Endpoint(address=f"{first}.10")
    return found


def test_the_policies_that_were_accepted_let_through_what_the_table_says_and_nothing_else(
    deployed: Deployed, api: Api, world: edges.World, figures: Figures
):
    policies = api.find("networking.k8s.io/v1", "NetworkPolicy")
    parties = ours(deployed) | others(world)
    assert {party for party, _ in parties} == set(Party), "a party of the table is nowhere, or one is not in it"
    declared = {(p.number, p.protocol) for edge in edges.TABLE for p in world.ports(edge)}
    tried = declared | {(22, "TCP"), (80, "TCP"), (6443, "TCP"), (53, "UDP"), (8080, "UDP"), (31_000, "TCP")}
    wrong, passed, judged = [], 0, 0
    for (source, target), (port, protocol) in itertools.product(itertools.permutations(parties, 2), sorted(tried)):
        if source[0] not in edges.NAMESPACES and target[0] not in edges.NAMESPACES:
            continue  # no policy of ours is about others among themselves
        is_let = edges.allowed(policies, parties[source], parties[target], port, protocol)
        judged, passed = judged + 1, passed + is_let
        if is_let != edges.is_in_table(world, source, target, port, protocol):
            wrong.append(f"{source} -> {target} {port}/{protocol}: {'let through' if is_let else 'refused'}")
    assert not wrong, "\n".join(wrong)
    figures.add("packets judged by NetworkPolicies", str(judged), f"{passed} let through, as the table says")


def test_without_a_policy_everything_would_pass_so_each_namespace_is_shut_first(deployed: Deployed, api: Api):
    spaces = {m["metadata"]["name"] for m in deployed.named("Namespace")}
    shut = {
        p["metadata"]["namespace"]
        for p in api.find("networking.k8s.io/v1", "NetworkPolicy")
        if p["spec"]["podSelector"] == {} and set(p["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        if not p["spec"].get("ingress") and not p["spec"].get("egress")
    }
    assert shut == spaces
