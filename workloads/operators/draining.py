"""Emptying nodes whose end was announced: what is done for each notice, step by step, until its deadline.

A step looks at the cluster afresh and does what is missing, so that a handler that died goes on where it was, from the
same messages. An interruption and a lifecycle action empty the node: its pods get weight 0, it is cordoned, and pods
are evicted as disruption budgets allow. A rebalance recommendation only cordons: its group starts the replacement first
and then ends the instance by a lifecycle action of its own. What is left at the deadline is left to the node's end.
Knows neither Kubernetes nor AWS but by their doors.
"""

from __future__ import annotations

import dataclasses
import functools
import queue
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from workloads.operators.cloud import CloudFault
from workloads.operators.cluster import Cluster, ClusterFault, DeniedFault, Eviction, Node, Pod
from workloads.operators.hygiene import ours
from workloads.operators.notices import Hook, Hooks, Kind, Message, Notice, Notices, PoisonError, read
from workloads.operators.router import Router
from workloads.telemetry import log

HOLD_S: Final = 12
"""How long nobody else gets a message that is being worked on: about the time that a death of the handler costs."""
HOLD_EVERY_S: Final = 3.0
SECONDS_MIN: Final = 1
"""The least time that a pod gets to end: 0 would tear it from the node's record before it has."""

_logger = log.get(component="spot")


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that a node has. Raises ValueError when one is not positive."""

    notice_s: float = 120.0
    """From an interruption notice until EC2 takes the instance."""
    drain_s: float = 600.0
    """From a lifecycle action until we let the instance go, drained or not."""
    heartbeat_s: float = 60.0
    """Between two heartbeats of a lifecycle action; well within the hook's own time."""
    insist_s: float = 300.0
    """After the deadline: how long AWS is asked to take our answer before the message goes back to the queue."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} must be positive")


@dataclasses.dataclass
class _Work:
    """All that is known about one instance that ends."""

    instance: str
    began: float
    deadline: float
    messages: dict[str, tuple[Message, Notice]] = dataclasses.field(default_factory=dict)
    beaten: float = 0.0
    held: float = 0.0
    said: set[str] = dataclasses.field(default_factory=set)
    """Faults that stand in the log: they come back each second."""
    withdrawn: int = 0
    evicted: int = 0
    outcome: str = ""
    """Set when the node is dealt with and only AWS's word is missing."""

    @property
    def notices(self) -> list[Notice]:
        return [notice for _, notice in self.messages.values()]

    @property
    def hooks(self) -> list[Hook]:
        return [notice.hook for notice in self.notices if notice.hook is not None]

    @property
    def empties(self) -> bool:
        return any(notice.kind is not Kind.REBALANCE for notice in self.notices)


