"""What AWS says about instances and their groups: one door, its records, and its fake. Knows no client of AWS."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol

TERMINATED: Final = "terminated"
ALIVE: Final = frozenset({"pending", "running"})


class CloudFault(Exception):  # noqa: N818 - a fault of somebody else, as everywhere here
    """AWS did not answer, refused, or answered in part; the message says what was asked and what came back."""


@dataclasses.dataclass(frozen=True)
class Group:
    """An Auto Scaling group as it is now."""

    desired: int
    in_service: frozenset[str] = frozenset()
    """Instances that it counts on."""
    others: frozenset[str] = frozenset()
    """Instances that come, go, stand by or are warm."""

    @property
    def instances(self) -> frozenset[str]:
        """All that it holds."""
        return self.in_service | self.others


class Cloud(Protocol):
    """EC2 and Auto Scaling of one region; both methods raise CloudFault unless the answer is whole."""

    def groups(self, names: Sequence[str]) -> Mapping[str, Group]:
        """Those of the named groups that exist."""
        ...

    def instances(self, ids: Collection[str]) -> Mapping[str, str]:
        """State by id (`pending`, `running`, `terminated`, ...); ids that EC2 does not know are left out.

        EC2 forgets a terminated instance within about an hour.
        """
        ...


class MemoryCloud:
    """AWS in memory; `fault` makes every call fail."""

    def __init__(self, groups: Mapping[str, Group], states: Mapping[str, str]) -> None:
        self.held = dict(groups)
        self.states = dict(states)
        self.fault = ""

    def groups(self, names: Sequence[str]) -> Mapping[str, Group]:
        """See Cloud."""
        self._asked()
        return {name: self.held[name] for name in names if name in self.held}

    def instances(self, ids: Collection[str]) -> Mapping[str, str]:
        """See Cloud."""
        self._asked()
        return {one: self.states[one] for one in ids if one in self.states}

    def _asked(self) -> None:
        if self.fault:
            raise CloudFault(self.fault)
