"""What the registry's tests are told in: bundles that are signed, and a process that can be killed at any step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from workloads.bundle.signature import Key, Trust
from workloads.contract.storage import Release
from workloads.objects.memory import Crash, MemoryObjects

_T = TypeVar("_T")

ACTOR = "publisher@here"


@dataclasses.dataclass(frozen=True)
class Made:
    """What was made and signed once for all tests; nobody changes it."""

    key: Key
    trust: Trust
    old: Path
    new: Path
    delta: Path
    """On top of `new`."""

    @staticmethod
    def signature(directory: Path) -> Path:
        return directory.with_name(directory.name + ".sig")

    @property
    def old_release(self) -> Release:
        return Release(bundle=self.old.name)

    @property
    def new_release(self) -> Release:
        return Release(bundle=self.new.name)


class Mortal:
    """A process that dies right before or after its nth step: a call to the store, an fsync, a rename. 0 is never.

    What is dead does nothing more: no step, and no clean-up either. Files that it wrote stay, as after kill -9.
    """

    def __init__(self) -> None:
        self.dies_at = 0
        self.after = False
        self.steps: list[str] = []
        self.dead = False

    def live(self, dies_at: int = 0, *, after: bool = False) -> None:
        """A new process."""
        self.dies_at, self.after, self.steps, self.dead = dies_at, after, [], False

    def step(self, name: str, run: Callable[[], _T], *, counted: bool = True) -> _T:
        if self.dead:
            raise Crash(name)
        if counted:
            self.steps.append(name)
        now = counted and len(self.steps) == self.dies_at
        if now and not self.after:
            self.dead = True
            raise Crash(name)
        try:
            return run()
        finally:
            if now:  # whatever it gave or raised, nobody learns of it
                self.dead = True
                raise Crash(name)


class MortalObjects(MemoryObjects):
    """A store whose caller is mortal."""

    def __init__(self, mortal: Mortal) -> None:
        super().__init__()
        self._mortal = mortal

    def _call(self, name: str, key: str, run: Callable[[bool], Any]) -> Any:  # noqa: ANN401 - as the call's own
        return self._mortal.step(f"{name} {key}", lambda: super(MortalObjects, self)._call(name, key, run))
