"""A fault as data: what is done, under which load, for how long, and what must hold meanwhile. Makes nothing itself."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Sequence

from loadtests.drive import MIX, READS, Aim, Drive, Leg
from rankbridge.drills.evidence import Expectation
from rankbridge.drills.scene import Scene

Script = Callable[[Scene, float], Iterator[float]]
"""Does one thing after another and yields the seconds to wait between. The first step begins the fault, what follows
the last wait heals it. The number is how long the fault is to last."""


class Need(enum.StrEnum):
    """What a fault cannot be made without; the value says it to a person."""

    CLOUD = "an object store that the sites follow (`make localstack-install`)"
    RIG = "real tunnels between namespaces (root, and the rig's packages)"
    TUNNELS = "two tunnels between the sites"
    CLOCK = "libfaketime (Debian's `faketime`: make system-tools)"


@dataclasses.dataclass(frozen=True)
class Load:
    """How fast, as shares of what home was measured to answer in time."""

    share: float = 0.5
    at_least: float = 0.0
    """Requests a second, whatever the machine can do."""
    overload: Sequence[tuple[float, float]] = ()
    """(seconds, times home's capacity), one after another while the fault lasts: the load is the fault then."""
    of_peak: bool = False
    """Times the measured peak instead: the most that was ever answered in time, from whatever rung."""
    aws_share: float = 0.0
    """Of the requests, those that enter at aws: reads alone, since events of aws need home."""

    def rate(self, capacity_per_s: float) -> float:
        """Requests a second before and after."""
        return max(self.at_least, self.share * capacity_per_s)


@dataclasses.dataclass(frozen=True)
class Fault:
    """One entry of the catalogue."""

    id: str
    """`F8`, or `F18-retrieval` for one of several forms; `FAULTS=F18` chooses them all."""
    title: str
    how: str
    """How it is made, in a sentence for who reads the table."""
    script: Script | None
    """None: it cannot be had here, and `absent` says why."""
    expects: tuple[Expectation, ...] = ()
    on_rig: tuple[Expectation, ...] = ()
    """What can be expected besides where tunnels are real."""
    load: Load = Load()
    before_s: float = 5.0
    during_s: float = 8.0
    after_s: float = 8.0
    steps_s: float = 0.0
    """What the steps themselves take, on a busy machine; the load lasts so much longer."""
    requests: int = 0
    """So many at the least; the fault lasts longer for them."""
    prepare: Callable[[Scene], None] | None = None
    """What is done before the load begins; the ground undoes it when it is restored."""
    needs: tuple[Need, ...] = ()
    absent: str = ""

    @property
    def number(self) -> str:
        """`F18` of `F18-retrieval`."""
        return self.id.partition("-")[0]

    def lasting(self, capacity_per_s: float) -> Fault:
        """As long as its number of requests takes at this capacity."""
        if self.load.overload:
            return dataclasses.replace(self, during_s=sum(seconds for seconds, _ in self.load.overload))
        wanted = math.ceil(self.requests / self.load.rate(capacity_per_s)) if self.requests else 0.0
        whole = self.before_s + self.during_s + self.after_s
        return dataclasses.replace(self, during_s=self.during_s + max(0.0, wanted - whole))

    def drive(self, home: str, aws: str, capacity_per_s: float, peak_per_s: float, *, seed: int) -> Drive:
        """The load for it, by the gateways' URLs."""
        rate = self.load.rate(capacity_per_s)
        aims = [Aim(url=home, share=1.0 - self.load.aws_share, mix=dict(MIX))]
        if self.load.aws_share:
            aims.append(Aim(url=aws, share=self.load.aws_share, mix=dict(READS)))
        if self.load.overload:
            once = peak_per_s if self.load.of_peak else capacity_per_s
            middle = [Leg(seconds=seconds, rate=times * once) for seconds, times in self.load.overload]
            legs = [Leg(seconds=self.before_s, rate=rate), *middle, Leg(seconds=self.after_s, rate=rate)]
        else:
            whole = self.before_s + self.during_s + self.steps_s + self.after_s
            legs = [Leg(seconds=whole, rate=rate)]
        return Drive(aims=aims, legs=legs, seed=seed)
