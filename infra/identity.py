"""Who workloads are: certificates of our own CA exchanged for short-lived roles, one role for each kind of workload.

Also where alarms and the budget report to. What a role may do is `infra.iam`'s business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pulumi
import pulumi_aws as aws
from pulumi import Output, ResourceOptions

from infra import iam
from infra.config import FoundationConfig, Trust
from infra.iam import Role, Scope

SESSION_SECONDS = 3_600


@dataclasses.dataclass(frozen=True)
class IdentityArgs:
    """What the workloads' roles are made from."""

    config: FoundationConfig
    scope: Scope
    groups: Sequence[tuple[str, str]]
    """(region, Auto Scaling group name) of every GPU node group."""
    queues: Sequence[str]
    """ARNs of the notice queues."""


class Identity(pulumi.ComponentResource):
    """The trust anchor, its profile, and a role for each kind of workload."""

    def __init__(self, name: str, args: IdentityArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:identity:Identity", name, None, opts)
        child = ResourceOptions(parent=self)
        config, names = args.config, args.config.names
        self.trust_anchor_arn: Output[str] | None = None
        self.profile_arn: Output[str] | None = None
        if config.identity.trust is Trust.ROLES_ANYWHERE:
            anchor = aws.rolesanywhere.TrustAnchor(
                "home-ca",
                name=names.of("home-ca"),
                enabled=True,
                source=aws.rolesanywhere.TrustAnchorSourceArgs(
                    source_type="CERTIFICATE_BUNDLE",
                    source_data=aws.rolesanywhere.TrustAnchorSourceSourceDataArgs(
                        x509_certificate_data=config.identity.trust_anchor
                    ),
                ),
                tags=names.tags("home-ca"),
                opts=child,
            )
            self.trust_anchor_arn = anchor.arn
        self.roles: dict[Role, aws.iam.Role] = {}
        for role in Role:
            resource = aws.iam.Role(
                role.value,
                name=args.scope.role_name(role.value),
                description=f"Workload {role.value}",
                max_session_duration=SESSION_SECONDS,
                assume_role_policy=self._trust(args, role),
                tags=names.tags(role.value),
                opts=child,
            )
            aws.iam.RolePolicy(
                role.value,
                name=role.value,
                role=resource.name,
                policy=iam.workload(role, args.scope, config.storage.region, groups=args.groups, queues=args.queues),
                opts=child,
            )
            self.roles[role] = resource
        if self.trust_anchor_arn is not None:
            profile = aws.rolesanywhere.Profile(
                "workloads",
                name=names.of("workloads"),
                enabled=True,
                duration_seconds=SESSION_SECONDS,
                role_arns=[r.arn for r in self.roles.values()],
                tags=names.tags("workloads"),
                opts=child,
            )
            self.profile_arn = profile.arn
        self.register_outputs({})

    def _trust(self, args: IdentityArgs, role: Role) -> Output[str] | str:
        if self.trust_anchor_arn is None:
            return iam.trust_account(args.config.account)
        return self.trust_anchor_arn.apply(lambda arn: iam.trust_certificate(arn, role.value))


@dataclasses.dataclass(frozen=True)
class AlarmsArgs:
    """Whom to tell."""

    config: FoundationConfig
    scope: Scope


class Alarms(pulumi.ComponentResource):
    """The topic that alarms speak to, and the budget."""

    def __init__(self, name: str, args: AlarmsArgs, opts: ResourceOptions | None = None) -> None:
        super().__init__("rankbridge:identity:Alarms", name, None, opts)
        child = ResourceOptions(parent=self)
        config, names = args.config, args.config.names
        key = aws.kms.Key(
            "alarms",
            description=f"{names.prefix}: alarms",
            enable_key_rotation=True,
            deletion_window_in_days=7 if config.storage.force_destroy else 30,
            policy=iam.key_policy(config.account, ["budgets.amazonaws.com", "cloudwatch.amazonaws.com"]),
            tags=names.tags("alarms"),
            opts=child,
        )
        aws.kms.Alias("alarms", name=args.scope.key_alias("alarms"), target_key_id=key.id, opts=child)
        self.topic = aws.sns.Topic(
            "alarms", name=names.of("alarms"), kms_master_key_id=key.arn, tags=names.tags("alarms"), opts=child
        )
        policy = aws.sns.TopicPolicy(
            "alarms",
            arn=self.topic.arn,
            policy=self.topic.arn.apply(lambda arn: iam.topic_policy(arn, config.account)),
            opts=child,
        )
        if config.alarms.email is not None:
            aws.sns.TopicSubscription(
                "alarms-email", topic=self.topic.arn, protocol="email", endpoint=config.alarms.email, opts=child
            )
        if config.alarms.budget_usd is not None:
            aws.budgets.Budget(
                "monthly",
                name=names.of("monthly"),
                account_id=config.account,
                budget_type="COST",
                limit_amount=f"{config.alarms.budget_usd}.0",
                limit_unit="USD",
                time_unit="MONTHLY",
                notifications=[
                    aws.budgets.BudgetNotificationArgs(
                        comparison_operator="GREATER_THAN",
                        threshold=threshold,
                        threshold_type="PERCENTAGE",
                        notification_type=kind,
                        subscriber_sns_topic_arns=[self.topic.arn],
                    )
                    for threshold, kind in ((80, "ACTUAL"), (100, "FORECASTED"))
                ],
                tags=names.tags("monthly"),
                opts=ResourceOptions(parent=self, depends_on=[policy]),
            )
        self.register_outputs({"topicArn": self.topic.arn})
