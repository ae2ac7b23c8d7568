"""Faults that a rehearsal may plant, as desk and agent read them from `--inject`. Knows not how they are planted."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Final

_INJECTION: Final = re.compile(r"ranker-delay=(\d+(?:\.\d+)?)ms")
DELAY_MAX_MS: Final = 10_000.0


@dataclasses.dataclass(frozen=True)
class Injection:
    """Faults planted for a rehearsal."""

    ranker_delay_ms: float = 0.0
    """Slept by the ranker before each batch."""


NOTHING_INJECTED: Final = Injection()


def parse_injections(texts: Sequence[str]) -> Injection:
    """`["ranker-delay=80ms"]` as an Injection. Raises ValueError that names the fault and what is known."""
    delay = 0.0
    for text in texts:
        match = _INJECTION.fullmatch(text)
        if match is None:
            raise ValueError(f"unknown injection {text!r}; known is ranker-delay=<milliseconds>ms (ranker-delay=80ms)")
        delay = float(match[1])
        if not 0 < delay <= DELAY_MAX_MS:
            raise ValueError(f"{text!r}: the delay must be above 0 and at most {DELAY_MAX_MS:.0f} ms")
    return Injection(ranker_delay_ms=delay)
