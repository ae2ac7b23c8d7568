"""Notices as AWS documents them, and what is none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.operators.notices import Hook, Kind, PoisonError, read

# The documents of AWS's user guides, with an instance of their form.
INTERRUPTION = {
    "version": "0",
    "id": "12345678-1234-1234-1234-123456789012",
    "detail-type": "EC2 Spot Instance Interruption Warning",
    "source": "aws.ec2",
    "account": "123456789012",
    "time": "2026-11-22T20:00:00Z",
    "region": "us-east-2",
    "resources": ["arn:aws:ec2:us-east-2a:instance/i-1234567890abcdef0"],
    "detail": {"instance-id": "i-1234567890abcdef0", "instance-action": "terminate"},
}
REBALANCE = {
    **INTERRUPTION,
    "detail-type": "EC2 Instance Rebalance Recommendation",
    "detail": {"instance-id": "i-1234567890abcdef0"},
}
TERMINATING = {
    **INTERRUPTION,
    "detail-type": "EC2 Instance-terminate Lifecycle Action",
    "source": "aws.autoscaling",
    "resources": ["auto-scaling-group-arn"],
    "detail": {
        "LifecycleActionToken": "87654321-4321-4321-4321-210987654321",
        "AutoScalingGroupName": "my-asg",
        "LifecycleHookName": "my-lifecycle-hook",
        "EC2InstanceId": "i-1234567890abcdef0",
        "LifecycleTransition": "autoscaling:EC2_INSTANCE_TERMINATING",
        "NotificationMetadata": "additional-info",
        "Origin": "AutoScalingGroup",
        "Destination": "EC2",
    },
}


@pytest.mark.parametrize("document", [INTERRUPTION, REBALANCE, TERMINATING])
def test_each_notice_names_its_instance_and_its_time(document: dict[str, object]):
    notice = read(json.dumps(document))
    assert notice.instance == "i-1234567890abcdef0"
    assert notice.at == 1795377600.0
    assert notice.kind == document["detail-type"]
    assert (notice.hook is not None) == (notice.kind is Kind.TERMINATING)


def test_a_lifecycle_action_says_what_to_answer():
    hook = read(json.dumps(TERMINATING)).hook
    assert hook == Hook("my-asg", "my-lifecycle-hook", "87654321-4321-4321-4321-210987654321")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "no json",
        "[]",
        "null",
        json.dumps({**INTERRUPTION, "detail-type": "EC2 Instance State-change Notification"}),
        json.dumps({**INTERRUPTION, "detail": {}}),
        json.dumps({**INTERRUPTION, "detail": {"instance-id": "../../nodes/worker-1"}}),
        json.dumps({**INTERRUPTION, "time": "2026-11-22T20:00:00"}),
        json.dumps({**TERMINATING, "detail": {**TERMINATING["detail"], "LifecycleActionToken": "x"}}),  # type: ignore[dict-item]  # as below
        json.dumps({**TERMINATING, "detail": {**TERMINATING["detail"], "LifecycleHookName": None}}),  # type: ignore[dict-item]  # AWS never does
        json.dumps(
            {
                **TERMINATING,
                "detail": {**TERMINATING["detail"], "LifecycleTransition": "autoscaling:EC2_INSTANCE_LAUNCHING"},
            }  # type: ignore[dict-item]  # as above
        ),
    ],
)
def test_what_is_no_notice_is_poison(body: str):
    with pytest.raises(PoisonError):
        read(body)


@given(st.text() | st.recursive(st.none() | st.text(), lambda inner: st.dictionaries(st.text(), inner)).map(json.dumps))
def test_no_message_brings_the_reader_down(body: str):
    with pytest.raises(PoisonError):
        read(body)
