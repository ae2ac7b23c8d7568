"""Builds the control plane's commands from their Go modules, once for each set of versions.

Needs Go and the module proxy. What is built lies in `.tools/controlplane/`, with a stamp of the `go.mod` and `go.sum`
that it came from; Go's own cache makes a second clone quick. Kinds of prometheus-operator and KEDA, which do not run
here, come from their modules too, so that what is declared of them is judged by their own schemas.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from infra.controlplane import BINARIES, CRDS, MODULES, ControlPlaneError, command_name

SOURCES: Final = Path(__file__).parent
STAGES: Final = BINARIES / "stages.yaml"
_STAGE_FOLDERS: Final = ("node/fast", "node/heartbeat-with-lease", "pod/fast")
CRD_FILES: Final[Mapping[str, tuple[str, ...]]] = {
    "github.com/prometheus-operator/prometheus-operator": tuple(
        f"example/prometheus-operator-crd/monitoring.coreos.com_{kind}.yaml"
        for kind in ("podmonitors", "prometheusrules", "servicemonitors")
    ),
    "github.com/kedacore/keda/v2": tuple(
        f"config/crd/bases/keda.sh_{kind}.yaml" for kind in ("scaledobjects", "triggerauthentications")
    ),
}
"""Go module -> the definitions of kinds in it that the apps declare."""


def digest(folder: str) -> str:
    """What a module's commands are built from."""
    seen = hashlib.sha256()
    for name in ("go.mod", "go.sum"):
        seen.update((SOURCES / folder / name).read_bytes())
    return seen.hexdigest()


def is_current(folder: str) -> bool:
    """Whether a module's commands stand and are of these versions."""
    stamp = BINARIES / f".{folder}-stamp"
    there = all((BINARIES / command_name(package)).exists() for package in MODULES[folder])
    return there and stamp.exists() and stamp.read_text() == digest(folder)


def crds_are_current() -> bool:
    """Whether the definitions of foreign kinds stand and are of these versions."""
    stamp = CRDS / ".stamp"
    names = [path.rpartition("/")[2] for paths in CRD_FILES.values() for path in paths]
    there = all((CRDS / name).exists() for name in names)
    return there and stamp.exists() and stamp.read_text() == digest("crds")


def build(say: Callable[[str], None]) -> None:
    """Build what is missing or stale. Raises ControlPlaneError."""
    if shutil.which("go") is None:
        raise ControlPlaneError(
            "Go is not installed; the control plane is built with it: see https://go.dev/doc/install"
        )
    BINARIES.mkdir(parents=True, exist_ok=True)
    pending = [folder for folder in MODULES if not is_current(folder)]
    for number, folder in enumerate(pending, 1):
        began = time.monotonic()
        say(f"control plane {number}/{len(pending)}: building {', '.join(map(command_name, MODULES[folder]))}")
        for package in MODULES[folder]:
            _go(
                "build",
                "-trimpath",
                f"-ldflags={_flags(folder)}",
                "-o",
                str(BINARIES / command_name(package)),
                package,
                at=folder,
            )
        if folder == "kwok":
            _copy_stages()
        (BINARIES / f".{folder}-stamp").write_text(digest(folder))
        say(f"control plane {number}/{len(pending)}: done in {time.monotonic() - began:.0f} s")
    if not crds_are_current():
        say("control plane: copying definitions of prometheus-operator's and KEDA's kinds")
        _copy_crds()


def kubernetes_version() -> str:
    """The version of Kubernetes that is pinned, `v1.x.y`."""
    for line in (SOURCES / "kubernetes" / "go.mod").read_text().splitlines():
        words = line.replace("require", "").split()
        if len(words) >= 2 and words[0] == "k8s.io/kubernetes":
            return words[1]
    raise ControlPlaneError("infra/controlplane/kubernetes/go.mod names no version of k8s.io/kubernetes")


def _flags(folder: str) -> str:
    flags = "-s -w"
    if folder == "kubernetes":
        # Without it the API server calls itself v0.0.0 and clients that look at the version refuse it.
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
            flags += f" -X {package}.gitVersion={kubernetes_version()}"
    return flags


def _copy_stages() -> None:
    """How KWOK plays nodes and pods: the stages that its own module holds."""
    source = Path(_go("list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kwok", at="kwok").strip()) / "kustomize" / "stage"
    found = [path for folder in _STAGE_FOLDERS for path in sorted((source / folder).glob("*.yaml"))]
    documents = [path.read_text() for path in found if path.name != "kustomization.yaml"]
    if not documents:
        raise ControlPlaneError(f"the KWOK module has no stages under {source}")
    STAGES.write_text("\n---\n".join(documents))


def _copy_crds() -> None:
    """Definitions of kinds, out of modules that are fetched and compared with `go.sum` but never compiled."""
    CRDS.mkdir(exist_ok=True)
    for module, paths in CRD_FILES.items():
        source = Path(json.loads(_go("mod", "download", "-json", module, at="crds"))["Dir"])
        for path in paths:
            if not (source / path).exists():
                raise ControlPlaneError(f"the module {module} has no {path}: the version in crds/go.mod moved it")
            (CRDS / Path(path).name).write_bytes((source / path).read_bytes())
    (CRDS / ".stamp").write_text(digest("crds"))


def _go(*arguments: str, at: str) -> str:
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false", "GOTOOLCHAIN": "local"}
    done = subprocess.run(
        ["go", *arguments], cwd=SOURCES / at, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ControlPlaneError(f"go {arguments[0]} in infra/controlplane/{at} failed:\n{done.stderr[-2000:]}")
    return done.stdout
