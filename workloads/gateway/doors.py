"""The gateway's neighbours, each behind one narrow door: the rankers here and next door, retrieval, intake.

A door turns a neighbour's ways of failing into one `DoorFault` with a fixed reason, and checks what
comes back before anybody uses it. Real doors speak HTTP over `neighbour.Neighbour`; the fakes beside them answer at
once, late or not at all, as told. Doors hold no policy: whether to call is the router's and the ladder's question.

Triton's wire format: KServe v2 with the binary tensor data extension
(https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import msgspec
import numpy as np
import numpy.typing as npt

from workloads.bundle.session import open_session
from workloads.contract.editions import Edition
from workloads.contract.events import Event
from workloads.contract.http import (
    DEADLINE_HEADER,
    PATH_CANDIDATES,
    PATH_HEALTH,
    PATH_INTAKE,
    PATH_RANK,
    PATH_READY,
    BackendState,
    CandidatesAnswer,
    CandidatesQuery,
    EventsAnswer,
    RankAnswer,
    RankQuery,
)
from workloads.contract.slo import CANDIDATES_RANKED
from workloads.contract.tensors import RANKER, STUDENT
from workloads.data.fusion import Candidates
from workloads.gateway.ladder import Reason
from workloads.gateway.neighbour import Late, Neighbour, Reply, Unreachable

Sparse = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

RETRY_AFTER_MAX_S: Final = 300
STATE_TIMEOUT_S: Final = 0.25
"""How long a neighbour may take to say that it is ready."""


class DoorFault(Exception):  # noqa: N818 - as BundleFault
    """A neighbour gave no answer that can be used. `detail` is for a log; it holds no data of a request."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Ranker(Protocol):
    """Scores candidates."""

    async def probabilities(self, sparse: Sparse, dense: Floats, timeout_s: float) -> Floats:
        """Click probability of each row, [C], from the ranker's inputs [C, F_s] and [C, F_d]. Raises DoorFault."""
        ...

    async def state(self) -> BackendState:
        """Whether it would answer now."""
        ...

    async def close(self) -> None:
        """Give its resources back."""
        ...


class Retrieval(Protocol):
    """Finds candidates."""

    async def candidates(self, query: CandidatesQuery, timeout_s: float) -> CandidatesAnswer:
        """At most `query.count` candidates of the bundle that the query names. Raises DoorFault."""
        ...

    async def state(self) -> BackendState:
        """Whether it would answer now."""
        ...

    async def close(self) -> None:
        """Give its resources back."""
        ...


class IntakeFault(Exception):  # noqa: N818 - as BundleFault
    """Events are not known to be on disk. The message is for the client; it holds no data of a request."""

    def __init__(self, why: str, retry_after_s: int = 1) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s
        """What the intake asked for, or a moment."""


class IntakeBusy(IntakeFault):
    """The intake takes no more now, so that its queue and its disk keep room: senders are to slow down."""


class Intake(Protocol):
    """Keeps events."""

    async def append(self, events: Sequence[Event], timeout_s: float) -> EventsAnswer:
        """Returns when all are on disk. Raises IntakeFault."""
        ...

    async def state(self) -> BackendState:
        """Whether it would answer now."""
        ...

    async def close(self) -> None:
        """Give its resources back."""
        ...


