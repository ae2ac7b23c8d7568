"""What every declared resource must hold to, as functions on plain records.

The same rules run on the recorded program in unit tests, on `pulumi preview --json` (`infra.rules.preview`), and as a
policy pack (`policy/`). A rule sees property names as the engine does, in camelCase. Imports no Pulumi.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final


class Marker(enum.Enum):
    """A value that a rule may not or cannot see."""

    UNKNOWN = "unknown until created"
    SECRET = "secret"  # noqa: S105 -- says that it is one


Value = object
"""JSON values, or a Marker in their place."""


@dataclasses.dataclass(frozen=True)
class Resource:
    """A resource as it is declared: its engine type, its logical name and its inputs."""

    type: str
    name: str
    inputs: Mapping[str, Value]

    def get(self, *path: str | int) -> Value:
        """The value at a path; None where there is nothing, UNKNOWN below something unknown."""
        value: Value = self.inputs
        for step in path:
            if value is Marker.UNKNOWN:
                return value
            if isinstance(value, Mapping) and isinstance(step, str):
                value = value.get(step)
            elif isinstance(value, Sequence) and not isinstance(value, str) and isinstance(step, int):
                value = value[step] if -len(value) <= step < len(value) else None
            else:
                return None
        return value

    def sequence(self, *path: str | int) -> Sequence[Value]:
        """The list at a path, empty where there is none."""
        value = self.get(*path)
        return value if isinstance(value, list | tuple) else ()


@dataclasses.dataclass(frozen=True)
class Violation:
    """A rule that a resource breaks, and what to do about it."""

    rule: str
    type: str
    name: str
    message: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.rule}: {self.type} {self.name}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Context:
    """What a rule may count on. A policy pack sees secrets in the clear, so it cannot tell that they are ones."""

    secrets_marked: bool = True
    everything: bool = True
    """Whether all resources of the stack are in sight, so that a missing one is one."""


Check = Callable[[Resource, Context], Iterator[str]]
CheckAll = Callable[[Sequence[Resource], Context], Iterator[tuple[Resource, str]]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A named rule on single resources (`check`) or on the stack as a whole (`check_all`)."""

    name: str
    description: str
    types: frozenset[str] = frozenset()
    check: Check | None = None
    check_all: CheckAll | None = None


def evaluate(rules: Iterable[Rule], resources: Sequence[Resource], context: Context | None = None) -> list[Violation]:
    """Every violation of the rules by the resources, in the order of the rules."""
    context = context or Context()
    found = []
    for rule in rules:
        if rule.check is not None:
            for resource in resources:
                if not rule.types or resource.type in rule.types:
                    found += [
                        Violation(rule.name, resource.type, resource.name, m) for m in rule.check(resource, context)
                    ]
        if rule.check_all is not None and context.everything:
            found += [Violation(rule.name, r.type, r.name, m) for r, m in rule.check_all(resources, context)]
    return found


UNKNOWN: Final = Marker.UNKNOWN
SECRET: Final = Marker.SECRET
