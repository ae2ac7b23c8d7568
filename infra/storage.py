"""Where data lies: a bucket and a key for each class of data, copies in another region, image repositories.

Who may use them is `infra.iam`'s and `infra.identity`'s business; this module closes the buckets to everybody else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Final

import pulumi
import pulumi_aws as aws
from pulumi import Output, ResourceOptions

from infra import iam
from infra.config import FoundationConfig
from infra.iam import DataClass, Scope

REPLICATED: Final = (DataClass.MODELS, DataClass.SNAPSHOTS)
"""What the other region gets: what cannot be made again from what is kept at home."""
LOCKED: Final = (DataClass.MODELS,)
"""What cannot be deleted before its time, in governance mode."""
ABORT_DAYS: Final = 3
NONCURRENT_DAYS: Final = 30


@dataclasses.dataclass(frozen=True)
class BucketArgs:
    """What one bucket is made from."""

    config: FoundationConfig
    scope: Scope
    data: DataClass
    bucket: str
    key_arn: Output[str]
    expire_days: int | None
    flow_log_regions: Sequence[str] = ()


class Bucket(pulumi.ComponentResource):
    """A bucket that is versioned, encrypted with its class's key, and reachable over TLS by IAM only."""

    def __init__(self, name: str, args: BucketArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:storage:Bucket", name, None, opts)
        child = ResourceOptions(parent=self)
        config, locked = args.config, args.data in LOCKED
        self.bucket = aws.s3.Bucket(
            name,
            bucket=args.bucket,
            object_lock_enabled=locked,
            force_destroy=config.storage.force_destroy,
            tags=config.names.tags(args.bucket, data=args.data.value),
            opts=child,
        )
        block = aws.s3.BucketPublicAccessBlock(
            name,
            bucket=self.bucket.bucket,
            block_public_acls=True,
            block_public_policy=True,
            ignore_public_acls=True,
            restrict_public_buckets=True,
            opts=child,
        )
        self.versioning = aws.s3.BucketVersioning(
            name,
            bucket=self.bucket.bucket,
            versioning_configuration=aws.s3.BucketVersioningVersioningConfigurationArgs(status="Enabled"),
            opts=child,
        )
        aws.s3.BucketServerSideEncryptionConfiguration(
            name,
            bucket=self.bucket.bucket,
            rules=[
                aws.s3.BucketServerSideEncryptionConfigurationRuleArgs(
                    apply_server_side_encryption_by_default=aws.s3.BucketServerSideEncryptionConfigurationRuleApplyServerSideEncryptionByDefaultArgs(
                        sse_algorithm="aws:kms", kms_master_key_id=args.key_arn
                    ),
                    bucket_key_enabled=True,
                )
            ],
            opts=child,
        )
        self.policy = aws.s3.BucketPolicy(
            name,
            bucket=self.bucket.bucket,
            policy=iam.bucket_policy(args.scope, args.bucket, args.data, args.flow_log_regions),
            opts=ResourceOptions(parent=self, depends_on=[block]),
        )
        aws.s3.BucketLifecycleConfiguration(
            name,
            bucket=self.bucket.bucket,
            rules=self._lifecycle(args),
            # S3 refuses rules about old versions before versioning is on.
            opts=ResourceOptions(parent=self, depends_on=[self.versioning]),
        )
        if locked:
            aws.s3.BucketObjectLockConfiguration(
                name,
                bucket=self.bucket.bucket,
                rule=aws.s3.BucketObjectLockConfigurationRuleArgs(
                    default_retention=aws.s3.BucketObjectLockConfigurationRuleDefaultRetentionArgs(
                        mode="GOVERNANCE", days=config.storage.lock_days
                    )
                ),
                opts=ResourceOptions(parent=self, depends_on=[self.versioning]),
            )
        self.register_outputs({"bucket": self.bucket.bucket})

    @staticmethod
    def _lifecycle(args: BucketArgs) -> list[aws.s3.BucketLifecycleConfigurationRuleArgs]:
        everything = aws.s3.BucketLifecycleConfigurationRuleFilterArgs(prefix="")
        rules = [
            aws.s3.BucketLifecycleConfigurationRuleArgs(
                id="abort-incomplete-uploads",
                status="Enabled",
                filter=everything,
                abort_incomplete_multipart_upload=aws.s3.BucketLifecycleConfigurationRuleAbortIncompleteMultipartUploadArgs(
                    days_after_initiation=ABORT_DAYS
                ),
            ),
            aws.s3.BucketLifecycleConfigurationRuleArgs(
                id="drop-old-versions",
                status="Enabled",
                filter=everything,
                noncurrent_version_expiration=aws.s3.BucketLifecycleConfigurationRuleNoncurrentVersionExpirationArgs(
                    noncurrent_days=NONCURRENT_DAYS
                ),
            ),
        ]
        if args.expire_days is not None:
            rules.append(
                aws.s3.BucketLifecycleConfigurationRuleArgs(
                    id="expire",
                    status="Enabled",
                    filter=everything,
                    expiration=aws.s3.BucketLifecycleConfigurationRuleExpirationArgs(days=args.expire_days),
                )
            )
        return rules


@dataclasses.dataclass(frozen=True)
class StorageArgs:
    """What all of storage is made from. Providers: one of the home region of the data, one of the replica's."""

    config: FoundationConfig
    scope: Scope
    regions: Sequence[str]
    """Regions with a VPC, whose flow logs arrive here."""
    replica_provider: aws.Provider | None


class Storage(pulumi.ComponentResource):
    """Every bucket with its key, and the copies in another region where configured."""

    def __init__(self, name: str, args: StorageArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:storage:Storage", name, None, opts)
        self._args = args
        settings = args.config.storage
        expiry = {DataClass.LOGS: settings.log_days, DataClass.SNAPSHOTS: settings.snapshot_days}
        self.keys: dict[DataClass, aws.kms.Key] = {}
        self.buckets: dict[DataClass, Bucket] = {}
        for data in DataClass:
            services = ["delivery.logs.amazonaws.com"] if data is DataClass.LOGS else []
            self.keys[data] = self._key(data.value, services, None)
            self.buckets[data] = Bucket(
                data.value,
                BucketArgs(
                    config=args.config,
                    scope=args.scope,
                    data=data,
                    bucket=args.scope.bucket(data),
                    key_arn=self.keys[data].arn,
                    expire_days=expiry.get(data),
                    flow_log_regions=args.regions,
                ),
                ResourceOptions(parent=self),
            )
        # For jobs that read no Pulumi state.
        aws.ssm.Parameter(
            "buckets",
            name=args.config.names.path("buckets"),
            type="String",
            value=json.dumps({d.value: args.scope.bucket(d) for d in DataClass}, sort_keys=True),
            tags=args.config.names.tags("buckets"),
            opts=ResourceOptions(parent=self),
        )
        if args.replica_provider is not None and settings.replica_region is not None:
            self._replicate(args.replica_provider, settings.replica_region)
        self.register_outputs({})

    def _key(self, name: str, services: Sequence[str], provider: aws.Provider | None) -> aws.kms.Key:
        config = self._args.config
        child = ResourceOptions(parent=self, provider=provider)
        key = aws.kms.Key(
            name,
            description=f"{config.names.prefix}: {name}",
            enable_key_rotation=True,
            deletion_window_in_days=7 if config.storage.force_destroy else 30,
            policy=iam.key_policy(config.account, services),
            tags=config.names.tags(name),
            opts=child,
        )
        aws.kms.Alias(name, name=self._args.scope.key_alias(name), target_key_id=key.id, opts=child)
        return key

    def _replicate(self, provider: aws.Provider, region: str) -> None:
        config, scope = self._args.config, self._args.scope
        key = self._key("replica", [], provider)
        role = aws.iam.Role(
            "replication",
            name=scope.role_name("replication"),
            description="S3 copies models and snapshots to the other region",
            assume_role_policy=iam.trust_service("s3.amazonaws.com", config.account),
            tags=config.names.tags("replication"),
            opts=ResourceOptions(parent=self),
        )
        policy = aws.iam.RolePolicy(
            "replication",
            name="replication",
            role=role.name,
            policy=iam.replication(scope, config.storage.region, region, REPLICATED),
            opts=ResourceOptions(parent=self),
        )
        for data in REPLICATED:
            source = self.buckets[data]
            copy = Bucket(
                f"{data.value}-replica",
                BucketArgs(
                    config=config,
                    scope=scope,
                    data=data,
                    bucket=scope.replica(data),
                    key_arn=key.arn,
                    expire_days=config.storage.snapshot_days if data is DataClass.SNAPSHOTS else None,
                ),
                ResourceOptions(parent=self, providers=[provider]),
            )
            aws.s3.BucketReplicationConfig(
                data.value,
                bucket=source.bucket.bucket,
                role=role.arn,
                rules=[
                    aws.s3.BucketReplicationConfigRuleArgs(
                        id="everything",
                        status="Enabled",
                        priority=0,
                        filter=aws.s3.BucketReplicationConfigRuleFilterArgs(prefix=""),
                        # What is deleted here by mistake is still there.
                        delete_marker_replication=aws.s3.BucketReplicationConfigRuleDeleteMarkerReplicationArgs(
                            status="Disabled"
                        ),
                        source_selection_criteria=aws.s3.BucketReplicationConfigRuleSourceSelectionCriteriaArgs(
                            sse_kms_encrypted_objects=aws.s3.BucketReplicationConfigRuleSourceSelectionCriteriaSseKmsEncryptedObjectsArgs(
                                status="Enabled"
                            )
                        ),
                        destination=aws.s3.BucketReplicationConfigRuleDestinationArgs(
                            bucket=copy.bucket.arn,
                            storage_class="STANDARD_IA",
                            encryption_configuration=aws.s3.BucketReplicationConfigRuleDestinationEncryptionConfigurationArgs(
                                replica_kms_key_id=key.arn
                            ),
                        ),
                    )
                ],
                opts=ResourceOptions(parent=self, depends_on=[policy, source.versioning, copy.versioning]),
            )


@dataclasses.dataclass(frozen=True)
class RegistryArgs:
    """What the image repositories of a region are made from."""

    config: FoundationConfig
    site: str


class Registry(pulumi.ComponentResource):
    """Image repositories next to the nodes that pull from them. Tags never move; old untagged images go."""

    def __init__(self, name: str, args: RegistryArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:storage:Registry", name, None, opts)
        child = ResourceOptions(parent=self)
        names = args.config.names
        rule = {
            "rulePriority": 1,
            "description": "drop untagged images",
            "selection": {
                "tagStatus": "untagged",
                "countType": "sinceImagePushed",
                "countUnit": "days",
                "countNumber": 14,
            },
            "action": {"type": "expire"},
        }
        self.urls: dict[str, Output[str]] = {}
        for repository in args.config.repositories:
            resource = aws.ecr.Repository(
                f"{args.site}-{repository}",
                name=f"{names.prefix}/{repository}",
                image_tag_mutability="IMMUTABLE",
                image_scanning_configuration=aws.ecr.RepositoryImageScanningConfigurationArgs(scan_on_push=True),
                encryption_configurations=[aws.ecr.RepositoryEncryptionConfigurationArgs(encryption_type="KMS")],
                force_delete=args.config.storage.force_destroy,
                tags=names.tags(repository, site=args.site),
                opts=child,
            )
            aws.ecr.LifecyclePolicy(
                f"{args.site}-{repository}",
                repository=resource.name,
                policy=json.dumps({"rules": [rule]}, sort_keys=True),
                opts=child,
            )
            self.urls[repository] = resource.repository_url
        self.register_outputs({})
