"""One request from what is known of a user to a list of items: features, candidates, rank, rules.

Each stage is timed and has its share of the deadline. What is late, lost or wrong costs a rung and
never the answer: a ranker's order (`ranking`), else the retrieval's, else the traditional recommender's. What that
proposes is ranked by nobody: it has none of the retrieval's scores, which rankers learned to read. Users
come in as pseudonyms. HTTP, JSON and raw ids are not known here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from workloads.bundle.store import Bundle
from workloads.contract.http import (
    SOURCES,
    CandidatesAnswer,
    CandidatesQuery,
    RankedItem,
    RecommendRequest,
    SearchRequest,
    Served,
    SimilarRequest,
)
from workloads.contract.quality import Protocol
from workloads.contract.slo import CANDIDATES_RANKED, Endpoint, Rung, Stage
from workloads.contract.tensors import PAD
from workloads.data.definitions import Touch
from workloads.data.features import ItemTables, Taste, UserState, rank_features
from workloads.data.fusion import Candidates
from workloads.gateway import rules
from workloads.gateway.doors import DoorFault, Retrieval
from workloads.gateway.ladder import (
    BEST_RUNG,
    WORTH_TRYING_MS,
    Circuit,
    Leave,
    Reason,
    candidates_budget_ms,
    counts_as_late,
    rank_budget_ms,
    ranks,
)
from workloads.gateway.people import Known, People
from workloads.gateway.ranking import Ranked, Ranking
from workloads.gateway.timing import Clock, Timer
from workloads.gateway.traditional import Traditional
from workloads.telemetry import log

Ints = npt.NDArray[np.int32]
Kind = Literal["recommend", "search", "similar"]

SPARE: Final = 2
"""Candidates asked for per item of the answer where nothing is ranked: the rules take some away."""

_nobody: Final = np.empty(0, dtype=np.int32)
_logger = log.get(component="pipeline")


class Wish(NamedTuple):
    """No better rung than this is wanted, and why."""

    rung: int = Rung.FULL_RANKER
    reason: Reason | None = None


_PLAIN: Final = Wish(Rung.TRADITIONAL, Reason.ASKED)
ANY: Final = Wish()


@dataclasses.dataclass(frozen=True)
class Question:
    """What the stages need to know of a request."""

    endpoint: Endpoint
    kind: Kind
    k: int
    state: UserState
    exclude: Ints
    """Item indices that the answer leaves out."""
    traditional: Callable[[], Candidates]
    """What rung 4 proposes."""
    query: str | None = None
    varied: bool = False
    """Whether one category may not fill the answer."""
    wish: Wish = ANY
    protocol: Protocol | None = None
    """By which the loss of a rung is measured; None where it is not."""
    unknown: Reason | None = None
    """Why the state lacks a profile that there may be."""


@dataclasses.dataclass(frozen=True)
class Course:
    """What became of a question: candidates in the order to answer, and how they came about."""

    candidates: Candidates
    scores: npt.NDArray[np.float32]
    rung: int
    reason: Reason | None
    ranked: int | None = None
    ranked_at: str | None = None
    predicted_ms: float | None = None


class Pipeline:
    """All stages over one edition; a request is one call of `recommend`, `search` or `similar`."""

    def __init__(
        self,
        *,
        site: str,
        bundle: Bundle,
        delta: int = 0,
        ranking: Ranking,
        retrieval: Retrieval,
        people: People | None,
        clock: Clock,
        best_rung: Mapping[str, int] = BEST_RUNG,
        on_fault: Callable[[Reason], None] = lambda _: None,
    ) -> None:
        """`on_fault` is told of every call to retrieval or profiles that brought no usable answer.

        `delta` says how many deltas `bundle` was opened with. Doors and people belong to the application.
        """
        self.site = site
        self.bundle = bundle
        self.delta = delta
        # Plain arrays: numpy's memmap type pays for its bookkeeping on every operation.
        self.tables = ItemTables.of({name: table.view(np.ndarray) for name, table in bundle.tables.items()})
        self.best_rung = best_rung
        self._in_stock = self.tables.in_stock != 0
        self._traditional = Traditional(self.tables, bundle.titles)
        self.ranking = ranking
        self._losses = _losses(bundle)
        self._retrieval, self._retrieval_circuit = retrieval, Circuit()
        self._people = people
        self._clock = clock
        self._on_fault = on_fault

    async def recommend(
        self, request: RecommendRequest, user: str | None, timer: Timer, wish: Wish = ANY
    ) -> tuple[list[RankedItem], Served]:
        """`/v1/recommend`. `user` is a pseudonym."""
        index = self.bundle.index
        known = await self._known(user)
        state = self._state(known.touches, request.history)
        exclude = _nobody
        if not request.repeats:
            session = [index[item] for item in request.history if item in index]
            exclude = np.concatenate([state.bought_items, np.array(session, dtype=np.int32)])
        return await self._answer(
            Question(
                endpoint=Endpoint.RECOMMEND,
                kind="recommend",
                k=request.k,
                state=state,
                exclude=exclude,
                traditional=lambda: self._traditional.recommend(state),
                varied=True,
                wish=wish if request.use_model else _PLAIN,
                protocol="repeats" if request.repeats else "novel",
                unknown=known.reason,
            ),
            timer,
        )

    async def search(
        self, request: SearchRequest, user: str | None, timer: Timer, wish: Wish = ANY
    ) -> tuple[list[RankedItem], Served]:
        """`/v1/search`. `user` is a pseudonym."""
        # Taste plays a part only where the ranker does: the order of retrieval is the query's alone.
        known = await self._known(user if ranks(self.best_rung[Endpoint.SEARCH]) else None)
        state = self._state(known.touches, ())
        return await self._answer(
            Question(
                endpoint=Endpoint.SEARCH,
                kind="search",
                k=request.k,
                state=state,
                exclude=_nobody,
                traditional=lambda: self._traditional.search(request.query),
                query=request.query,
                wish=wish,
                protocol="search",
                unknown=known.reason,
            ),
            timer,
        )

    async def similar(self, request: SimilarRequest, timer: Timer, wish: Wish = ANY) -> tuple[list[RankedItem], Served]:
        """`/v1/similar`."""
        item = self.bundle.index.get(request.item, PAD)
        state = self._state((), (request.item,))
        return await self._answer(
            Question(
                endpoint=Endpoint.SIMILAR,
                kind="similar",
                k=request.k,
                state=state,
                exclude=np.array([item], dtype=np.int32) if item else _nobody,
                traditional=lambda: self._traditional.similar(item),
                wish=wish,
            ),
            timer,
        )

    def warm_up(self) -> None:
        """Go once through all that is computed here: first calls import, allocate and take a hundred times as long."""
        state = self._state((), [item for item in self.bundle.item_ids[1:4] if item])
        candidates = self._traditional.recommend(state)
        rank_features(state, candidates, self.tables, self.bundle.features)
        question = Question(
            endpoint=Endpoint.RECOMMEND,
            kind="recommend",
            k=2 * len(candidates.items),
            state=state,
            exclude=state.items,
            traditional=lambda: candidates,
            varied=True,
        )
        self._obey_rules(question, Course(candidates, candidates.scores, Rung.TRADITIONAL, None))
        self._traditional.search(self.bundle.titles[-1])

    async def _known(self, user: str | None) -> Known:
        known = Known() if user is None or self._people is None else await self._people.known(user)
        if known.reason is not None:
            self._on_fault(known.reason)
        return known

    def _state(self, touches: Sequence[Touch], history: Sequence[str]) -> UserState:
        return UserState.of(touches, history, self._clock.wall_ms(), self.bundle.index)

    async def _answer(self, question: Question, timer: Timer) -> tuple[list[RankedItem], Served]:
        course = await self._course(question, timer)
        reason = course.reason or question.unknown
        items = self._obey_rules(question, course)
        timer.lap(Stage.RULES)
        served = Served(
            rung=course.rung,
            site=self.site,
            bundle=self.bundle.short,
            delta=self.delta,
            stages_ms={stage: round(spent, 3) for stage, spent in timer.stages_ms.items()},
            reason=None if reason is None else reason.value,
            ranked=course.ranked,
            ranked_at=course.ranked_at,
            loss=self._losses.get((question.protocol, course.rung)),
            predicted_ms=course.predicted_ms,
        )
        return items, served

    async def _course(self, question: Question, timer: Timer) -> Course:
        """Down the ladder until something answers; the last rung always does."""
        best, wish = self.best_rung[question.endpoint], question.wish
        aim = max(best, wish.rung)
        lowered = wish.reason if aim > best else None
        timer.lap(Stage.FEATURES)
        if aim >= Rung.TRADITIONAL:
            return self._plain(question, timer, lowered)
        # While retrieval works: what is called soon runs once this request waits for it.
        taste = functools.cache(functools.partial(Taste.of, question.state, self.tables, self.bundle.features.items))
        soon = asyncio.get_running_loop().call_soon(taste) if ranks(aim) else None
        try:
            candidates = await self._candidates(question, timer, ranked_after=ranks(aim))
        except DoorFault as fault:
            if soon is not None:
                soon.cancel()
            return self._plain(question, timer, fault.reason)
        finally:
            timer.lap(Stage.CANDIDATES)
        if not ranks(aim):
            return Course(candidates, candidates.scores, aim, lowered)
        sparse, dense = rank_features(question.state, candidates, self.tables, self.bundle.features, taste())
        timer.lap(Stage.FEATURES)
        try:
            left_ms = rank_budget_ms(timer.deadline_ms, timer.spent_ms())
            ranked = await self.ranking.rank(sparse, dense, left_ms, aim)
        except DoorFault as fault:
            return Course(candidates, candidates.scores, Rung.RETRIEVAL_SCORE, lowered or fault.reason)
        finally:
            timer.lap(Stage.RANK)
        return self._in_order(candidates, ranked, lowered)

    def _in_order(self, candidates: Candidates, ranked: Ranked, lowered: Reason | None) -> Course:
        """The candidates by the scores of a ranker."""
        probabilities, route = ranked.probabilities, ranked.route
        order = np.argsort(-probabilities, kind="stable")
        return Course(
            _ordered(candidates, order),
            probabilities[order],
            route.rung,
            ranked.reason or lowered,
            ranked=len(order),
            ranked_at=route.site,
            predicted_ms=round(ranked.predicted_ms, 3),
        )

    def _plain(self, question: Question, timer: Timer, reason: Reason | None) -> Course:
        candidates = question.traditional()
        timer.lap(Stage.CANDIDATES)
        return Course(candidates, candidates.scores, Rung.TRADITIONAL, reason)

    async def _candidates(self, question: Question, timer: Timer, *, ranked_after: bool) -> Candidates:
        """The retrieval's proposals. Raises DoorFault: no time, not to be called now, or not usable."""
        budget_ms = candidates_budget_ms(timer.deadline_ms, timer.spent_ms(), ranked_after=ranked_after)
        given = self._leave(self._retrieval_circuit, budget_ms)
        query = CandidatesQuery(
            bundle=self.bundle.id,
            delta=self.delta,
            kind=question.kind,
            **of_state(question.state),
            query=question.query,
            count=count_for(question.k, ranked_after=ranked_after),
            exclude=question.exclude.tolist(),
        )
        try:
            answer = await self._retrieval.candidates(query, budget_ms / 1000.0)
            candidates = self._usable(answer)
        except DoorFault as fault:
            self._failed(self._retrieval_circuit, given, fault, budget_ms)
            raise
        except BaseException:
            self._retrieval_circuit.abandoned(given)
            raise
        if self._retrieval_circuit.succeeded():
            _logger.info("retrieval is back")
        if not len(candidates.items):
            raise DoorFault(Reason.RETRIEVAL_EMPTY, "retrieval found nothing")
        return candidates

    def _leave(self, circuit: Circuit, budget_ms: float) -> Leave:
        """Leave to call. Raises DoorFault when there is no time for it, or the neighbour is known to be lost."""
        if budget_ms < WORTH_TRYING_MS:
            raise DoorFault(Reason.NO_TIME, "the deadline leaves no time")
        given = circuit.leave(self._clock.now_s())
        if given is Leave.NO:
            raise DoorFault(circuit.reason or Reason.NO_TIME, "not called while its circuit is open")
        return given

    def _failed(self, circuit: Circuit, given: Leave, fault: DoorFault, budget_ms: float) -> None:
        self._on_fault(fault.reason)
        if fault.reason is Reason.RETRIEVAL_LATE and not counts_as_late(Stage.CANDIDATES, budget_ms):
            circuit.abandoned(given)
        elif circuit.failed(fault.reason, given, self._clock.now_s()):
            _logger.warning("a neighbour is lost", reason=fault.reason.value, fault=fault.detail)

    def _usable(self, answer: CandidatesAnswer) -> Candidates:
        """The answer as arrays, held against the bundle. Raises DoorFault for what must not be used."""
        if answer.bundle != self.bundle.id or answer.delta != self.delta:
            detail = (
                f"retrieval answered from {answer.bundle[:12]!r}+{answer.delta}, "
                f"the request is on {self.bundle.short}+{self.delta}"
            )
            raise DoorFault(Reason.RETRIEVAL_OTHER_BUNDLE, detail)
        try:
            candidates = Candidates.read(answer)
        except ValueError as error:
            raise DoorFault(Reason.RETRIEVAL_FAULT, f"retrieval answered {error}") from None
        items, source = candidates.items, candidates.source
        sound = not len(items) or (
            items.min() > PAD
            and items.max() < len(self.bundle.item_ids)
            and source.min() >= 0
            and source.max() < len(SOURCES)
            and np.isfinite(candidates.scores).all()
            and np.isfinite(candidates.ann).all()
        )
        if not sound:
            raise DoorFault(Reason.RETRIEVAL_FAULT, "retrieval answered items or scores that the bundle cannot hold")
        return candidates

    def _obey_rules(self, question: Question, course: Course) -> list[RankedItem]:
        ranked = course.candidates.items
        shown = rules.showable(self._in_stock, question.exclude)
        places = rules.choose(ranked, question.k, shown, self.tables.category if question.varied else None)
        chosen = ranked[places]
        ids = self.bundle.item_ids
        answer = [
            RankedItem(item=ids[item], score=round(score, 6), source=SOURCES[source])
            for item, score, source in zip(
                chosen.tolist(),
                course.scores[places].tolist(),
                course.candidates.source[places].tolist(),
                strict=True,
            )
        ]
        if len(answer) < question.k:
            filled = rules.fill(chosen, question.k, self._traditional.popular, shown)
            last = min(answer[-1].score, 0.0) if answer else 0.0
            answer += [RankedItem(item=ids[item], score=last, source="popular") for item in filled.tolist()]
        return answer


def count_for(k: int, *, ranked_after: bool) -> int:
    """How many candidates an answer of k items wants."""
    return max(CANDIDATES_RANKED, SPARE * k) if ranked_after else SPARE * k


def of_state(state: UserState) -> dict[str, Any]:
    """The fields of a CandidatesQuery that say who asks."""
    return {
        "history": state.items.tolist(),
        "history_strength": state.strength.tolist(),
        "history_age_hours": state.age_hours.tolist(),
        "context": state.context.tolist(),
    }


def _losses(bundle: Bundle) -> dict[tuple[Protocol | None, int], float]:
    """What the bundle's maker measured that each rung loses; nothing is lost at rung 1."""
    losses: dict[tuple[Protocol | None, int], float] = {}
    for row in bundle.manifest.quality.rungs:
        losses[row.protocol, row.rung] = row.loss
        losses[row.protocol, Rung.FULL_RANKER] = 0.0
    return losses


def _ordered(candidates: Candidates, order: npt.NDArray[np.intp]) -> Candidates:
    return Candidates(
        items=candidates.items[order],
        scores=candidates.scores[order],
        ann=candidates.ann[order],
        source=candidates.source[order],
    )
