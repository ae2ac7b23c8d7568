"""The real doors, each against what its neighbour may answer: whole answers only, and one name for every fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from botocore.stub import ANY, Stubber
from lightkube import Client, KubeConfig
from lightkube.config.models import Cluster, User

from workloads.operators import aws
from workloads.operators.cloud import CloudFault, Group
from workloads.operators.cluster import ClusterFault, DeniedFault, Eviction
from workloads.operators.kubernetes import LightkubeCluster
from workloads.operators.notices import Hook

HOOK = Hook("g", "drained", "87654321-4321-4321-4321-210987654321")

# AWS


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object, str], Stubber]]:
    """A stub for the client that a door keeps under a name."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    made: list[Stubber] = []

    def stub(door: object, name: str) -> Stubber:
        made.append(Stubber(getattr(door, name)))
        made[-1].activate()
        return made[-1]

    yield stub
    for one in made:
        one.assert_no_pending_responses()


Stub = Callable[[object, str], Stubber]


def page(*states: tuple[str, str], more: str | None = None) -> dict[str, Any]:
    instances = [{"InstanceId": one, "State": {"Name": state}} for one, state in states]
    return {"Reservations": [{"Instances": instances}], **({"NextToken": more} if more else {})}


def test_instances_are_read_to_the_last_page_and_asked_for_by_filter(stubbed: Stub):
    door = aws.AwsCloud("eu-central-1")
    ec2 = stubbed(door, "_ec2")
    asked = {"Filters": [{"Name": "instance-id", "Values": ["i-1", "i-2"]}]}
    ec2.add_response("describe_instances", page(("i-1", "running"), more="x"), asked)
    ec2.add_response("describe_instances", page(("i-2", "terminated")), {**asked, "NextToken": "x"})
    assert door.instances({"i-2", "i-1"}) == {"i-1": "running", "i-2": "terminated"}


def test_more_instances_than_a_filter_takes_are_asked_for_in_turn(stubbed: Stub):
    door = aws.AwsCloud("eu-central-1")
    ec2 = stubbed(door, "_ec2")
    ids = [f"i-{n:017x}" for n in range(aws.FILTER_VALUES + 1)]
    for some in (ids[: aws.FILTER_VALUES], ids[aws.FILTER_VALUES :]):
        ec2.add_response(
            "describe_instances",
            page(*((one, "running") for one in some)),
            {"Filters": [{"Name": "instance-id", "Values": some}]},
        )
    assert len(door.instances(ids)) == len(ids)


def test_a_page_that_fails_takes_the_whole_answer_with_it(stubbed: Stub):
    door = aws.AwsCloud("eu-central-1")
    ec2 = stubbed(door, "_ec2")
    ec2.add_response("describe_instances", page(("i-1", "terminated"), more="x"))
    ec2.add_client_error("describe_instances", "RequestLimitExceeded", http_status_code=503)
    with pytest.raises(CloudFault, match="RequestLimitExceeded"):
        door.instances({"i-1", "i-2"})


def test_a_group_tells_whom_it_counts_on_from_whom_it_only_holds(stubbed: Stub):
    door = aws.AwsCloud("eu-central-1")
    held = [("i-1", "InService"), ("i-2", "Terminating:Wait"), ("i-3", "Warmed:Stopped")]
    group: dict[str, Any] = {
        "AutoScalingGroupName": "g",
        "MinSize": 0,
        "MaxSize": 3,
        "DesiredCapacity": 2,
        "DefaultCooldown": 1,
        "AvailabilityZones": ["eu-central-1a"],
        "HealthCheckType": "EC2",
        "CreatedTime": 0,
        "Instances": [
            {
                "InstanceId": one,
                "LifecycleState": state,
                "AvailabilityZone": "eu-central-1a",
                "HealthStatus": "Healthy",
                "ProtectedFromScaleIn": False,
            }
            for one, state in held
        ],
    }
    stubbed(door, "_scaling").add_response(
        "describe_auto_scaling_groups", {"AutoScalingGroups": [group]}, {"AutoScalingGroupNames": ["g", "h"]}
    )
    assert door.groups(["g", "h"]) == {"g": Group(2, frozenset({"i-1"}), frozenset({"i-2", "i-3"}))}


def test_an_action_that_is_over_is_done_and_any_other_refusal_a_fault(stubbed: Stub):
    door = aws.LifecycleHooks("eu-central-1")
    scaling = stubbed(door, "_scaling")
    over = "No active Lifecycle Action found with token 87654321"
    scaling.add_client_error("complete_lifecycle_action", "ValidationError", over)
    door.complete("i-1", HOOK)
    scaling.add_client_error("record_lifecycle_action_heartbeat", "ValidationError", "1 validation error")
    with pytest.raises(CloudFault, match="heartbeat for i-1"):
        door.beat("i-1", HOOK)
    scaling.add_client_error("complete_lifecycle_action", "AccessDenied")
    with pytest.raises(CloudFault, match="AccessDenied"):
        door.complete("i-1", HOOK)


