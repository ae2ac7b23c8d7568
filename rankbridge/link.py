"""The way between the two sites as a fault sees it: cut it, slow it, heal it.

Two forms keep this door: the tunnels of the network-namespace rig, and a TCP relay where nobody is root. It does not
know what travels on the link, nor who judges what becomes of it.
"""

from __future__ import annotations

import dataclasses
import enum
import random
from collections.abc import Sequence
from typing import Protocol


class Direction(enum.StrEnum):
    """Which packets a fault meets."""

    BOTH = "both"
    TO_CLOUD = "to-cloud"
    FROM_CLOUD = "from-cloud"


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a link does to what passes. The default does nothing."""

    delay_ms: float = 0.0
    """One way."""
    jitter_ms: float = 0.0
    """Uniform, plus or minus."""
    loss: float = 0.0
    """Share of packets, 0 to 1; a TCP relay resets connections instead."""
    rate_mbit: float | None = None
    largest: int | None = None
    """Packets of more bytes than this vanish without a word: an MTU hole. A TCP relay knows no packets."""
    cut: bool = False
    direction: Direction = Direction.BOTH

    def toward(self, direction: Direction) -> Shape:
        """What it does to packets that go one way."""
        return self if self.direction in {Direction.BOTH, direction} else Shape()

    def occupies_s(self, size: int) -> float:
        """For so long `size` bytes keep the wire; 0 where it has no rate."""
        return 0.0 if self.rate_mbit is None else size * 8 / (self.rate_mbit * 1e6)

    def late_s(self, chance: random.Random) -> float:
        """So much later than it left something arrives."""
        return max(0.0, self.delay_ms + self.jitter_ms * chance.uniform(-1, 1)) / 1000


class Link(Protocol):
    """Both tunnels of the sites' VPN, numbered from 1; the relay of the rootless form has as many."""

    @property
    def tunnels(self) -> Sequence[int]:
        """Their numbers."""
        ...

    def shape(self, shape: Shape, tunnel: int | None = None) -> None:
        """From now on one tunnel, or all, does this; an earlier shape of it is forgotten."""
        ...

    def heal(self) -> None:
        """Every tunnel does nothing to what passes any more."""
        ...


class FakeLink:
    """Remembers what it was told."""

    def __init__(self, tunnels: Sequence[int] = (1, 2)) -> None:
        self.tunnels = tunnels
        self.told: list[tuple[Shape | None, int | None]] = []

    def shape(self, shape: Shape, tunnel: int | None = None) -> None:
        """See `Link`."""
        self.told.append((shape, tunnel))

    def heal(self) -> None:
        """See `Link`."""
        self.told.append((None, None))
