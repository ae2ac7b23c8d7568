"""What a rehearsal or a single step is asked to do: which data, how large, how fast, and the jobs' command lines.

Pure but for looking at the data file and for the newest of several results. It runs nothing.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from pathlib import Path
from typing import Final

import msgspec

from rankbridge import preflight
from rankbridge.cloud import CloudForm
from rankbridge.faults import DeskError
from rankbridge.layout import Layout
from rankbridge.load import MIX_PER_S
from workloads.contract.sites import HOME

AWS_SHARE: Final = 0.25
"""Share of the load that enters at the cloud site."""


class SitesForm(enum.StrEnum):
    """How the two sites are laid out on this machine."""

    LOOPBACK = "loopback"
    NETNS = "netns"
    """Each in network namespaces of its own, with a real VPN between them; root."""


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Where behaviour data comes from; `path` is None for the simulator."""

    kind: str
    path: Path | None

    @classmethod
    def parse(cls, text: str) -> DataSource:
        """`simulator`, or KIND=PATH. Raises DeskError."""
        kinds = ("online-retail", "sequences", "events")
        kind, sign, path = text.partition("=")
        if text == "simulator":
            return cls("simulator", None)
        if kind not in kinds:
            known = ", ".join(["simulator", *(f"{kind}=PATH" for kind in kinds)])
            raise DeskError(f"--data {text}: no such kind of data", f"one of {known}")
        if not sign or not path:
            raise DeskError(f"--data {text}: the path of the file is missing", f"write --data {kind}=PATH")
        return cls(kind, Path(path).expanduser().absolute())

    def check(self) -> None:
        """Raises DeskError when its file cannot be read."""
        preflight.refuse(preflight.readable(self.path))

    def __str__(self) -> str:
        return self.kind if self.path is None else f"{self.kind}={self.path}"


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for."""

    data: DataSource
    out: Path
    users: int | None = None
    items: int | None = None
    events: int | None = None
    seed: int | None = None
    rate: float = MIX_PER_S
    load_seconds: float | None = None
    min_samples: int | None = None
    aws: CloudForm = CloudForm.LOCALSTACK
    injections: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    reuse_bundle: bool = False
    keep_up: bool = False
    sites: SitesForm = SitesForm.LOOPBACK

    def digest(self) -> str:
        """Names the ledger: two requests that would make the same thing have the same one."""
        facts = {
            field.name: str(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in {"out", "keep_up"}
        }
        if self.data.path is not None and self.data.path.exists():
            seen = self.data.path.stat()
            facts["file"] = f"{seen.st_size} {seen.st_mtime_ns}"
        return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()[:12]


def reproduce(request: Request) -> list[str]:
    """Commands that do all of this again; a data file by its name alone, since paths are of one machine."""
    words = []
    if request.data.path is not None:
        words.append(f"DATA={request.data.kind}={request.data.path.name}")
    if request.sites is not SitesForm.LOOPBACK:
        words.append(f"SITES={request.sites.value}")
    options = []
    for name in ("users", "items", "events", "seed", "load_seconds", "min_samples"):
        value = getattr(request, name)
        if value is not None:
            options.append(f"--{name.replace('_', '-')} {value:.15g}")
    if request.rate != MIX_PER_S:
        options.append(f"--rate {request.rate:g}")
    if request.aws is not CloudForm.LOCALSTACK:
        options.append(f"--aws {request.aws.value}")
    options += [f"--inject {one}" for one in request.injections]
    if request.reuse_bundle:
        options.append("--reuse-bundle")
    if options:
        words.append(f'ARGS="{" ".join(options)}"')
    return [" ".join(["make rehearse", *words])]


def data_arguments(
    layout: Layout, source: DataSource, *, users: int | None, items: int | None, events: int | None, seed: int | None
) -> list[str]:
    """Command line of the data job."""
    arguments = ["--source", str(source), "--home", str(layout.home)]
    for name, value in (("users", users), ("items", items), ("events", events), ("seed", seed)):
        if value is not None:
            arguments += [f"--{name}", str(value)]
    return arguments


def lake_arguments(layout: Layout, dataset: Path) -> list[str]:
    """Command line that brings a prepared data set into the lake."""
    return ["load", "--home", str(layout.home), "--dataset", str(dataset)]


def replication_arguments(layout: Layout, dataset: Path, bucket: str) -> list[str]:
    """Command line that brings what may leave of a data set into the data bucket."""
    return ["push", "--dataset", str(dataset), "--home", str(layout.home), "--data-bucket", bucket]


def training_arguments(layout: Layout, dataset: Path, *, seed: int | None) -> list[str]:
    """Command line of the training job on a data set at hand."""
    arguments = ["--dataset", str(dataset), "--home", str(layout.training_home)]
    return arguments if seed is None else [*arguments, "--seed", str(seed)]


def cloud_training_arguments(layout: Layout, replica: str, bucket: str, *, seed: int | None) -> list[str]:
    """Command line of the training job as it runs in the cloud: from the bucket alone, kept from all else."""
    arguments = ["--replica", replica, "--data-bucket", bucket, "--home", str(layout.training_home), "--confine"]
    return arguments if seed is None else [*arguments, "--seed", str(seed)]


def export_arguments(layout: Layout, training: Path, dataset: Path) -> list[str]:
    """Command line of the export job."""
    return ["--training", str(training), "--dataset", str(dataset), "--home", str(layout.training_home)]


def newest_dataset(layout: Layout) -> Path:
    """The data set that was prepared last. Raises DeskError when there is none."""
    return _newest(layout.site(HOME.name) / "datasets", "*-*", "there is no prepared data set", "`rankbridge data`")


def newest_training(layout: Layout) -> Path:
    """The training that was finished last. Raises DeskError when there is none."""
    return _newest(layout.training_home / "work", "train-*", "nothing has been trained", "`rankbridge train`")


def _newest(folder: Path, pattern: str, fault: str, remedy: str) -> Path:
    found = [path for path in folder.glob(pattern) if path.is_dir() and not path.name.startswith(".")]
    if not found:
        raise DeskError(fault, f"make one: {remedy}")
    return max(found, key=lambda path: path.stat().st_mtime)
