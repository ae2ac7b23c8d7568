"""Where everything lies: the checkout, its tools, and `.rankbridge/` with its state.

One address for each path of docs/architecture.md. It makes no folder and reads none of the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from workloads.contract.sites import HOME, SiteName

HOME_VARIABLE = "RANKBRIDGE_HOME"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Paths of one checkout (`root`) and one home of state (`home`), both absolute."""

    root: Path
    home: Path

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Layout:
        """This checkout, with its home in `.rankbridge` or where $RANKBRIDGE_HOME says."""
        root = Path(__file__).resolve().parent.parent
        named = environ.get(HOME_VARIABLE)
        return cls(root, Path(named).expanduser().absolute() if named else root / ".rankbridge")

    @property
    def triton_tool(self) -> Path:
        """The unpacked tritonserver wheel."""
        return self.root / ".tools" / "triton"

    @property
    def triton_python(self) -> Path:
        """The environment that Triton's Python backend runs in."""
        return self.root / ".tools" / "triton-python"

    @property
    def bundles(self) -> Path:
        """Finished bundles, one folder per id."""
        return self.home / "bundles"

    @property
    def work(self) -> Path:
        """What jobs leave to go on from."""
        return self.home / "work"

    @property
    def run(self) -> Path:
        """State of running processes."""
        return self.home / "run"

    @property
    def logs(self) -> Path:
        """One file per process and per job."""
        return self.run / "logs"

    def log(self, name: str) -> Path:
        """The log of a process (`<site>-<role>`) or a job."""
        return self.logs / f"{name}.log"

    def site(self, site: SiteName) -> Path:
        """What one site holds; nothing of one site reads another's."""
        return self.home / site.value

    @property
    def events(self) -> Path:
        """Acknowledged events."""
        return self.site(HOME.name) / "events.sqlite"

    @property
    def profiles(self) -> Path:
        """Profiles by pseudonym."""
        return self.site(HOME.name) / "profiles.sqlite"

    @property
    def pseudonym_key(self) -> Path:
        """The key of epoch 1."""
        return self.site(HOME.name) / "key" / "pseudonym-1.key"

    @property
    def users_sample(self) -> Path:
        """Raw ids for load users."""
        return self.site(HOME.name) / "users-sample.json"

    def shown(self, path: Path) -> str:
        """A path as a person in the checkout would type it."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)
