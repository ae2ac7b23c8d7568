"""The whole program of each apps stack reads like what is to run, and holds to every rule."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import apps as layer
from infra import apps_config, observability, outputs, paper, platform, pods, recording
from infra.apps_manifests import manifests
from infra.iam import Role as AwsRole
from infra.recording import Recording
from infra.rules import evaluate
from infra.rules.preview import RULES

Apps = Callable[..., Recording]
Manifest = dict[str, Any]
STACKS = ("apps-local", "apps-dev", "apps-prod")
ROOT = Path(__file__).resolve().parents[2]
KUBE_SCORE = ROOT / ".tools" / "controlplane" / "kube-score"


def of_kind(run: Recording, kind: str) -> dict[str, Manifest]:
    return {m["metadata"]["name"]: m for m in manifests(run) if m["kind"] == kind}


def templates(run: Recording) -> Iterator[tuple[str, Manifest]]:
    """Name of what makes pods, and their template."""
    for manifest in manifests(run):
        yield from templates_of(manifest)


def templates_of(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    match manifest["kind"]:
        case "Deployment" | "StatefulSet" | "DaemonSet":
            yield manifest["metadata"]["name"], manifest["spec"]["template"]
        case "CronJob":
            yield manifest["metadata"]["name"], manifest["spec"]["jobTemplate"]["spec"]["template"]


def flag(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.mark.parametrize("stack", STACKS)
def test_the_program_holds_to_every_rule(apps: Apps, stack: str):
    assert evaluate(RULES, apps(stack).rules_view()) == []


@pytest.mark.parametrize("stack", STACKS)
def test_a_preview_declares_the_same_objects(apps: Apps, stack: str):
    assert {r.urn for r in apps(stack, preview=True).resources} == {r.urn for r in apps(stack).resources}


def test_every_object_has_the_one_explicit_provider_and_server_side_apply(apps: Apps):
    run = apps()
    (provider,) = run.of("pulumi:providers:kubernetes")
    assert provider.inputs["enableServerSideApply"] in (True, "true")
    assert isinstance(provider.inputs["kubeconfig"], recording.Secret)
    strangers = [r.urn for r in run.custom() if r.provider.rpartition("::")[0] != provider.urn]
    assert not strangers


def test_names_are_unique_and_the_order_of_manifests_is_fixed(apps: Apps):
    found = manifests(apps())
    assert found == manifests(apps())
    keys = [(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in found]
    assert len(set(keys)) == len(keys)
    assert found[0]["kind"] == "Namespace"
    assert all(m["apiVersion"] and "__" not in "".join(m) for m in found)


def test_the_password_leaves_the_program_only_as_a_secret(apps: Apps):
    values, _ = paper.sample_apps("apps-prod")
    password = values[f"rankbridge:{apps_config.STORE_PASSWORD}"]
    assert password not in json.dumps([r.resource().inputs for r in apps().resources], default=str)
    assert of_kind(apps(), "Secret")["feature-store"]["stringData"]["password"] == password
    assert password not in json.dumps([t for _, t in templates(apps())])


def test_a_foundation_that_was_not_recorded_is_named():
    monitor = recording._Monitor(preview=False, references={})
    asked = types.SimpleNamespace(type="pulumi:pulumi:StackReference", id="a/b/foundation-x", name="x", parent="")
    with pytest.raises(LookupError, match="the stack a/b/foundation-x, which was not recorded"):
        monitor.ReadResource(asked)
    with pytest.raises(AssertionError, match="reads what it does not declare"):
        monitor.ReadResource(types.SimpleNamespace(type="kubernetes:core/v1:Pod", id="x", name="x", parent=""))


def test_everything_that_contradicts_the_foundation_is_said_at_once(recorded: Callable[..., Recording]):
    values, secrets = paper.sample_apps("apps-prod")
    config = apps_config.read("apps-prod", values, secrets)
    right = outputs.read(recorded("foundation-prod").outputs)
    assert layer.checked(config, right) is right
    home, cloud = right.sites
    sites = (dataclasses.replace(home, kind="edge"), dataclasses.replace(cloud, node_groups=()))
    wrong = dataclasses.replace(right, environment="dev", sites=sites)
    with pytest.raises(ValueError, match="onprem is edge there and home here; aws has no GPU nodes there; it is dev"):
        layer.checked(config, wrong)
    with pytest.raises(ValueError, match="it has no site aws"):
        layer.checked(config, dataclasses.replace(right, sites=(home,)))


def test_gpus_are_asked_for_in_the_cloud_only_and_gateways_are_at_both_sites(apps: Apps):
    deployments = of_kind(apps(), "Deployment")
    for name, one in deployments.items():
        spec = one["spec"]["template"]["spec"]
        gpus = [c["resources"]["limits"].get("nvidia.com/gpu") for c in spec["containers"]]
        assert (gpus == ["1"]) == (name == "aws-triton"), name
        assert (spec.get("runtimeClassName") == "nvidia") == (name == "aws-triton")
    assert {"onprem-gateway", "aws-gateway"} <= set(deployments)
    keys = {t["key"] for t in deployments["aws-triton"]["spec"]["template"]["spec"]["tolerations"]}
    assert "nvidia.com/gpu" in keys


def test_a_gpu_pod_outlasts_a_hiccup_and_a_gateway_does_not(apps: Apps):
    def waits(name: str) -> set[int]:
        spec = of_kind(apps(), "Deployment")[name]["spec"]["template"]["spec"]
        return {t["tolerationSeconds"] for t in spec["tolerations"] if "tolerationSeconds" in t}

    assert waits("aws-triton") == {3600}
    assert waits("aws-gateway") == waits("onprem-gateway") == {30}


def test_only_home_has_people(apps: Apps):
    for name, template in templates(apps()):
        told = json.dumps(template)
        serves_home = name in {"onprem-gateway", "onprem-intake", "onprem-feature-store"}
        assert ("--vault" in told) == (name == "onprem-gateway")
        assert ("feature-store" in told) == serves_home, name


def test_every_server_listens_in_its_pod_and_says_that_it_may(apps: Apps):
    seen = 0
    for name, template in templates(apps()):
        for one in template["spec"]["containers"] + template["spec"].get("initContainers", []):
            command = one.get("command", [])
            if "--listen" in command:
                seen += 1
                environment = {e["name"]: e.get("value") for e in one["env"]}
                assert environment["RANKBRIDGE_LISTEN"] == "anywhere", name
                port = int(flag(command, "--listen").removeprefix("0.0.0.0:"))
                assert port in {p["containerPort"] for p in one["ports"]}
    assert seen > 8


def test_addresses_in_commands_are_services_that_exist(apps: Apps):
    services = {
        (f"{n}.{m['metadata']['namespace']}.svc", p["port"])
        for n, m in of_kind(apps(), "Service").items()
        for p in m["spec"]["ports"]
    }
    told = set()
    for _, template in templates(apps()):
        for host, port in re.findall(r"([a-z0-9-]+\.rankbridge[a-z-]*\.svc):(\d+)", json.dumps(template)):
            told.add((host, int(port)))
    assert told
    assert told <= services


def test_every_command_line_is_one_that_our_programs_take(apps: Apps):
    """The flags are those that the deployables' own help knows."""
    asked: dict[tuple[str, ...], set[str]] = {}
    for _, template in templates(apps()):
        for one in template["spec"]["containers"] + template["spec"].get("initContainers", []):
            command = one.get("command") or []
            for index, part in enumerate(command):
                if part.startswith("workloads."):
                    rest = command[index + 1 :]
                    sub = tuple(rest[:1]) if rest and not rest[0].startswith("-") else ()
                    flags = {f.partition("=")[0] for f in rest if f.startswith("--")}
                    asked.setdefault((part, *sub), set()).update(flags)
    assert {("workloads.gateway",), ("workloads.agent", "run"), ("workloads.operators", "spot")} <= set(asked)
    for (module, *sub), flags in asked.items():
        source = (ROOT / module.replace(".", "/")).rglob("*.py")
        known = {
            node.value
            for file in source
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--")
        }
        assert flags - {"--notice-s"} <= known, (module, *sub)


