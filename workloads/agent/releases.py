"""Where releases come from: a channel of the registry, or one directory for ever. One door, with its fake beside it.

The door is asked in threads, because object storage blocks. What it raises is a Refusal (the release is at fault) or a
Hindrance (the way to it is).
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from workloads.agent.refusal import Hindrance, Refusal
from workloads.bundle.channels import NoChannel, RegistryFault
from workloads.bundle.registry import NotPublished, Registry
from workloads.bundle.signature import SignatureFault
from workloads.bundle.site import SiteDirectory
from workloads.bundle.store import BundleFault, copy_bundle
from workloads.contract.editions import Edition
from workloads.objects.store import Damaged, NotFound, ObjectsError


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the site is to serve."""

    bundle: str
    deltas: tuple[str, ...] = ()
    channel: str | None = None
    sequence: int = 0
    moved_ms: int | None = None
    """When the channel was pointed to it."""
    held: bool = False
    """Asked for by hand: it is on disk, and the cloud is not asked."""

    @property
    def edition(self) -> Edition:
        """As it is served."""
        return Edition(bundle=self.bundle, delta=len(self.deltas))


class Releases(Protocol):
    """The one door to releases."""

    channel: str | None

    def wanted(self) -> Wanted | None:
        """What the channel points to; None when it points to nothing yet. Raises Hindrance."""
        ...

    def fetch(self, wanted: Wanted, site: SiteDirectory) -> None:
        """Bring it to the site: signature and digests verified, on disk, each directory by one rename.

        Raises Refusal or Hindrance.
        """
        ...


class ChannelReleases:
    """A channel of the registry in the models bucket."""

    def __init__(self, registry: Registry, channel: str) -> None:
        self._registry = registry
        self.channel: str | None = channel
        self._name = channel

    def wanted(self) -> Wanted | None:
        """See `Releases`."""
        try:
            pointer, _ = self._registry.pointer(self._name)
        except NoChannel:
            return None
        except (RegistryFault, ObjectsError) as error:
            raise Hindrance(str(error)) from error
        return Wanted(
            pointer.current.bundle,
            tuple(pointer.current.deltas),
            channel=pointer.channel,
            sequence=pointer.sequence,
            moved_ms=pointer.moved_ms,
        )

    def fetch(self, wanted: Wanted, site: SiteDirectory) -> None:
        """See `Releases`."""
        with _judged():
            self._registry.fetch(wanted.bundle, site.bundles)
            for number, delta in enumerate(wanted.deltas, start=1):
                self._registry.fetch_delta(delta, site.deltas, wanted.bundle, number)


@contextlib.contextmanager
def _judged() -> Iterator[None]:
    try:
        yield
    except SignatureFault as error:
        raise Refusal("signature", f"{error}; {error.remedy}") from error
    except (BundleFault, Damaged) as error:
        raise Refusal("content", str(error)) from error
    except (NotPublished, NotFound) as error:
        raise Refusal("not_published", str(error)) from error
    except (RegistryFault, ObjectsError, OSError) as error:
        raise Hindrance(str(error)) from error


class FixedRelease:
    """One bundle in a directory: what `--bundle DIR` serves for ever."""

    channel: str | None = None

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle.resolve()

    def wanted(self) -> Wanted | None:
        """See `Releases`."""
        return Wanted(self._bundle.name)

    def fetch(self, wanted: Wanted, site: SiteDirectory) -> None:  # noqa: ARG002 - there is one
        """See `Releases`."""
        with _judged():
            copy_bundle(self._bundle, site.bundles)


class FakeReleases:
    """A registry in memory: bundles are directories, nothing is signed. For tests."""

    def __init__(self, *bundles: Path) -> None:
        self.channel: str | None = "stable"
        self.bundles = {path.name: path for path in bundles}
        self.deltas: dict[str, Path] = {}
        """By id."""
        self.pointer: Wanted | None = None
        self.fault: Exception | None = None
        """What every question fails with: Hindrance for a cloud that is gone."""
        self.fetches = 0

    def promote(self, bundle: str, *deltas: str) -> None:
        """Point the channel to a bundle with deltas."""
        sequence = 1 if self.pointer is None else self.pointer.sequence + 1
        self.pointer = Wanted(bundle, deltas, channel="stable", sequence=sequence)

    def wanted(self) -> Wanted | None:
        """See `Releases`."""
        if self.fault is not None:
            raise self.fault
        return self.pointer

    def fetch(self, wanted: Wanted, site: SiteDirectory) -> None:
        """See `Releases`."""
        self.fetches += 1
        if self.fault is not None:
            raise self.fault
        with _judged():
            copy_bundle(self.bundles[wanted.bundle], site.bundles)
            for number, delta in enumerate(wanted.deltas, start=1):
                place = site.delta_folder(wanted.bundle, number, delta)
                if not place.exists():
                    shutil.copytree(self.deltas[delta], place)
