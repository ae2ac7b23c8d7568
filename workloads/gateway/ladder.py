"""Which rung to try with how much time, and why an answer steps down. Pure: time comes in as numbers.

A stage gets its share of the deadline by the promises of `contract.slo`, after the reserve for
rules, encoding and the way home. A neighbour that failed is remembered by a `Circuit`, so that not every
request pays for finding out again; one request at a time probes whether it is back.
"""

from __future__ import annotations

import enum
from typing import Final

from workloads.contract.http import REASON_ASKED
from workloads.contract.slo import ANSWER_RESERVE_MS, STAGE_P99_MS, Endpoint, Rung, Stage

BEST_RUNG: Final[dict[str, int]] = {
    Endpoint.RECOMMEND.value: Rung.FULL_RANKER,
    Endpoint.SEARCH.value: Rung.RETRIEVAL_SCORE,
    Endpoint.SIMILAR.value: Rung.RETRIEVAL_SCORE,
}
"""The best rung of each endpoint where a bundle says nothing else."""

WORTH_TRYING_MS: Final = 1.0
"""With less time than this a call to a neighbour is not begun."""

FAILURES_IN_A_ROW: Final = 8
"""So many open a circuit. Fewer can be one pause of a busy machine, or one client's requests that a neighbour cannot
digest, and neither may cost the others their rung."""
PROBE_FIRST_S: Final = 0.1
PROBE_LAST_S: Final = 0.5
"""Probes of a lost neighbour come after this at first, and doubling up to the last: recovery is met within a second."""

PATIENCE: Final = 10.0
"""However far off a client's deadline is, a stage waits this many times its promise at most: a hung neighbour must not
hold a gateway's places for as long as its clients can wait."""

_CANDIDATES_SHARE: Final = 0.7
"""More than the stage's part of the promise: what comes late is ranked all the same, in a millisecond by the student if
by nobody else. What is given up costs the step to rung 4, where half of the order's worth is lost."""
_RANK_SHARE: Final = STAGE_P99_MS[Stage.RANK] / (STAGE_P99_MS[Stage.CANDIDATES] + STAGE_P99_MS[Stage.RANK])


class Reason(enum.StrEnum):
    """Why an answer is below the best configured rung. Fixed words: metrics carry them as labels."""

    ASKED = REASON_ASKED
    NO_TIME = "no_time"
    RANKER_DOWN = "ranker_down"
    RANKER_LATE = "ranker_late"
    RANKER_BUSY = "ranker_busy"
    RANKER_NOT_LOADED = "ranker_not_loaded"
    RANKER_FAULT = "ranker_fault"
    RANKER_NONSENSE = "ranker_nonsense"
    """It answered with NaN, or with another number of scores than candidates."""
    RANKER_SLOW = "ranker_slow"
    """No ranker was expected to answer in time, so none was waited for."""
    PEER_DOWN = "peer_down"
    PEER_LATE = "peer_late"
    PEER_BUSY = "peer_busy"
    """The other site wants its ranker for itself."""
    PEER_OTHER_BUNDLE = "peer_other_bundle"
    """The sites are on different editions, as they are for a moment at each flip."""
    PEER_FAULT = "peer_fault"
    PEER_NONSENSE = "peer_nonsense"
    STUDENT_FAULT = "student_fault"
    OVERLOAD = "overload"
    """So much is asked here that a lower rung for some is better than no answer."""
    RETRIEVAL_DOWN = "retrieval_down"
    RETRIEVAL_LATE = "retrieval_late"
    RETRIEVAL_FAULT = "retrieval_fault"
    RETRIEVAL_OTHER_BUNDLE = "retrieval_other_bundle"
    RETRIEVAL_EMPTY = "retrieval_empty"
    PROFILES_DOWN = "profiles_down"
    """The answer is whole and at its rung, but made as for somebody unknown: the profile could not be read."""


def counts_as_late(stage: Stage, budget_ms: float) -> bool:
    """Whether a neighbour that did not answer in `budget_ms` was late by its promise, not by the client's haste."""
    return budget_ms >= STAGE_P99_MS[stage] / 2


def ranks(best_rung: int) -> bool:
    """Whether the best answer of an endpoint passes the ranker."""
    return best_rung < Rung.RETRIEVAL_SCORE


def candidates_budget_ms(deadline_ms: float, spent_ms: float, *, ranked_after: bool) -> float:
    """How long candidates may take; with ranking to follow, only their share of the whole. Below 0: no time."""
    left = min(deadline_ms - ANSWER_RESERVE_MS - spent_ms, PATIENCE * STAGE_P99_MS[Stage.CANDIDATES])
    if not ranked_after:
        return left
    return min(left, (deadline_ms - ANSWER_RESERVE_MS) * _CANDIDATES_SHARE)


def rank_budget_ms(deadline_ms: float, spent_ms: float) -> float:
    """How long ranking may take: its share of the whole, or what is left if that is less. Below 0: no time."""
    whole = deadline_ms - ANSWER_RESERVE_MS
    return min(whole - spent_ms, whole * _RANK_SHARE, PATIENCE * STAGE_P99_MS[Stage.RANK])


class Leave(enum.Enum):
    """What a circuit says to somebody who wants to call."""

    NO = "no"
    CALL = "call"
    PROBE = "probe"
    """Call, and say how it went: whether the neighbour is back hangs on this call."""


class Circuit:
    """Whether to call a neighbour now. Closed: yes. Open: no, but for one probe at a time.

    Ask `leave`, then tell `succeeded` or `failed` (`abandoned` when the caller itself was called off),
    with what was given; `now_s` is any clock that does not go back.
    """

    def __init__(self) -> None:
        self._reason: Reason | None = None
        self._failures = 0
        self._wait_s = PROBE_FIRST_S
        self._probe_at_s = 0.0
        self._probing = False

    @property
    def reason(self) -> Reason | None:
        """Why the circuit is open; None when it is closed."""
        return self._reason

    def leave(self, now_s: float) -> Leave:
        """Whether this request may call."""
        if self._reason is None:
            return Leave.CALL
        if self._probing or now_s < self._probe_at_s:
            return Leave.NO
        self._probing = True
        return Leave.PROBE

    def succeeded(self) -> bool:
        """The neighbour answered well, whoever asked. True when this closed the circuit."""
        closed = self._reason is not None
        self._reason, self._failures, self._wait_s, self._probing = None, 0, PROBE_FIRST_S, False
        return closed

    def failed(self, reason: Reason, given: Leave, now_s: float) -> bool:
        """The neighbour did not answer well. True when this opened the circuit.

        A call that began while the circuit was closed and fails while it is open says nothing new.
        """
        if self._reason is None:
            self._failures += 1
            if self._failures < FAILURES_IN_A_ROW:
                return False
            self._reason, self._probe_at_s = reason, now_s + self._wait_s
            return True
        if given is Leave.PROBE:
            self._reason = reason
            self._wait_s = min(2 * self._wait_s, PROBE_LAST_S)
            self._probing, self._probe_at_s = False, now_s + self._wait_s
        return False

    def abandoned(self, given: Leave) -> None:
        """The caller was called off before the neighbour could answer: nothing is learnt."""
        if given is Leave.PROBE:
            self._probing = False