@pytest.mark.parametrize("stack", STACKS)
def test_an_update_waits_for_nothing_that_it_does_not_start_itself(apps: Apps, stack: str):
    """Pulumi waits until a Service has pods, a claim its volume and an Ingress its address, and fails after minutes."""
    run = apps(stack)
    started = [
        (m["metadata"]["namespace"], m["spec"]["template"]["metadata"]["labels"].items())
        for m in manifests(run)
        if m["kind"] in ("Deployment", "StatefulSet") and m["spec"]["replicas"]
    ]

    def waits(manifest: Manifest) -> bool:
        metadata = manifest["metadata"]
        if manifest["kind"] == "Service":
            spec = manifest["spec"]
            chosen = spec["selector"].items()
            is_empty = not any(at == metadata["namespace"] and chosen <= labels for at, labels in started)
            return is_empty and spec.get("clusterIP") != "None"
        return manifest["kind"] in ("PersistentVolumeClaim", "Ingress")

    found = [m["metadata"] for m in manifests(run) if waits(m)]
    assert {"load", "vault"} <= {m["name"] for m in found}
    assert [m["name"] for m in found if m.get("annotations", {}).get("pulumi.com/skipAwait") != "true"] == []


def test_an_update_leaves_the_number_of_pods_to_the_scaler(apps: Apps):
    run = apps()
    scaled = {m["spec"]["scaleTargetRef"]["name"] for m in of_kind(run, "ScaledObject").values()}
    ignored = {r.name for r in run.of("kubernetes:apps/v1:Deployment") if "spec.replicas" in r.ignored}
    assert scaled == ignored == {"onprem-gateway", "onprem-triton", "aws-gateway", "aws-triton"}


