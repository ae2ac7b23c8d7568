"""Every rule holds for every committed stack, and every rule fires."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from infra.recording import Recording
from infra.rules import SECRET, UNKNOWN, Context, Resource, evaluate
from infra.rules import foundation as rules
from infra.rules.foundation import RULES

Record = Callable[..., Recording]
STACKS = ("foundation-local", "foundation-dev", "foundation-prod")


@pytest.mark.parametrize("preview", [False, True])
@pytest.mark.parametrize("stack", STACKS)
def test_every_committed_stack_holds_to_every_rule(recorded: Record, stack: str, preview: bool):  # noqa: FBT001
    resources = recorded(stack, preview=preview).rules_view()
    assert len(resources) > 100
    assert evaluate(RULES, resources) == []


def allow(**statement: object) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Sid": "X", **statement}]})


Change = Callable[[dict[str, Any]], object]
BREAKS: list[tuple[str, str, Change, str]] = [
    # rule, type, what is done to the first resource of the type, what the message names
    ("imdsv2", rules.TEMPLATE, lambda i: i["metadataOptions"].update(httpTokens="optional"), "IMDSv2"),
    ("imdsv2", rules.TEMPLATE, lambda i: i["metadataOptions"].update(httpPutResponseHopLimit=2), "HopLimit"),
    ("imdsv2", rules.TEMPLATE, lambda i: i.pop("metadataOptions"), "IMDSv2"),
    ("no-public-node", rules.TEMPLATE, lambda i: i["networkInterfaces"][0].update(associatePublicIpAddress="true"), "false"),
    ("no-public-node", rules.TEMPLATE, lambda i: i["networkInterfaces"][0].pop("associatePublicIpAddress"), "false"),
    ("no-public-node", rules.TEMPLATE, lambda i: i.pop("networkInterfaces"), "interface"),
    ("no-public-node", rules.SUBNET, lambda i: i.update(mapPublicIpOnLaunch=True), "mapPublic"),
    ("no-open-security-group", rules.SECURITY_GROUP, lambda i: i["ingress"][0].update(cidrBlocks=["0.0.0.0/0"]), "0.0.0.0/0"),
    ("no-open-security-group", rules.SECURITY_GROUP, lambda i: i["ingress"][0].update(ipv6CidrBlocks=["::/0"]), "::/0"),
    ("no-open-security-group", rules.SECURITY_GROUP, lambda i: i["egress"][0].update(cidrBlocks=["0.0.0.0/1"]), "0.0.0.0/1"),
    ("no-open-security-group", rules.SECURITY_GROUP, lambda i: i["egress"][0].update(protocol="-1"), "protocol"),
    ("encrypted", rules.TEMPLATE, lambda i: i["blockDeviceMappings"][0]["ebs"].pop("encrypted"), "encrypted"),
    ("encrypted", rules.TEMPLATE, lambda i: i.pop("blockDeviceMappings"), "root volume"),
    ("encrypted", "aws:sqs/queue:Queue", lambda i: i.update(sqsManagedSseEnabled=False), "sqsManagedSseEnabled"),
    ("encrypted", "aws:sns/topic:Topic", lambda i: i.pop("kmsMasterKeyId"), "kmsMasterKeyId"),
    ("encrypted", "aws:secretsmanager/secret:Secret", lambda i: i.pop("kmsKeyId"), "kmsKeyId"),
    ("encrypted", "aws:kms/key:Key", lambda i: i.update(enableKeyRotation=False), "rotate"),
    ("encrypted", "aws:ecr/repository:Repository", lambda i: i.pop("encryptionConfigurations"), "KMS"),
    ("encrypted", "aws:ecr/repository:Repository", lambda i: i.update(imageTagMutability="MUTABLE"), "IMMUTABLE"),
    ("encrypted", rules.BUCKET_COMPANIONS["encryption"],
     lambda i: i["rules"][0]["applyServerSideEncryptionByDefault"].update(sseAlgorithm="AES256"), "aws:kms"),
    ("versioned", rules.BUCKET_COMPANIONS["versioning"],
     lambda i: i["versioningConfiguration"].update(status="Suspended"), "Enabled"),
    ("closed-bucket", rules.BUCKET_COMPANIONS["a public access block"], lambda i: i.update(blockPublicPolicy=False), "blockPublic"),
    ("tls-only", rules.BUCKET_COMPANIONS["a policy"], lambda i: i.update(policy='{"Statement": []}'), "TLS"),
    ("complete-buckets", rules.BUCKET_COMPANIONS["versioning"], lambda i: i.update(bucket="another"), "has no versioning"),
    ("complete-buckets", rules.BUCKET_COMPANIONS["a lifecycle"], lambda i: i.update(bucket="another"), "has no lifecycle"),
    ("both-tunnels", rules.CONNECTION, lambda i: i.pop("tunnel2InsideCidr"), "tunnel2InsideCidr"),
    ("both-tunnels", rules.CONNECTION, lambda i: i.update(tunnel1IkeVersions=["ikev1", "ikev2"]), "ikev2 only"),
    ("both-tunnels", rules.CONNECTION, lambda i: i.update(tunnel1Phase1DhGroupNumbers=[14, 20]), "19, 20, 21"),
    ("both-tunnels", rules.CONNECTION, lambda i: i.pop("tunnel2Phase2DhGroupNumbers"), "19, 20, 21"),
    ("both-tunnels", rules.CONNECTION, lambda i: i.update(tunnel2Phase2EncryptionAlgorithms=["AES256"]), "AES-GCM"),
    ("both-tunnels", rules.CONNECTION, lambda i: i.update(tunnel1DpdTimeoutAction="clear"), "restart"),
    ("both-tunnels", rules.CONNECTION, lambda i: i.update(tunnel1PresharedKey="x" * 40), "must be a secret"),
    ("both-tunnels", rules.CONNECTION, lambda i: i.pop("tunnel2PresharedKey"), "own secret"),
    ("no-star", "aws:iam/rolePolicy:RolePolicy", lambda i: i.update(policy=allow(Action="s3:*", Resource="arn:x")), "s3:*"),
    ("no-star", "aws:iam/rolePolicy:RolePolicy", lambda i: i.update(policy=allow(Action="s3:GetObject", Resource="*")), "s3:GetObject"),
    ("no-star", "aws:iam/rolePolicy:RolePolicy", lambda i: i.update(policy=allow(NotAction="s3:GetObject", Resource="x")), "is not"),
    ("no-star", "aws:iam/role:Role", lambda i: i.update(assumeRolePolicy=allow(Action="sts:AssumeRole", Principal="*")), "who may"),
    ("no-star", "aws:iam/role:Role",
     lambda i: i.update(assumeRolePolicy=allow(Action="sts:AssumeRole", Principal={"AWS": "*"})), "who may"),
    ("no-star", "aws:kms/key:Key", lambda i: i.update(policy=allow(Action="kms:*", Principal={"AWS": "arn:role/x"}, Resource="*")), "kms:*"),
    ("no-star", "aws:sqs/queuePolicy:QueuePolicy",
     lambda i: i.update(policy=allow(Action="sqs:SendMessage", Principal="*", Resource="x")), "who may"),
    ("lifecycle-hooks", rules.GROUP, lambda i: i["initialLifecycleHooks"].pop(0), "launching"),
    ("lifecycle-hooks", rules.GROUP, lambda i: i.pop("initialLifecycleHooks"), "terminating"),
    ("tagged", "aws:ec2/vpc:Vpc", lambda i: i["tags"].pop("owner"), "owner"),
    ("tagged", "aws:kms/key:Key", lambda i: i.pop("tags"), "environment"),
    ("group-tagged", rules.GROUP, lambda i: i["tags"][0].update(propagateAtLaunch=False), "Name"),
    ("quiet-commands", "command:remote:Command", lambda i: i.update(logging="stdoutAndStderr"), "logging"),
    ("quiet-commands", "command:remote:Command", lambda i: i.update(stdin="token"), "stdin"),
    ("quiet-commands", "command:remote:Command", lambda i: i.update(connection={"privateKey": "key"}), "privateKey"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "type_", "change", "named"), BREAKS, ids=[f"{b[0]}-{n}" for n, b in enumerate(BREAKS)]
)
def test_a_rule_fires(recorded: Record, rule: str, type_: str, change: Change, named: str):
    resources = recorded("foundation-prod").rules_view()
    # The nodes' security group has rules both ways; of other types any will do.
    nodes = type_ == rules.SECURITY_GROUP
    index = next(n for n, r in enumerate(resources) if r.type == type_ and (not nodes or r.name.endswith("-nodes")))
    broken = _copy(resources[index])
    change(broken.inputs)  # type: ignore[arg-type]  # a copy of our own
    resources[index] = broken
    found = evaluate(RULES, resources)
    assert [v for v in found if v.rule == rule and named in v.message], found
    assert {v.rule for v in found} == {rule}


def _copy(resource: Resource) -> Resource:
    # Markers are compared by identity, which enumeration members keep when copied.
    return Resource(resource.type, resource.name, copy.deepcopy(dict(resource.inputs)))


def test_every_rule_is_seen_to_fire():
    assert {b[0] for b in BREAKS} == {r.name for r in RULES}


def test_two_tunnels_with_one_key_are_seen_where_keys_are_seen(recorded: Record):
    connection = _copy(recorded("foundation-prod").one(rules.CONNECTION, "onprem-aws").resource())
    connection.inputs.update(tunnel1PresharedKey="k" * 40, tunnel2PresharedKey="k" * 40)  # type: ignore[attr-defined]
    found = evaluate(RULES, [connection], Context(secrets_marked=False, everything=False))
    assert [v.message for v in found] == ["the tunnels must have different keys"]


def test_a_short_key_is_seen_where_keys_are_seen_and_not_repeated(recorded: Record):
    connection = _copy(recorded("foundation-prod").one(rules.CONNECTION, "onprem-aws").resource())
    connection.inputs.update(tunnel1PresharedKey="0hunter2", tunnel2PresharedKey="k" * 40)  # type: ignore[attr-defined]
    (violation,) = evaluate(RULES, [connection], Context(secrets_marked=False, everything=False))
    assert "tunnel1PresharedKey" in str(violation)
    assert "hunter2" not in str(violation)


@pytest.mark.parametrize("value", [UNKNOWN, SECRET])
def test_what_cannot_be_seen_breaks_no_rule_by_itself(value: object):
    keys = ("policy", "assumeRolePolicy", "metadataOptions", "networkInterfaces", "blockDeviceMappings", "tags", "rules",
            "versioningConfiguration")  # fmt: skip
    if value is SECRET:
        keys = ("policy", "assumeRolePolicy")
    tags = dict.fromkeys(rules.REQUIRED_TAGS, "x")
    for type_ in (rules.TEMPLATE, "aws:iam/rolePolicy:RolePolicy", "aws:iam/role:Role"):
        if type_ != rules.TEMPLATE or value is UNKNOWN:
            assert evaluate(RULES, [Resource(type_, "x", {"tags": tags, **dict.fromkeys(keys, value)})]) == []
