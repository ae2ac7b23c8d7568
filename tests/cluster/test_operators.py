"""Node hygiene and the spot handler as real processes, against the real control plane and an AWS on this machine.

Each runs as a ServiceAccount that has `contract.operators.access` and nothing else. Between them and the emulator is a
door that can be told to fail as AWS does; it also plays the two lifecycle calls that the emulator lacks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import boto3
import pytest
import yaml
from lightkube import ApiError, Client, KubeConfig, codecs
from lightkube.models.authentication_v1 import TokenRequestSpec
from lightkube.models.core_v1 import NodeSpec, NodeStatus
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Namespace, Node, Pod, Secret, ServiceAccount, ServiceAccountToken
from lightkube.resources.discovery_v1 import EndpointSlice

from infra.controlplane import ControlPlane
from infra.emulator import Emulator
from workloads.contract.operators import IN_ROTATION, ROTATION_LABEL, SITE_LABEL, WITHDRAWN, Operator, access

pytestmark = pytest.mark.real_parts

REGION, SITE, GROUP = "eu-central-1", "operators-test", "operators-test-gpu"
HERE, SERVING, ELSEWHERE = "operators", "operators-serving", "operators-elsewhere"
HOME_NODE = "operators-home-1"
SIZE = {"cpu": "8", "memory": "32Gi", "pods": "110"}
GONE_WITHIN_S = 60


def until(true: Callable[[], Any], what: str, seconds: float = 60, every: float = 0.1) -> float:
    """Wait until it is so; the seconds that it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"waited {seconds:g} s for: {what}"
        time.sleep(every)
    return time.monotonic() - began


class Figures(Protocol):
    """The suite's table of what was measured."""

    def add(self, what: str, value: str, bound: str = "") -> None: ...


# AWS


@dataclasses.dataclass
class Door:
    """What the operators take for AWS: the emulator, and `answers` (action -> status and body) before it."""

    port: int
    answers: dict[str, Callable[[Mapping[str, str]], tuple[int, str]]]
    lifecycle: list[dict[str, str]] = dataclasses.field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def lifecycle_calls(self, action: str, instance: str = "") -> list[dict[str, str]]:
        return [call for call in self.lifecycle if call["Action"] == action and call["InstanceId"].startswith(instance)]


def lifecycle_answer(action: str) -> str:
    return f'<{action}Response xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/"><{action}Result/></{action}Response>'


@pytest.fixture(scope="module")
def aws(plane: ControlPlane, emulator: Emulator) -> Iterator[Door]:  # noqa: ARG001 - skipped before the emulator starts
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked = dict(urllib.parse.parse_qsl(body.decode())) if b"Action=" in body else {}
            action = asked.get("Action", "")
            if action in ("CompleteLifecycleAction", "RecordLifecycleActionHeartbeat"):
                door.lifecycle.append(asked)
                self.answer(200, lifecycle_answer(action).encode())
            elif action in door.answers:
                status, text = door.answers[action](asked)
                self.answer(status, text.encode())
            else:
                through = http.client.HTTPConnection("127.0.0.1", emulator.port, timeout=60)
                with contextlib.closing(through):
                    headers = {k: v for k, v in self.headers.items() if k.lower() != "content-length"}
                    through.request("POST", self.path, body, headers)
                    reply = through.getresponse()
                    self.answer(reply.status, reply.read(), reply.headers["Content-Type"] or "text/xml")

        def answer(self, status: int, body: bytes, kind: str = "text/xml") -> None:
            with contextlib.suppress(OSError):  # an operator that was killed waits for no answer
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base class's name
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        door = Door(server.server_address[1], {})
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield door
        server.shutdown()


Boto = Callable[[str], Any]


@pytest.fixture(scope="module")
def boto(emulator: Emulator) -> Boto:
    def make(service: str) -> Any:  # noqa: ANN401 - boto3 makes its clients at run time
        return boto3.client(
            service,
            endpoint_url=emulator.endpoint,
            region_name=REGION,
            aws_access_key_id="test",
            aws_secret_access_key="test",  # noqa: S106 - the emulator takes anything
        )

    return make