class TritonRanker:
    """The ranker of one bundle in the site's Triton."""

    def __init__(self, host_port: str, bundle_id: str) -> None:
        self._model = RANKER.triton_name(bundle_id)
        self._at = neighbour(host_port)
        headers = (("content-type", "application/octet-stream"),)
        self._head = self._at.head("POST", f"/v2/models/{self._model}/infer", headers)
        self._ready = self._at.head("GET", f"/v2/models/{self._model}/ready")
        self._requests: dict[int, tuple[bytes, bytes]] = {}

    async def probabilities(self, sparse: Sparse, dense: Floats, timeout_s: float) -> Floats:
        """See `Ranker`."""
        rows = len(sparse)
        header, more_head = self._request(rows)
        body = (header, sparse.data.cast("B"), dense.data.cast("B"))
        try:
            reply = await self._at.send(self._head, body, timeout_s, more_head)
        except Unreachable as error:
            raise DoorFault(Reason.RANKER_DOWN, f"Triton: {error}") from None
        except Late:
            raise DoorFault(Reason.RANKER_LATE, f"Triton gave no answer in {timeout_s * 1000:.0f} ms") from None
        if reply.status != 200:
            raise self._fault(reply)
        return self._scores(reply, rows)

    def _request(self, rows: int) -> tuple[bytes, bytes]:
        """The JSON part of a request for so many rows, and the header line that says its length; made once each.

        It names no timeout: Triton would look at one only under a queue policy, and the gateway counts the time itself.
        """
        made = self._requests.get(rows)
        if made is None:
            inputs = [
                {
                    "name": spec.name,
                    "datatype": _TRITON_TYPES[spec.dtype],
                    "shape": [rows, *spec.shape],
                    "parameters": {"binary_data_size": rows * int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize},
                }
                for spec in RANKER.inputs
            ]
            header = msgspec.json.encode({"inputs": inputs, "parameters": {"binary_data_output": True}})
            made = self._requests[rows] = header, b"inference-header-content-length: %d\r\n" % len(header)
        return made

    def _fault(self, reply: Reply) -> DoorFault:
        text = _error_text(reply)
        if reply.status == 503:
            reason = Reason.RANKER_BUSY
        elif "unknown model" in text or "no available versions" in text or "is not ready" in text:
            reason = Reason.RANKER_NOT_LOADED
        else:
            reason = Reason.RANKER_FAULT
        return DoorFault(reason, f"Triton answered {reply.status}: {text}")

    def _scores(self, reply: Reply, rows: int) -> Floats:
        """The tail of the body is the one output; its size says whether it is what was asked for."""
        length = reply.headers.get(b"inference-header-content-length", b"")
        start = int(length) if length.isdigit() else -1
        if start < 0 or len(reply.body) - start != 4 * rows:
            detail = f"Triton answered {len(reply.body) - start} bytes of scores for {rows} candidates"
            raise DoorFault(Reason.RANKER_NONSENSE, detail)
        scores: Floats = np.frombuffer(reply.body, dtype="<f4", offset=start)
        return _checked(scores)

    async def state(self) -> BackendState:
        """See `Ranker`."""
        return await _state(self._at, self._ready, f"the model {self._model}")

    async def close(self) -> None:
        """See `Ranker`."""
        await self._at.close()


class PeerRanker:
    """The other site's Triton, by way of its gateway: the same edition, or none at all.

    What goes over are features of one request and item indices; nothing in them names anybody.
    """

    def __init__(self, name: str, url: str, edition: Edition) -> None:
        self.name = name
        self._edition = edition
        self._at = neighbour(url)
        self._head = self._at.head("POST", PATH_RANK, _MSGPACK)
        self._alive = self._at.head("GET", PATH_HEALTH)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(RankAnswer).decode

    async def probabilities(self, sparse: Sparse, dense: Floats, timeout_s: float) -> Floats:
        """See `Ranker`. The other site is told how much time is left, and nothing else of the request."""
        rows = len(sparse)
        query = RankQuery(
            bundle=self._edition.bundle,
            delta=self._edition.delta,
            rows=rows,
            sparse=sparse.tobytes(),
            dense=dense.tobytes(),
        )
        deadline = b"%b: %.1f\r\n" % (_DEADLINE, max(timeout_s * 1000.0, 1.0))
        try:
            reply = await self._at.send(self._head, (self._encode(query),), timeout_s, deadline)
        except Unreachable as error:
            raise DoorFault(Reason.PEER_DOWN, f"{self.name}: {error}") from None
        except Late:
            late = f"{self.name} gave no answer in {timeout_s * 1000:.0f} ms"
            raise DoorFault(Reason.PEER_LATE, late) from None
        if reply.status != 200:
            reason = _PEER_REASONS.get(reply.status, Reason.PEER_FAULT)
            raise DoorFault(reason, f"{self.name} answered {reply.status}: {_error_text(reply)}")
        return self._scores(reply.body, rows)

    def _scores(self, body: bytes, rows: int) -> Floats:
        """Scores of this edition for so many rows, or a fault: those of another would order other items."""
        try:
            answer = self._decode(body)
        except _UNREADABLE as error:
            raise DoorFault(Reason.PEER_NONSENSE, f"{self.name}'s answer is no RankAnswer: {error}") from None
        if (answer.bundle, answer.delta) != (self._edition.bundle, self._edition.delta):
            detail = f"{self.name} answered from {answer.bundle[:12]!r}+{answer.delta}, asked was {self._edition}"
            raise DoorFault(Reason.PEER_OTHER_BUNDLE, detail)
        if len(answer.probability) != 4 * rows:
            detail = f"{self.name} answered {len(answer.probability)} bytes of scores for {rows} candidates"
            raise DoorFault(Reason.PEER_NONSENSE, detail)
        scores: Floats = np.frombuffer(answer.probability, dtype="<f4")
        return _checked(scores, Reason.PEER_NONSENSE, self.name)

    async def state(self) -> BackendState:
        """Whether the other gateway lives. Not whether it is ready: it would ask us in turn."""
        return await _state(self._at, self._alive, f"the gateway of {self.name}")

    async def close(self) -> None:
        """See `Ranker`."""
        await self._at.close()


