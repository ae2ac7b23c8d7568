"""The policy pack runs the very rules, in its own environment, on properties as the engine hands them over."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.recording import Recording
from infra.rules import UNKNOWN
from infra.rules.preview import RULES

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "policy" / ".venv" / "bin" / "python"

# What the engine's host does: properties behind the proxy that raises for what is unknown, one policy after the other.
DRIVER = """
import json, runpy, sys, types
from pulumi_policy import ResourceValidationPolicy
from pulumi_policy.proxy import unknown_checking_proxy
pack = runpy.run_path(sys.argv[1], run_name="pack")
declared = [types.SimpleNamespace(**{**r, "props": unknown_checking_proxy(r["props"])}) for r in json.load(sys.stdin)]
found, policies = [], pack["policies"]()
for policy in policies:
    if isinstance(policy, ResourceValidationPolicy):
        for resource in declared:
            policy.validate(resource, lambda message, urn=None: found.append([policy.name, message]))
    else:
        stack = types.SimpleNamespace(resources=declared)
        policy.validate(stack, lambda message, urn=None: found.append([policy.name, message]))
json.dump({"policies": [p.name for p in policies], "found": found}, sys.stdout)
"""


def judge(resources: list[dict[str, Any]]) -> dict[str, Any]:
    if not PYTHON.exists():
        pytest.skip("the policy pack has no environment: make policy-venv")
    ran = subprocess.run(
        [str(PYTHON), "-c", DRIVER, str(ROOT / "policy" / "__main__.py")],
        input=json.dumps(resources),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def wire(value: object) -> object:
    """A recorded value as the engine gives it to a pack: numbers as floats, secrets in the clear, unknowns as marks."""
    if value is UNKNOWN:
        return "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
    if isinstance(value, dict):
        return {k: wire(v) for k, v in value.items()}
    if isinstance(value, list):
        return [wire(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def given(run: Recording) -> list[dict[str, Any]]:
    return [
        {
            "resource_type": r.type,
            "name": r.name,
            "urn": r.urn,
            "props": {k: wire(r.plain(k)) for k in r.inputs},
        }
        for r in run.custom()
    ]


@pytest.mark.parametrize("preview", [False, True])
def test_every_rule_is_in_the_pack_and_the_stack_passes(recorded: Callable[..., Recording], preview: bool):  # noqa: FBT001
    answer = judge(given(recorded("foundation-prod", preview=preview)))
    assert set(answer["policies"]) == {r.name for r in RULES}
    assert answer["found"] == []


def test_a_violation_is_seen_beside_an_unknown_property(recorded: Callable[..., Recording]):
    resources = given(recorded("foundation-prod", preview=True))
    template = next(r for r in resources if r["resource_type"] == "aws:ec2/launchTemplate:LaunchTemplate")
    template["props"]["metadataOptions"]["httpTokens"] = "optional"
    assert "04da6b54" in json.dumps(template), "something in the template is unknown in a preview"
    connection = next(r for r in resources if r["resource_type"] == "aws:ec2/vpnConnection:VpnConnection")
    connection["props"]["tunnel1PresharedKey"] = connection["props"]["tunnel2PresharedKey"]
    found = {name for name, _ in judge(resources)["found"]}
    assert found == {"imdsv2", "both-tunnels"}


def test_the_apps_pass_and_a_violation_of_theirs_is_seen(apps: Callable[..., Recording]):
    resources = given(apps("apps-prod"))
    assert judge(resources)["found"] == []
    service = next(r for r in resources if r["urn"].endswith("core/v1:Service::aws-triton"))
    service["props"]["spec"]["type"] = "LoadBalancer"
    assert {name for name, _ in judge(resources)["found"]} == {"inside-only"}