@pytest.fixture(scope="module")
def instances(boto: Boto) -> list[str]:
    """Ids of the six instances that an Auto Scaling group started."""
    ec2, scaling = boto("ec2"), boto("autoscaling")
    vpc = ec2.create_vpc(CidrBlock="10.231.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.231.0.0/24", AvailabilityZone=f"{REGION}a")["Subnet"][
        "SubnetId"
    ]
    ec2.create_launch_template(
        LaunchTemplateName=GROUP, LaunchTemplateData={"ImageId": "ami-12c6146b", "InstanceType": "g5.xlarge"}
    )
    scaling.create_auto_scaling_group(
        AutoScalingGroupName=GROUP,
        MinSize=0,
        MaxSize=9,
        DesiredCapacity=6,
        VPCZoneIdentifier=subnet,
        LaunchTemplate={"LaunchTemplateName": GROUP, "Version": "1"},
    )
    (made,) = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=[GROUP])["AutoScalingGroups"]
    return [one["InstanceId"] for one in made["Instances"]]


def terminate(boto: Boto, instance: str) -> None:
    boto("autoscaling").terminate_instance_in_auto_scaling_group(
        InstanceId=instance, ShouldDecrementDesiredCapacity=True
    )


# The cluster


def namespace(client: Client, name: str) -> None:
    client.apply(Namespace(metadata=ObjectMeta(name=name)))


def join(client: Client, name: str, provider_id: str, site: str) -> None:
    labels = {"rankbridge.io/played-by": "kwok", SITE_LABEL: site}
    client.apply(Node(metadata=ObjectMeta(name=name, labels=labels), spec=NodeSpec(providerID=provider_id)))
    client.apply(
        Node.Status(metadata=ObjectMeta(name=name), status=NodeStatus(capacity=SIZE, allocatable=SIZE)),
        field_manager="kubelet",
        force=True,  # KWOK may have been faster
    )


@pytest.fixture(scope="module")
def cluster(client: Client, instances: list[str]) -> Iterator[Client]:
    """Nodes of the instances and one at home, k3s' node passwords, and the operators' rights."""
    for name in (HERE, SERVING, ELSEWHERE):
        namespace(client, name)
    join(client, HOME_NODE, f"k3s://{HOME_NODE}", "onprem")
    for instance in instances:
        join(client, instance, f"aws:///{REGION}a/{instance}", SITE)
    for node in (HOME_NODE, *instances):
        client.apply(Secret(metadata=ObjectMeta(name=f"{node}.node-password.k3s", namespace="kube-system")))
    client.apply(Secret(metadata=ObjectMeta(name="operators-other", namespace="kube-system")))
    for operator in Operator:
        client.apply(ServiceAccount(metadata=ObjectMeta(name=operator.value, namespace=HERE)))
        rights = access(operator, namespace=HERE, service_account=operator.value, serving=[SERVING], prefix="operators")
        for manifest in rights:
            client.apply(codecs.from_dict(manifest))
    until(lambda: all(is_ready(client, node) for node in (HOME_NODE, *instances)), "nodes ready")
    yield client
    for name in (SERVING, ELSEWHERE, HERE):
        client.delete(Namespace, name)
    for node in (HOME_NODE, *instances):
        with contextlib.suppress(ApiError):
            client.delete(Node, node)


def exists(client: Client, kind: Any, name: str, **where: str) -> bool:  # noqa: ANN401 - a resource class
    try:
        client.get(kind, name, **where)
    except ApiError as error:
        if error.status.code == 404:
            return False
        raise
    return True


def is_ready(client: Client, node: str) -> bool:
    status = client.get(Node, node).status
    return any(c.type == "Ready" and c.status == "True" for c in (status and status.conditions) or ())


def kubeconfig(plane: ControlPlane, client: Client, account: str, path: Path) -> Path:
    request = ServiceAccountToken(metadata=ObjectMeta(), spec=TokenRequestSpec(audiences=[]))
    token = client.create(request, account, namespace=HERE).status
    assert token is not None
    document = yaml.safe_load(plane.kubeconfig.read_text())
    document["users"][0]["user"] = {"token": token.token}
    path.touch(0o600)
    path.write_text(yaml.safe_dump(document))
    return path


