"""The fidelity ledger: for each type of resource, what stands for the real thing here, what that proves and what not.

`LEDGER` is written by hand, docs/fidelity.md is generated from it; a declared type without a row, and a row without a
declared type, fail tests. Where an emulator does something otherwise than AWS, tests/infra/test_emulator.py asserts it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Final

RECORDED: Final = "recording only"
LOCALSTACK: Final = "LocalStack"
MOTO: Final = "LocalStack + plugin (moto)"
CONTROL_PLANE: Final = "real control plane, nodes played by KWOK"
PLAYED: Final = "its definition on the real control plane"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the ledger. `driven`: a test sends this document to the emulator, without the Pulumi CLI."""

    emulator: str
    proves: str
    does_not: str
    driven: bool = False


_TAGS: Final = "the call is accepted and read back"
_ACCEPTED: Final = "the API server accepts it with every field known, and a second apply changes nothing"
_NO_CONTAINERS: Final = "containers: no image is pulled and nothing runs on a played node, so that probes always pass"

LEDGER: Final[dict[str, Row]] = {
    "aws:autoscaling/group:Group": Row(
        MOTO,
        "template, overrides, shares and tags are accepted; instances start with our user data and tags",
        "that instances boot: there is no machine behind them. Hooks given with the group are forgotten, refreshes do "
        "nothing, shares of an uneven number are rounded down",
        driven=True,
    ),
    "aws:budgets/budget:Budget": Row(
        RECORDED, "threshold and topic are declared", "everything else: moto has no subscribers and no tags of budgets"
    ),
    "aws:cloudwatch/eventRule:EventRule": Row(
        LOCALSTACK, "each pattern matches its notice and no other", "that AWS sends such notices", driven=True
    ),
    "aws:cloudwatch/eventTarget:EventTarget": Row(LOCALSTACK, _TAGS, "delivery of AWS's own notices"),
    "aws:cloudwatch/metricAlarm:MetricAlarm": Row(
        LOCALSTACK,
        "the alarm is accepted",
        "that it rings: nothing publishes AWS/VPN TunnelState. Its tags are forgotten",
    ),
    "aws:ec2/customerGateway:CustomerGateway": Row(
        LOCALSTACK, "address and ASN are accepted", "that a router answers", driven=True
    ),
    "aws:ec2/defaultSecurityGroup:DefaultSecurityGroup": Row(LOCALSTACK, _TAGS, "packet filtering"),
    "aws:ec2/eip:Eip": Row(LOCALSTACK, _TAGS, "a public address"),
    "aws:ec2/flowLog:FlowLog": Row(LOCALSTACK, _TAGS, "delivery, and so the log bucket's policy for the log service"),
    "aws:ec2/internetGateway:InternetGateway": Row(LOCALSTACK, _TAGS, "traffic"),
    "aws:ec2/launchTemplate:LaunchTemplate": Row(
        LOCALSTACK,
        "the template is accepted, and instances carry its user data byte for byte",
        "that `resolve:ssm:` images resolve (local names an image id), IMDSv2, encryption of volumes; its own tags "
        "appear among those of its instances",
        driven=True,
    ),
    "aws:ec2/natGateway:NatGateway": Row(LOCALSTACK, _TAGS, "traffic"),
    "aws:ec2/route:Route": Row(LOCALSTACK, "the route is accepted for its target", "traffic", driven=True),
    "aws:ec2/routeTable:RouteTable": Row(LOCALSTACK, _TAGS, "traffic", driven=True),
    "aws:ec2/routeTableAssociation:RouteTableAssociation": Row(LOCALSTACK, _TAGS, "traffic"),
    "aws:ec2/securityGroup:SecurityGroup": Row(
        LOCALSTACK, "the rules are well formed", "packet filtering: infra.rules judges the rules instead"
    ),
    "aws:ec2/subnet:Subnet": Row(LOCALSTACK, "ranges fit the VPC and each other", "that zones are apart", driven=True),
    "aws:ec2/vpc:Vpc": Row(LOCALSTACK, "the range is accepted", "a network", driven=True),
    "aws:ec2/vpcEndpoint:VpcEndpoint": Row(
        LOCALSTACK,
        _TAGS,
        "names, private DNS, endpoint policies (their version is lost); home uses the emulator's own address",
    ),
    "aws:ec2/vpnConnection:VpnConnection": Row(
        LOCALSTACK,
        "the connection is accepted, and its XML has AWS's layout, which our reader reads",
        "tunnel options: ranges, keys and proposals are ignored, the XML holds made-up values and one tunnel twice "
        "(vpn.verify_xml is false there). The private end is checked by strongSwan, FRR and nft themselves",
        driven=True,
    ),
    "aws:ec2/vpnGateway:VpnGateway": Row(LOCALSTACK, "ASN and attachment are accepted", "BGP", driven=True),
    "aws:ec2/vpnGatewayRoutePropagation:VpnGatewayRoutePropagation": Row(
        RECORDED,
        "a propagation for each table is declared",
        "everything else: LocalStack answers 501, local has static routes",
    ),
    "aws:ec2transitgateway/transitGateway:TransitGateway": Row(
        RECORDED, "the option wires VPC, connection and routes together", "everything else"
    ),
    "aws:ec2transitgateway/vpcAttachment:VpcAttachment": Row(RECORDED, "as the transit gateway", "everything else"),
    "aws:ecr/lifecyclePolicy:LifecyclePolicy": Row(MOTO, _TAGS, "expiry"),
    "aws:ecr/repository:Repository": Row(
        MOTO, "the name and settings are accepted", "pushing and pulling", driven=True
    ),
    "aws:iam/instanceProfile:InstanceProfile": Row(LOCALSTACK, _TAGS, "credentials on a node"),
    "aws:iam/role:Role": Row(
        LOCALSTACK, "trust documents are well formed", "who may take a role: nothing is enforced", driven=True
    ),
    "aws:iam/rolePolicy:RolePolicy": Row(
        LOCALSTACK,
        "policy documents are well formed",
        "that they grant enough or little enough: not enforced",
        driven=True,
    ),
    "aws:kms/alias:Alias": Row(
        LOCALSTACK, "keys work under their aliases", "conditions on aliases in policies", driven=True
    ),
    "aws:kms/key:Key": Row(
        LOCALSTACK, "key policies are accepted, keys encrypt", "key policies' effect, rotation", driven=True
    ),
    "aws:rolesanywhere/profile:Profile": Row(RECORDED, "every role is in the profile", "everything else: not in moto"),
    "aws:rolesanywhere/trustAnchor:TrustAnchor": Row(
        RECORDED,
        "trust documents name the anchor and the certificate's name",
        "certificates; local trusts the account instead",
    ),
    "aws:s3/bucket:Bucket": Row(
        LOCALSTACK, "versions, locks and conditional writes hold", "checksums: a wrong one is accepted", driven=True
    ),
    "aws:s3/bucketLifecycleConfiguration:BucketLifecycleConfiguration": Row(
        LOCALSTACK, "the rules are accepted", "that anything expires", driven=True
    ),
    "aws:s3/bucketObjectLockConfiguration:BucketObjectLockConfiguration": Row(
        LOCALSTACK, "a locked version cannot be deleted", "the end of a lock", driven=True
    ),
    "aws:s3/bucketPolicy:BucketPolicy": Row(
        LOCALSTACK, "the document is accepted and read back", "its effect: not enforced", driven=True
    ),
    "aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock": Row(LOCALSTACK, _TAGS, "its effect"),
    "aws:s3/bucketReplicationConfig:BucketReplicationConfig": Row(
        RECORDED, "copies, keys and versions are wired together", "copying: local has one region"
    ),
    "aws:s3/bucketServerSideEncryptionConfiguration:BucketServerSideEncryptionConfiguration": Row(
        LOCALSTACK, _TAGS, "encryption at rest"
    ),
    "aws:s3/bucketVersioning:BucketVersioning": Row(LOCALSTACK, "versions are kept", "nothing of note"),
    "aws:secretsmanager/secret:Secret": Row(
        LOCALSTACK, "the secret is found by its name", "who may read it", driven=True
    ),
    "aws:secretsmanager/secretVersion:SecretVersion": Row(
        LOCALSTACK, "the value is read back", "who may read it", driven=True
    ),
    "aws:sns/topic:Topic": Row(LOCALSTACK, _TAGS, "encryption"),
    "aws:sns/topicPolicy:TopicPolicy": Row(LOCALSTACK, _TAGS, "its effect"),
    "aws:sns/topicSubscription:TopicSubscription": Row(
        RECORDED, "the address is subscribed", "mail; local has no address"
    ),
    "aws:sqs/queue:Queue": Row(LOCALSTACK, _TAGS, "encryption"),
    "aws:sqs/queuePolicy:QueuePolicy": Row(LOCALSTACK, _TAGS, "its effect"),
    "aws:ssm/parameter:Parameter": Row(LOCALSTACK, _TAGS, "who may read it"),
    "command:remote:Command": Row(
        "a shell in a directory of its own",
        "the script parses, installs what it says, refuses a wrong binary, and changes nothing when run again",
        "SSH, systemd, and k3s itself: there is no k3s here. Its files are checked as YAML and JSON, not by k3s",
        driven=True,
    ),
    "kubernetes:admissionregistration.k8s.io/v1:ValidatingAdmissionPolicy": Row(
        CONTROL_PLANE, "its expressions compile, and it refuses what it must", "nothing of note", driven=True
    ),
    "kubernetes:admissionregistration.k8s.io/v1:ValidatingAdmissionPolicyBinding": Row(
        CONTROL_PLANE, _ACCEPTED, "nothing of note", driven=True
    ),
    "kubernetes:apps/v1:DaemonSet": Row(
        CONTROL_PLANE, "one pod on each GPU node", "the device plugin: played nodes state their GPUs", driven=True
    ),
    "kubernetes:apps/v1:Deployment": Row(
        CONTROL_PLANE,
        "Pod Security, quota, scheduling, rollouts and evictions are Kubernetes' own",
        _NO_CONTAINERS,
        driven=True,
    ),
    "kubernetes:apps/v1:StatefulSet": Row(
        CONTROL_PLANE, "as a Deployment; its claims are bound", f"{_NO_CONTAINERS}; disks", driven=True
    ),
    "kubernetes:autoscaling/v2:HorizontalPodAutoscaler": Row(
        CONTROL_PLANE,
        "the real controller follows an external metric up and down",
        "the metric: an APIService of the tests answers in the place of KEDA or an adapter",
        driven=True,
    ),
    "kubernetes:batch/v1:CronJob": Row(CONTROL_PLANE, _ACCEPTED, f"{_NO_CONTAINERS}; training, TensorRT", driven=True),
    "kubernetes:core/v1:ConfigMap": Row(
        CONTROL_PLANE, f"{_ACCEPTED}; dashboards are JSON over series that exist", "Grafana", driven=True
    ),
    "kubernetes:core/v1:LimitRange": Row(CONTROL_PLANE, _ACCEPTED, "nothing of note", driven=True),
    "kubernetes:core/v1:Namespace": Row(
        CONTROL_PLANE, "Pod Security refuses what it must and takes all of ours", "nothing of note", driven=True
    ),
    "kubernetes:core/v1:PersistentVolumeClaim": Row(CONTROL_PLANE, "it is bound", "a disk", driven=True),
    "kubernetes:core/v1:ResourceQuota": Row(
        CONTROL_PLANE, "all fits at its highest, and one pod more is refused", "nothing of note", driven=True
    ),
    "kubernetes:core/v1:Secret": Row(CONTROL_PLANE, _ACCEPTED, "encryption at rest", driven=True),
    "kubernetes:core/v1:Service": Row(
        CONTROL_PLANE, "its endpoints follow its pods", "packets: there is no kube-proxy and no DNS", driven=True
    ),
    "kubernetes:core/v1:ServiceAccount": Row(
        CONTROL_PLANE, "operators work with no more", "nothing of note", driven=True
    ),
    "kubernetes:keda.sh/v1alpha1:ScaledObject": Row(
        PLAYED,
        "it holds to KEDA's own schema",
        "scaling by KEDA: it does not run here; an HPA is driven instead",
        driven=True,
    ),
    "kubernetes:monitoring.coreos.com/v1:PodMonitor": Row(
        PLAYED, "it holds to prometheus-operator's schema", "that anything is scraped", driven=True
    ),
    "kubernetes:monitoring.coreos.com/v1:PrometheusRule": Row(
        PLAYED,
        "the schema; promtool takes the rules, and fires them on made-up series",
        "delivery of alerts",
        driven=True,
    ),
    "kubernetes:monitoring.coreos.com/v1:ServiceMonitor": Row(
        PLAYED, "it holds to prometheus-operator's schema", "that anything is scraped", driven=True
    ),
    "kubernetes:networking.k8s.io/v1:Ingress": Row(CONTROL_PLANE, _ACCEPTED, "TLS and routing", driven=True),
    "kubernetes:networking.k8s.io/v1:NetworkPolicy": Row(
        "real control plane, and a function that judges packets",
        "every pair of parties, sites and ports is allowed if the table of edges says so, and only then",
        "packet filtering: played nodes enforce nothing. The function is ours, not a CNI's",
        driven=True,
    ),
    "kubernetes:node.k8s.io/v1:RuntimeClass": Row(CONTROL_PLANE, _ACCEPTED, "NVIDIA's runtime", driven=True),
    "kubernetes:policy/v1:PodDisruptionBudget": Row(
        CONTROL_PLANE, "a drain takes one pod at a time", "nothing of note", driven=True
    ),
    "kubernetes:rbac.authorization.k8s.io/v1:ClusterRole": Row(
        CONTROL_PLANE,
        "operators do their work with it, and are refused beyond it",
        "cluster-autoscaler itself",
        driven=True,
    ),
    "kubernetes:rbac.authorization.k8s.io/v1:ClusterRoleBinding": Row(
        CONTROL_PLANE, "as its role", "as its role", driven=True
    ),
    "kubernetes:rbac.authorization.k8s.io/v1:Role": Row(
        CONTROL_PLANE, "as a ClusterRole", "as a ClusterRole", driven=True
    ),
    "kubernetes:rbac.authorization.k8s.io/v1:RoleBinding": Row(
        CONTROL_PLANE, "as its role", "as its role", driven=True
    ),
    "kubernetes:scheduling.k8s.io/v1:PriorityClass": Row(
        CONTROL_PLANE, "serving pods push jobs aside, and jobs push nobody", "nothing of note", driven=True
    ),
}


