"""Reads a stack file into the raw values that the program would be given, without the Pulumi CLI.

Used by tests, by the recorded program and by the emulator's start, which needs the same values the CLI would pass on.
Secrets are never in the committed stack files; `sample_secrets` makes throw-away ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import yaml

STACKS: Final = Path(__file__).parent / "stacks"


def values(stack: str, directory: Path = STACKS) -> dict[str, str]:
    """`namespace:key` -> string for a stack, structured values as JSON, as Pulumi hands them to a program."""
    document = yaml.safe_load((directory / f"Pulumi.{stack}.yaml").read_text())
    return {key: raw(value) for key, value in document["config"].items()}


def raw(value: object) -> str:
    """One configuration value as the program receives it."""
    return value if isinstance(value, str) else json.dumps(value)


def structured(values: Mapping[str, str], key: str) -> object:
    """A structured value, for a caller that changes a part of it."""
    return json.loads(values[key])


def sample_secrets(keys: Iterable[str]) -> dict[str, str]:
    """A well-formed throw-away value for each secret: made from its name, so worthless, and the same each time."""
    return {key: _sample(key) for key in keys}


def _sample(key: str) -> str:
    digest = hashlib.sha256(f"throw-away {key}".encode()).hexdigest()
    if key == "ssh-private-key":
        return f"-----BEGIN OPENSSH PRIVATE KEY-----\n{digest}\n-----END OPENSSH PRIVATE KEY-----\n"
    return f"x{digest[:47]}"
