"""Every mistake in a stack file is named, all at once, before anything is touched."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra import config
from infra.config import FaultsError
from infra.plan import Fault

Fill = Callable[..., tuple[dict[str, str], frozenset[str]]]
STACKS = ("foundation-local", "foundation-dev", "foundation-prod")


def faults_of(
    filled: Fill, edit: Callable[[dict[str, Any]], None], stack: str = "foundation-prod"
) -> tuple[Fault, ...]:
    values, secrets = filled(stack, edit)
    with pytest.raises(FaultsError) as caught:
        config.read(stack, values, secrets)
    return caught.value.faults


@pytest.mark.parametrize("stack", STACKS)
def test_each_committed_stack_is_complete_but_for_what_is_the_operators(filled: Fill, stack: str):
    read = config.read(stack, *filled(stack))
    assert f"foundation-{read.environment}" == stack
    assert [link.name for link in read.links] == ["onprem-aws"]


def test_a_configuration_is_frozen(filled: Fill):
    read = config.read("foundation-prod", *filled("foundation-prod"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.account = "x"  # type: ignore[misc]  # the very thing that must not work


def test_no_secret_is_part_of_a_configuration(filled: Fill):
    values, secrets = filled("foundation-prod")
    shown = repr(config.read("foundation-prod", values, secrets))
    assert secrets
    assert not [k for k in secrets if values[k] in shown]


def put(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """An edit that sets the value at a dotted path; numbers index lists."""

    def edit(decoded: dict[str, Any]) -> None:
        *way, last = path.split(".")
        at: Any = decoded
        for step in way:
            at = at[int(step) if isinstance(at, list) else step]
        at[int(last) if isinstance(at, list) else last] = value

    return edit


BAD: list[tuple[str, Any, str, str]] = [
    # where, what, the fault's key, a part of the remedy
    ("sites.1.cidr", "10.10.128.0/17", "sites[1].cidr", "does not overlap sites[0].cidr (10.10.0.0/16)"),
    ("network.pods", "10.20.0.0/16", "network.pods", "does not overlap sites[1].cidr"),
    ("network.services", "10.42.8.0/24", "network.services", "does not overlap network.pods"),
    ("network.pods", "10.42.0.0/22", "network.pods", "large enough for 23 nodes"),
    ("sites.1.cidr", "10.20.0.0/23", "sites[1].cidr", "/16 to /22"),
    ("sites.1.cidr", "10.20.0.1/16", "sites[1].cidr", "without host bits"),
    ("sites.1.cidr", "8.8.0.0/16", "sites[1].cidr", "private IPv4 range"),
    ("sites.1.asn", 65010, "sites[1].asn", "different for each site"),
    ("sites.1.asn", 7224, "sites[1].asn", "a private ASN"),
    ("sites.1.zones", ["eu-central-1a"], "sites[1].zones", "2 or 3 different zones"),
    ("sites.1.zones", ["us-east-1a", "us-east-1b"], "sites[1].zones", "zones of eu-central-1"),
    ("sites.1.region", "mars", "sites[1].region", "an AWS region"),
    ("sites.1.kind", "moon", "sites[1].kind", "one of home, cloud, edge"),
    ("sites.0.kind", "edge", "sites", "exactly one home"),
    ("sites.0.router", "10.0.0.1", "sites[0].router", "public IPv4 address"),
    ("sites.0.name", "Home!", "sites[0].name", "lower-case"),
    ("sites.1.endpoints", ["ssm", "s4"], "sites[1].endpoints", "secretsmanager"),
    ("sites.1.egress_cidrs", ["1.0.0.0/8"], "sites[1].egress_cidrs", "no way out"),
    ("sites.1.egress_cidrs", ["0.0.0.0/0"], "sites[1].egress_cidrs", "none of them larger than a /8"),
    ("network.mtu", 1500, "network.mtu", "1280 to 1446"),
    ("network.mtu", "big", "network.mtu", "whole number"),
    ("vpn.nat_traversal", True, "network.mtu", "1280 to 1438"),
    (
        "vpn.inside.onprem-aws",
        ["169.254.0.0/30", "169.254.10.4/30"],
        "vpn.inside.onprem-aws[0]",
        "not one that AWS reserves",
    ),
    (
        "vpn.inside.onprem-aws",
        ["169.254.169.252/30", "169.254.10.4/30"],
        "vpn.inside.onprem-aws[0]",
        "169.254.169.252/30",
    ),
    ("vpn.inside.onprem-aws", ["10.0.0.0/30", "169.254.10.4/30"], "vpn.inside.onprem-aws[0]", "169.254.0.0/16"),
    ("vpn.inside.onprem-aws", ["169.254.10.0/30"] * 2, "vpn.inside.onprem-aws[1]", "one tunnel only"),
    ("vpn.inside.onprem-aws", ["169.254.10.0/30"], "vpn.inside.onprem-aws", "a list of two ranges"),
    ("vpn.inside.onprem-mars", ["169.254.9.0/30", "169.254.9.4/30"], "vpn.inside.onprem-mars", "onprem-aws"),
    ("vpn.inside", {}, "vpn.inside.onprem-aws", "a list of two ranges"),
    ("vpn.dh_group", 14, "vpn.dh_group", "19, 20 or 21"),
    ("vpn.cipher", "3des", "vpn.cipher", "aes256-gcm"),
    ("vpn.verify_xml", False, "vpn.verify_xml", "only an emulator"),
    ("vpn.attach", "wire", "vpn.attach", "transit-gateway"),
    ("node_groups.0.types", ["z9.huge"], "node_groups[0].types", "of the table gpu_types: g6.xlarge"),
    ("repositories", ["gateway-"], "repositories", "image names"),
    ("node_groups.0.types", [], "node_groups[0].types", "at least one"),
    ("node_groups.1.spot_percent", 101, "node_groups[1].spot_percent", "0 to 100"),
    ("node_groups.1.spot_percent", -1, "node_groups[1].spot_percent", "0 to 100"),
    ("node_groups.0.spot_percent", 50, "node_groups[0].warm_pool", "one on-demand type"),
    ("node_groups.0.min", 5, "node_groups[0].min", "0 to 4"),
    ("node_groups.0.site", "onprem", "node_groups[0].site", "a cloud site: aws"),
    ("node_groups.1.name", "gpu-base", "node_groups[1].name", "a name of its own"),
    ("node_groups.0.image_id", "ami-12345678", "node_groups[0].image_parameter", "only one of the two"),
    ("node_groups.0.max", 999, "network.pods", "large enough for 1018 nodes"),
    ("k3s.version", "latest", "k3s.version", "v1.34.2+k3s1"),
    ("k3s.sha256", "0" * 64, "k3s.sha256", "a real digest"),
    ("k3s.api", "10.99.0.1", "k3s.api", "of the home range 10.10.0.0/16"),
    ("onprem.hosts.0.role", "agent", "onprem.hosts", "1, 3 or 5 servers"),
    ("onprem.hosts.0.address", "10.20.0.11", "onprem.hosts[0].address", "of onprem's range"),
    ("onprem.hosts.0.address", "10.10.0.12", "onprem.hosts[1].address", "an address of its own"),
    ("onprem.hosts.0.name", "a b", "onprem.hosts[0].name", "a host name"),
    ("storage.replica_region", "eu-central-1", "storage.replica_region", "another region"),
    ("storage.force_destroy", True, "storage.force_destroy", "only an emulator"),
    ("identity.trust", "account", "identity.trust", "roles-anywhere"),
    ("identity.trust_anchor", None, "identity.trust_anchor", "PEM"),
    ("emulator", {"endpoint": "http://127.0.0.1:4566"}, "emulator", "only foundation-local"),
    ("account", "12", "account", "12 digits"),
    ("alarms.budget_usd", 0, "alarms.budget_usd", "1 to"),
    ("alarms", {}, "alarms.budget_usd", "1 to"),
    ("alarms.budget", 5, "alarms.budget", "budget_usd"),
    ("sitez", [], "sitez", "sites"),
    ("sites.0.colour", "red", "sites[0].colour", "removed"),
    ("vpn", "yes", "vpn", "a mapping"),
    ("sites", {}, "sites", "a list of mappings"),
]


@pytest.mark.parametrize(("path", "value", "key", "remedy"), BAD, ids=[f"{b[0]}={str(b[1])[:24]}" for b in BAD])
def test_a_mistake_is_named_with_key_value_and_remedy(filled: Fill, path: str, value: object, key: str, remedy: str):
    faults = faults_of(filled, put(path, value))
    assert [f for f in faults if f.key == key and remedy in f.allowed], "\n".join(map(str, faults))


def test_a_region_without_the_gpu_type_is_refused(filled: Fill):
    def edit(decoded: dict[str, Any]) -> None:
        decoded["gpu_types"]["g6.xlarge"]["regions"] = ["us-east-1"]

    faults = faults_of(filled, edit)
    assert {f.key for f in faults} == {"node_groups[0].types", "node_groups[1].types"}
    assert all("eu-central-1" in f.allowed for f in faults)


def test_types_with_different_gpu_counts_do_not_mix(filled: Fill):
    def edit(decoded: dict[str, Any]) -> None:
        decoded["gpu_types"]["g5.xlarge"]["gpus"] = 4

    assert [f.key for f in faults_of(filled, edit)] == ["node_groups[1].types"]


def test_names_that_become_one_when_joined_are_refused(filled: Fill):
    """Hyphens join a site's name with a group's and two sites' with each other, and may be in each."""

    def edit(decoded: dict[str, Any]) -> None:
        second = {"region": "eu-west-1", "zones": ["eu-west-1a", "eu-west-1b"]}
        decoded["sites"] += [
            {"name": "aws-gpu", "kind": "cloud", "cidr": "10.60.0.0/16", "asn": 64999, **second},
            {"name": "onprem-aws", "kind": "edge", "cidr": "10.50.0.0/24", "asn": 64998, "router": "203.0.113.9"},
            {"name": "gpu", "kind": "cloud", "cidr": "10.70.0.0/16", "asn": 64997, **second},
        ]
        decoded["gpu_types"]["g6.xlarge"]["regions"].append("eu-west-1")
        first = decoded["node_groups"][0]
        decoded["node_groups"].append({**first, "name": "base", "site": "aws-gpu", "types": ["g6.xlarge"]})
        assert (first["site"], first["name"]) == ("aws", "gpu-base")

    said = [(f.key, f.value) for f in faults_of(filled, edit)]
    assert ("node_groups[2].name", "aws-gpu-base") in said
    assert ("sites", "onprem-aws-gpu") in said