def page(types: Collection[str]) -> str:
    """docs/fidelity.md for the declared types. Raises LookupError for a type without a row or a row without a type."""
    missing, stale = sorted(set(types) - set(LEDGER)), sorted(set(LEDGER) - set(types))
    if missing or stale:
        raise LookupError(
            f"ledger without a row for {missing}, with a row too many for {stale}: edit infra/fidelity.py"
        )
    lines = [
        "# Fidelity ledger",
        "",
        "What stands for the real thing when there is no AWS and no cluster, what that proves and what it does not.",
        "Generated from `infra/fidelity.py` by `make infra-docs`; a declared type without a row fails the tests.",
        "",
        "*Driven* means that a test sends the very document which the program renders to the emulator, without the",
        "Pulumi CLI. With it, `tests/engine` brings up the whole of `foundation-local`; rows of *recording only* are",
        "in no stack that an emulator can run. Policy rules (`infra/rules`) hold for all of them. For kinds of",
        "Kubernetes, *driven* means that `make test-cluster` applies the manifest which the program renders.",
        "",
        "| resource | stands for it | driven | proves | does not prove |",
        "|---|---|---|---|---|",
    ]
    for type_ in sorted(types):
        row = LEDGER[type_]
        lines.append(f"| `{type_}` | {row.emulator} | {'yes' if row.driven else ''} | {row.proves} | {row.does_not} |")
    return "\n".join(lines) + "\n"
