"""Empties every place of the people in the vault's queue, and says in the audit log that it is done.

All places are emptied in every pass, whatever an earlier one did: that is how the job goes on after a kill anywhere. A
person's entry leaves the queue last, and not before a pass that began `settle_ms` after they were forgotten: until
then a request that named them could still be on its way to a place that was emptied already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from workloads.erasure.places import Place
from workloads.privacy.audit import Audit
from workloads.privacy.vault import Vault
from workloads.telemetry.progress import Progress

ACTOR: Final = "erasure"
ACTION: Final = "person.erased"
SETTLE_MS: Final = 65_000
"""A request lives at most a minute (`contract.http.DEADLINE_MAX_MS`)."""


def run_pass(
    vault: Vault,
    places: Sequence[Place],
    audit: Audit,
    progress: Progress,
    *,
    clock: Callable[[], int],
    settle_ms: int = SETTLE_MS,
) -> int:
    """Empty all places once of everybody in the queue; milliseconds until the next pass is due, 0 for none.

    The audit log gets one line a person: the ticket, how many people the pass was for, and what was removed of them all
    together (of earlier passes nothing is known any more). Raises PlaceError, VaultError and AuditError; the queue then
    still has everybody who is not done.
    """
    queue = vault.queue()
    if not queue:
        return 0
    began = clock()
    people = {name for erasure in queue for name in erasure.pseudonyms}
    removed: dict[str, int] = {}
    for number, place in enumerate(places):
        progress.step("erase", number, len(places), "places")
        removed[place.name] = place.remove(people)
    progress.step("erase", len(places), len(places), "places")
    left = 0
    for erasure in queue:
        wait = erasure.asked_ms + settle_ms - began
        if wait > 0:
            left = wait if left == 0 else min(left, wait)
            continue
        audit.append(
            action=ACTION,
            actor=ACTOR,
            subject=erasure.ticket,
            detail={"people_in_pass": len(queue), "asked_ms": erasure.asked_ms, **removed},
        )
        vault.done(erasure.ticket)
        progress.note("erase", f"{erasure.ticket} is done")
    return left