def test_all_mistakes_come_in_one_message(filled: Fill):
    def edit(decoded: dict[str, Any]) -> None:
        put("sites.1.asn", 65010)(decoded)
        put("network.mtu", 9000)(decoded)
        put("vpn.dh_group", 2)(decoded)
        put("node_groups.1.spot_percent", 300)(decoded)
        put("sites.1.cidr", "10.10.0.0/16")(decoded)

    keys = {f.key for f in faults_of(filled, edit)}
    assert keys >= {"sites[1].asn", "network.mtu", "vpn.dh_group", "node_groups[1].spot_percent", "sites[1].cidr"}


PSK = "rankbridge:psk-onprem-aws-1"


@pytest.mark.parametrize("bad", ["short", "0" + "x" * 40, "x" * 40 + "\n", "x" * 20 + "'; }" + "x" * 20])
def test_a_bad_psk_is_refused_and_never_printed(filled: Fill, bad: str):
    values, secrets = filled("foundation-prod")
    with pytest.raises(FaultsError) as caught:
        config.read("foundation-prod", values | {PSK: bad}, secrets)
    assert [f.key for f in caught.value.faults] == ["psk-onprem-aws-1"]
    assert "first one not 0" in str(caught.value)
    assert bad not in str(caught.value)


def test_a_psk_in_plain_text_is_refused_and_never_printed(filled: Fill):
    values, secrets = filled("foundation-prod")
    with pytest.raises(FaultsError) as caught:
        config.read("foundation-prod", values, secrets - {PSK})
    assert "pulumi config set --secret rankbridge:psk-onprem-aws-1" in str(caught.value)
    assert values[PSK] not in str(caught.value)


