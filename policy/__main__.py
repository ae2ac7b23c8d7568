"""The policy pack: every rule of `infra.rules`, mandatory. `pulumi preview --policy-pack policy`.

It runs in an environment of its own (make policy-venv), because pulumi-policy wants another protobuf than the project.
The rules themselves know nothing of this pack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pulumi_policy import (
    EnforcementLevel,
    PolicyPack,
    ResourceValidationArgs,
    ResourceValidationPolicy,
    StackValidationArgs,
    StackValidationPolicy,
)
from pulumi_policy.proxy import UnknownValueError

from infra.rules import UNKNOWN, Context, Resource, Rule, evaluate, foundation, kubernetes

RULES = (*foundation.RULES, *kubernetes.RULES)
ONE = Context(secrets_marked=False, everything=False)
ALL = Context(secrets_marked=False, everything=True)


def seen(value: Any) -> Any:
    """A property as rules see it: plain, and marked where it is not known yet.

    The engine's properties raise when something unknown is touched, and the pack's host takes that for "nothing to
    say": a whole policy would be skipped because of one unknown property that it never asked for.
    """
    if isinstance(value, Mapping):
        return {k: _seen_at(value, k) for k in value}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_seen_at(value, i) for i in range(len(value))]
    return value


def _seen_at(container: Any, key: Any) -> Any:
    try:
        return seen(container[key])
    except UnknownValueError:
        return UNKNOWN


def resource(declared: Any) -> Resource:
    """A resource of the engine as rules see it."""
    return Resource(declared.resource_type, declared.name, seen(declared.props))


def for_resource(rule: Rule) -> Callable[[ResourceValidationArgs, Callable[[str], None]], None]:
    """A rule on one resource."""

    def validate(args: ResourceValidationArgs, report: Callable[[str], None]) -> None:
        for violation in evaluate([rule], [resource(args)], ONE):
            report(violation.message)

    return validate


def for_stack(rule: Rule) -> Callable[[StackValidationArgs, Callable[..., None]], None]:
    """A rule on all resources together."""

    def validate(args: StackValidationArgs, report: Callable[..., None]) -> None:
        by_name = {(r.resource_type, r.name): r.urn for r in args.resources}
        for violation in evaluate([rule], [resource(r) for r in args.resources], ALL):
            report(violation.message, by_name.get((violation.type, violation.name)))

    return validate


def policies() -> list[Any]:
    """Every rule as a policy."""
    made: list[Any] = []
    for rule in RULES:
        if rule.check is not None:
            made.append(ResourceValidationPolicy(rule.name, rule.description, for_resource(rule)))
        if rule.check_all is not None:
            made.append(StackValidationPolicy(rule.name, rule.description, for_stack(rule)))
    return made


if __name__ == "__main__":
    PolicyPack("rankbridge", policies(), EnforcementLevel.MANDATORY)
