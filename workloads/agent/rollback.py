"""Going back by hand: ask the site's agent for an edition that is on disk, and wait until it is served.

The wish is a file (`memory.Hold`), so that it is not lost when the agent does not run, and needs no cloud. It holds
until the channel moves on; asked for twice, it happens once. Nothing is flipped here: Triton must have the model before
gateways turn to it, which is the agent's work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Final

from workloads.agent import memory
from workloads.agent.memory import Hold
from workloads.bundle.site import EditionsFault, SiteDirectory, read_editions
from workloads.bundle.store import BundleFault
from workloads.contract.editions import Edition, SiteEditions
from workloads.telemetry.progress import Progress

STAGE: Final = "rollback"
LOOK_EVERY_S: Final = 0.1


class RollbackFault(Exception):  # noqa: N818 - as BundleFault
    """Why nothing was gone back to, and what to do about it."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.remedy = remedy


def rollback(
    options: argparse.Namespace, progress: Progress, *, clock: Callable[[], float], sleep: Callable[[float], None]
) -> None:
    """Ask for `options.to` (None: the previous edition) at `options.site_dir`, and wait. Raises RollbackFault."""
    root: Path = options.site_dir
    editions = _editions(root)
    edition = _chosen(root, editions, options.to)
    hold = memory.read_hold(root)
    # What is served without having been asked for may be on its way out already: the wish is written all the same.
    if edition == editions.serve and len(editions.load) == 1 and hold is not None and hold.edition == edition:
        progress.result({"edition": str(edition)}, seconds=0.0)
        return
    seen = memory.read_seen(root)
    try:
        memory.write_hold(root, Hold(edition=edition, sequence=0 if seen is None else seen.sequence))
    except OSError as error:
        raise RollbackFault(f"cannot write {root}: {error}", "make room there") from error
    begun = clock()
    progress.step(STAGE, 0, 1)
    while True:
        hold = memory.read_hold(root)
        if hold is not None and hold.edition == edition and hold.refused is not None:
            raise RollbackFault(
                f"the agent refused {edition}: {hold.refused}", "go back to another edition with --to, or promote one"
            )
        editions = _editions(root)
        if editions.serve == edition and len(editions.load) == 1:
            break
        if clock() - begun > options.wait_s:
            raise RollbackFault(
                f"{edition} is asked for, and not served after {options.wait_s:g} s",
                "see what the agent's /readyz waits for; if the agent does not run, start it: it goes there first",
            )
        sleep(LOOK_EVERY_S)
    progress.step(STAGE, 1, 1)
    progress.result({"edition": str(edition)}, seconds=round(clock() - begun, 3))


def resume(
    options: argparse.Namespace,
    progress: Progress,
    *,
    clock: Callable[[], float],  # noqa: ARG001 - as rollback
    sleep: Callable[[float], None],  # noqa: ARG001 - as rollback
) -> None:
    """Let the site follow its channel again. Raises RollbackFault."""
    editions = _editions(options.site_dir)
    try:
        memory.write_hold(options.site_dir, None)
    except OSError as error:
        raise RollbackFault(f"cannot write {options.site_dir}: {error}", "make it writable") from error
    progress.result({"edition": str(editions.serve), "channel": editions.channel or ""})


def _editions(root: Path) -> SiteEditions:
    try:
        editions = read_editions(SiteDirectory(root).editions)
    except EditionsFault as error:
        raise RollbackFault(str(error), "start the site's agent: it writes the file anew") from error
    if editions is None:
        raise RollbackFault(f"{root} serves nothing", "give the --site-dir of a site that an agent runs at")
    return editions


def _chosen(root: Path, editions: SiteEditions, asked: str | None) -> Edition:
    """The edition that is asked for, which is on disk. Raises RollbackFault."""
    site = SiteDirectory(root)
    if asked is None:
        hold = memory.read_hold(root)
        if hold is not None and hold.refused is None:
            # Asked for before, perhaps done: what is previous now is what was gone away from.
            before: Edition | None = hold.edition
        else:
            # While a flip is under way, back is where it began.
            before = next((one for one in editions.load if one != editions.serve), editions.previous)
        if before is None:
            raise RollbackFault(f"{root} has no previous edition", "name one with --to, or promote one")
        edition = before
    else:
        prefix, _, number = asked.partition("+")
        found = sorted(path.name for path in site.bundles.glob(f"{prefix}*") if path.is_dir() and len(path.name) == 64)
        if not prefix or len(found) != 1 or not (number or "0").isdecimal():
            there = ", ".join(sorted(path.name[:12] for path in site.bundles.glob("[0-9a-f]*") if path.is_dir()))
            raise RollbackFault(f"{asked!r} names no bundle of this site, or several", f"on disk are {there or 'none'}")
        edition = Edition(bundle=found[0], delta=int(number or "0"))
    try:
        site.delta_paths(edition)
    except BundleFault as error:
        raise RollbackFault(str(error), "name an edition that is on disk") from error
    if not site.bundle(edition.bundle).is_dir():
        raise RollbackFault(f"the bundle of {edition} is not on disk", "name one that is with --to")
    return edition
