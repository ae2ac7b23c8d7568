"""From a delta on disk to the channel that sites watch: signed, published, and put on top of what is served.

The channel moves by one compare-and-swap, and only from the very release that the delta stands on. Whoever comes
second is told, and `add` makes its delta anew on top of the other's. A bundle that was promoted meanwhile is
never taken back: new items go on top of it, or not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Final

from workloads.bundle.channels import ChannelConflict, RegistryFault
from workloads.bundle.delta import verify_delta
from workloads.bundle.manifest import SHORT
from workloads.bundle.registry import Registry
from workloads.bundle.signature import sign, signature_path
from workloads.contract.storage import ChannelPointer, Release
from workloads.delta.making import make
from workloads.telemetry.progress import Progress

STAGE: Final = "publish"
RACES: Final = 16
"""How often another's move of the channel is answered by trying again."""


class Superseded(RegistryFault):
    """The channel serves something else than what the delta stands on."""


@dataclasses.dataclass(frozen=True)
class Publisher:
    """Who publishes, and where."""

    registry: Registry
    channel: str
    actor: str
    """As the audit log and the channel name them."""
    key: Path
    """Private key of the signature."""
    password: str | None = dataclasses.field(default=None, repr=False)

    def publish(self, delta: Path) -> ChannelPointer:
        """Sign and publish a delta, and put it on top of what the channel serves; again is harmless.

        Raises Superseded; RegistryFault, BundleFault, SignatureFault and ObjectsError as the registry does.
        """
        manifest = verify_delta(delta)
        delta = delta.resolve()
        identity = delta.name.partition("-")[2]
        for _ in range(RACES):
            pointer, _etag = self.registry.pointer(self.channel)
            current = pointer.current
            if identity in current.deltas:
                return pointer
            last = current.deltas[-1] if current.deltas else None
            if current.bundle != manifest.bundle or last != manifest.previous:
                raise Superseded(
                    f"{self.channel} serves {_shown(current)}, and the delta stands on "
                    f"{manifest.bundle[:SHORT]} with {manifest.number - 1} deltas",
                    "make it again on top of that, or use `add`, which does",
                )
            signature = signature_path(delta)
            if not signature.exists():
                sign(delta, self.key, password=self.password)
            self.registry.publish_delta(delta, signature, actor=self.actor)
            release = Release(bundle=current.bundle, deltas=[*current.deltas, identity])
            try:
                return self.registry.promote(self.channel, release, self.actor, expect=pointer.sequence)
            except ChannelConflict:
                continue
        raise RegistryFault(f"others moved {self.channel} {RACES} times meanwhile", "try again when it is quieter")

    def add(
        self, items: Path, work: Path, progress: Progress, *, now_ms: Callable[[], int]
    ) -> tuple[Path, ChannelPointer]:
        """Put the items of a file on top of what the channel serves now: their delta, and the channel as it then is.

        `work` keeps what is fetched (`bundles/`, `deltas/`) and what is made (`made/`). Raises MakeFault, and all that
        `publish` does but Superseded: then the delta is made anew.
        """
        for _ in range(RACES):
            pointer, _etag = self.registry.pointer(self.channel)
            current = pointer.current
            bundle = self.registry.fetch(current.bundle, work / "bundles")
            deltas = [
                self.registry.fetch_delta(identity, work / "deltas", current.bundle, number)
                for number, identity in enumerate(current.deltas, 1)
            ]
            delta = make(bundle, deltas, items, work / "made", progress, now_ms=now_ms)
            progress.note(STAGE, f"on top of {_shown(current)}")
            try:
                return delta, self.publish(delta)
            except Superseded as fault:
                progress.note(STAGE, f"{fault.fault}: made anew on top of that")
        raise RegistryFault(f"others moved {self.channel} {RACES} times meanwhile", "try again when it is quieter")


def _shown(release: Release) -> str:
    return f"{release.bundle[:SHORT]} with {len(release.deltas)} deltas"