def test_an_hpa_takes_the_place_of_keda(apps: Apps):
    run = apps("apps-prod", crds="off", autoscaling={"engine": "hpa"})
    assert not [m for m in manifests(run) if "monitoring.coreos" in m["apiVersion"] or "keda" in m["apiVersion"]]
    gateway = of_kind(run, "HorizontalPodAutoscaler")["aws-gateway"]["spec"]
    assert (gateway["minReplicas"], gateway["maxReplicas"]) == (2, 12)
    assert gateway["metrics"][0]["external"]["metric"]["name"] == "rankbridge_in_flight"


def test_each_gateway_is_told_of_one_whose_site_has_another_triton(apps: Apps):
    deployments = of_kind(apps(), "Deployment")
    for site, other in (("onprem", "aws"), ("aws", "onprem")):
        command = deployments[f"{site}-gateway"]["spec"]["template"]["spec"]["containers"][0]["command"]
        told = [word for word in command if word.startswith("--peer")]
        assert told == [f"--peer={other}=http://{other}-gateway.rankbridge.svc:8080"]


def test_an_edge_site_is_gateway_and_retrieval_and_nothing_else(recorded: Callable[..., Recording]):
    below = recorded("foundation-prod")
    values, _ = paper.sample_apps("apps-prod")
    sites = json.loads(values["rankbridge:sites"])
    edge = {"name": "shop-1", "kind": "edge", "class": "cpu", "host": "shop-1.example.com", "ranks_at": "onprem"}
    sites.append({**edge, "roles": {"gateway": {}, "retrieval": {}}})
    there = [*below.outputs["sites"], {**below.outputs["sites"][0], "name": "shop-1", "kind": "edge"}]
    wider = {**below.outputs, "sites": there}
    run = paper.record_apps("apps-prod", dataclasses.replace(below, outputs=wider), sites=sites)
    assert {n for n in of_kind(run, "Deployment") if n.startswith("shop-1")} == {"shop-1-gateway", "shop-1-retrieval"}
    gateway = of_kind(run, "Deployment")["shop-1-gateway"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert flag(gateway, "--triton") == "onprem-triton.rankbridge.svc:8000"
    assert flag(gateway, "--site-kind") == "edge"
    assert evaluate(RULES, run.rules_view()) == []


def test_a_second_region_is_one_entry_with_all_that_looks_after_its_nodes(recorded: Callable[..., Recording]):
    below = recorded("foundation-prod")
    values, _ = paper.sample_apps("apps-prod")
    sites = json.loads(values["rankbridge:sites"])
    sites.append({**sites[1], "name": "aws2", "host": "ranking-aws2.example.com"})
    _, cloud = below.outputs["sites"]
    groups = [{**g, "auto_scaling_group": f"{g['auto_scaling_group']}-2"} for g in cloud["node_groups"]]
    queue = "https://sqs.eu-west-1.amazonaws.com/1/notices"
    second = {**cloud, "name": "aws2", "region": "eu-west-1", "cidr": "10.30.0.0/16", "queue_url": queue}
    wider = {**below.outputs, "sites": [*below.outputs["sites"], {**second, "node_groups": groups}]}
    run = paper.record_apps("apps-prod", dataclasses.replace(below, outputs=wider), sites=sites)
    assert evaluate(RULES, run.rules_view()) == []
    deployments = of_kind(run, "Deployment")
    assert {n for n in deployments if n.startswith("aws2-")} == {
        f"aws2-{what}"
        for what in ("gateway", "retrieval", "triton", "cluster-autoscaler", "node-hygiene", "spot-handler")
    }
    for site, region, theirs in (
        ("aws", "eu-central-1", {g["auto_scaling_group"] for g in cloud["node_groups"]}),
        ("aws2", "eu-west-1", {g["auto_scaling_group"] for g in groups}),
    ):
        main = deployments[f"{site}-cluster-autoscaler"]["spec"]["template"]["spec"]["containers"][0]
        assert {"name": "AWS_REGION", "value": region} in main["env"]
        assert {p.rpartition(":")[2] for p in main["command"] if p.startswith("--nodes=")} == theirs
        hygiene = deployments[f"{site}-node-hygiene"]["spec"]["template"]["spec"]["containers"][0]["command"]
        assert flag(hygiene, "--region") == region
        assert {hygiene[i + 1] for i, part in enumerate(hygiene) if part == "--group"} == theirs
    spot = deployments["aws2-spot-handler"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert flag(spot, "--queue-url") == queue
    held = {p.partition("=")[2] for n in deployments if n.endswith("autoscaler") for p in _command(deployments[n])}
    (role,) = (m for m in manifests(run) if m["kind"] == "Role" and m["metadata"]["name"].endswith("autoscaler"))
    for rule in role["rules"]:
        assert set(rule.get("resourceNames", [])) <= held, "what it may do is about what it was told to hold"


def _command(deployment: Manifest) -> list[str]:
    command: list[str] = deployment["spec"]["template"]["spec"]["containers"][0]["command"]
    return command


@pytest.mark.parametrize(
    ("gpu", "resource", "told"),
    [
        ({"sharing": "time-slicing", "replicas": 4}, "nvidia.com/gpu", "replicas: 4"),
        ({"sharing": "mig", "mig_profile": "1g.10gb"}, "nvidia.com/mig-1g.10gb", "migStrategy: mixed"),
    ],
)
def test_gpus_are_shared_as_configured(apps: Apps, gpu: dict[str, Any], resource: str, told: str):
    run = apps("apps-prod", gpu=gpu)
    triton = of_kind(run, "Deployment")["aws-triton"]["spec"]["template"]["spec"]["containers"][0]
    assert triton["resources"]["limits"][resource] == "1"
    assert told in of_kind(run, "ConfigMap")["device-plugin"]["data"]["config.yaml"]


def test_operators_look_after_the_foundations_groups_and_queues(apps: Apps):
    deployments = of_kind(apps(), "Deployment")

    def command(name: str) -> list[str]:
        found: list[str] = deployments[name]["spec"]["template"]["spec"]["containers"][0]["command"]
        return found

    groups = {"rankbridge-prod-aws-gpu-base", "rankbridge-prod-aws-gpu-burst"}
    hygiene = command("aws-node-hygiene")
    assert {hygiene[i + 1] for i, part in enumerate(hygiene) if part == "--group"} == groups
    assert flag(command("aws-spot-handler"), "--queue-url").startswith("https://sqs.eu-central-1.")
    assert {p.rpartition(":")[2] for p in command("aws-cluster-autoscaler") if p.startswith("--nodes=")} == groups


def test_every_pod_that_speaks_to_aws_is_its_role_by_the_certificate_of_just_that_role(apps: Apps):
    seen = set()
    for name, template in templates(apps()):
        spec = template["spec"]
        before, all_of_them = spec.get("initContainers", []), [*spec.get("initContainers", []), *spec["containers"]]
        asks = [c["name"] for c in all_of_them if "AWS_REGION" in {e["name"] for e in c.get("env", [])}]
        sidecars = [c for c in before if c["name"] == "identity"]
        assert len(sidecars) == bool(asks), name
        holders = [c["name"] for c in all_of_them if "identity" in {m["name"] for m in c.get("volumeMounts", [])}]
        assert holders == ["identity"] * len(sidecars), f"{name}: nobody else sees the key"
        for sidecar in sidecars:
            (volume,) = (v for v in spec["volumes"] if v["name"] == "identity")
            (source,) = volume["projected"]["sources"]
            role = source["secret"]["name"].removeprefix("identity-")
            seen.add(role)
            assert flag(sidecar["command"], "--role-arn").endswith(f"rankbridge-prod-{role}"), name
            assert flag(sidecar["command"], "--region") == "eu-central-1"
            assert sidecar["restartPolicy"] == "Always"
            started = [c["name"] for c in before]
            assert all(started.index("identity") < started.index(c) for c in asks if c in started), name
    assert seen == {"agent", "trainer", "publisher", "autoscaler", "node-hygiene", "spot-handler"}


def test_on_an_emulator_there_is_no_certificate_to_ask_for(apps: Apps):
    said = json.dumps(manifests(apps("apps-local")))
    assert "identity-" not in said
    assert "AWS_ENDPOINT_URL" in said


def test_without_trusted_certificates_there_is_no_way_to_a_role():
    class Nobody:
        trust_anchor_arn = roles_anywhere_profile_arn = None

    with pytest.raises(ValueError, match=r"identity\.trust_anchor"):
        platform.identity_command(AwsRole.AGENT, Nobody())  # type: ignore[arg-type] -- nothing else of it is asked


# Definitions of others


CRD: Manifest = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "things.example.com"},
    "spec": {
        "group": "example.com",
        "scope": "Namespaced",
        "names": {"plural": "things", "kind": "Thing"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


def test_definitions_come_from_files_whose_digest_the_stack_file_holds(
    apps: Apps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(layer, "ROOT", tmp_path)
    (tmp_path / "things.yaml").write_text(yaml.safe_dump(CRD))
    digest = hashlib.sha256((tmp_path / "things.yaml").read_bytes()).hexdigest()
    run = apps("apps-prod", crds="install", crd_files={"things.yaml": digest})
    assert of_kind(run, "CustomResourceDefinition")["things.example.com"]["spec"] == CRD["spec"]
    assert manifests(run)[0]["kind"] == "CustomResourceDefinition"
    with pytest.raises(Exception, match="its SHA-256 is"):
        apps("apps-prod", crds="install", crd_files={"things.yaml": "0" * 64})


# What others say of it


@pytest.mark.parametrize("stack", STACKS)
def test_kube_score_has_nothing_to_say_but_what_a_reason_stands_beside(apps: Apps, stack: str, tmp_path: Path):
    if not KUBE_SCORE.exists():
        pytest.skip("kube-score is not built: make cluster-tools")
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump_all(manifests(apps(stack))))
    ran = subprocess.run(
        [str(KUBE_SCORE), "score", "--kubernetes-version", "v1.36", "--output-format", "json", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = []
    judged = json.loads(ran.stdout)
    for one in judged:
        low = [check for check in one["checks"] if check["grade"] < 10 and not check["skipped"]]
        found += [(one["object_name"], check["check"]["id"], check["comments"]) for check in low]
    assert found == []
    assert len(judged) > 50


def test_each_exception_from_kube_score_has_its_reason(apps: Apps):
    excused = 0
    for manifest in manifests(apps()):
        for metadata in (manifest["metadata"], *(t["metadata"] for _, t in templates_of(manifest))):
            annotations = metadata.get("annotations") or {}
            for check in filter(None, annotations.get("kube-score/ignore", "").split(",")):
                excused += 1
                assert len(annotations[pods.reason_key(check)]) > 10, (manifest["metadata"]["name"], check)
    assert excused


def exported() -> set[str]:
    """Series that processes of ours export, from the source of the metrics that they make."""
    kinds = {
        "Counter": ("_total",),
        "Gauge": ("",),
        "Histogram": ("_bucket", "_count", "_sum"),
        "GaugeMetricFamily": ("",),
    }
    found = set()
    for file in (ROOT / "workloads").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found |= {first.value + tail for tail in kinds[node.func.id]}
    return found


TRITONS = {
    "nv_inference_request_success",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_gpu_utilization",
}
"""docs.nvidia.com, Triton's metrics."""


def expressions(run: Recording) -> dict[str, str]:
    found = {}
    for rule in of_kind(run, "PrometheusRule").values():
        for group in rule["spec"]["groups"]:
            found |= {f"{group['name']}/{r['alert']}/{r['labels']['severity']}": r["expr"] for r in group["rules"]}
    for name, board in of_kind(run, "ConfigMap").items():
        if name.startswith("dashboard-"):
            (text,) = board["data"].values()
            for panel in json.loads(text)["panels"]:
                found[f"{name}/{panel['title']}"] = panel["targets"][0]["expr"]
    for name, one in of_kind(run, "ScaledObject").items():
        found[f"scaling/{name}"] = one["spec"]["triggers"][0]["metadata"]["query"]
    return found


def test_alerts_dashboards_and_scalers_speak_of_series_that_exist(apps: Apps):
    known = exported() | TRITONS
    asked = expressions(apps())
    assert len(asked) > 25
    for where, expression in asked.items():
        series = set(re.findall(r"\b(?:rankbridge|nv)_[a-z0-9_]+", expression))
        assert series, where
        assert series <= known, (where, series - known)


def test_promises_are_edges_of_the_histogram(apps: Apps):
    from workloads.telemetry.metrics import BUCKETS_MS  # noqa: PLC0415 -- tests see every room

    edges = {f"{edge / 1000:g}" for edge in BUCKETS_MS}
    asked = {e for text in expressions(apps()).values() for e in re.findall(r'\ble="([^"]+)"', text)}
    assert asked
    assert asked <= edges


def promtool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: Debian's package prometheus has it")
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, cwd=cwd)


def rule_file(run: Recording, folder: Path) -> Path:
    (rule,) = of_kind(run, "PrometheusRule").values()
    file = folder / "rules.yaml"
    file.write_text(yaml.safe_dump(rule["spec"]))
    return file


def test_promtool_takes_every_rule_and_every_query(apps: Apps, tmp_path: Path):
    file = rule_file(apps(), tmp_path)
    ran = promtool("check", "rules", file.name, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    queries = [{"record": f"q:{i}", "expr": e} for i, e in enumerate(expressions(apps()).values())]
    text = yaml.safe_dump({"groups": [{"name": "queries", "rules": queries}]}).replace("$site", "aws")
    (tmp_path / "queries.yaml").write_text(text)
    ran = promtool("check", "rules", "queries.yaml", cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(("late", "fires"), [(30, True), (1, False)], ids=["30 % late", "1 % late"])
def test_a_site_that_misses_its_promise_rings_and_one_that_keeps_it_does_not(
    apps: Apps,
    tmp_path: Path,
    late: int,
    fires: bool,  # noqa: FBT001
):
    rule_file(apps(), tmp_path)
    labels = '{endpoint="/v1/recommend",role="gateway",site="aws"'
    series = [
        (f"rankbridge_request_seconds_count{labels}}}", f"0+{6000}x120"),
        (f'rankbridge_request_seconds_bucket{labels},le="0.1"}}', f"0+{60 * (100 - late)}x120"),
        ('rankbridge_in_flight{site="aws",role="gateway"}', "1x120"),
    ]
    expected = [
        {
            "exp_labels": {"severity": severity, "site": "aws"},
            "exp_annotations": {
                "summary": f"/v1/recommend at aws misses 100 ms {factor:g} times as often as its budget allows"
            },
        }
        for _, _, factor, severity in observability.WINDOWS
    ]
    alert = {"eval_time": "90m", "alertname": "RecommendLate", "exp_alerts": expected if fires else []}
    test = {
        "interval": "1m",
        "input_series": [{"series": s, "values": v} for s, v in series],
        "alert_rule_test": [alert],
    }
    case = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(case))
    ran = promtool("test", "rules", "case.yaml", cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_dashboards_are_whole(apps: Apps):
    boards = observability.dashboards(())
    for name, board in boards.items():
        text = of_kind(apps(), "ConfigMap")[f"dashboard-{name}"]["data"][f"{name}.json"]
        made = json.loads(text)
        assert made["uid"] == board["uid"]
        places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in made["panels"]]
        assert len(set(places)) == len(places)
