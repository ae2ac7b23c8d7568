"""What the operator adds to a committed stack file, made up for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from infra import config, paper, recording, stackfile
from infra.plan import FaultsError

SHA256 = "".join(f"{i:02x}" for i in range(32))
TRUST_ANCHOR = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"

Filled = tuple[dict[str, str], frozenset[str]]


def fill(stack: str, edit: Callable[[dict[str, Any]], None] | None = None) -> Filled:
    """A stack file's values with the operator's share added and `edit` applied to them decoded, and its secret keys."""
    raw = stackfile.values(stack)
    decoded: dict[str, Any] = {k.partition(":")[2]: json.loads(v) if v[:1] in "[{" else v for k, v in raw.items()}
    decoded["k3s"].setdefault("sha256", SHA256)
    if stack != "foundation-local":
        decoded["identity"]["trust_anchor"] = TRUST_ANCHOR
    if edit is not None:
        edit(decoded)
    values = {f"rankbridge:{k}": stackfile.raw(v) for k, v in decoded.items() if not k.startswith("=")}
    secrets: frozenset[str] = frozenset()
    for _ in range(2):
        # The first reading says which secrets are missing; a stack too broken to say keeps none.
        try:
            config.read(stack, values, secrets)
        except FaultsError as error:
            missing = [f.key for f in error.faults if f.value == "nothing" and "--secret" in f.allowed]
            values |= {f"rankbridge:{k}": v for k, v in stackfile.sample_secrets(missing).items()}
            secrets |= {f"rankbridge:{k}" for k in missing}
    return values, secrets


@pytest.fixture
def filled() -> Callable[..., Filled]:
    return fill


_RECORDINGS: dict[tuple[str, bool], recording.Recording] = {}


def recorded(stack: str, *, preview: bool = False) -> recording.Recording:
    """The recorded program of a committed stack; each is run once."""
    key = (stack, preview)
    if key not in _RECORDINGS:
        _RECORDINGS[key] = recording.record(stack, *fill(stack), preview=preview)
    return _RECORDINGS[key]


@pytest.fixture(name="recorded")
def _recorded() -> Callable[..., recording.Recording]:
    return recorded


_APPS: dict[tuple[str, bool], recording.Recording] = {}


def apps_recorded(
    stack: str = "apps-prod",
    *,
    preview: bool = False,
    **sections: Any,  # noqa: ANN401 -- stack values
) -> recording.Recording:
    """The recorded program of an apps stack on its foundation; a committed one is run once."""
    below = recorded(stack.replace("apps", "foundation", 1))
    if sections:
        return paper.record_apps(stack, below, preview=preview, **sections)
    key = (stack, preview)
    if key not in _APPS:
        _APPS[key] = paper.record_apps(stack, below, preview=preview)
    return _APPS[key]


@pytest.fixture(name="apps")
def _apps() -> Callable[..., recording.Recording]:
    return apps_recorded