class StudentRanker:
    """Rung 2: the bundle's small student in INT8, in this process, so that nothing on a network can take it away.

    It runs on the event loop: 200 candidates are 0.12 ms there (p95 0.2), and 0.18 ms by way of a thread, whose p95 was
    6.4 ms when both cores were busy.
    """

    def __init__(self, path: Path) -> None:
        """Open `student.onnx`. Raises ValueError when it is not what `tensors.STUDENT` says."""
        try:
            self._session = open_session(path)
        except Exception as error:  # its exceptions have no base class of their own
            raise ValueError(f"{path.name} cannot be opened by ONNX Runtime: {error}") from None
        wanted = [spec.name for spec in STUDENT.inputs]
        if sorted(entry.name for entry in self._session.get_inputs()) != sorted(wanted):
            raise ValueError(f"{path.name} has other inputs than {' and '.join(wanted)}")
        self._outputs = [spec.name for spec in STUDENT.outputs]
        # Once for nothing: the first run of a session takes many times as long as those after it.
        nothing = {
            spec.name: np.zeros((CANDIDATES_RANKED, *spec.shape), dtype=np.dtype(spec.dtype)) for spec in STUDENT.inputs
        }
        self._session.run(self._outputs, nothing)

    async def probabilities(self, sparse: Sparse, dense: Floats, timeout_s: float) -> Floats:  # noqa: ARG002 - Ranker's
        """See `Ranker`. It takes the time that it takes, and lets nothing else go on meanwhile."""
        try:
            found = self._session.run(self._outputs, {"sparse": sparse, "dense": dense})[0]
        except Exception as error:  # as above
            raise DoorFault(Reason.STUDENT_FAULT, f"the student: {error}") from None
        scores: Floats = found.reshape(-1)
        if len(scores) != len(sparse):
            raise DoorFault(Reason.STUDENT_FAULT, f"the student gave {len(scores)} scores for {len(sparse)} candidates")
        return _checked(scores, Reason.STUDENT_FAULT, "the student")

    async def state(self) -> BackendState:
        """See `Ranker`: where there is one, it answers."""
        return BackendState(up=True, detail="the student is loaded")

    async def close(self) -> None:
        """Nothing to give back but memory."""


