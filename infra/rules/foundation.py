"""The foundation's rules: metadata service, public addresses, open ports, encryption, versions, tunnels, IAM, tags.

Unknown values pass a rule: they are judged again when they are known (`pulumi up` runs the pack with real values).
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from infra import iam
from infra.plan import REQUIRED_TAGS
from infra.rules import UNKNOWN, Context, Resource, Rule, Value
from infra.vpn.plan import PSK_FORM, PSK_PATTERN

TEMPLATE: Final = "aws:ec2/launchTemplate:LaunchTemplate"
GROUP: Final = "aws:autoscaling/group:Group"
HOOK: Final = "aws:autoscaling/lifecycleHook:LifecycleHook"
SECURITY_GROUP: Final = "aws:ec2/securityGroup:SecurityGroup"
SUBNET: Final = "aws:ec2/subnet:Subnet"
INSTANCE: Final = "aws:ec2/instance:Instance"
BUCKET: Final = "aws:s3/bucket:Bucket"
CONNECTION: Final = "aws:ec2/vpnConnection:VpnConnection"

OPEN_EGRESS_MAX: Final = 8
"""A range with a shorter prefix than this is "everywhere" to us."""
CURVES: Final = (19, 20, 21)

BUCKET_COMPANIONS: Final = {
    "versioning": "aws:s3/bucketVersioning:BucketVersioning",
    "encryption": "aws:s3/bucketServerSideEncryptionConfiguration:BucketServerSideEncryptionConfiguration",
    "a public access block": "aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock",
    "a policy": "aws:s3/bucketPolicy:BucketPolicy",
    "a lifecycle": "aws:s3/bucketLifecycleConfiguration:BucketLifecycleConfiguration",
}

UNTAGGED: Final = frozenset(
    {
        "aws:autoscaling/group:Group",  # its tags are a list, judged by autoscaling-tags
        "aws:autoscaling/lifecycleHook:LifecycleHook",
        "aws:cloudwatch/eventTarget:EventTarget",
        "aws:ec2/route:Route",
        "aws:ec2/routeTableAssociation:RouteTableAssociation",
        "aws:ec2/vpnGatewayRoutePropagation:VpnGatewayRoutePropagation",
        "aws:ecr/lifecyclePolicy:LifecyclePolicy",
        "aws:iam/rolePolicy:RolePolicy",
        "aws:kms/alias:Alias",
        "aws:s3/bucketLifecycleConfiguration:BucketLifecycleConfiguration",
        "aws:s3/bucketObjectLockConfiguration:BucketObjectLockConfiguration",
        "aws:s3/bucketPolicy:BucketPolicy",
        "aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock",
        "aws:s3/bucketReplicationConfig:BucketReplicationConfig",
        "aws:s3/bucketServerSideEncryptionConfiguration:BucketServerSideEncryptionConfiguration",
        "aws:s3/bucketVersioning:BucketVersioning",
        "aws:secretsmanager/secretVersion:SecretVersion",
        "aws:sns/topicPolicy:TopicPolicy",
        "aws:sns/topicSubscription:TopicSubscription",
        "aws:sqs/queuePolicy:QueuePolicy",
    }
)
"""AWS types that take no tags."""


def _mapping(value: Value) -> Mapping[str, Value]:
    return value if isinstance(value, Mapping) else {}


def _true(value: Value) -> bool:
    return value is UNKNOWN or value is True or value == "true"


def imdsv2(resource: Resource, _: Context) -> Iterator[str]:
    """The metadata service answers only to a session token, and only one hop away."""
    options = resource.get("metadataOptions")
    if options is UNKNOWN:
        return
    if resource.get("metadataOptions", "httpTokens") not in ("required", UNKNOWN):
        yield "metadataOptions.httpTokens must be `required` (IMDSv2)"
    if resource.get("metadataOptions", "httpPutResponseHopLimit") not in (1, UNKNOWN):
        yield "metadataOptions.httpPutResponseHopLimit must be 1: pods must not reach the node's role"


def no_public_node(resource: Resource, _: Context) -> Iterator[str]:
    """No node has a public address, nor a subnet that would give it one."""
    if resource.type == SUBNET and resource.get("mapPublicIpOnLaunch") not in (None, False, UNKNOWN):
        yield "mapPublicIpOnLaunch must be false"
    if resource.type == INSTANCE and resource.get("associatePublicIpAddress") not in (False, UNKNOWN):
        yield "associatePublicIpAddress must be false"
    if resource.type == TEMPLATE:
        interfaces = resource.sequence("networkInterfaces")
        if not interfaces and resource.get("networkInterfaces") is not UNKNOWN:
            yield "must state its network interface, or the subnet decides about a public address"
        for index, _interface in enumerate(interfaces):
            value = resource.get("networkInterfaces", index, "associatePublicIpAddress")
            if value not in ("false", False, UNKNOWN):
                yield f"networkInterfaces[{index}].associatePublicIpAddress must be false"


def no_open_security_group(resource: Resource, _: Context) -> Iterator[str]:
    """No group lets the world in or out."""
    entries = [(way, e) for way in ("ingress", "egress") for e in resource.sequence(way)]
    if resource.type.startswith("aws:vpc/securityGroup"):
        entries = [("rule", resource.inputs)]
    for way, entry in entries:
        rule = _mapping(entry)
        ranges: list[Value] = []
        for key in ("cidrBlocks", "ipv6CidrBlocks", "cidrIpv4", "cidrIpv6"):
            value = rule.get(key)
            ranges += value if isinstance(value, list | tuple) else [value] if value else []
        for cidr in ranges:
            if isinstance(cidr, str) and ipaddress.ip_network(cidr, strict=False).prefixlen < OPEN_EGRESS_MAX:
                yield f"{way} must not name {cidr}: name the ranges that are meant"
        if rule.get("protocol") in ("-1", -1, "all") and ranges:
            yield f"{way} must name a protocol and ports for {', '.join(map(str, ranges))}"


def encrypted(resource: Resource, _: Context) -> Iterator[str]:  # noqa: PLR0912 -- a table, one case a type
    """Whatever stores something stores it encrypted."""
    match resource.type:
        case "aws:ec2/launchTemplate:LaunchTemplate":
            devices = resource.sequence("blockDeviceMappings")
            if not devices and resource.get("blockDeviceMappings") is not UNKNOWN:
                yield "must state its root volume as encrypted"
            for index, _device in enumerate(devices):
                if not _true(resource.get("blockDeviceMappings", index, "ebs", "encrypted")):
                    yield f"blockDeviceMappings[{index}].ebs.encrypted must be true"
        case "aws:sqs/queue:Queue":
            if not _true(resource.get("sqsManagedSseEnabled")) and not resource.get("kmsMasterKeyId"):
                yield "must be encrypted: sqsManagedSseEnabled or kmsMasterKeyId"
        case "aws:sns/topic:Topic":
            if not resource.get("kmsMasterKeyId"):
                yield "must be encrypted: kmsMasterKeyId"
        case "aws:secretsmanager/secret:Secret":
            if not resource.get("kmsKeyId"):
                yield "must name its key: kmsKeyId"
        case "aws:kms/key:Key":
            if not _true(resource.get("enableKeyRotation")):
                yield "must rotate: enableKeyRotation"
        case "aws:ecr/repository:Repository":
            if resource.get("encryptionConfigurations", 0, "encryptionType") not in ("KMS", UNKNOWN):
                yield "must be encrypted with KMS"
            if resource.get("imageTagMutability") not in ("IMMUTABLE", UNKNOWN):
                yield "imageTagMutability must be IMMUTABLE: a tag must not change its image"
        case "aws:s3/bucketServerSideEncryptionConfiguration:BucketServerSideEncryptionConfiguration":
            algorithm = resource.get("rules", 0, "applyServerSideEncryptionByDefault", "sseAlgorithm")
            if algorithm not in ("aws:kms", "aws:kms:dsse", UNKNOWN):
                yield "must encrypt with aws:kms"


def versioned(resource: Resource, _: Context) -> Iterator[str]:
    """A bucket keeps what is overwritten."""
    if resource.get("versioningConfiguration", "status") not in ("Enabled", UNKNOWN):
        yield "versioningConfiguration.status must be Enabled"


def closed_bucket(resource: Resource, _: Context) -> Iterator[str]:
    """All four doors of the public access block are shut."""
    for key in ("blockPublicAcls", "blockPublicPolicy", "ignorePublicAcls", "restrictPublicBuckets"):
        if not _true(resource.get(key)):
            yield f"{key} must be true"


def tls_only(resource: Resource, _: Context) -> Iterator[str]:
    """A bucket's policy denies plain HTTP."""
    for statement in _statements(resource.get("policy")):
        condition = _mapping(_mapping(statement.get("Condition")).get("Bool"))
        if statement.get("Effect") == "Deny" and condition.get("aws:SecureTransport") in ("false", False):
            return
    if resource.get("policy") is not UNKNOWN:
        yield "must deny requests without TLS (aws:SecureTransport)"


