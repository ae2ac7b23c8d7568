"""Which Nodes may go: a pure decision from what the cluster and the cloud say now, and what they said before.

A Node that stays too long costs little: nothing is scheduled to it. A Node that goes while its instance lives costs its
pods. So every doubt ends in no deletion at all, and says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

from workloads.operators.cloud import ALIVE, TERMINATED, Group
from workloads.operators.cluster import Node, instance_of


@dataclasses.dataclass(frozen=True)
class Limits:
    """How sure is sure. Raises ValueError for numbers that would remove a node on one look or never."""

    rounds: int = 4
    """Rounds on end that must agree."""
    unknown_s: float = 900.0
    """How long EC2 must not know an instance, whose node is not ready, before it counts as gone."""
    per_round: int = 2
    """Deletions in one round at most."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.rounds < 2:
            raise ValueError(f"{self.rounds} rounds: at least two must agree before a node is removed")
        if self.unknown_s < 60:
            raise ValueError(f"{self.unknown_s:g} s: an instance must be unknown for at least a minute")
        if self.per_round < 1:
            raise ValueError(f"{self.per_round} deletions a round: nothing would ever be removed")


@dataclasses.dataclass(frozen=True)
class Round:
    """What was seen in one round."""

    site: str
    region: str
    nodes: Sequence[Node]
    asked: Sequence[str]
    """Names of the groups that were asked for."""
    groups: Mapping[str, Group]
    states: Mapping[str, str]
    """Instance id to state, for each of `instances_to_ask` that EC2 knows."""


@dataclasses.dataclass(frozen=True)
class Gone:
    """For how long a node's instance has been seen as gone, without a break and in the same way."""

    instance: str
    terminated: bool
    """EC2 says so; else EC2 does not know it."""
    rounds: int
    since: float


History = Mapping[str, Gone]
"""By node name. Starts empty, and starts again after every round that was held."""
NOTHING_SEEN: Final[History] = {}


@dataclasses.dataclass(frozen=True)
class Deletion:
    """One node to remove, and why."""

    node: str
    instance: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do after a round, and what to remember for the next."""

    deletions: tuple[Deletion, ...]
    history: History
    hold: str = ""
    """Why the round removes nothing, whatever else was seen."""
    ours: int = 0
    """Nodes of our site that are EC2 instances."""


def ours(nodes: Sequence[Node], *, site: str, region: str) -> dict[str, Node]:
    """Instance id -> Node, for each node that is certainly an instance of our site."""
    named = ((instance_of(node, site=site, region=region), node) for node in nodes)
    return {instance: node for instance, node in named if instance is not None}


def instances_to_ask(nodes: Sequence[Node], groups: Mapping[str, Group], *, site: str, region: str) -> set[str]:
    """Whose state to ask EC2 for: our nodes', and the groups' own, by which the answer itself is judged."""
    return set(ours(nodes, site=site, region=region)).union(*(group.instances for group in groups.values()))


def decide(seen: Round, history: History, now: float, limits: Limits) -> Decision:
    """The nodes that may go now. `now` is a monotonic clock in seconds, the same as in the rounds before."""
    mine = ours(seen.nodes, site=seen.site, region=seen.region)
    if hold := _doubt(seen):
        return Decision((), NOTHING_SEEN, hold, len(mine))
    held = frozenset[str]().union(*(group.instances for group in seen.groups.values()))
    remembered: dict[str, Gone] = {}
    for instance, node in mine.items():
        terminated = _is_gone(node, seen.states.get(instance), is_held=instance in held)
        if terminated is None:
            continue
        before = history.get(node.name)
        if before is None or (before.instance, before.terminated) != (instance, terminated):
            before = Gone(instance, terminated, 0, now)
        remembered[node.name] = dataclasses.replace(before, rounds=before.rounds + 1)
    sure = sorted(
        (gone.since, name)
        for name, gone in remembered.items()
        if gone.rounds >= limits.rounds and (gone.terminated or now - gone.since >= limits.unknown_s)
    )
    deletions = tuple(_deletion(name, remembered[name], now) for _, name in sure[: limits.per_round])
    return Decision(deletions, remembered, ours=len(mine))


def _doubt(seen: Round) -> str:
    """Why this round's answer is not to be acted on; empty for none."""
    missing = sorted(set(seen.asked) - set(seen.groups))
    if missing or not seen.asked:
        return f"the answer lacks the group {', '.join(missing) or '(none was asked for)'}"
    counted_on = frozenset[str]().union(*(group.in_service for group in seen.groups.values()))
    unknown = sorted(counted_on - set(seen.states))
    if unknown:
        return f"EC2 does not know {unknown[0]}, which its group counts on: the answer is not whole"
    wanted = sum(group.desired for group in seen.groups.values())
    if wanted > 0 and not any(state in ALIVE for state in seen.states.values()):
        return f"no instance is alive while the groups want {wanted}: not everything ends at once"
    return ""


def _is_gone(node: Node, state: str | None, *, is_held: bool) -> bool | None:
    """True when EC2 says terminated, False when it does not know the instance and nor does anybody else, else None."""
    if state == TERMINATED:
        return True
    if state is None and not node.ready and not is_held:
        return False
    return None


def _deletion(name: str, gone: Gone, now: float) -> Deletion:
    said = "EC2 says terminated" if gone.terminated else "unknown to EC2 and not ready"
    return Deletion(name, gone.instance, f"{said}, {gone.rounds} rounds and {now - gone.since:.0f} s on end")
