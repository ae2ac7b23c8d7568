"""Reads nested values key by key, types them, and gathers every fault instead of stopping at the first.

`infra.config` says what a stack file may hold; this is how it is read. A value that is refused leaves a fault and a
stand-in of the right type, so that reading goes on. Knows nothing of sites or clouds.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError
from typing import Final, TypeVar

from infra.plan import Fault

T = TypeVar("T")
E = TypeVar("E", bound=enum.StrEnum)

NOWHERE: Final = IPv4Network("0.0.0.0/32")
"""Stands for a range that could not be read."""


def as_network(value: object) -> IPv4Network | None:
    """An IPv4 range in CIDR form without host bits, or None."""
    try:
        return IPv4Network(value) if isinstance(value, str) and "/" in value else None
    except (AddressValueError, NetmaskValueError, ValueError):
        return None


def as_address(value: object) -> IPv4Address | None:
    """An IPv4 address, or None."""
    try:
        return IPv4Address(value) if isinstance(value, str) else None
    except AddressValueError:
        return None


class Reader:
    """One mapping of the stack file, read key by key; faults go to a shared list and reading goes on."""

    def __init__(self, path: str, value: object, faults: list[Fault]) -> None:
        self.path = path
        self.faults = faults
        self._read: set[str] = set()
        self._values: Mapping[str, object] = {}
        if isinstance(value, dict):
            self._values = value
        else:
            self.fault(None, value, "a mapping")

    def key(self, key: str | None) -> str:
        """The full name of a key, as the operator would write it."""
        return self.path if key is None else f"{self.path}.{key}" if self.path else key

    def fault(self, key: str | None, value: object, allowed: str) -> None:
        """Note one fault."""
        shown = "nothing" if value is None else str(value)
        self.faults.append(Fault(self.key(key), shown if len(shown) <= 80 else shown[:77] + "...", allowed))

    def has(self, key: str) -> bool:
        """Whether the key is given."""
        return self._values.get(key) is not None

    def parsed(self, key: str, parse: Callable[[object], T | None], allowed: str, instead: T, *, optional: bool) -> T:
        """The key's value by `parse`, which answers None for a value that it refuses."""
        self._read.add(key)
        value = self._values.get(key)
        if value is None and optional:
            return instead
        result = None if value is None else parse(value)
        if result is None:
            self.fault(key, value, allowed)
            return instead
        return result

    def text(self, key: str, pattern: str, allowed: str, default: str | None = None) -> str:
        """A string that matches `pattern` whole."""

        def parse(value: object) -> str | None:
            return value if isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) else None

        return self.parsed(key, parse, allowed, default or "", optional=default is not None)

    def number(self, key: str, low: int, high: int, default: int | None = None, what: str = "") -> int:
        """A whole number in [low, high]."""

        def parse(value: object) -> int | None:
            whole = isinstance(value, int) and not isinstance(value, bool)
            return value if whole and isinstance(value, int) and low <= value <= high else None

        allowed = f"a whole number {low} to {high}" + (f" ({what})" if what else "")
        return self.parsed(key, parse, allowed, low if default is None else default, optional=default is not None)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        return self.parsed(key, lambda v: v if isinstance(v, bool) else None, "true or false", default, optional=True)

    def choice(self, key: str, options: type[E], default: E) -> E:
        """A member of an enumeration, by its value."""

        def parse(value: object) -> E | None:
            return next((o for o in options if o.value == value), None)

        return self.parsed(key, parse, "one of " + ", ".join(o.value for o in options), default, optional=True)

    def network(self, key: str, allowed: str, fits: Callable[[IPv4Network], bool]) -> IPv4Network:
        """An IPv4 range without host bits."""
        return self.parsed(
            key, lambda v: n if (n := as_network(v)) and fits(n) else None, allowed, NOWHERE, optional=False
        )

    def address(self, key: str, allowed: str) -> IPv4Address:
        """An IPv4 address."""
        return self.parsed(key, as_address, allowed, IPv4Address(0), optional=False)

    def texts(self, key: str, pattern: str, allowed: str, *, optional: bool = True) -> tuple[str, ...]:
        """A list of different strings that match `pattern` whole."""

        def parse(value: object) -> tuple[str, ...] | None:
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                return None
            good = all(re.fullmatch(pattern, v, re.ASCII) for v in value) and len(set(value)) == len(value)
            return tuple(value) if good else None

        return self.parsed(key, parse, allowed, (), optional=optional)

    def section(self, key: str, *, optional: bool = False) -> Reader:
        """The mapping under a key."""
        self._read.add(key)
        value = self._values.get(key)
        if value is None and not optional:
            self.fault(key, None, "a mapping")
        return Reader(self.key(key), {} if value is None else value, [] if value is None else self.faults)

    def sections(self, key: str, *, optional: bool = False) -> list[Reader]:
        """The mappings in the list under a key."""
        self._read.add(key)
        value = self._values.get(key)
        if not isinstance(value, list):
            if value is not None or not optional:
                self.fault(key, value, "a list of mappings")
            return []
        return [Reader(f"{self.key(key)}[{i}]", entry, self.faults) for i, entry in enumerate(value)]

    def keys(self) -> list[str]:
        """The keys given, for mappings whose keys are data; each counts as read."""
        self._read.update(self._values)
        return [str(k) for k in self._values]

    def raw(self, key: str) -> object:
        """A value for a caller that checks it itself."""
        self._read.add(key)
        return self._values.get(key)

    def finish(self) -> None:
        """Refuse what nobody read."""
        for key in sorted(set(self._values) - self._read):
            known = ", ".join(sorted(self._read))
            self.fault(str(key), "(unknown key)", f"removed, or one of: {known}")