class Running:
    """One operator as a process."""

    def __init__(self, plane: ControlPlane, client: Client, aws: Door, home: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = home / f"{arguments[0]}-{self.port}.log"
        self._command = [sys.executable, "-m", "workloads.operators", *arguments, "--site", SITE, "--region", REGION]
        self._environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(home),
            "KUBECONFIG": str(kubeconfig(plane, client, arguments[0], home / f"{arguments[0]}.kubeconfig")),
            "AWS_ENDPOINT_URL": aws.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._command, "--listen", f"127.0.0.1:{self.port}"], env=self._environment, stdout=log, stderr=log
            )
        until(lambda: self.get("/readyz")[0] == 200, "ready")
        return self.process

    def restart(self) -> None:
        """As after a death: SIGKILL, and a new one."""
        self.process.kill()
        self.process.wait()
        self._start()

    def get(self, path: str) -> tuple[int, str]:
        if self.process.poll() is not None:
            pytest.fail(f"ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        found = re.search(rf"^rankbridge_{re.escape(name)} (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        assert found, name
        return float(found[1])

    def logged(self, event: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [record for record in records if record["event"] == event]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(10) == 0


Start = Callable[..., Running]


@pytest.fixture
def start(plane: ControlPlane, cluster: Client, aws: Door, tmp_path: Path) -> Iterator[Start]:
    running: list[Running] = []

    def begin(*arguments: str) -> Running:
        running.append(Running(plane, cluster, aws, tmp_path, *arguments))
        return running[-1]

    yield begin
    for one in running:
        one.stop()


# Hygiene


def test_the_node_of_a_terminated_instance_goes_within_a_minute_and_no_other(
    start: Start, cluster: Client, boto: Boto, instances: list[str], figures: Figures
):
    hygiene = start("hygiene", "--group", GROUP)
    gone, *others = instances
    terminate(boto, gone)
    took = until(lambda: not exists(cluster, Node, gone), "the node is gone", GONE_WITHIN_S)
    figures.add("node of a terminated instance gone", f"{took:.1f} s", f"at most {GONE_WITHIN_S} s")
    assert not exists(cluster, Secret, f"{gone}.node-password.k3s", namespace="kube-system")
    for left in (HOME_NODE, *others):
        assert exists(cluster, Node, left)
        assert exists(cluster, Secret, f"{left}.node-password.k3s", namespace="kube-system")
    assert exists(cluster, Secret, "operators-other", namespace="kube-system")
    assert hygiene.metric("hygiene_nodes_removed_total") == 1
    assert json.loads(hygiene.get("/readyz")[1])["hygiene"]["last_success"]


EC2 = "http://ec2.amazonaws.com/doc/2016-11-15/"
SCALING = "http://autoscaling.amazonaws.com/doc/2011-01-01/"
ERROR = (
    "<Response><Errors><Error><Code>{0}</Code><Message>x</Message></Error></Errors><RequestID>x</RequestID></Response>"
)
NO_GROUPS = (
    f'<DescribeAutoScalingGroupsResponse xmlns="{SCALING}"><DescribeAutoScalingGroupsResult><AutoScalingGroups/>'
    "</DescribeAutoScalingGroupsResult></DescribeAutoScalingGroupsResponse>"
)


def described(states: Mapping[str, str], more: str = "") -> str:
    codes = {"running": 16, "terminated": 48}
    items = "".join(
        f"<item><instancesSet><item><instanceId>{one}</instanceId><instanceState><code>{codes[state]}</code>"
        f"<name>{state}</name></instanceState></item></instancesSet></item>"
        for one, state in states.items()
    )
    return (
        f'<DescribeInstancesResponse xmlns="{EC2}"><reservationSet>{items}</reservationSet>{more}'
        "</DescribeInstancesResponse>"
    )


def test_an_aws_that_fails_or_answers_nothing_or_half_or_that_all_is_gone_removes_nothing(
    start: Start, cluster: Client, boto: Boto, aws: Door, instances: list[str], figures: Figures
):
    gone, *others = instances[1:]
    hygiene = start("hygiene", "--group", GROUP, "--period-s", "1", "--rounds", "2")
    lies: dict[str, tuple[str, str, Callable[[Mapping[str, str]], tuple[int, str]]]] = {
        "error": ("cloud-fault", "DescribeInstances", lambda _: (500, ERROR.format("InternalError"))),
        "throttled": ("cloud-fault", "DescribeInstances", lambda _: (503, ERROR.format("RequestLimitExceeded"))),
        "denied": ("cloud-fault", "DescribeAutoScalingGroups", lambda _: (403, ERROR.format("AccessDenied"))),
        "no answer's form": ("cloud-fault", "DescribeInstances", lambda _: (200, "<html>proxy</html>")),
        "second page fails": (
            "cloud-fault",
            "DescribeInstances",
            lambda asked: (
                (500, ERROR.format("InternalError"))
                if "NextToken" in asked
                else (200, described({gone: "terminated"}, "<nextToken>x</nextToken>"))
            ),
        ),
        "empty": ("held", "DescribeInstances", lambda _: (200, described({}))),
        "half": ("held", "DescribeInstances", lambda _: (200, described({gone: "terminated", others[0]: "running"}))),
        "no group": ("held", "DescribeAutoScalingGroups", lambda _: (200, NO_GROUPS)),
        "all gone": ("held", "DescribeInstances", lambda _: (200, described(dict.fromkeys(instances, "terminated")))),
    }
    aws.answers = {"DescribeInstances": lies["error"][2]}
    terminate(boto, gone)
    try:
        for what, (result, action, answer) in lies.items():
            aws.answers = {action: answer}  # never without one: the truth would be three rounds of it
            counter = f'hygiene_rounds_total{{result="{result}"}}'
            before = hygiene.metric(counter)
            # One more than must agree, and one that was under way.
            until(
                lambda counter=counter, before=before: hygiene.metric(counter) >= before + 3, f"rounds with {what}", 90
            )
            for node in (HOME_NODE, gone, *others):
                assert exists(cluster, Node, node), f"{what}: {node} was removed"
    finally:
        aws.answers = {}
    took = until(lambda: not exists(cluster, Node, gone), "the node is gone once AWS answers again")
    figures.add("the same once AWS answers again, a round a second", f"{took:.1f} s")
    assert hygiene.metric("hygiene_nodes_removed_total") == 1
    assert all(exists(cluster, Node, node) for node in (HOME_NODE, *others))
    reasons = {record["reason"] for record in hygiene.logged("nothing is removed")}
    for said in (
        "InternalError",
        "RequestLimitExceeded",
        "AccessDenied",
        "cannot describe",
        "EC2 does not know",
        GROUP,
    ):
        assert any(said in reason for reason in reasons), (said, reasons)
    assert any("no instance is alive" in reason for reason in reasons)


def test_the_api_server_itself_keeps_the_operators_from_what_is_not_theirs(
    plane: ControlPlane, cluster: Client, instances: list[str], tmp_path: Path
):
    def as_account(operator: Operator) -> Client:
        config = kubeconfig(plane, cluster, operator.value, tmp_path / operator.value)
        return Client(config=KubeConfig.from_file(config), trust_env=False)

    here = instances[-1]
    pods(cluster, "probe", SERVING, {})
    with as_account(Operator.HYGIENE) as hygiene, as_account(Operator.SPOT) as spot:
        refused: list[Callable[[], object]] = [
            lambda: hygiene.delete(Node, HOME_NODE),
            lambda: hygiene.delete(Secret, "operators-other", namespace="kube-system"),
            lambda: list(hygiene.list(Secret, namespace="kube-system")),
            lambda: hygiene.patch(Node, here, {"spec": {"unschedulable": True}}),
            lambda: spot.delete(Node, here),
            lambda: spot.patch(Node, HOME_NODE, {"spec": {"unschedulable": True}}),
            lambda: spot.patch(Node, here, {"metadata": {"labels": {SITE_LABEL: "onprem"}}}),
            lambda: spot.patch(Pod, "probe", {"metadata": {"labels": {"x": "y"}}}, namespace=ELSEWHERE),
            lambda: spot.patch(
                Pod, "probe", {"spec": {"containers": [{"name": "main", "image": "evil"}]}}, namespace=SERVING
            ),
            lambda: spot.delete(Pod, "probe", namespace=SERVING),
        ]
        for attempt in refused:
            with pytest.raises(ApiError) as no:
                attempt()
            assert no.value.status.code == 403, no.value
        spot.patch(Pod, "probe", {"metadata": {"labels": {ROTATION_LABEL: WITHDRAWN}}}, namespace=SERVING)
    cluster.delete(Pod, "probe", namespace=SERVING)


# Spot


RESTRICTED = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def pod_spec(**more: object) -> dict[str, Any]:
    container = {"name": "main", "image": f"images.invalid/x@sha256:{'0' * 64}", "securityContext": RESTRICTED}
    resources = {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"cpu": "10m", "memory": "16Mi"}}
    return {
        "containers": [{**container, "resources": resources}],
        "nodeSelector": {SITE_LABEL: SITE},
        "tolerations": [{"operator": "Exists", "effect": "NoExecute"}],
        **more,
    }


def pods(client: Client, name: str, where: str, labels: Mapping[str, str], **more: object) -> None:
    metadata = {"name": name, "namespace": where, "labels": dict(labels)}
    client.apply(codecs.from_dict({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod_spec(**more)}))


def ranker(client: Client, replicas: int) -> None:
    """A serving Deployment with its Service and its budget, and a DaemonSet beside it."""
    labels = {"app": "ranker"}
    template = {"metadata": {"labels": {**labels, ROTATION_LABEL: IN_ROTATION}}, "spec": pod_spec()}
    beside = {"metadata": {"labels": {"app": "plugin"}}, "spec": pod_spec()}
    for kind, version, name, spec in (
        (
            "Deployment",
            "apps/v1",
            "ranker",
            {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template},
        ),
        ("DaemonSet", "apps/v1", "plugin", {"selector": {"matchLabels": {"app": "plugin"}}, "template": beside}),
        ("PodDisruptionBudget", "policy/v1", "ranker", {"maxUnavailable": 1, "selector": {"matchLabels": labels}}),
        ("Service", "v1", "ranker", {"selector": {**labels, ROTATION_LABEL: IN_ROTATION}, "ports": [{"port": 8000}]}),
    ):
        metadata = {"name": name, "namespace": SERVING}
        client.apply(codecs.from_dict({"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}))


def on(client: Client, node: str, app: str = "ranker") -> list[Pod]:
    found = client.list(Pod, namespace=SERVING, labels={"app": app}, fields={"spec.nodeName": node})
    return [pod for pod in found if pod.metadata and pod.metadata.deletionTimestamp is None]


def ready(client: Client) -> set[str]:
    """Names of the ranker's pods that are ready and stay."""
    return {
        pod.metadata.name
        for pod in client.list(Pod, namespace=SERVING, labels={"app": "ranker"})
        if pod.metadata and pod.metadata.name and pod.metadata.deletionTimestamp is None and pod.status
        if any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions or ())
    }


def endpoints(client: Client) -> set[str]:
    """Names of the pods that the ranker's Service sends requests to."""
    return {
        point.targetRef.name
        for found in client.list(EndpointSlice, namespace=SERVING, labels={"kubernetes.io/service-name": "ranker"})
        for point in found.endpoints or ()
        if point.targetRef and point.targetRef.name and point.conditions and point.conditions.ready
    }


def reopen(client: Client, *nodes: str) -> None:
    """Let pods come to these of the site's nodes and to no other."""
    for node in client.list(Node, labels={SITE_LABEL: SITE}):
        assert node.metadata
        assert node.metadata.name
        client.patch(Node, node.metadata.name, {"spec": {"unschedulable": node.metadata.name not in nodes}})


@contextlib.contextmanager
def watched(look: Callable[[], int]) -> Iterator[list[int]]:
    """What was seen, looked at all the time."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            seen.append(look())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def ranker_at(client: Client, node: str) -> set[str]:
    """Two pods of the ranker serve, both on this node, and nothing else is open; their names."""
    reopen(client, node)
    ranker(client, 2)
    for pod in client.list(Pod, namespace=SERVING, labels={"app": "ranker"}):
        if pod.metadata and pod.metadata.name and pod.spec and pod.spec.nodeName != node:
            client.delete(Pod, pod.metadata.name, namespace=SERVING, grace_period=0)
    until(lambda: len(on(client, node)) == 2 == len(ready(client)) == len(endpoints(client)), "the ranker serves there")
    return {pod.metadata.name for pod in on(client, node) if pod.metadata and pod.metadata.name}


POISON = "no notice at all"


def token_of(instance: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, instance))


@dataclasses.dataclass
class Queue:
    """The site's queue and the one for what nobody could read."""

    sqs: Any
    url: str
    dead: str

    def send(self, kind: str, detail: Mapping[str, str]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat()
        body = {"version": "0", "detail-type": kind, "time": now, "region": REGION, "detail": dict(detail)}
        self.sqs.send_message(QueueUrl=self.url, MessageBody=json.dumps(body))

    def interrupt(self, instance: str) -> None:
        detail = {"instance-id": instance, "instance-action": "terminate"}
        self.send("EC2 Spot Instance Interruption Warning", detail)

    def terminating(self, instance: str) -> None:
        detail = {
            "EC2InstanceId": instance,
            "AutoScalingGroupName": GROUP,
            "LifecycleHookName": "drained",
            "LifecycleActionToken": token_of(instance),
            "LifecycleTransition": "autoscaling:EC2_INSTANCE_TERMINATING",
        }
        self.send("EC2 Instance-terminate Lifecycle Action", detail)

    def held(self, url: str = "") -> int:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        said = self.sqs.get_queue_attributes(QueueUrl=url or self.url, AttributeNames=names)["Attributes"]
        return sum(int(value) for value in said.values())


@pytest.fixture(scope="module")
def notices(boto: Boto) -> Queue:
    sqs = boto("sqs")
    name = f"operators-{time.time_ns()}"
    dead = sqs.create_queue(QueueName=f"{name}-dead")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 2})
    attributes = {"VisibilityTimeout": "60", "RedrivePolicy": policy}
    return Queue(sqs, sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"], dead)


def test_a_node_that_ends_is_emptied_as_its_budget_allows_through_a_death_and_then_let_go(
    start: Start, cluster: Client, aws: Door, notices: Queue, instances: list[str], figures: Figures
):
    ends, other, last = instances[2:5]
    before = ranker_at(cluster, ends)
    until(lambda: len(on(cluster, ends, "plugin")) == 1, "the DaemonSet's pod is there")
    pods(cluster, "at-home", SERVING, {"app": "at-home"}, nodeSelector={SITE_LABEL: "onprem"}, nodeName=HOME_NODE)
    notices.sqs.send_message(QueueUrl=notices.url, MessageBody=POISON)
    spot = start("spot", "--queue-url", notices.url, "--serving", SERVING, "--heartbeat-s", "1")
    with watched(lambda: len(ready(cluster))) as least:
        began = time.monotonic()
        notices.terminating(ends)
        # Weight 0 for both at once; the budget lets one go, and the other runs on where it is.
        out = until(lambda: not endpoints(cluster) & before, "no new request goes there")
        figures.add("notice until the node's pods get no new request", f"{out:.1f} s")
        until(lambda: spot.metric('spot_evictions_total{result="refused"}') >= 3, "the budget holds one")
        assert cluster.get(Node, ends).spec.unschedulable
        assert len(on(cluster, ends)) == 1
        assert aws.lifecycle_calls("RecordLifecycleActionHeartbeat", ends)
        assert not aws.lifecycle_calls("CompleteLifecycleAction")
        restarted = time.monotonic()
        spot.restart()
        reopen(cluster, other)
        until(lambda: aws.lifecycle_calls("CompleteLifecycleAction", ends), "the instance is let go", 60)
        figures.add(
            "killed while draining: let go after", f"{time.monotonic() - restarted:.1f} s", "12 s of visibility"
        )
        figures.add("notice until let go, with the death", f"{time.monotonic() - began:.1f} s")
        (call,) = aws.lifecycle_calls("CompleteLifecycleAction", ends)
    assert call["LifecycleActionToken"] == token_of(ends)
    assert call["LifecycleActionResult"] == "CONTINUE"
    assert call["LifecycleHookName"] == "drained"
    assert min(least) >= 1  # of two, as the budget says
    assert on(cluster, ends) == []
    assert len(on(cluster, ends, "plugin")) == 1
    assert exists(cluster, Pod, "at-home", namespace=SERVING)
    until(lambda: len(endpoints(cluster)) == 2, "the others serve")
    assert len(on(cluster, other)) == 2

    # Nothing hinders: as fast as pods end.
    cluster.patch(Node, last, {"spec": {"unschedulable": False}})
    began = time.monotonic()
    notices.terminating(other)
    until(lambda: aws.lifecycle_calls("CompleteLifecycleAction", other), "the next is let go")
    figures.add("notice until let go, two pods under a budget of one", f"{time.monotonic() - began:.1f} s")


def test_what_a_budget_holds_beyond_the_notice_is_left_and_unknown_instances_and_poison_are_no_hindrance(
    start: Start, cluster: Client, aws: Door, notices: Queue, instances: list[str]
):
    ends = instances[5]
    ranker_at(cluster, ends)
    spot = start("spot", "--queue-url", notices.url, "--serving", SERVING, "--notice-s", "6")
    notices.terminating("i-0123456789abcdef0")
    until(lambda: aws.lifecycle_calls("CompleteLifecycleAction", "i-0123456789abcdef0"), "an unknown one is let go")
    notices.interrupt(ends)
    until(lambda: spot.metric('spot_instances_total{outcome="left"}') == 1, "the deadline")
    (said,) = spot.logged("deadline passed: what is left ends with its node")
    assert len(said["left"]) == 1
    assert cluster.get(Node, ends).spec.unschedulable
    assert len(on(cluster, ends)) == 1
    assert not aws.lifecycle_calls("CompleteLifecycleAction", ends)
    until(lambda: not notices.held(), "nothing is left in the queue")
    (poison,) = notices.sqs.receive_message(QueueUrl=notices.dead, WaitTimeSeconds=1)["Messages"]
    assert poison["Body"] == POISON
