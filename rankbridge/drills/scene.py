"""What a fault may do to the running sites: the one door of every drill, and its fake.

A fault is a script over this door. It knows no process ids and no addresses; `rankbridge.drills.sites` does.
"""

from __future__ import annotations

import enum
from typing import Final, Protocol

from rankbridge.link import FakeLink, Link
from rankbridge.roles import Role
from workloads.contract.sites import SiteName


class StoreFault(enum.StrEnum):
    """What the object store does to who asks it."""

    NONE = "none"
    ERROR_500 = "500"
    ERROR_503 = "503"
    SLOW = "slow"
    RESET = "reset"
    EXPIRED = "expired"
    """403: the credentials have expired."""


class BadBundle(enum.StrEnum):
    """What is wrong with a bundle that gets published."""

    SIGNATURE = "signature"
    TRUNCATED = "truncated"
    SHAPE = "shape"
    NAN = "nan"
    SLOW = "slow"


OWN_CLOCK: Final = "own clock"
"""Where processes have the clock that they were given, a fact of the row: `IN_ALL` where nothing is amiss."""
IN_ALL: Final = "in all processes"
OFF: Final = "clock off"
"""How far it was from the machine's, each time that it was set, a fact of the row: `HOURS` as it should be."""
HOURS: Final = "+1 h, -1 h, +0 h"


RESOLVED: Final = "names resolved"
"""At which sites a name has an address, a fact of the row: `NOWHERE` where there is no DNS."""
NOWHERE: Final = "nowhere"


class Scene(Protocol):
    """Both sites under load. What is done here is undone by `restore`, whatever a script forgot."""

    @property
    def link(self) -> Link:
        """The way between the sites."""
        ...

    def kill(self, role: Role, site: SiteName) -> None:
        """SIGKILL a process and its children: no last word, no clean end."""

    def bring_back(self) -> None:
        """Start what is missing, and wait until all is ready."""

    def freeze(self, role: Role, site: SiteName) -> None:
        """SIGSTOP a process and its children: connections stay open, nothing is answered."""

    def thaw(self, role: Role, site: SiteName) -> None:
        """SIGCONT."""

    def slow_down(self, role: Role, site: SiteName, times: float) -> None:
        """Let it run one part of `times` of the time, in slices of some milliseconds, until `thaw`."""

    def hide_profiles(self, *, hidden: bool) -> None:
        """Take the feature store's table away from who reads it, or bring it back."""

    def store(self, fault: StoreFault) -> None:
        """From now on the object store does this."""

    def fill_disk(self, *, full: bool) -> None:
        """Let the intake's disk have no room, or room again."""

    def give_clock(self, site: SiteName) -> None:
        """Start a site's own processes anew with a clock that can be set; before the load."""

    def set_clock(self, site: SiteName, off_s: int) -> None:
        """So many seconds before (+) or behind (-) the others'."""

    def look_up(self, name: str) -> None:
        """Note at which sites a name has an address; nothing is done to either."""

    def publish_bad(self, what: BadBundle) -> None:
        """Bring a bundle with one fault into the registry and let the sites' channel point to it."""

    def publish_good(self) -> None:
        """Let the channel point to the good bundle again."""

    def restart(self, role: Role, site: SiteName) -> None:
        """Stop a process as an operator does, start it, and wait until it is ready."""

    def roll(self) -> None:
        """Bring home to another bundle of its own copies, as an operator does without the cloud, and back."""

    def scale_up(self) -> None:
        """Start a second gateway at home beside the first, and ask it."""

    def retrain(self) -> None:
        """A small training at home, on home's own data set, to its end."""

    def replace_endpoint(self, tunnel: int) -> None:
        """End the cloud's box of a tunnel without a word, and put another in its place."""

    def use_key(self, tunnel: int, *, wrong: bool) -> None:
        """Set a tunnel up anew with a key at one end that the other has not, or with the right one."""

    def await_route(self, tunnel: int, *, away: bool, within_s: float) -> float:
        """Wait until home's packets left a tunnel, or came back to it, and note when; the seconds waited.

        None are waited where routes do not show.
        """
        ...

    def note(self, name: str, found: str) -> None:
        """A fact for the row."""

    def waits(self) -> float:
        """A random wait between 0 and 1, of the suite's seed."""
        ...


class FakeScene:
    """Writes down what it was told."""

    def __init__(self) -> None:
        self.link = FakeLink()
        self.told: list[str] = []

    def kill(self, role: Role, site: SiteName) -> None:
        """See Scene."""
        self.told.append(f"kill {role} at {site}")

    def bring_back(self) -> None:
        """See Scene."""
        self.told.append("bring back")

    def freeze(self, role: Role, site: SiteName) -> None:
        """See Scene."""
        self.told.append(f"freeze {role} at {site}")

    def thaw(self, role: Role, site: SiteName) -> None:
        """See Scene."""
        self.told.append(f"thaw {role} at {site}")

    def slow_down(self, role: Role, site: SiteName, times: float) -> None:
        """See Scene."""
        self.told.append(f"slow {role} at {site} down {times:g} times")

    def hide_profiles(self, *, hidden: bool) -> None:
        """See Scene."""
        self.told.append("hide profiles" if hidden else "show profiles")

    def store(self, fault: StoreFault) -> None:
        """See Scene."""
        self.told.append(f"store {fault}")

    def fill_disk(self, *, full: bool) -> None:
        """See Scene."""
        self.told.append("fill disk" if full else "free disk")

    def give_clock(self, site: SiteName) -> None:
        """See Scene."""
        self.told.append(f"give {site} a clock")

    def set_clock(self, site: SiteName, off_s: int) -> None:
        """See Scene."""
        self.told.append(f"clock of {site} {off_s:+d} s")

    def look_up(self, name: str) -> None:
        """See Scene."""
        self.told.append(f"look up {name}")

    def publish_bad(self, what: BadBundle) -> None:
        """See Scene."""
        self.told.append(f"publish bad {what}")

    def publish_good(self) -> None:
        """See Scene."""
        self.told.append("publish good")

    def restart(self, role: Role, site: SiteName) -> None:
        """See Scene."""
        self.told.append(f"restart {role} at {site}")

    def roll(self) -> None:
        """See Scene."""
        self.told.append("roll")

    def scale_up(self) -> None:
        """See Scene."""
        self.told.append("scale up")

    def retrain(self) -> None:
        """See Scene."""
        self.told.append("retrain")

    def replace_endpoint(self, tunnel: int) -> None:
        """See Scene."""
        self.told.append(f"replace the box of tunnel {tunnel}")

    def use_key(self, tunnel: int, *, wrong: bool) -> None:
        """See Scene."""
        self.told.append(f"{'wrong' if wrong else 'right'} key for tunnel {tunnel}")

    def await_route(self, tunnel: int, *, away: bool, within_s: float) -> float:  # noqa: ARG002 - the door's
        """See Scene."""
        self.told.append(f"await the route {'away from' if away else 'back to'} tunnel {tunnel}")
        return 0.0

    def note(self, name: str, found: str) -> None:
        """See Scene."""
        self.told.append(f"{name}: {found}")

    def waits(self) -> float:
        """See Scene."""
        return 0.5