def complete_buckets(resources: Sequence[Resource], _: Context) -> Iterator[tuple[Resource, str]]:
    """Every bucket has versioning, encryption, block, policy and lifecycle."""
    for bucket in (r for r in resources if r.type == BUCKET):
        for what, companion in BUCKET_COMPANIONS.items():
            named = [r.get("bucket") for r in resources if r.type == companion]
            if bucket.get("bucket") not in named and UNKNOWN not in named:
                yield bucket, f"has no {what.removeprefix('a ')} ({companion.rpartition(':')[2]})"


def both_tunnels(resource: Resource, context: Context) -> Iterator[str]:
    """Two planned tunnels, IKEv2, elliptic curves, authenticated ciphers, restart, different secret keys."""
    for number in (1, 2):
        prefix = f"tunnel{number}"
        if not resource.get(f"{prefix}InsideCidr"):
            yield f"{prefix}InsideCidr must be planned"
        versions = resource.get(f"{prefix}IkeVersions")
        if versions is not UNKNOWN and versions != ["ikev2"]:
            yield f"{prefix}IkeVersions must be ikev2 only"
        for phase in (1, 2):
            groups = resource.get(f"{prefix}Phase{phase}DhGroupNumbers")
            if groups is not UNKNOWN and (not groups or not isinstance(groups, list) or set(groups) - set(CURVES)):
                yield f"{prefix}Phase{phase}DhGroupNumbers must be among 19, 20, 21"
            ciphers = resource.get(f"{prefix}Phase{phase}EncryptionAlgorithms")
            if ciphers is not UNKNOWN and (
                not ciphers or not isinstance(ciphers, list) or any("GCM" not in str(c) for c in ciphers)
            ):
                yield f"{prefix}Phase{phase}EncryptionAlgorithms must be AES-GCM"
        if resource.get(f"{prefix}DpdTimeoutAction") not in ("restart", UNKNOWN):
            yield f"{prefix}DpdTimeoutAction must be restart"
        yield from _key(resource, prefix, context)
    keys = [resource.get(f"tunnel{n}PresharedKey") for n in (1, 2)]
    if all(isinstance(k, str) for k in keys) and keys[0] == keys[1]:
        yield "the tunnels must have different keys"


