"""The doors to AWS over boto3. Endpoint and credentials are the standard AWS configuration's and named nowhere.

Retries are botocore's alone (standard mode, which backs off when AWS throttles); what it gives up on is a CloudFault.
The endpoint of one service alone can be set by AWS_ENDPOINT_URL_AUTO_SCALING and the like.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from workloads.operators.cloud import CloudFault, Group
from workloads.operators.notices import Hook, Message

ATTEMPTS: Final = 3
CONNECT_S: Final = 3.0
READ_S: Final = 10.0
WAIT_S: Final = 20
"""The longest that SQS waits for a message; an answer may take that long."""
FILTER_VALUES: Final = 200
"""Values that one filter of DescribeInstances takes."""
MESSAGES: Final = 10
_IN_SERVICE: Final = "InService"


def client(service: str, region: str, *, read_s: float = READ_S) -> Any:  # noqa: ANN401 - boto3 makes these classes at run time
    """A client of a service, from the standard configuration. Raises CloudFault when there is none."""
    try:
        return boto3.session.Session().client(  # type: ignore[call-overload]  # its name is not known to the types
            service,
            region_name=region,
            config=Config(
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                connect_timeout=CONNECT_S,
                read_timeout=read_s,
                tcp_keepalive=True,
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise CloudFault(f"no client for {service}: {error}") from error


class AwsCloud:
    """`Cloud` over EC2 and Auto Scaling of one region."""

    def __init__(self, region: str) -> None:
        self._ec2 = client("ec2", region)
        self._scaling = client("autoscaling", region)

    def groups(self, names: Sequence[str]) -> Mapping[str, Group]:
        """See Cloud."""
        with _asking("describe Auto Scaling groups"):
            pages = self._scaling.get_paginator("describe_auto_scaling_groups").paginate(
                AutoScalingGroupNames=list(names)
            )
            return {
                group["AutoScalingGroupName"]: _group(group) for page in pages for group in page["AutoScalingGroups"]
            }

    def instances(self, ids: Collection[str]) -> Mapping[str, str]:
        """See Cloud. By a filter: a list of ids would be refused whole for one that EC2 has forgotten."""
        states: dict[str, str] = {}
        with _asking("describe instances"):
            for some in _batches(sorted(ids), FILTER_VALUES):
                pages = self._ec2.get_paginator("describe_instances").paginate(
                    Filters=[{"Name": "instance-id", "Values": some}]
                )
                for page in pages:
                    for reservation in page["Reservations"]:
                        for instance in reservation["Instances"]:
                            states[instance["InstanceId"]] = instance["State"]["Name"]
        return states


def _batches(values: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _group(answer: Mapping[str, Any]) -> Group:
    held = [(one["InstanceId"], one["LifecycleState"]) for one in answer.get("Instances", ())]
    return Group(
        desired=int(answer["DesiredCapacity"]),
        in_service=frozenset(name for name, state in held if state == _IN_SERVICE),
        others=frozenset(name for name, state in held if state != _IN_SERVICE),
    )


class SqsNotices:
    """`Notices` over one SQS queue."""

    def __init__(self, url: str, region: str) -> None:
        self._url = url
        self._sqs = client("sqs", region, read_s=WAIT_S + READ_S)

    def receive(self, wait_s: int, hold_s: int) -> Sequence[Message]:
        """See Notices."""
        with _asking("receive notices"):
            answer = self._sqs.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=MESSAGES,
                WaitTimeSeconds=min(wait_s, WAIT_S),
                VisibilityTimeout=hold_s,
                MessageSystemAttributeNames=["ApproximateReceiveCount"],
            )
            return [
                Message(
                    id=one["MessageId"],
                    receipt=one["ReceiptHandle"],
                    body=one["Body"],
                    received=int(one.get("Attributes", {}).get("ApproximateReceiveCount", 1)),
                )
                for one in answer.get("Messages", ())
            ]

    def hold(self, message: Message, seconds: int) -> None:
        """See Notices."""
        with _asking("hold a notice"):
            self._sqs.change_message_visibility(
                QueueUrl=self._url, ReceiptHandle=message.receipt, VisibilityTimeout=seconds
            )

    def done(self, message: Message) -> None:
        """See Notices."""
        with _asking("delete a notice"):
            self._sqs.delete_message(QueueUrl=self._url, ReceiptHandle=message.receipt)


class LifecycleHooks:
    """`Hooks` over Auto Scaling."""

    def __init__(self, region: str) -> None:
        self._scaling = client("autoscaling", region)

    def beat(self, instance: str, hook: Hook) -> None:
        """See Hooks."""
        with _asking(f"record a heartbeat for {instance}"), _over_is_done():
            self._scaling.record_lifecycle_action_heartbeat(**_action(instance, hook))

    def complete(self, instance: str, hook: Hook) -> None:
        """See Hooks."""
        with _asking(f"complete the lifecycle action of {instance}"), _over_is_done():
            self._scaling.complete_lifecycle_action(**_action(instance, hook), LifecycleActionResult="CONTINUE")


def _action(instance: str, hook: Hook) -> dict[str, str]:
    return {
        "AutoScalingGroupName": hook.group,
        "LifecycleHookName": hook.name,
        "LifecycleActionToken": hook.token,
        "InstanceId": instance,
    }


@contextlib.contextmanager
def _over_is_done() -> Iterator[None]:
    """Auto Scaling knows no such action any more: somebody answered, its time is over, or the group is gone."""
    try:
        yield
    except ClientError as error:
        said = error.response.get("Error", {})
        if said.get("Code") != "ValidationError" or "No active Lifecycle Action" not in said.get("Message", ""):
            raise


@contextlib.contextmanager
def _asking(what: str) -> Iterator[None]:
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise CloudFault(f"cannot {what}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CloudFault(f"cannot {what}: the answer lacks {error}") from error
