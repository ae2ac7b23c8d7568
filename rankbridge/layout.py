"""Where everything lies: the checkout, its tools, and `.rankbridge/` with its state.

One address for each path of docs/architecture.md. It makes no folder and reads none of the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from workloads.contract.sites import AWS, HOME, SiteName

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
    def training_home(self) -> Path:
        """Home of state of training and export; all that they may read and write."""
        return self.site(AWS.name) / "training"

    @property
    def bundles(self) -> Path:
        """Finished bundles, one folder per id, as export made them: what a site serves is its own copy."""
        return self.training_home / "bundles"

    @property
    def replicas(self) -> Path:
        """Data sets that training fetched from the data bucket."""
        return self.training_home / "replica"

    @property
    def publisher_key(self) -> Path:
        """The private key that bundles are signed with."""
        return self.site(AWS.name) / "signing" / "publisher.key"

    def trust(self, site: SiteName) -> Path:
        """Folder of the public keys whose signatures a site accepts."""
        return self.site(site) / "trust"

    @property
    def audit(self) -> Path:
        """The hash-chained log of exports, promotions and deletions."""
        return self.site(HOME.name) / "audit.jsonl"

    @property
    def lake(self) -> Path:
        """Behaviour events as Parquet and Iceberg."""
        return self.site(HOME.name) / "lake"

    @property
    def vault(self) -> Path:
        """Who is behind a pseudonym; home only."""
        return self.site(HOME.name) / "vault.sqlite"

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