def _key(resource: Resource, prefix: str, context: Context) -> Iterator[str]:
    key = resource.get(f"{prefix}PresharedKey")
    if key is None:
        yield f"{prefix}PresharedKey must be the stack's own secret"
    elif isinstance(key, str) and context.secrets_marked:
        yield f"{prefix}PresharedKey must be a secret"
    elif isinstance(key, str) and not PSK_PATTERN.fullmatch(key):
        yield f"{prefix}PresharedKey must have {PSK_FORM}"


def _statements(policy: Value) -> list[Mapping[str, Value]]:
    if not isinstance(policy, str):
        return []
    found = json.loads(policy).get("Statement", [])
    return [s for s in (found if isinstance(found, list) else [found]) if isinstance(s, dict)]


def _several(value: Value) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [] if value is None else [str(value)]


def no_star(resource: Resource, _: Context) -> Iterator[str]:
    """No wildcard action, no wildcard resource but for reads that know no resource, no world as principal."""
    key = "assumeRolePolicy" if resource.type == "aws:iam/role:Role" else "policy"
    for statement in _statements(resource.get(key)):
        if statement.get("Effect") != "Allow":
            continue
        sid = statement.get("Sid", "a statement")
        actions, principal = _several(statement.get("Action")), statement.get("Principal")
        whole_key = resource.type == "aws:kms/key:Key" and _root(principal)
        for action in actions:
            if "*" in action and not (whole_key and action == "kms:*"):
                yield f"{sid} must name its actions, not {action}"
        if resource.type != "aws:kms/key:Key" and "*" in _several(statement.get("Resource")):
            scoped = sorted(set(actions) - iam.UNSCOPED_ACTIONS)
            if scoped:
                yield f"{sid} must name the resources of {', '.join(scoped)}"
        endpoint = resource.type == "aws:ec2/vpcEndpoint:VpcEndpoint"
        if not endpoint and "*" in (_several(principal) + _several(_mapping(principal).get("AWS"))):
            yield f"{sid} must name who may"
        if "NotAction" in statement or "NotResource" in statement:
            yield f"{sid} must say what is allowed, not what is not"


