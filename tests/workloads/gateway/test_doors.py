"""Each way a neighbour can fail becomes one reason, and what comes back is checked before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from workloads.bundle.store import Bundle
from workloads.contract.editions import Edition
from workloads.contract.events import Event, EventType
from workloads.contract.http import (
    CandidatesQuery,
    EventsAnswer,
    EventsRequest,
    RankAnswer,
    RankQuery,
)
from workloads.contract.tensors import RANKER, RANKER_DENSE, RANKER_SPARSE, USER_TOWER
from workloads.data.fusion import Candidates
from workloads.gateway import doors
from workloads.gateway.doors import (
    DoorFault,
    HttpIntake,
    HttpRetrieval,
    IntakeBusy,
    IntakeFault,
    PeerRanker,
    StudentRanker,
    TritonRanker,
)
from workloads.gateway.ladder import Reason
from workloads.gateway.neighbour import Late, Neighbour, Reply, Unreachable

BUNDLE = "ab" * 32
ROWS = 3


class Wire(Neighbour):
    """Keeps what would go out and answers as told."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1", 1)
        self.reply: Reply | Exception = Reply(200, {}, b"")
        self.head_sent, self.body_sent = b"", b""

    async def send(
        self, head: bytes, body: Sequence[bytes | memoryview] = (), timeout_s: float = 1.0, more_head: bytes = b""
    ) -> Reply:
        self.head_sent, self.body_sent = head + more_head, b"".join(body)
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    made = Wire()
    monkeypatch.setattr(doors, "neighbour", lambda _: made)
    return made


def batch() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return (
        random.integers(0, 100, (ROWS, len(RANKER_SPARSE)), dtype=np.int64),
        random.normal(size=(ROWS, len(RANKER_DENSE))).astype(np.float32),
    )


def scores(*values: float, header: bytes = b'{"outputs":[]}') -> Reply:
    body = header + np.array(values, dtype="<f4").tobytes()
    return Reply(200, {b"inference-header-content-length": b"%d" % len(header)}, body)


async def test_a_ranking_call_is_one_binary_request_to_the_bundles_model(wire: Wire):
    wire.reply = scores(0.1, 0.2, 0.3)
    sparse, dense = batch()
    answer = await TritonRanker("127.0.0.1:8000", BUNDLE).probabilities(sparse, dense, 1.0)
    assert answer.tolist() == pytest.approx([0.1, 0.2, 0.3])
    lines = wire.head_sent.decode().split("\r\n")
    assert lines[0] == f"POST /v2/models/ranker-{BUNDLE[:12]}/infer HTTP/1.1"
    (length,) = [int(line.split(": ")[1]) for line in lines if line.startswith("inference-header-content-length")]
    header = msgspec.json.decode(wire.body_sent[:length])
    assert [(tensor["name"], tensor["shape"]) for tensor in header["inputs"]] == [
        (spec.name, [ROWS, *spec.shape]) for spec in RANKER.inputs
    ]
    assert wire.body_sent[length:] == sparse.tobytes() + dense.tobytes()
    assert [tensor["parameters"]["binary_data_size"] for tensor in header["inputs"]] == [sparse.nbytes, dense.nbytes]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Unreachable("refused"), Reason.RANKER_DOWN),
        (Late("late"), Reason.RANKER_LATE),
        (Reply(400, {}, b'{"error":"Request for unknown model: \'ranker-x\' is not found"}'), Reason.RANKER_NOT_LOADED),
        (
            Reply(404, {}, b'{"error":"Request for unknown model: x has no available versions"}'),
            Reason.RANKER_NOT_LOADED,
        ),
        (Reply(503, {}, b'{"error":"Exceeds maximum queue size"}'), Reason.RANKER_BUSY),
        (Reply(500, {}, b'{"error":"indices element out of data bounds"}'), Reason.RANKER_FAULT),
        (Reply(500, {}, b"\xff\xfe no json"), Reason.RANKER_FAULT),
        (Reply(200, {}, b"{}"), Reason.RANKER_NONSENSE),
        (scores(0.1, 0.2), Reason.RANKER_NONSENSE),
        (scores(0.1, 0.2, 0.3, 0.4), Reason.RANKER_NONSENSE),
        (scores(0.1, float("nan"), 0.3), Reason.RANKER_NONSENSE),
        (scores(0.1, float("inf"), 0.3), Reason.RANKER_NONSENSE),
        (scores(0.1, -1.0, 0.3), Reason.RANKER_NONSENSE),
        (Reply(200, {b"inference-header-content-length": b"many"}, b"{}"), Reason.RANKER_NONSENSE),
    ],
)
async def test_every_failure_of_triton_has_its_reason(wire: Wire, reply: Reply | Exception, reason: Reason):
    wire.reply = reply
    with pytest.raises(DoorFault) as caught:
        await TritonRanker("127.0.0.1:8000", BUNDLE).probabilities(*batch(), 1.0)
    assert caught.value.reason is reason