def test_both_tunnels_with_the_same_psk_are_refused(filled: Fill):
    values, secrets = filled("foundation-prod")
    with pytest.raises(FaultsError, match=r"psk-onprem-aws-2 .*different from psk-onprem-aws-1") as caught:
        config.read("foundation-prod", values | {"rankbridge:psk-onprem-aws-2": values[PSK]}, secrets)
    assert values[PSK] not in str(caught.value)


def test_a_missing_secret_is_named_with_the_command_that_sets_it(filled: Fill):
    values, secrets = filled("foundation-prod")
    del values["rankbridge:k3s-agent-token"]
    with pytest.raises(FaultsError, match="config set --secret rankbridge:k3s-agent-token"):
        config.read("foundation-prod", values, secrets)


def test_a_secret_nobody_asked_for_is_refused(filled: Fill):
    values, secrets = filled("foundation-prod")
    with pytest.raises(FaultsError, match="psk-onprem-mars-1") as caught:
        config.read("foundation-prod", values | {"rankbridge:psk-onprem-mars-1": "hidden-value"}, secrets)
    assert "hidden-value" not in str(caught.value)


def test_an_encrypted_value_that_is_no_secret_is_refused_unread(filled: Fill):
    values, secrets = filled("foundation-prod")
    with pytest.raises(FaultsError, match="account = <not shown>"):
        config.read("foundation-prod", values, secrets | {"rankbridge:account"})