class HttpRetrieval:
    """The site's retrieval service."""

    def __init__(self, url: str) -> None:
        self._at = neighbour(url)
        self._head = self._at.head("POST", PATH_CANDIDATES, _MSGPACK)
        self._ready = self._at.head("GET", PATH_READY)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(CandidatesAnswer).decode

    async def candidates(self, query: CandidatesQuery, timeout_s: float) -> CandidatesAnswer:
        """See `Retrieval`."""
        try:
            reply = await self._at.send(self._head, (self._encode(query),), timeout_s)
        except Unreachable as error:
            raise DoorFault(Reason.RETRIEVAL_DOWN, f"retrieval: {error}") from None
        except Late:
            raise DoorFault(Reason.RETRIEVAL_LATE, f"retrieval gave no answer in {timeout_s * 1000:.0f} ms") from None
        if reply.status == 409:
            raise DoorFault(Reason.RETRIEVAL_OTHER_BUNDLE, f"retrieval serves another bundle: {_error_text(reply)}")
        if reply.status != 200:
            raise DoorFault(Reason.RETRIEVAL_FAULT, f"retrieval answered {reply.status}: {_error_text(reply)}")
        try:
            return self._decode(reply.body)
        except _UNREADABLE as error:
            raise DoorFault(Reason.RETRIEVAL_FAULT, f"retrieval's answer is no CandidatesAnswer: {error}") from None

    async def state(self) -> BackendState:
        """See `Retrieval`."""
        return await _state(self._at, self._ready, "retrieval")

    async def close(self) -> None:
        """See `Retrieval`."""
        await self._at.close()


class HttpIntake:
    """The intake at home."""

    def __init__(self, url: str) -> None:
        self._at = neighbour(url)
        self._head = self._at.head("POST", PATH_INTAKE, _MSGPACK)
        self._ready = self._at.head("GET", PATH_READY)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(EventsAnswer).decode

    async def append(self, events: Sequence[Event], timeout_s: float) -> EventsAnswer:
        """See `Intake`."""
        try:
            reply = await self._at.send(self._head, (self._encode({"events": events}),), timeout_s)
        except Unreachable as error:
            raise IntakeFault(f"the intake cannot be reached: {error}") from None
        except Late:
            raise IntakeFault(f"the intake gave no answer in {timeout_s * 1000:.0f} ms") from None
        if reply.status != 200:
            after = reply.headers.get(b"retry-after", b"")
            retry_after_s = min(int(after), RETRY_AFTER_MAX_S) if after.isdigit() else 1
            if reply.status == 429:
                raise IntakeBusy("the intake takes no more events for now", retry_after_s)
            raise IntakeFault(f"the intake answered {reply.status}", retry_after_s)
        try:
            return self._decode(reply.body)
        except _UNREADABLE:
            raise IntakeFault("the intake answered what is no acknowledgement") from None

    async def state(self) -> BackendState:
        """See `Intake`."""
        return await _state(self._at, self._ready, "the intake")

    async def close(self) -> None:
        """See `Intake`."""
        await self._at.close()


def neighbour(where: str) -> Neighbour:
    """The neighbour at `host:port` or `http://host:port`. Raises ValueError for anything else."""
    parts = urlsplit(where if "//" in where else f"//{where}")
    if parts.scheme not in {"", "http"} or not parts.hostname or not parts.port or parts.path.strip("/"):
        raise ValueError(f"{where!r} is no address; write http://host:port, or host:port")
    return Neighbour(parts.hostname, parts.port)


_MSGPACK: Final = (("content-type", "application/msgpack"),)
_DEADLINE: Final = DEADLINE_HEADER.lower().encode()
_PEER_REASONS: Final = {
    409: Reason.PEER_OTHER_BUNDLE,
    429: Reason.PEER_BUSY,
    503: Reason.PEER_BUSY,
}
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec's decoders raise; the second for text that is not UTF-8."""
_TRITON_TYPES: Final = {"int64": "INT64", "float32": "FP32"}


def _checked(scores: Floats, reason: Reason = Reason.RANKER_NONSENSE, who: str = "Triton") -> Floats:
    """Probabilities, or a fault: a NaN that passed would end up in an order that nobody meant."""
    # One comparison chain finds NaN, too: it is in no range.
    if not ((scores >= 0.0) & (scores <= 1.0)).all():
        raise DoorFault(reason, f"{who} answered scores that are no probabilities")
    return scores


