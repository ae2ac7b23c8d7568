"""Judges a `pulumi preview --json`: `pulumi preview --json --show-sames | python -m infra.rules.preview`.

Without `--show-sames` the engine leaves out what does not change, and rules about several resources would judge a part.

Exit code 0 when every resource holds to every rule, 1 with one line for each that does not (or when there is none),
2 for input that is no preview.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from infra.rules import SECRET, UNKNOWN, Resource, Value, evaluate, foundation, kubernetes

RULES: Final = (*foundation.RULES, *kubernetes.RULES)
_UNKNOWN: Final = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
_SIGNATURE: Final = "4dabf18193072939515e22adb298388d"
_GONE: Final = frozenset({"delete", "delete-replaced", "discard", "discard-replaced", "read-discard"})


def resources(document: Mapping[str, Any]) -> list[Resource]:
    """Resources that will exist after the previewed update, without components, providers and the stack itself."""
    found = {}
    for step in document["steps"]:
        state = step.get("newState")
        if step["op"] in _GONE or not state or not state.get("custom") or state["type"].startswith("pulumi:"):
            continue
        # A replacement shows as several steps of one resource.
        found[state["urn"]] = Resource(
            state["type"],
            state["urn"].rpartition("::")[2],
            {k: _value(v) for k, v in (state.get("inputs") or {}).items() if not k.startswith("__")},
        )
    return list(found.values())


def unseen(document: Mapping[str, Any]) -> int:
    """How many unchanged resources the engine counted and did not print."""
    counted = int((document.get("changeSummary") or {}).get("same", 0))
    printed = [step for step in document["steps"] if step["op"] == "same"]
    return max(0, counted - len(printed))


def _value(value: Any) -> Value:  # noqa: ANN401 -- JSON
    if value == _UNKNOWN:
        return UNKNOWN
    if value == "[secret]" or (isinstance(value, dict) and _SIGNATURE in value):
        return SECRET
    if isinstance(value, dict):
        return {k: _value(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_value(v) for v in value]
    return value


def main(arguments: Sequence[str]) -> int:
    """Read a preview from the file named, or from standard input."""
    try:
        document = json.loads(Path(arguments[0]).read_text() if arguments else sys.stdin.read())
        declared, left_out = resources(document), unseen(document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.stderr.write(f"no `pulumi preview --json` document: {type(error).__name__}\n")
        return 2
    if left_out:
        sys.stderr.write(f"{left_out} unchanged resources are left out: run pulumi preview --json --show-sames\n")
        return 2
    violations = evaluate(RULES, declared)
    for violation in violations:
        sys.stdout.write(f"{violation}\n")
    sys.stdout.write(f"{len(declared)} resources, {len(violations)} violation(s) of {len(RULES)} rules\n")
    return 1 if violations or not declared else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
