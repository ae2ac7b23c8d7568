"""Every policy document: who may do what, to which resource, under which condition.

Pure: names and numbers in, JSON out. ARNs are built from names that the plan fixes, so that a preview shows each
document whole, before anything exists. A key is named by its alias (`kms:ResourceAliases`): its id is known only later.

Sources: Service Authorization Reference (which action takes which resource and condition key); IAM Roles Anywhere,
"Trust model"; VPC flow logs, "Publish to Amazon S3"; KMS, "Use aliases to control access".
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from typing import Final

from infra.plan import Names

Statement = dict[str, object]


class Role(enum.StrEnum):
    """A workload's role; the value is the common name of the certificate that may take it."""

    REPLICATOR = "replicator"
    TRAINER = "trainer"
    PUBLISHER = "publisher"
    CLEANER = "cleaner"
    READER = "reader"
    AGENT = "agent"
    AUTOSCALER = "autoscaler"
    HYGIENE = "node-hygiene"
    SPOT = "spot-handler"
    BACKUP = "backup"


class DataClass(enum.StrEnum):
    """What lies in a bucket; each class has a bucket and a key of its own."""

    DATA = "data"
    MODELS = "models"
    LOGS = "logs"
    SNAPSHOTS = "snapshots"
    ARTEFACTS = "artefacts"


UNSCOPED_ACTIONS: Final = frozenset(
    {
        "autoscaling:DescribeAutoScalingGroups",
        "autoscaling:DescribeAutoScalingInstances",
        "autoscaling:DescribeLaunchConfigurations",
        "autoscaling:DescribeScalingActivities",
        "autoscaling:DescribeTags",
        "ec2:DescribeImages",
        "ec2:DescribeInstances",
        "ec2:DescribeInstanceTypes",
        "ec2:DescribeLaunchTemplateVersions",
        "ecr:GetAuthorizationToken",
    }
)
"""Read-only actions for which IAM knows no resource: the only ones that may be allowed on `*`."""


@dataclasses.dataclass(frozen=True)
class Scope:
    """The account and environment that ARNs are built in."""

    names: Names
    account: str

    def bucket(self, data: DataClass) -> str:
        """A bucket's name: global, so the account is part of it."""
        return self.names.of(self.account, data.value)

    def replica(self, data: DataClass) -> str:
        """Name of a bucket's copy in the other region."""
        return self.names.of(self.account, data.value, "replica")

    def bucket_arn(self, bucket: str, path: str = "") -> str:
        """A bucket, or objects in it."""
        return f"arn:aws:s3:::{bucket}{path}"

    def key_alias(self, name: str) -> str:
        """A key's alias."""
        return f"alias/{self.names.of(name)}"

    def role_name(self, role: str) -> str:
        """A role's name."""
        return self.names.of(role)

    def role_arn(self, role: str) -> str:
        """A role's ARN."""
        return f"arn:aws:iam::{self.account}:role/{self.role_name(role)}"

    def arn(self, service: str, region: str, resource: str) -> str:
        """Any regional resource of the account."""
        return f"arn:aws:{service}:{region}:{self.account}:{resource}"

    def parameter_arn(self, region: str, *path: str) -> str:
        """A parameter of the environment."""
        return self.arn("ssm", region, f"parameter{self.names.path(*path)}")

    def group_arn(self, region: str, group: str) -> str:
        """An Auto Scaling group; its ARN holds an id that AWS makes up."""
        return self.arn("autoscaling", region, f"autoScalingGroup:*:autoScalingGroupName/{group}")


def document(statements: Sequence[Statement]) -> str:
    """A policy document, the same text for the same statements."""
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)}, sort_keys=True)


def allow(sid: str, actions: Sequence[str], resources: Sequence[str], **condition: Mapping[str, object]) -> Statement:
    """An Allow statement."""
    statement: Statement = {"Sid": sid, "Effect": "Allow", "Action": sorted(actions), "Resource": sorted(resources)}
    return {**statement, "Condition": condition} if condition else statement