class Handler:
    """The notices under way. `offer` may be called from another thread than `step`."""

    def __init__(
        self,
        cluster: Cluster,
        router: Router,
        notices: Notices,
        hooks: Hooks,
        *,
        site: str,
        region: str,
        times: Times,
        clock: Callable[[], float],
        registry: CollectorRegistry,
    ) -> None:
        self._cluster = cluster
        self._router = router
        self._queue = notices
        self._hooks = hooks
        self._site = site
        self._region = region
        self._times = times
        self._clock = clock
        self._offered: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._work: dict[str, _Work] = {}
        self._metrics = _Metrics(registry)

    @property
    def busy(self) -> bool:
        """Whether there is something to step for."""
        return bool(self._work) or not self._offered.empty()

    def offer(self, messages: Sequence[Message]) -> None:
        """Take these on at the next step."""
        for message in messages:
            self._offered.put(message)

    def step(self) -> str:
        """Do for each instance what can be done now; what is wrong with the cluster, or empty."""
        now = self._clock()
        while not self._offered.empty():
            self._take(self._offered.get(), now)
        self._metrics.active.set(len(self._work))
        try:
            nodes: Mapping[str, Node] | ClusterFault = ours(self._cluster.nodes(), site=self._site, region=self._region)
            fault = ""
        except ClusterFault as error:
            nodes, fault = error, str(error)
        for work in list(self._work.values()):
            self._hold(work, now)
            if not work.outcome:
                try:
                    work.outcome = self._empty(work, nodes, now)
                except ClusterFault as error:
                    fault = str(error)
                    work.outcome = self._unreached(work, fault, now)
            if work.outcome:
                self._finish(work, now)
            else:
                self._beat(work, now)
        self._metrics.active.set(len(self._work))
        return fault

    def _take(self, message: Message, now: float) -> None:
        try:
            notice = read(message.body)
        except PoisonError as error:
            # Left to the queue, which gives it to others a few times and then puts it aside for a person.
            self._metrics.poison.inc()
            _logger.error("message is no notice", message=message.id, received=message.received, fault=str(error))
            return
        self._metrics.notices.labels(notice.kind.label).inc()
        allowed = self._times.drain_s if notice.kind is Kind.TERMINATING else self._times.notice_s
        deadline = min(notice.at, now) + allowed  # a clock of ours that is behind AWS's gives no more time
        work = self._work.get(notice.instance)
        if work is None:
            work = self._work[notice.instance] = _Work(notice.instance, now, deadline)
        elif notice.kind is not Kind.REBALANCE:
            work.deadline = min(work.deadline, deadline) if work.empties else deadline
        work.messages[message.id] = (message, notice)
        work.held = now
        if notice.hook is not None:
            work.beaten = now
        _logger.info(
            "notice", kind=notice.kind.label, instance=notice.instance, seconds_left=round(work.deadline - now, 1)
        )

    def _empty(self, work: _Work, nodes: Mapping[str, Node] | ClusterFault, now: float) -> str:
        """One step with the node; the outcome when there is nothing more to do. Raises ClusterFault."""
        if isinstance(nodes, ClusterFault):
            raise nodes
        node = nodes.get(work.instance)
        if node is None:
            return "unknown"
        if not work.empties:
            self._cordon(node)
            return "cordoned"
        pods = [pod for pod in self._cluster.pods(node.name) if not pod.stays]
        work.withdrawn += self._unless_denied(work, functools.partial(self._router.withdraw, pods))
        self._unless_denied(work, functools.partial(self._cordon, node))
        if not pods:
            return "drained"
        for pod in pods:
            if not pod.leaving:
                evict = functools.partial(self._evict, pod, work.deadline - now)
                work.evicted += self._unless_denied(work, evict)
        if now < work.deadline:
            return ""
        self._metrics.left.inc(len(pods))
        _logger.warning(
            "deadline passed: what is left ends with its node",
            node=node.name,
            leaving=[pod.title for pod in pods if pod.leaving],
            left=[pod.title for pod in pods if not pod.leaving],
        )
        return "left"

    @staticmethod
    def _unless_denied(work: _Work, act: Callable[[], int]) -> int:
        """What was done, or 0 when the API server will not: there is no time to stop at one thing of many."""
        try:
            return act()
        except DeniedFault as error:
            if str(error) not in work.said:
                work.said.add(str(error))
                _logger.error("denied, and gone on without", instance=work.instance, fault=str(error))
            return 0

    def _cordon(self, node: Node) -> int:
        if node.unschedulable:
            return 0
        self._cluster.cordon(node.name)
        return 1

    def _evict(self, pod: Pod, left_s: float) -> int:
        shorter = max(int(left_s), SECONDS_MIN)
        result = self._cluster.evict(pod.namespace, pod.name, shorter if shorter < pod.grace_s else None)
        self._metrics.evictions.labels(result).inc()
        return int(result is Eviction.ACCEPTED)

    def _unreached(self, work: _Work, fault: str, now: float) -> str:
        if now < work.deadline:
            return ""
        _logger.error("deadline passed and the cluster was not reached", instance=work.instance, fault=fault)
        return "unreached"

    def _hold(self, work: _Work, now: float) -> None:
        if now - work.held < HOLD_EVERY_S:
            return
        work.held = now
        for message, _ in work.messages.values():
            try:
                self._queue.hold(message, HOLD_S)
            except CloudFault as error:
                _logger.warning("message not held: it may be delivered again", message=message.id, fault=str(error))

    def _beat(self, work: _Work, now: float) -> None:
        if not work.hooks or now - work.beaten < self._times.heartbeat_s:
            return
        work.beaten = now
        for hook in work.hooks:
            try:
                self._hooks.beat(work.instance, hook)
            except CloudFault as error:
                _logger.warning("no heartbeat", instance=work.instance, hook=hook.name, fault=str(error))

    def _finish(self, work: _Work, now: float) -> None:
        """Let the instance go, and forget it once AWS has taken our word."""
        try:
            for hook in work.hooks:
                self._hooks.complete(work.instance, hook)
            for message, _ in list(work.messages.values()):
                self._queue.done(message)
                del work.messages[message.id]
        except CloudFault as error:
            if now < work.deadline + self._times.insist_s:
                if str(error) not in work.said:
                    work.said.add(str(error))
                    _logger.warning("not let go yet", instance=work.instance, fault=str(error))
                return
            _logger.error("given up: the message goes back to its queue", instance=work.instance, fault=str(error))
            work.outcome = "given-up"
        del self._work[work.instance]
        self._metrics.nodes.labels(work.outcome).inc()
        self._metrics.seconds.observe(now - work.began)
        _logger.info(
            "instance dealt with",
            instance=work.instance,
            outcome=work.outcome,
            withdrawn=work.withdrawn,
            evicted=work.evicted,
            seconds=round(now - work.began, 1),
        )


class _Metrics:
    """What the handler counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.notices = Counter("rankbridge_spot_notices", "Notices by kind", ("kind",), registry=registry)
        self.poison = Counter("rankbridge_spot_poison", "Deliveries of messages that are no notice", registry=registry)
        self.nodes = Counter(
            "rankbridge_spot_instances", "Instances dealt with, by what became of them", ("outcome",), registry=registry
        )
        self.evictions = Counter("rankbridge_spot_evictions", "Evictions by answer", ("result",), registry=registry)
        self.left = Counter("rankbridge_spot_pods_left", "Pods that were left to their node's end", registry=registry)
        self.active = Gauge("rankbridge_spot_active", "Instances being dealt with", registry=registry)
        self.seconds = Histogram(
            "rankbridge_spot_seconds",
            "From the notice's receipt until the instance was let go",
            registry=registry,
            buckets=(1, 2, 5, 10, 20, 30, 60, 90, 120, 180, 300, 600),
        )
        for kind in Kind:
            self.notices.labels(kind.label)
        for result in Eviction:
            self.evictions.labels(result)
        for outcome in ("drained", "left", "cordoned", "unknown", "unreached", "given-up"):
            self.nodes.labels(outcome)