async def _state(at: Neighbour, head: bytes, what: str) -> BackendState:
    try:
        reply = await at.send(head, timeout_s=STATE_TIMEOUT_S)
    except Unreachable as error:
        return BackendState(up=False, detail=str(error))
    except Late:
        return BackendState(up=False, detail=f"{what} did not say whether it is ready in {STATE_TIMEOUT_S:g} s")
    if reply.status == 200:
        return BackendState(up=True, detail=f"{what} is ready")
    said = _error_text(reply)
    return BackendState(up=False, detail=f"{what} is not ready ({reply.status}){': ' + said if said else ''}")


def _error_text(reply: Reply) -> str:
    """What a neighbour says about its failure, in one short line."""
    try:
        match msgspec.json.decode(reply.body):
            case {"error": str(text)} | {"detail": str(text)}:
                pass
            case _:
                text = reply.body.decode()
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = reply.body[:200].decode(errors="replace")
    return " ".join(text.split())[:200]


class FakeNeighbour:
    """What the fakes share: answer after `delay_s` of `sleep`, or fail with `fault`; count the calls.

    The timeout holds as it does for a real door, against the same sleep.
    """

    def __init__(self, sleep: Callable[[float], Any] = asyncio.sleep) -> None:
        self.delay_s = 0.0
        self.fault: Exception | None = None
        self.calls = 0
        self._sleep = sleep

    async def wait(self, timeout_s: float, late: Exception) -> None:
        """Take the time that it takes; raise what was set."""
        self.calls += 1
        if self.delay_s:
            await self._sleep(min(self.delay_s, timeout_s))
        if self.delay_s > timeout_s:
            raise late
        if self.fault is not None:
            raise self.fault

    async def state(self) -> BackendState:
        """Up unless a fault is set."""
        return BackendState(up=self.fault is None, detail=str(self.fault or "a fake that answers"))

    async def close(self) -> None:
        """Nothing to give back."""


class FakeRanker(FakeNeighbour):
    """Scores by a function of its inputs; the default prefers high item indices."""

    late: Reason = Reason.RANKER_LATE
    score: Callable[[Sparse, Floats], Floats] = staticmethod(
        lambda sparse, _: (sparse[:, 0] / (sparse[:, 0].max(initial=0) + 1)).astype(np.float32)
    )

    async def probabilities(self, sparse: Sparse, dense: Floats, timeout_s: float) -> Floats:
        """See `Ranker`."""
        await self.wait(timeout_s, DoorFault(self.late, "a fake that is late"))
        return _checked(self.score(sparse, dense))


class FakeRetrieval(FakeNeighbour):
    """Answers the items it was given, in order; keeps the queries it was asked."""

    def __init__(self, bundle: str, items: Sequence[int] = (), sleep: Callable[[float], Any] = asyncio.sleep) -> None:
        super().__init__(sleep)
        self.bundle = bundle
        self.delta = 0
        self.items = list(items)
        self.queries: list[CandidatesQuery] = []

    async def candidates(self, query: CandidatesQuery, timeout_s: float) -> CandidatesAnswer:
        """See `Retrieval`."""
        self.queries.append(query)
        await self.wait(timeout_s, DoorFault(Reason.RETRIEVAL_LATE, "a fake that is late"))
        items = [item for item in self.items if item not in query.exclude][: query.count]
        scores = [1.0 / (1 + place) for place in range(len(items))]
        return Candidates.of(items, scores, scores, [0] * len(items)).answer(self.bundle, self.delta)


class FakeIntake(FakeNeighbour):
    """Keeps events in a list; an event id that was there before is a duplicate."""

    def __init__(self, sleep: Callable[[float], Any] = asyncio.sleep) -> None:
        super().__init__(sleep)
        self.kept: dict[str, Event] = {}

    async def append(self, events: Sequence[Event], timeout_s: float) -> EventsAnswer:
        """See `Intake`."""
        await self.wait(timeout_s, IntakeFault("the intake gave no answer in time"))
        before = len(self.kept)
        for event in events:
            self.kept.setdefault(event.event_id, event)
        accepted = len(self.kept) - before
        return EventsAnswer(accepted=accepted, duplicates=len(events) - accepted)