def test_messages_come_with_how_often_they_came(stubbed: Stub):
    door = aws.SqsNotices("http://queue", "eu-central-1")
    sqs = stubbed(door, "_sqs")
    message = {"MessageId": "m", "ReceiptHandle": "r", "Body": "b", "Attributes": {"ApproximateReceiveCount": "3"}}
    asked = {"QueueUrl": "http://queue", "WaitTimeSeconds": 20, "VisibilityTimeout": 20, "MaxNumberOfMessages": 10}
    sqs.add_response("receive_message", {"Messages": [message]}, {**asked, "MessageSystemAttributeNames": ANY})
    sqs.add_response("receive_message", {}, None)
    (got,) = door.receive(60, 20)
    assert (got.id, got.body, got.received) == ("m", "b", 3)
    assert "receipt" not in repr(got)
    assert door.receive(0, 20) == []


# Kubernetes

Answer = Callable[[httpx2.Request], httpx2.Response]


def cluster(answer: Answer) -> LightkubeCluster:
    config = KubeConfig.from_one(cluster=Cluster(server="http://cluster.invalid"), user=User(token="x"))  # noqa: S106 - asks a fake
    return LightkubeCluster(Client(config=config, transport=httpx2.MockTransport(answer), trust_env=False))


def says(status: int, **fields: object) -> Answer:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "message": "no", **fields}
    return lambda _: httpx2.Response(status, json=body)


def test_nodes_and_pods_are_read_to_the_last_page():
    def node(name: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - parts of a manifest
        return {"metadata": {"name": name}, "spec": {}, **more}

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/api/v1/nodes":
            if "continue" not in request.url.params:
                ready = {"conditions": [{"type": "Ready", "status": "True"}]}
                return httpx2.Response(200, json={"metadata": {"continue": "x"}, "items": [node("a", status=ready)]})
            silent = {"conditions": [{"type": "Ready", "status": "Unknown"}]}
            return httpx2.Response(
                200,
                json={
                    "metadata": {},
                    "items": [node("b", status=silent, spec={"providerID": "aws:///z/i", "unschedulable": True})],
                },
            )
        assert request.url.params["fieldSelector"] == "spec.nodeName=a"
        pods = [
            {"metadata": {"name": "daemon", "ownerReferences": [owner("DaemonSet")]}},
            {"metadata": {"name": "static", "annotations": {"kubernetes.io/config.mirror": "x"}}},
            {"metadata": {"name": "ended"}, "status": {"phase": "Succeeded"}},
            {"metadata": {"name": "leaving", "deletionTimestamp": "2026-01-01T00:00:00Z"}},
            {"metadata": {"name": "runs", "ownerReferences": [owner("ReplicaSet")]}, "status": {"phase": "Running"}},
        ]
        return httpx2.Response(200, json={"metadata": {}, "items": pods})

    def owner(kind: str) -> dict[str, Any]:
        return {"apiVersion": "apps/v1", "kind": kind, "name": "x", "uid": "x", "controller": True}

    door = cluster(answer)
    first, second = door.nodes()
    assert (first.name, first.ready, first.unschedulable, first.provider_id) == ("a", True, False, "")
    assert (second.name, second.ready, second.unschedulable, second.provider_id) == ("b", False, True, "aws:///z/i")
    pods = {pod.name: pod for pod in door.pods("a")}
    assert {name for name, pod in pods.items() if pod.stays} == {"daemon", "static", "ended"}
    assert {name for name, pod in pods.items() if pod.leaving} == {"leaving"}


@pytest.mark.parametrize(("status", "said"), [(201, Eviction.ACCEPTED), (429, Eviction.REFUSED), (404, Eviction.GONE)])
def test_an_eviction_is_accepted_refused_or_too_late(status: int, said: Eviction):
    asked: list[dict[str, Any]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        assert request.url.path == "/api/v1/namespaces/s/pods/p/eviction"
        asked.append(json.loads(request.content))
        return says(status)(request)

    assert cluster(answer).evict("s", "p", 7) is said
    assert asked[0]["deleteOptions"]["gracePeriodSeconds"] == 7


@pytest.mark.parametrize(("status", "fault"), [(403, DeniedFault), (500, DeniedFault), (503, ClusterFault)])
def test_what_the_api_server_will_not_do_is_told_from_what_it_cannot_do_now(status: int, fault: type[ClusterFault]):
    with pytest.raises(ClusterFault) as raised:
        cluster(says(status)).evict("s", "p", None)
    assert type(raised.value) is fault


def test_an_answer_that_is_no_json_and_none_at_all_are_faults():
    def hangs(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectTimeout("")

    with pytest.raises(ClusterFault, match="ConnectTimeout"):
        cluster(hangs).nodes()
    with pytest.raises(ClusterFault):
        cluster(lambda _: httpx2.Response(200, text="<html>")).nodes()
    with pytest.raises(ClusterFault):
        cluster(lambda _: httpx2.Response(502, text="<html>")).remove_node("n")


def test_what_is_gone_already_is_removed():
    door = cluster(says(404))
    door.remove_node("n")
    door.remove_secret("kube-system", "n.node-password.k3s")
    door.label_pod("s", "p", "l", "v")