EDITION = Edition(bundle=BUNDLE, delta=2)


def peer() -> PeerRanker:
    return PeerRanker("aws", "http://127.0.0.1:8080", EDITION)


def ranked(*values: float, bundle: str = BUNDLE, delta: int = 2) -> Reply:
    probability = np.array(values, dtype="<f4").tobytes()
    answer = RankAnswer(bundle=bundle, delta=delta, site="aws", probability=probability, rank_ms=1.0)
    return Reply(200, {}, msgspec.msgpack.encode(answer))


async def test_the_other_site_gets_features_of_an_edition_and_the_time_that_is_left(wire: Wire):
    wire.reply = ranked(0.1, 0.2, 0.3)
    sparse, dense = batch()
    assert (await peer().probabilities(sparse, dense, 0.0425)).tolist() == pytest.approx([0.1, 0.2, 0.3])
    lines = wire.head_sent.decode().split("\r\n")
    assert lines[0] == "POST /internal/rank HTTP/1.1"
    assert "rankbridge-deadline-ms: 42.5" in lines
    query = msgspec.msgpack.decode(wire.body_sent, type=RankQuery)
    assert (query.bundle, query.delta, query.rows) == (BUNDLE, 2, ROWS)
    assert (query.sparse, query.dense) == (sparse.tobytes(), dense.tobytes())


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Unreachable("refused"), Reason.PEER_DOWN),
        (Late("late"), Reason.PEER_LATE),
        (Reply(409, {}, b'{"detail":"another edition"}'), Reason.PEER_OTHER_BUNDLE),
        (Reply(503, {}, b'{"detail":"busy"}'), Reason.PEER_BUSY),
        (Reply(429, {}, b'{"detail":"busy"}'), Reason.PEER_BUSY),
        (Reply(500, {}, b"\xff"), Reason.PEER_FAULT),
        (Reply(404, {}, b""), Reason.PEER_FAULT),
        (Reply(200, {}, b""), Reason.PEER_NONSENSE),
        (Reply(200, {}, b"\xc1"), Reason.PEER_NONSENSE),
        (ranked(0.1, 0.2, 0.3, bundle="cd" * 32), Reason.PEER_OTHER_BUNDLE),
        (ranked(0.1, 0.2, 0.3, delta=1), Reason.PEER_OTHER_BUNDLE),
        (ranked(0.1, 0.2), Reason.PEER_NONSENSE),
        (ranked(0.1, 0.2, float("nan")), Reason.PEER_NONSENSE),
        (ranked(0.1, 0.2, 1.5), Reason.PEER_NONSENSE),
    ],
)
async def test_every_failure_of_the_other_site_has_its_reason(wire: Wire, reply: Reply | Exception, reason: Reason):
    wire.reply = reply
    with pytest.raises(DoorFault) as caught:
        await peer().probabilities(*batch(), 1.0)
    assert caught.value.reason is reason


async def test_the_other_site_is_asked_whether_it_lives_and_not_whether_it_is_ready(wire: Wire):
    wire.reply = Reply(200, {}, b"")
    assert (await peer().state()).up
    assert wire.head_sent.startswith(b"GET /healthz ")  # /readyz would ask us in turn, and so on


def test_what_is_no_student_is_refused_with_its_name(tmp_path: Path):
    path = tmp_path / "student.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"student\.onnx cannot be opened"):
        StudentRanker(path)


def test_a_model_with_other_inputs_is_no_student(bundle: Bundle):
    with pytest.raises(ValueError, match="other inputs than sparse and dense"):
        StudentRanker(bundle.model_path(USER_TOWER))


async def test_a_student_scores_every_candidate_in_this_process(bundle: Bundle):
    # The ranker has the student's inputs and outputs: any such model can be one.
    student = StudentRanker(bundle.model_path(RANKER))
    sparse, dense = batch()
    scores = await student.probabilities(sparse, dense, 0.0)
    assert scores.shape == (ROWS,)
    assert ((scores > 0) & (scores < 1)).all()
    assert (await student.state()).up


async def test_a_student_that_cannot_read_its_input_is_a_fault_and_no_crash(bundle: Bundle):
    student = StudentRanker(bundle.model_path(RANKER))
    sparse, dense = batch()
    for bad in ((sparse + 10**6, dense), (sparse, np.full_like(dense, np.nan))):
        with pytest.raises(DoorFault) as caught:
            await student.probabilities(*bad, 1.0)
        assert caught.value.reason is Reason.STUDENT_FAULT


QUERY = CandidatesQuery(
    bundle=BUNDLE,
    kind="recommend",
    history=[1],
    history_strength=[1.0],
    history_age_hours=[0.0],
    context=[0.0] * 4,
    count=5,
)
ANSWER = Candidates.of([1], [0.5], [0.5], [0]).answer(BUNDLE, 0)