def _use_key(scope: Scope, region: str, aliases: Sequence[str], actions: Sequence[str]) -> Statement:
    return allow(
        "UseKeys",
        actions,
        [scope.arn("kms", region, "key/*")],
        **{"ForAnyValue:StringEquals": {"kms:ResourceAliases": [scope.key_alias(a) for a in aliases]}},
    )


_READ_KEY: Final = ("kms:Decrypt",)
_WRITE_KEY: Final = ("kms:Decrypt", "kms:GenerateDataKey")


def _read(scope: Scope, data: DataClass, path: str = "/*") -> list[Statement]:
    bucket = scope.bucket(data)
    return [
        allow(f"List{data.value.title()}", ["s3:ListBucket"], [scope.bucket_arn(bucket)]),
        allow(f"Read{data.value.title()}", ["s3:GetObject"], [scope.bucket_arn(bucket, path)]),
    ]


def _write(scope: Scope, data: DataClass, path: str) -> Statement:
    actions = ["s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    return allow(f"Write{data.value.title()}", actions, [scope.bucket_arn(scope.bucket(data), path)])


def _remove(scope: Scope, data: DataClass, path: str) -> list[Statement]:
    bucket = scope.bucket(data)
    return [
        allow(f"ListVersions{data.value.title()}", ["s3:ListBucketVersions"], [scope.bucket_arn(bucket)]),
        allow(
            f"Remove{data.value.title()}",
            ["s3:DeleteObject", "s3:DeleteObjectVersion"],
            [scope.bucket_arn(bucket, path)],
        ),
    ]


def workload(role: Role, scope: Scope, region: str, *, groups: Sequence[tuple[str, str]], queues: Sequence[str]) -> str:
    """What a workload may do. `groups` are (region, Auto Scaling group name), `queues` are ARNs."""
    group_arns = [scope.group_arn(r, name) for r, name in groups]
    find_buckets = allow("FindBuckets", ["ssm:GetParameter"], [scope.parameter_arn(region, "buckets")])
    match role:
        case Role.REPLICATOR:
            # Home's: brings replicas, reads them back, and takes out what an erasure or a rotation made anew.
            statements = [
                *_read(scope, DataClass.DATA, "/replica/*"),
                _write(scope, DataClass.DATA, "/replica/*"),
                *_remove(scope, DataClass.DATA, "/replica/*"),
                # A push that was killed asks which of its uploads the store has begun.
                allow(
                    "SeeUploads",
                    ["s3:ListBucketMultipartUploads"],
                    [scope.bucket_arn(scope.bucket(DataClass.DATA))],
                ),
                _use_key(scope, region, ["data"], _WRITE_KEY),
                find_buckets,
            ]
        case Role.TRAINER:
            # Reads what was replicated, writes candidates; what is published it can only read.
            statements = [
                *_read(scope, DataClass.DATA),
                *_read(scope, DataClass.MODELS),
                _write(scope, DataClass.DATA, "/candidates/*"),
                _use_key(scope, region, ["data", "models"], _WRITE_KEY),
                find_buckets,
            ]
        case Role.PUBLISHER:
            # Writes under digests and moves channels; Object Lock keeps what is published.
            statements = [
                *_read(scope, DataClass.MODELS),
                *_read(scope, DataClass.DATA, "/candidates/*"),
                _write(scope, DataClass.MODELS, "/*"),
                _use_key(scope, region, ["data", "models"], _WRITE_KEY),
                find_buckets,
            ]
        case Role.CLEANER:
            # Removes what no channel needs; what Object Lock holds it can ask about and not remove.
            bucket = scope.bucket(DataClass.MODELS)
            statements = [
                *_read(scope, DataClass.MODELS),
                *_remove(scope, DataClass.MODELS, "/*"),
                allow(
                    "SeeLocks",
                    ["s3:GetObjectLegalHold", "s3:GetObjectRetention"],
                    [scope.bucket_arn(bucket, "/*")],
                ),
                _use_key(scope, region, ["models"], _READ_KEY),
                find_buckets,
            ]
        case Role.READER | Role.AGENT:
            statements = [
                *_read(scope, DataClass.MODELS),
                _use_key(scope, region, ["models"], _READ_KEY),
                find_buckets,
            ]
        case Role.AUTOSCALER:
            statements = [
                allow(
                    "See",
                    [
                        "autoscaling:DescribeAutoScalingGroups",
                        "autoscaling:DescribeAutoScalingInstances",
                        "autoscaling:DescribeLaunchConfigurations",
                        "autoscaling:DescribeScalingActivities",
                        "autoscaling:DescribeTags",
                        "ec2:DescribeImages",
                        "ec2:DescribeInstanceTypes",
                        "ec2:DescribeLaunchTemplateVersions",
                    ],
                    ["*"],
                ),
                allow(
                    "Scale",
                    ["autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"],
                    group_arns,
                ),
            ]
        case Role.HYGIENE:
            statements = [
                allow("See", ["autoscaling:DescribeAutoScalingGroups", "ec2:DescribeInstances"], ["*"]),
            ]
        case Role.SPOT:
            statements = [
                allow(
                    "Hear",
                    [
                        "sqs:ReceiveMessage",
                        "sqs:DeleteMessage",
                        "sqs:ChangeMessageVisibility",
                        "sqs:GetQueueAttributes",
                    ],
                    queues,
                ),
                allow(
                    "LetGo",
                    ["autoscaling:CompleteLifecycleAction", "autoscaling:RecordLifecycleActionHeartbeat"],
                    group_arns,
                ),
                allow("See", ["autoscaling:DescribeAutoScalingInstances"], ["*"]),
            ]
        case Role.BACKUP:
            statements = [
                allow("List", ["s3:ListBucket"], [scope.bucket_arn(scope.bucket(DataClass.SNAPSHOTS))]),
                _write(scope, DataClass.SNAPSHOTS, "/etcd/*"),
                _use_key(scope, region, ["snapshots"], _WRITE_KEY),
            ]
    return document(statements)


def node(scope: Scope, region: str, *, site: str, token_secret: str, groups: Sequence[str]) -> str:
    """What a GPU node itself may do: fetch its token and its k3s, pull images, answer its launch hook."""
    return document(
        [
            allow(
                "JoinToken",
                ["secretsmanager:GetSecretValue"],
                [scope.arn("secretsmanager", region, f"secret:{token_secret}-??????")],
            ),
            _use_key(scope, region, [f"nodes-{site}", "artefacts"], _READ_KEY),
            allow("K3s", ["s3:GetObject"], [scope.bucket_arn(scope.bucket(DataClass.ARTEFACTS), "/k3s/*")]),
            allow("RegistryLogin", ["ecr:GetAuthorizationToken"], ["*"]),
            allow(
                "PullImages",
                ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"],
                [scope.arn("ecr", region, f"repository/{scope.names.prefix}/*")],
            ),
            allow(
                "AnswerHook",
                ["autoscaling:CompleteLifecycleAction"],
                [scope.group_arn(region, group) for group in groups],
            ),
        ]
    )


def replication(scope: Scope, region: str, replica_region: str, classes: Sequence[DataClass]) -> str:
    """What S3 needs to copy buckets to the other region."""
    sources = [scope.bucket(c) for c in classes]
    return document(
        [
            allow(
                "ReadSource",
                ["s3:GetReplicationConfiguration", "s3:ListBucket"],
                [scope.bucket_arn(b) for b in sources],
            ),
            allow(
                "ReadVersions",
                [
                    "s3:GetObjectVersionForReplication",
                    "s3:GetObjectVersionAcl",
                    "s3:GetObjectVersionTagging",
                    "s3:GetObjectRetention",
                    "s3:GetObjectLegalHold",
                ],
                [scope.bucket_arn(b, "/*") for b in sources],
            ),
            allow(
                "WriteCopies",
                ["s3:ReplicateObject", "s3:ReplicateDelete", "s3:ReplicateTags"],
                [scope.bucket_arn(scope.replica(c), "/*") for c in classes],
            ),
            {**_use_key(scope, region, [c.value for c in classes], _READ_KEY), "Sid": "ReadKeys"},
            {**_use_key(scope, replica_region, ["replica"], ("kms:GenerateDataKey",)), "Sid": "WriteKey"},
        ]
    )


# Who may take a role


def trust_service(service: str, account: str | None = None) -> str:
    """A service takes the role, on behalf of `account` only where the service can say so."""
    statement: Statement = {
        "Sid": "Service",
        "Effect": "Allow",
        "Principal": {"Service": service},
        "Action": "sts:AssumeRole",
    }
    if account is not None:
        statement["Condition"] = {"StringEquals": {"aws:SourceAccount": account}}
    return document([statement])


def trust_certificate(trust_anchor_arn: str, common_name: str) -> str:
    """The holder of a certificate of our CA with this common name takes the role."""
    return document(
        [
            {
                "Sid": "Certificate",
                "Effect": "Allow",
                "Principal": {"Service": "rolesanywhere.amazonaws.com"},
                "Action": ["sts:AssumeRole", "sts:SetSourceIdentity", "sts:TagSession"],
                "Condition": {
                    "StringEquals": {"aws:PrincipalTag/x509Subject/CN": common_name},
                    "ArnEquals": {"aws:SourceArn": trust_anchor_arn},
                },
            }
        ]
    )


def trust_account(account: str) -> str:
    """The account's own administrators take the role; emulators only, `infra.config` holds that."""
    return document(
        [
            {
                "Sid": "Account",
                "Effect": "Allow",
                "Principal": {"AWS": f"arn:aws:iam::{account}:root"},
                "Action": "sts:AssumeRole",
            }
        ]
    )


# Policies of resources


def key_policy(account: str, services: Sequence[str] = ()) -> str:
    """A key is governed by IAM policies of its account, and used by AWS services on the account's behalf.

    `kms:*` for the account's root is AWS's own default: without it a key can become unmanageable for ever.
    """
    statements: list[Statement] = [
        {
            "Sid": "Account",
            "Effect": "Allow",
            "Principal": {"AWS": f"arn:aws:iam::{account}:root"},
            "Action": "kms:*",
            "Resource": "*",
        }
    ]
    if services:
        statements.append(
            {
                "Sid": "Services",
                "Effect": "Allow",
                "Principal": {"Service": sorted(services)},
                "Action": ["kms:Decrypt", "kms:DescribeKey", "kms:Encrypt", "kms:GenerateDataKey"],
                "Resource": "*",
                "Condition": {"StringEquals": {"aws:SourceAccount": account}},
            }
        )
    return document(statements)


def autoscaling_key_policy(account: str) -> str:
    """The key of node volumes: Auto Scaling's service role creates encrypted volumes with it."""
    role = f"arn:aws:iam::{account}:role/aws-service-role/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling"
    root: Statement = {
        "Sid": "Account",
        "Effect": "Allow",
        "Principal": {"AWS": f"arn:aws:iam::{account}:root"},
        "Action": "kms:*",
        "Resource": "*",
    }
    # Named by condition: a principal that does not exist yet would make the whole policy invalid.
    use: Statement = {
        "Sid": "AutoScaling",
        "Effect": "Allow",
        "Principal": {"AWS": f"arn:aws:iam::{account}:root"},
        "Action": [
            "kms:Decrypt",
            "kms:DescribeKey",
            "kms:Encrypt",
            "kms:GenerateDataKeyWithoutPlaintext",
            "kms:ReEncryptFrom",
            "kms:ReEncryptTo",
        ],
        "Resource": "*",
        "Condition": {"ArnEquals": {"aws:PrincipalArn": role}},
    }
    grant: Statement = {
        **use,
        "Sid": "AutoScalingGrant",
        "Action": "kms:CreateGrant",
        "Condition": {"ArnEquals": {"aws:PrincipalArn": role}, "Bool": {"kms:GrantIsForAWSResource": "true"}},
    }
    return document([root, use, grant])


def bucket_policy(scope: Scope, bucket: str, data: DataClass, regions: Sequence[str] = ()) -> str:
    """TLS only and the class's key only; the log bucket takes flow logs of the account from each of `regions`."""
    both = [scope.bucket_arn(bucket), scope.bucket_arn(bucket, "/*")]
    statements: list[Statement] = [
        {
            "Sid": "TlsOnly",
            "Effect": "Deny",
            "Principal": "*",
            "Action": "s3:*",
            "Resource": both,
            "Condition": {"Bool": {"aws:SecureTransport": "false"}},
        },
        {
            "Sid": "ModernTls",
            "Effect": "Deny",
            "Principal": "*",
            "Action": "s3:*",
            "Resource": both,
            "Condition": {"NumericLessThan": {"s3:TlsVersion": "1.2"}},
        },
    ]
    if data is DataClass.LOGS:
        account = {"aws:SourceAccount": scope.account}
        arn = {"ArnLike": {"aws:SourceArn": [scope.arn("logs", r, "*") for r in regions]}}
        delivery: Statement = {"Effect": "Allow", "Principal": {"Service": "delivery.logs.amazonaws.com"}}
        statements += [
            {
                **delivery,
                "Sid": "FlowLogs",
                "Action": "s3:PutObject",
                "Resource": scope.bucket_arn(bucket, f"/vpc/AWSLogs/{scope.account}/*"),
                "Condition": {**arn, "StringEquals": {**account, "s3:x-amz-acl": "bucket-owner-full-control"}},
            },
            {
                **delivery,
                "Sid": "FlowLogsCheck",
                "Action": ["s3:GetBucketAcl", "s3:ListBucket"],
                "Resource": scope.bucket_arn(bucket),
                "Condition": {**arn, "StringEquals": account},
            },
        ]
    return document(statements)


def queue_policy(queue_arn: str, rule_arns: Sequence[str]) -> str:
    """EventBridge's rules put notices into the queue, nobody else."""
    return document(
        [
            {
                "Sid": "EventBridge",
                "Effect": "Allow",
                "Principal": {"Service": "events.amazonaws.com"},
                "Action": "sqs:SendMessage",
                "Resource": queue_arn,
                "Condition": {"ArnEquals": {"aws:SourceArn": sorted(rule_arns)}},
            }
        ]
    )


def topic_policy(topic_arn: str, account: str) -> str:
    """Alarms and the budget speak to the topic."""
    return document(
        [
            {
                "Sid": "Alarms",
                "Effect": "Allow",
                "Principal": {"Service": ["budgets.amazonaws.com", "cloudwatch.amazonaws.com"]},
                "Action": "sns:Publish",
                "Resource": topic_arn,
                "Condition": {"StringEquals": {"aws:SourceAccount": account}},
            }
        ]
    )


def s3_endpoint_policy(buckets: Sequence[str], images: str | None = None) -> str:
    """Through an endpoint only our buckets are reached; `images` is the region whose ECR layers lie in AWS's bucket."""
    resources = [f"arn:aws:s3:::{b}{tail}" for b in buckets for tail in ("", "/*")]
    actions = [
        "s3:AbortMultipartUpload",
        "s3:GetBucketLocation",
        "s3:GetObject",
        "s3:GetObjectVersion",
        "s3:ListBucket",
        "s3:ListMultipartUploadParts",
        "s3:PutObject",
    ]
    statements: list[Statement] = [{**allow("OurBuckets", actions, resources), "Principal": "*"}]
    if images is not None:
        layers = [f"arn:aws:s3:::prod-{images}-starport-layer-bucket/*"]
        statements.append({**allow("ImageLayers", ["s3:GetObject"], layers), "Principal": "*"})
    return document(statements)