@pytest.mark.parametrize("stack", ["prod", "apps-prod", "foundation-", "foundation-PROD"])
def test_a_stack_of_another_name_is_refused(filled: Fill, stack: str):
    with pytest.raises(FaultsError, match="foundation-<environment>"):
        config.read(stack, *filled("foundation-prod"))


def second_region(decoded: dict[str, Any]) -> None:
    decoded["sites"].append(
        {"name": "aws2", "kind": "cloud", "region": "eu-west-1", "zones": ["eu-west-1a", "eu-west-1b"],
         "cidr": "10.30.0.0/16", "asn": 64630}
    )  # fmt: skip
    decoded["sites"].append(
        {"name": "shop", "kind": "edge", "cidr": "10.50.0.0/24", "asn": 65050, "router": "203.0.113.9"}
    )
    decoded["vpn"]["inside"] |= {
        name: [f"169.254.{n}.0/30", f"169.254.{n}.4/30"]
        for n, name in enumerate(("onprem-aws2", "shop-aws", "shop-aws2"), start=20)
    }


def test_a_second_region_and_an_edge_site_are_an_entry_each(filled: Fill):
    read = config.read("foundation-prod", *filled("foundation-prod", second_region))
    assert [link.name for link in read.links] == ["onprem-aws", "shop-aws", "onprem-aws2", "shop-aws2"]
    assert "psk-shop-aws2-2" in read.secret_keys


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = sorted({b[0].rpartition(".")[0] or b[0] for b in BAD} | {b[0] for b in BAD})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.sampled_from(PLACES), json_like)
def test_whatever_stands_in_a_stack_file_the_answer_is_a_configuration_or_faults(
    filled: Fill, path: str, value: object
):
    values, secrets = filled("foundation-prod", put(path, value))
    with contextlib.suppress(FaultsError):
        config.read("foundation-prod", values, secrets)
