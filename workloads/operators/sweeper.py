"""One round of node hygiene: look, decide, remove, and say what was done. Knows when nothing: a loop calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge

from workloads.contract.operators import NODE_PASSWORD_NAMESPACE, NODE_PASSWORD_SUFFIX
from workloads.operators.cloud import Cloud, CloudFault
from workloads.operators.cluster import Cluster, ClusterFault
from workloads.operators.hygiene import NOTHING_SEEN, Deletion, Limits, Round, decide, instances_to_ask
from workloads.telemetry import log

_logger = log.get(component="hygiene")


class Sweeper:
    """Rounds over one site's groups in one region, and their memory."""

    def __init__(
        self,
        cluster: Cluster,
        cloud: Cloud,
        *,
        site: str,
        region: str,
        groups: Sequence[str],
        limits: Limits,
        clock: Callable[[], float],
        registry: CollectorRegistry,
    ) -> None:
        self._cluster = cluster
        self._cloud = cloud
        self._site = site
        self._region = region
        self._groups = tuple(groups)
        self._limits = limits
        self._clock = clock
        self._history = NOTHING_SEEN
        self._fault = ""
        self._rounds = Counter("rankbridge_hygiene_rounds", "Rounds by how they ended", ("result",), registry=registry)
        for result in ("done", "held", "cloud-fault", "cluster-fault"):
            self._rounds.labels(result)
        self._removed = Counter("rankbridge_hygiene_nodes_removed", "Nodes removed", registry=registry)
        self._ours = Gauge("rankbridge_hygiene_nodes", "Nodes of the site that are EC2 instances", registry=registry)
        self._waiting = Gauge(
            "rankbridge_hygiene_nodes_gone",
            "Nodes whose instance seems gone and that are still there",
            registry=registry,
        )

    def round(self) -> str:
        """Look once and remove what may go; why the round was not whole, or empty."""
        try:
            fault, result = self._round()
        except CloudFault as error:
            fault, result = str(error), "cloud-fault"
        except ClusterFault as error:
            fault, result = str(error), "cluster-fault"
        if fault:
            self._history = NOTHING_SEEN  # rounds agree on end, or they do not agree
        if fault != self._fault:
            if fault:
                _logger.warning("nothing is removed", reason=fault, result=result)
            else:
                _logger.info("rounds are whole again", before=self._fault)
        self._fault = fault
        self._rounds.labels(result).inc()
        return fault

    def _round(self) -> tuple[str, str]:
        nodes = self._cluster.nodes()
        groups = self._cloud.groups(self._groups)
        asked = instances_to_ask(nodes, groups, site=self._site, region=self._region)
        states = self._cloud.instances(asked) if asked else {}
        seen = Round(self._site, self._region, nodes, self._groups, groups, states)
        decision = decide(seen, self._history, self._clock(), self._limits)
        self._history = decision.history
        self._ours.set(decision.ours)
        if decision.hold:
            return decision.hold, "held"
        self._waiting.set(len(decision.history))
        for deletion in decision.deletions:
            self._remove(deletion)
        return "", "done"

    def _remove(self, deletion: Deletion) -> None:
        # The password first: when this fails the Node is still there to remind us of it.
        self._cluster.remove_secret(NODE_PASSWORD_NAMESPACE, deletion.node + NODE_PASSWORD_SUFFIX)
        self._cluster.remove_node(deletion.node)
        self._removed.inc()
        _logger.info("node removed", node=deletion.node, instance=deletion.instance, reason=deletion.reason)