def _root(principal: Value) -> bool:
    return str(_mapping(principal).get("AWS", "")).endswith(":root")


def lifecycle_hooks(resources: Sequence[Resource], _: Context) -> Iterator[tuple[Resource, str]]:
    """Every Auto Scaling group waits for its nodes to join and to drain."""
    for group in (r for r in resources if r.type == GROUP):
        hooks = [_mapping(h).get("lifecycleTransition") for h in group.sequence("initialLifecycleHooks")]
        hooks += [
            r.get("lifecycleTransition")
            for r in resources
            if r.type == HOOK and r.get("autoscalingGroupName") in (group.get("name"), UNKNOWN)
        ]
        for transition, why in (("LAUNCHING", "nodes join"), ("TERMINATING", "pods leave")):
            if f"autoscaling:EC2_INSTANCE_{transition}" not in hooks:
                yield group, f"must have a lifecycle hook on {transition.lower()}, so that {why} first"


def tagged(resource: Resource, _: Context) -> Iterator[str]:
    """Everything that takes tags says what it is and whose."""
    if not resource.type.startswith("aws:") or resource.type in UNTAGGED:
        return
    tags = resource.get("tags")
    missing = [] if tags is UNKNOWN else [t for t in REQUIRED_TAGS if t not in _mapping(tags)]
    if missing:
        yield "must have the tags " + ", ".join(missing)


def group_tagged(resource: Resource, _: Context) -> Iterator[str]:
    """Nodes inherit the tags of their group."""
    tags = [_mapping(t) for t in resource.sequence("tags")]
    carried = {t.get("key") for t in tags if _true(t.get("propagateAtLaunch"))}
    missing = [t for t in REQUIRED_TAGS if t not in carried]
    if missing and resource.get("tags") is not UNKNOWN:
        yield "must give its nodes the tags " + ", ".join(missing)


def quiet_commands(resource: Resource, context: Context) -> Iterator[str]:
    """What runs on private hosts carries secrets through stdin only, and logs nothing."""
    if resource.get("logging") not in ("none", UNKNOWN):
        yield "logging must be none"
    if context.secrets_marked and isinstance(resource.get("stdin"), str):
        yield "stdin must be a secret"
    if context.secrets_marked and isinstance(resource.get("connection", "privateKey"), str):
        yield "connection.privateKey must be a secret"


RULES: Final = (
    Rule("imdsv2", "Metadata service by token only, one hop", frozenset({TEMPLATE, INSTANCE}), imdsv2),
    Rule("no-public-node", "No node with a public address", frozenset({TEMPLATE, SUBNET, INSTANCE}), no_public_node),
    Rule(
        "no-open-security-group",
        "No security group open to the world",
        frozenset(
            {
                SECURITY_GROUP,
                "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule",
                "aws:vpc/securityGroupEgressRule:SecurityGroupEgressRule",
            }
        ),
        no_open_security_group,
    ),
    Rule("encrypted", "Encryption of everything stored", check=encrypted),
    Rule("versioned", "Versioned buckets", frozenset({BUCKET_COMPANIONS["versioning"]}), versioned),
    Rule("closed-bucket", "No public bucket", frozenset({BUCKET_COMPANIONS["a public access block"]}), closed_bucket),
    Rule("tls-only", "Buckets over TLS only", frozenset({BUCKET_COMPANIONS["a policy"]}), tls_only),
    Rule("complete-buckets", "No bucket without its companions", check_all=complete_buckets),
    Rule("both-tunnels", "Two tunnels, strong and alike", frozenset({CONNECTION}), both_tunnels),
    Rule(
        "no-star",
        "No * in IAM",
        frozenset(
            {
                "aws:iam/role:Role",
                "aws:iam/rolePolicy:RolePolicy",
                "aws:iam/policy:Policy",
                "aws:kms/key:Key",
                "aws:s3/bucketPolicy:BucketPolicy",
                "aws:sqs/queuePolicy:QueuePolicy",
                "aws:sns/topicPolicy:TopicPolicy",
                "aws:ec2/vpcEndpoint:VpcEndpoint",
            }
        ),
        no_star,
    ),
    Rule("lifecycle-hooks", "Hooks on launch and termination", check_all=lifecycle_hooks),
    Rule("tagged", "Tags", check=tagged),
    Rule("group-tagged", "Tags of nodes", frozenset({GROUP}), group_tagged),
    Rule("quiet-commands", "No secret in a command or log", frozenset({"command:remote:Command"}), quiet_commands),
)
"""Every rule of the foundation, in the order in which violations are reported."""
