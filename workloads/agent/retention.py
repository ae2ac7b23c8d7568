"""What stays on a site's disk: the editions that are served, loaded or could be gone back to. All else goes.

A directory leaves its name before it is emptied, so that a crash leaves nothing half there under a good name.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from workloads.agent.repository import INCOMING, SERVED
from workloads.bundle.signature import SIGNATURE_SUFFIX, signature_path
from workloads.bundle.site import SiteDirectory
from workloads.contract.editions import Edition

_DOOMED: Final = ".doomed-"


def clean(site: SiteDirectory, kept: Iterable[Edition]) -> list[str]:
    """Remove bundles, their signatures, deltas and models of none of `kept`; the names of the bundles that went.

    Of a kept bundle, deltas beyond those of its kept editions go, too. Raises OSError.
    """
    deltas: dict[str, int] = {}
    for edition in kept:
        deltas[edition.bundle] = max(edition.delta, deltas.get(edition.bundle, 0))
    models = {signature.triton_name(bundle) for bundle in deltas for signature in SERVED}
    roles = tuple(f"{signature.role}-" for signature in SERVED)
    for path in _visible(site.triton):
        if path.name.startswith(roles) and path.name not in models:
            remove(path)
    gone = []
    for path in _visible(site.bundles):
        if path.is_dir() and path.name not in deltas:
            remove(path)
            remove(signature_path(path))
            gone.append(path.name)
    for folder in _visible(site.deltas):
        if folder.name not in deltas:
            remove(folder)
            continue
        for number, delta in site.installed_deltas(folder.name).items():
            if number > deltas[folder.name]:
                remove_delta(site, folder.name, number, delta)
    for place in (site.triton, site.bundles, site.deltas, *_visible(site.deltas)):
        _forget_the_dead(place)
    return gone


def remove_delta(site: SiteDirectory, bundle: str, number: int, delta: str) -> None:
    """A delta and its signature. Raises OSError."""
    path = site.delta_folder(bundle, number, delta)
    remove(path)
    remove(signature_path(path))


def remove(path: Path) -> None:
    """A directory or file, if it is there. Raises OSError."""
    if not path.exists():
        return
    doomed = path.with_name(_DOOMED + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    if path.is_dir():
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink()


def _forget_the_dead(place: Path) -> None:
    """What agents that were killed left here: directories that were on their way out or in, signatures of nothing."""
    for leftover in (*place.glob(f"{_DOOMED}*"), *place.glob(f"{INCOMING}*")):
        shutil.rmtree(leftover, ignore_errors=True)
    for signature in place.glob(f"*{SIGNATURE_SUFFIX}"):
        if not signature.with_suffix("").exists():
            signature.unlink(missing_ok=True)


def _visible(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