async def test_candidates_go_and_come_as_message_pack(wire: Wire):
    wire.reply = Reply(200, {}, msgspec.msgpack.encode(ANSWER))
    assert await HttpRetrieval("http://127.0.0.1:8081").candidates(QUERY, 1.0) == ANSWER
    assert msgspec.msgpack.decode(wire.body_sent, type=CandidatesQuery) == QUERY
    assert wire.head_sent.startswith(b"POST /internal/candidates HTTP/1.1")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Unreachable("refused"), Reason.RETRIEVAL_DOWN),
        (Late("late"), Reason.RETRIEVAL_LATE),
        (Reply(409, {}, b'{"detail":"another bundle"}'), Reason.RETRIEVAL_OTHER_BUNDLE),
        (Reply(422, {}, b'{"detail":"a field"}'), Reason.RETRIEVAL_FAULT),
        (Reply(500, {}, b""), Reason.RETRIEVAL_FAULT),
        (Reply(200, {}, b""), Reason.RETRIEVAL_FAULT),
        (Reply(200, {}, b"\xc1"), Reason.RETRIEVAL_FAULT),
        (Reply(200, {}, b"\x81\xa1\x80\x01"), Reason.RETRIEVAL_FAULT),  # text that is not UTF-8
        (Reply(200, {}, msgspec.msgpack.encode({"bundle": BUNDLE})), Reason.RETRIEVAL_FAULT),
    ],
)
async def test_every_failure_of_retrieval_has_its_reason(wire: Wire, reply: Reply | Exception, reason: Reason):
    wire.reply = reply
    with pytest.raises(DoorFault) as caught:
        await HttpRetrieval("http://127.0.0.1:8081").candidates(QUERY, 1.0)
    assert caught.value.reason is reason


EVENT = Event(
    event_id="01890a5d-ac96-774b-bcce-b302099a8057", type=EventType.VIEW, timestamp_ms=1_790_000_000_000, item="a"
)


async def test_events_go_as_message_pack_that_intake_reads(wire: Wire):
    wire.reply = Reply(200, {}, msgspec.msgpack.encode(EventsAnswer(accepted=1, duplicates=0)))
    answer = await HttpIntake("http://127.0.0.1:8082").append([EVENT], 1.0)
    assert answer.accepted == 1
    assert msgspec.msgpack.decode(wire.body_sent, type=EventsRequest).events == [EVENT]


@pytest.mark.parametrize(
    "reply",
    [
        *(Unreachable("refused"), Late("late")),
        *(Reply(status, {}, b"{}") for status in (400, 413, 422, 503, 507)),
        *(Reply(200, {}, body) for body in (b"", b"{}", b"\x80", b"\x81\xa1\x80\x01")),
    ],
)
async def test_nothing_but_intakes_own_word_is_an_acknowledgement(wire: Wire, reply: Reply | Exception):
    wire.reply = reply
    with pytest.raises(IntakeFault):
        await HttpIntake("http://127.0.0.1:8082").append([EVENT], 1.0)


async def test_an_intake_without_room_says_when_to_come_back(wire: Wire):
    for told, meant in ((b"30", 30), (b"", 1), (b"soon", 1), (b"99999999", 300)):
        wire.reply = Reply(429, {b"retry-after": told}, b"{}")
        with pytest.raises(IntakeBusy) as busy:
            await HttpIntake("http://127.0.0.1:8082").append([EVENT], 1.0)
        assert busy.value.retry_after_s == meant


async def test_a_neighbour_is_up_when_it_says_so_and_else_tells_why(wire: Wire):
    for door in (
        TritonRanker("127.0.0.1:8000", BUNDLE),
        HttpRetrieval("http://127.0.0.1:8081"),
        HttpIntake("http://127.0.0.1:8082"),
    ):
        wire.reply = Reply(200, {}, b"")
        assert (await door.state()).up
        for reply, why in (
            (Reply(503, {}, b'{"ready":false,"missing":{"store":"disk full"}}'), "disk full"),
            (Unreachable("takes no connection"), "takes no connection"),
            (Late("late"), "0.25 s"),
        ):
            wire.reply = reply
            state = await door.state()
            assert not state.up
            assert why in state.detail


@pytest.mark.parametrize("where", ["127.0.0.1:8000", "http://127.0.0.1:8000", "http://127.0.0.1:8000/"])
def test_an_address_is_a_host_and_a_port(where: str):
    at = doors.neighbour(where)
    assert (at.host, at.port) == ("127.0.0.1", 8000)


@pytest.mark.parametrize(
    "where", ["", "127.0.0.1", "http://127.0.0.1", "https://127.0.0.1:1", "http://h:1/path", ":8000", "127.0.0.1:99999"]
)
def test_what_is_no_address_is_refused_with_the_form(where: str):
    with pytest.raises(ValueError, match=r"host:port|[Pp]ort"):
        doors.neighbour(where)
