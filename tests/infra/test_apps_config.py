"""What a stack file of the apps may hold, and that everything wrong with it is said at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import apps_config, paper
from infra.apps_config import AppsConfig, Crds, Engine, Image, Role
from infra.plan import FaultsError
from workloads.contract.sites import SiteKind

Edit = Callable[[dict[str, Any]], object]


def read(stack: str = "apps-prod", edit: Edit | None = None) -> AppsConfig:
    values, secrets = paper.sample_apps(stack)
    raw = {k.partition(":")[2]: json.loads(v) if v[:1] in "[{" else v for k, v in values.items()}
    if edit is not None:
        edit(raw)
    made = {f"rankbridge:{k}": v if isinstance(v, str) else json.dumps(v) for k, v in raw.items()}
    return apps_config.read(stack, made, secrets)


@pytest.mark.parametrize("stack", ["apps-local", "apps-dev", "apps-prod"])
def test_a_committed_stack_lacks_only_what_is_the_operators(stack: str):
    config = read(stack)
    assert set(config.images) == set(Image)
    assert config.home.kind is SiteKind.HOME
    assert set(config.home.roles) == set(Role)


def test_images_by_tag_and_placeholders_are_refused_with_the_command_that_writes_them():
    def edit(raw: dict[str, Any]) -> None:
        raw["images"]["gateway"] = "registry.example.com/gateway:latest"
        raw["images"]["agent"] = f"images.invalid/rankbridge/agent@sha256:{'0' * 64}"
        del raw["images"]["triton"]

    with pytest.raises(FaultsError) as caught:
        read(edit=edit)
    assert {f.key for f in caught.value.faults} == {"images.gateway", "images.triton", "images.agent"}
    assert all("rankbridge images pin" in f.allowed for f in caught.value.faults)


def test_local_takes_placeholders():
    images = read("apps-local").images
    assert all(image.startswith("images.invalid/") for image in images.values())


REFUSED: list[tuple[str, Edit]] = [
    ("triton_release", lambda raw: raw.update(triton_release="25.12")),
    ("foundation", lambda raw: raw.update(foundation="organization/rankbridge/foundation-dev")),
    ("cluster", lambda raw: raw.update(cluster="ambient")),
    ("crd_files", lambda raw: raw.update(crds="install")),
    ("autoscaling.engine", lambda raw: raw.update(crds="off")),
    ("signers", lambda raw: raw.update(signers={})),
    ("sites", lambda raw: raw["sites"][0].update(kind="edge")),
    ("sites[1].roles.intake", lambda raw: raw["sites"][1]["roles"].update(intake={})),
    ("sites[0].roles.retrieval", lambda raw: raw["sites"][0]["roles"].pop("retrieval")),
    ("sites[0].roles.gateway.max", lambda raw: raw["sites"][0]["roles"]["gateway"].update(max=1)),
    ("sites[0].roles.gateway.replicas", lambda raw: raw["sites"][0]["roles"]["gateway"].update(replicas=1)),
    ("sites[0].roles.intake.replicas", lambda raw: raw["sites"][0]["roles"]["intake"].update(replicas=2)),
    ("sites[1].roles.triton.cpu_limit", lambda raw: raw["sites"][1]["roles"]["triton"].update(cpu_limit="1")),
    ("sites (aws).ranks_at", lambda raw: raw["sites"][1].update(ranks_at="nowhere")),
    ("sites[1].name", lambda raw: raw["sites"][1].update(name="onprem")),
    ("jobs.site", lambda raw: raw["jobs"].update(site="onprem")),
    ("gpu.replicas", lambda raw: raw.update(gpu={"sharing": "time-slicing"})),
    ("gpu.mig_profile", lambda raw: raw.update(gpu={"sharing": "mig"})),
    ("aws_endpoint", lambda raw: raw.update(aws_endpoint="http://127.0.0.1:4566")),
    ("gatewayy", lambda raw: raw.update(gatewayy="x")),
]


@pytest.mark.parametrize(("key", "edit"), REFUSED, ids=[k for k, _ in REFUSED])
def test_a_wrong_value_is_refused_by_its_full_name(key: str, edit: Edit):
    with pytest.raises(FaultsError) as caught:
        read(edit=edit)
    assert key in {f.key for f in caught.value.faults}, str(caught.value)


def test_a_password_is_shown_by_no_fault():
    values, _ = paper.sample_apps("apps-prod")
    with pytest.raises(FaultsError) as caught:
        apps_config.read("apps-prod", values, frozenset())
    assert values[f"rankbridge:{apps_config.STORE_PASSWORD}"] not in str(caught.value)
    assert "encrypted" in str(caught.value)


def test_an_edge_site_is_one_entry_that_ranks_elsewhere():
    edge = {"name": "shop-1", "kind": "edge", "host": "shop-1.example.com", "ranks_at": "onprem"}
    edge |= {"roles": {"gateway": {}, "retrieval": {}}}  # type: ignore[dict-item] -- as JSON has it
    config = read(edit=lambda raw: raw["sites"].append(edge))
    assert config.site("shop-1").kind is SiteKind.EDGE
    assert config.site("shop-1").ranks_at == "onprem"


def test_the_entries_that_the_documents_show_are_taken_as_they_are():
    page = (Path(__file__).resolve().parents[2] / "docs" / "apps.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    config = read(edit=lambda raw: raw["sites"].extend(yaml.safe_load(shown)))
    kinds = {site.name: site.kind for site in config.sites}
    assert (kinds["aws2"], kinds["shop-1"]) == (SiteKind.CLOUD, SiteKind.EDGE)
    assert config.site("aws2").has_gpus
    assert config.site("shop-1").ranks_at == "onprem"


def test_without_foreign_kinds_an_hpa_scales():
    config = read(edit=lambda raw: raw.update(crds="off", autoscaling={}))
    assert (config.crds, config.autoscaling.engine) == (Crds.OFF, Engine.HPA)
