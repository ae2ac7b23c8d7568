"""What an image is called: `host/name[:tag][@digest]`, and which names only fill a place. Asks nobody."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from typing import Final

from rankbridge.faults import DeskError

_NAME: Final = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_REFERENCE: Final = re.compile(
    rf"(?P<host>[a-z0-9.-]+(?::[0-9]{{1,5}})?)/(?P<name>{_NAME}(?:/{_NAME})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """An image: `host/name[:tag][@digest]`."""

    host: str
    name: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read one. Raises DeskError."""
        found = _REFERENCE.fullmatch(text)
        if found is None or not ("." in found["host"] or ":" in found["host"] or found["host"] == "localhost"):
            raise DeskError(f"{text!r} names no image", "write it as registry.example.com/team/name:tag")
        return cls(found["host"], found["name"], found["tag"] or "", found["digest"] or "")

    @property
    def is_placeholder(self) -> bool:
        """Whether it stands for an image that nobody has pinned."""
        return self.host.endswith(".invalid") or is_placeholder(self.digest)

    @property
    def is_local(self) -> bool:
        """Whether it is only in the store of this machine."""
        return self.host == "localhost"

    @property
    def is_loopback(self) -> bool:
        """Whether its registry is a server on this very machine, which need not speak HTTPS."""
        return is_loopback(self.host.partition(":")[0])

    def pinned(self, digest: str) -> str:
        """The reference by digest alone, as stacks hold it."""
        return f"{self.host}/{self.name}@{digest}"

    def __str__(self) -> str:
        """As people write it."""
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.host}/{self.name}{tag}" + (f"@{self.digest}" if self.digest else "")


def is_placeholder(digest: str) -> bool:
    """Whether a digest only fills a place: one digit, 64 times."""
    return bool(digest) and len(set(digest.partition(":")[2])) == 1


def is_loopback(host: str) -> bool:
    """Whether a host's name or address can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
