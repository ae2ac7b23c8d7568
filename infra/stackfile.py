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


def with_images(text: str, images: Mapping[str, str], key: str = "rankbridge:images") -> str:
    """A stack file's text with these image references set, and not a byte of anything else changed.

    Comments and order stay; a new name goes behind the last one. Raises ValueError on a text that is no stack file.
    """
    found = yaml.compose(text, Loader=yaml.SafeLoader)
    config = _child(found, "config") if isinstance(found, yaml.MappingNode) else None
    if not isinstance(config, yaml.MappingNode) or not config.value:
        raise ValueError("it has no mapping `config`")
    section = _child(config, key)
    if section is not None and not (isinstance(section, yaml.MappingNode) or section.value == ""):
        raise ValueError(f"{key} is no mapping")
    entries = section.value if isinstance(section, yaml.MappingNode) else []
    places = {name.value: value for name, value in entries}
    block = isinstance(section, yaml.MappingNode) and not section.flow_style
    margin = config.value[0][0].start_mark.column
    if block and entries:
        margin = entries[0][0].start_mark.column
        edits = [
            (v.start_mark.index, v.end_mark.index, images[n] if v.value else f" {images[n]}")
            for n, v in places.items()
            if n in images
        ]
        new = "".join(f"\n{' ' * margin}{name}: {value}" for name, value in images.items() if name not in places)
        end = _end(text, entries[-1][1])
        edits.append((end, end, new))
    else:
        # absent, empty or in one line: written as a block, with what it held
        held = {name: value.value for name, value in places.items()} | dict(images)
        lines = "".join(f"\n{' ' * (margin + 2)}{name}: {value}" for name, value in held.items())
        if section is None:
            end = _end(text, config.value[-1][1])
            edits = [(end, end, f"\n{' ' * margin}{key}:{lines}")]
        else:
            edits = [(section.start_mark.index, section.end_mark.index, lines)]
    for begin, end, value in sorted(edits, reverse=True):
        text = text[:begin] + value + text[end:]
    return text


def _child(mapping: yaml.MappingNode, key: str) -> yaml.Node | None:
    return next((value for name, value in mapping.value if name.value == key), None)


def _end(text: str, node: yaml.Node) -> int:
    """Where the line of a node's last character ends; a comment behind it belongs to it."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(node, yaml.MappingNode) else last
    end: int = node.end_mark.index
    if end and text[end - 1] == "\n":  # a block scalar ends behind its last line
        return end - 1
    found = text.find("\n", end)
    return len(text) if found < 0 else found
