"""A new pseudonym key: everybody gets another name, keeps their history, and the old key is destroyed.

`begin` makes the next key, gives every profile its second name beside the first, and then switches: from that commit on
all gateways make names with the new key, and find the profile under it. `finish` renames what is kept under old names
and destroys the old key:

- prepared data sets (user, session, what the simulator planted), under new digests and names;
- the lake's events (user, session, names in contexts), no older snapshot stays;
- profiles under old names go; replicas and fetched copies with old names go, and the next push sends the renamed ones.

A user's new name is computed from the vault. A session's is the keyed hash of its old name: home does not know what it
was called. Everything may be repeated; a call after a crash does what was left. The spool must have been taken into the
lake and trimmed before: only the intake writes it. Bundles hold no names.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from workloads.data.removal import drop_data_sets, rename_people
from workloads.erasure.job import SETTLE_MS
from workloads.erasure.places import PeopleStore, Place
from workloads.lake.faults import LakeError
from workloads.lake.lake import Lake
from workloads.lake.renaming import rename
from workloads.privacy.audit import Audit
from workloads.privacy.pseudonym import key_path
from workloads.privacy.vault import Epochs, SqliteVault
from workloads.telemetry.progress import Progress

ACTOR: Final = "rotation"


class RotationError(Exception):
    """A rotation that cannot be begun or finished now; names fault and remedy."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault
        self.remedy = remedy


class Rotation:
    """The change of key of one home, under `data.custody`.

    `replicas` are the places outside of which old names must go as well.
    """

    def __init__(
        self,
        home: Path,
        vault: SqliteVault,
        profiles: PeopleStore | None,
        audit: Audit,
        *,
        progress: Progress,
        replicas: Sequence[Place] = (),
        settle_ms: int = SETTLE_MS,
    ) -> None:
        self._home = home
        self._vault = vault
        self._profiles = profiles
        self._audit = audit
        self._progress = progress
        self._replicas = replicas
        self._settle_ms = settle_ms

    def begin(self) -> Epochs:
        """Make the next key and switch to it. Raises VaultError while an earlier rotation is not finished."""
        epochs = self._vault.begin()
        if epochs.next is not None:
            names = self._vault.renamed(epochs.current, epochs.next)
            copied = 0 if self._profiles is None else self._profiles.copy(names)
            self._progress.step("profiles", len(names), len(names), "people")
            # Told before it is done, as every change is: a kill in between leaves a line too many, never one too few.
            self._audit.append(
                action="key.rotated", actor=ACTOR, subject=f"epoch {epochs.next}", detail={"profiles": copied}
            )
            epochs = self._vault.switch()
        self._progress.result({"next": "finish"}, current=epochs.current)
        return epochs

    def finish(self) -> Epochs:
        """Rename what has old names and destroy the old key. Raises RotationError, PlaceError, VaultError."""
        epochs = self._vault.epochs()
        old = epochs.retiring
        if old is None:
            raise RotationError("no rotation is under way", "begin one with rotate")
        self._nothing_under_way(epochs.current)
        self._spool_must_be_clear(old)
        names = self._vault.renamed(old, epochs.current)
        key = self._vault.key(epochs.current)
        prefix = f"s{old}-"

        def change(name: str) -> str:
            return key.session(name) if name.startswith(prefix) else names.get(name, name)

        sets = rename_people(self._home, change, epochs.current)  # before the lake, into which one may be loaded
        self._progress.step("data sets", len(sets), len(sets))
        files = self._rename_lake(change)
        profiles = 0
        if self._profiles is not None:
            self._profiles.copy(names)
            profiles = self._profiles.delete(sorted(names))
        for place in self._replicas:
            place.remove(names)
        drop_data_sets(self._home / "aws" / "training" / "replica", key_epoch=old)
        self._audit.append(
            action="key.destroyed",
            actor=ACTOR,
            subject=f"epoch {old}",
            detail={"lake_files": files, "data_sets": len(sets), "profiles": profiles},
        )
        epochs = self._vault.retire()
        self._progress.result({}, current=epochs.current, lake_files=files, data_sets=len(sets))
        return epochs

    def _rename_lake(self, change: Callable[[str], str]) -> int:
        path = self._home / "onprem" / "lake"
        if not path.is_dir():
            return 0
        try:
            with Lake.open(path) as lake:
                return rename(lake, change, self._progress)
        except LakeError as error:
            raise RotationError(error.fault, error.remedy) from None

    def _nothing_under_way(self, current: int) -> None:
        """Refuse while a request from before the switch may still bring an event under an old name."""
        switched_ms = self._vault.switched_ms
        # A key may be made long before it is used: profiles are copied in between, and a kill may come.
        made_s = key_path(self._vault.keys, current).stat().st_mtime if switched_ms is None else switched_ms / 1000
        wait_s = made_s + self._settle_ms / 1000 - time.time()
        if wait_s > 0:
            raise RotationError(
                "requests from before the rotation may still be on their way", f"try again in {wait_s:.0f} s"
            )

    def _spool_must_be_clear(self, old: int) -> None:
        """Refuse while the spool has events under old names.

        Dead letters may have some; with the old key gone they lead to nobody.
        """
        path = self._home / "onprem" / "events.sqlite"
        if not path.is_file():
            return
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=10)) as spool:
            (left,) = spool.execute(
                "SELECT count(*) FROM events WHERE user GLOB ? OR session GLOB ?", (f"p{old}-*", f"[ps]{old}-*")
            ).fetchone()
        if left:
            raise RotationError(
                f"the spool has {left} events under old names",
                "let the lake take them in (`python -m workloads.lake ingest`) and the spool be trimmed",
            )
