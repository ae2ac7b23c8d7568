"""The bench compares like with like: the same requests, by turns, summed one by one."""

import contextlib
import dataclasses
import http.server
import io
import json
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
import pytest
from rich.console import Console

from loadtests.stub import Behaviour, StubGateway
from rankbridge.bench import (
    Ask,
    BareParts,
    BenchResult,
    Connection,
    HttpGateway,
    Nobody,
    Options,
    Timing,
    main,
    measure,
    prepare,
    run,
    show,
    summarise,
)
from rankbridge.faults import DeskError
from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.store import open_bundle
from workloads.contract.events import EventType
from workloads.contract.http import (
    PATH_CANDIDATES,
    CandidatesAnswer,
    CandidatesQuery,
    ItemsAnswer,
    RecommendRequest,
    Served,
)
from workloads.contract.tensors import HISTORY_LENGTH, RANKER_DENSE, RANKER_SPARSE, VECTOR_DIM
from workloads.data.definitions import Touch
from workloads.data.fusion import Candidates
from workloads.gateway.simulator import Recorded

STAGES = {"features": 0.5, "candidates": 3.0, "rank": 4.0, "rules": 0.25}


class Clock:
    """Seconds that pass only when a fake says so, and the order of what happened."""

    def __init__(self) -> None:
        self.now = 100.0
        self.events: list[str] = []

    def __call__(self) -> float:
        return self.now

    def spend(self, name: str, ms: float) -> None:
        self.events.append(name)
        self.now += ms / 1000


class FakeGateway:
    """Takes `ms` for every answer."""

    def __init__(self, clock: Clock, ms: float, rung: int = 1) -> None:
        self._clock, self._ms, self._rung = clock, ms, rung

    def recommend(self, body: bytes) -> ItemsAnswer:
        self._clock.spend("gateway " + body.decode(), self._ms)
        return ItemsAnswer(request_id="r", items=[], served=served(self._rung))


class FakeParts:
    """Takes what it is told for each part."""

    def __init__(self, clock: Clock, retrieval: float, triton: float, tower: float, ann: float) -> None:
        self._clock, self._retrieval, self._triton, self._tower, self._ann = clock, retrieval, triton, tower, ann

    def features(self, ask: Ask) -> None:
        self._clock.spend("features", 0.75)

    def rules(self, ask: Ask) -> None:
        self._clock.spend("rules", 0.25)

    def candidates(self, query: bytes) -> CandidatesAnswer:
        self._clock.spend("retrieval", self._retrieval)
        return Candidates.of([], [], [], []).answer("", 0)

    def tower(self, history: np.ndarray) -> np.ndarray:
        self._clock.spend("tower", self._tower)
        return history.astype(np.float32)

    def search(self, vector: np.ndarray) -> None:
        self._clock.spend("ann", self._ann)

    def rank(self, sparse: np.ndarray, dense: np.ndarray) -> None:
        self._clock.spend("triton", self._triton)


def served(rung: int = 1) -> Served:
    reason = "ranker_late" if rung > 1 else None
    return Served(rung=rung, site="onprem", bundle="0" * 12, stages_ms=STAGES, reason=reason)


def asks(count: int) -> list[Ask]:
    nothing, none = np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int32)
    message, candidates, dense = RecommendRequest(), Candidates.of([], [], [], []), np.zeros(1, dtype=np.float32)
    return [Ask(str(i).encode(), message, b"", nothing, candidates, none, nothing, dense) for i in range(count)]


def timing(ms: float, retrieval: float = 1.0, triton: float = 2.0, rung: int = 1) -> Timing:
    return Timing(ms, 0.75, retrieval, triton, 0.25, tower=0.5, ann=0.25, served=served(rung))


def timings(gateway: Iterable[float], rung: int = 1) -> list[Timing]:
    return [timing(ms, rung=rung) for ms in gateway]


def test_every_part_is_timed_by_itself_and_summed_per_request():
    clock = Clock()
    found = measure(asks(3), FakeGateway(clock, 9.0), FakeParts(clock, 0.5, 5.0, 0.2, 0.1), clock=clock)
    assert [round(t.bare, 6) for t in found] == [6.5] * 3
    assert [round(t.calls, 6) for t in found] == [5.5] * 3
    assert [round(t.arithmetic, 6) for t in found] == [5.3] * 3
    assert [round(t.gateway, 6) for t in found] == [9.0] * 3
    assert [round(t.own, 6) for t in found] == [2.0] * 3, "the whole less candidates and rank"


def test_gateway_and_parts_take_turns_and_nobody_is_always_first():
    clock = Clock()
    measure(asks(2), FakeGateway(clock, 1.0), FakeParts(clock, 1.0, 1.0, 1.0, 1.0), parity=0, clock=clock)
    parts = ["features", "retrieval", "triton", "rules", "tower", "ann"]
    assert clock.events == [*parts, "gateway 0", "gateway 1", *parts]
    clock.events.clear()
    measure(asks(1), FakeGateway(clock, 1.0), FakeParts(clock, 1.0, 1.0, 1.0, 1.0), parity=1, clock=clock)
    assert clock.events[0] == "gateway 0", "the next round begins the other way round"


def test_ratios_are_taken_round_by_round_with_their_spread():
    result = summarise([timings([6.0] * 100), timings([8.0] * 100), timings([5.0] * 100)], [0.5], best_rung=1)
    assert (result.ratio_p50.low, result.ratio_p50.median, result.ratio_p50.high) == (1.25, 1.5, 2.0)
    assert result.bare.p50_ms == 4.0
    assert (result.calls.p50_ms, result.calls_ratio_p50.median) == (3.0, 2.0)
    assert result.gateway.p99_ms == 8.0
    assert result.stages["rank"].p50_ms == 4.0
    assert (result.requests, result.rounds) == (100, 3)


def test_a_quantile_of_sums_is_not_a_sum_of_quantiles():
    # whoever is slow in retrieval is quick in Triton: both have a p99 of 9, and no request ever took 18
    turns = [(9.0, 1.0), (1.0, 9.0)] * 100
    result = summarise([[timing(12.0, retrieval=a, triton=b) for a, b in turns]], [0.5], best_rung=1)
    assert result.retrieval.p99_ms == result.triton.p99_ms == 9.0
    assert result.calls.p99_ms == 10.0
    assert result.bare.p99_ms == 11.0


def test_answers_without_the_ranker_are_not_compared():
    with pytest.raises(DeskError, match=r"2 of 100 answers came from below rung 1: ranker_late \(2\)"):
        summarise([timings([1.0] * 98), timings([1.0] * 2, rung=3)], [0.5], best_rung=1)
    assert summarise([timings([1.0] * 199), timings([1.0], rung=3)], [0.5], best_rung=1).below_best == 1


def find(query: bytes) -> CandidatesAnswer:
    """A retrieval that finds the first 50 items."""
    asked = msgspec.msgpack.decode(query, type=CandidatesQuery)
    items = [item for item in range(1, 51) if item not in asked.exclude]
    scores = [0.5] * len(items)
    return Candidates.of(items, scores, scores, [0] * len(items)).answer(asked.bundle, 0)


class Buyer(Nobody):
    """Everybody bought this."""

    def __init__(self, bought: Touch) -> None:
        self._bought = bought

    def touches(self, user: str) -> list[Touch]:
        return [self._bought]


def test_the_bare_parts_are_asked_what_the_gateway_would_ask_for_this_person(tmp_path: Path):
    bundle = open_bundle(build_fake_bundle(tmp_path, items=60))
    known, bought = bundle.item_ids[7], Touch(bundle.item_ids[9], EventType.PURCHASE, 1_700_000_000_000, 1, 1)
    recorded = [
        msgspec.json.encode(RecommendRequest(history=[known, "nobody knows this"])),
        msgspec.json.encode(RecommendRequest(user="u")),
    ]
    one, other = prepare(recorded, bundle, Buyer(bought), find)
    asked = [msgspec.msgpack.decode(ask.query, type=CandidatesQuery) for ask in (one, other)]
    assert [query.history for query in asked] == [[7], [9]]
    assert [query.exclude for query in asked] == [[7], [9]], "what is in the basket or was bought is left out"
    assert one.history.shape == (HISTORY_LENGTH,)
    assert one.history[-1] == 7
    assert one.sparse.shape == (49, len(RANKER_SPARSE))
    assert other.sparse.shape == (49, len(RANKER_SPARSE))
    assert one.sparse.dtype == np.int64
    assert one.dense.shape == (49, len(RANKER_DENSE))
    assert one.dense.dtype == np.float32


def test_a_real_connection_reads_what_the_gateway_answers():
    with StubGateway() as stub, contextlib.closing(HttpGateway(stub.url)) as gateway:
        answer = gateway.recommend(msgspec.json.encode(RecommendRequest(k=3)))
        assert len(answer.items) == 3
        assert gateway.sample().best_rung["/v1/recommend"] == 1
        with (
            contextlib.closing(Connection(stub.url.removeprefix("http://"))) as connection,
            pytest.raises(DeskError, match="404"),
        ):
            connection.call("GET", "/nowhere", None, {})


def test_a_gateway_that_is_not_one_is_named_as_such():
    with (
        StubGateway(Behaviour(garbage=True)) as stub,
        contextlib.closing(HttpGateway(stub.url)) as gateway,
        pytest.raises(DeskError, match="not what the contract says"),
    ):
        gateway.recommend(msgspec.json.encode(RecommendRequest()))


class Neighbours(http.server.BaseHTTPRequestHandler):
    """Retrieval, and Triton as the KServe protocol's binary extension says, one score a row; remembers what it read."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[tuple[str, dict[str, tuple[str, list[int], int]]]]] = []
    queries: ClassVar[list[bytes]] = []
    scores_per_row = 1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == PATH_CANDIDATES:
            self.queries.append(body)
            answer = msgspec.msgpack.encode(find(body))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return
        size = int(self.headers["Inference-Header-Content-Length"])
        head = json.loads(body[:size])
        inputs = {i["name"]: (i["datatype"], i["shape"], i["parameters"]["binary_data_size"]) for i in head["inputs"]}
        assert sum(length for _, _, length in inputs.values()) == len(body) - size
        self.asked.append((self.path, inputs))
        rows = inputs["sparse"][1][0] * self.scores_per_row
        shape = {"name": "probability", "datatype": "FP32", "shape": [rows, 1]}
        outputs = [shape | {"parameters": {"binary_data_size": 4 * rows}}]
        answer = json.dumps({"model_name": "ranker", "model_version": "1", "outputs": outputs}).encode()
        self.send_response(200)
        self.send_header("Inference-Header-Content-Length", str(len(answer)))
        self.send_header("Content-Length", str(len(answer) + 4 * rows))
        self.end_headers()
        self.wfile.write(answer + np.zeros(rows, np.float32).tobytes())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def neighbours() -> Iterator[str]:
    """host:port of both neighbours."""
    Neighbours.asked.clear()
    Neighbours.queries.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Neighbours) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_bare_parts_are_the_bundles_own_models_and_one_real_call_to_triton(tmp_path: Path, neighbours: str):
    bundle = open_bundle(build_fake_bundle(tmp_path, items=300))
    history = [bundle.item_ids[60]]
    (ask,) = prepare([msgspec.json.encode(RecommendRequest(history=history))], bundle, Nobody(), find)
    with contextlib.closing(BareParts(bundle, neighbours, neighbours, Nobody())) as parts:
        vector = parts.tower(ask.history)
        assert vector.shape == (1, VECTOR_DIM)
        assert np.abs(vector).sum() > 0
        parts.search(vector)
        parts.rank(ask.sparse, ask.dense)
        parts.features(ask)
        parts.rules(ask)
        assert parts.candidates(ask.query) == find(ask.query)
    ((path, inputs),) = Neighbours.asked
    assert path == f"/v2/models/ranker-{bundle.short}/infer"
    assert inputs == {
        "sparse": ("INT64", [50, len(RANKER_SPARSE)], 50 * len(RANKER_SPARSE) * 8),
        "dense": ("FP32", [50, len(RANKER_DENSE)], 50 * len(RANKER_DENSE) * 4),
    }


def test_a_triton_that_answers_too_few_scores_is_not_compared(
    tmp_path: Path, neighbours: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Neighbours, "scores_per_row", 0)
    bundle = open_bundle(build_fake_bundle(tmp_path, items=60))
    (ask,) = prepare([msgspec.json.encode(RecommendRequest(user="u"))], bundle, Nobody(), find)
    with (
        contextlib.closing(BareParts(bundle, neighbours, neighbours, Nobody())) as parts,
        pytest.raises(DeskError, match="no score for each candidate"),
    ):
        parts.rank(ask.sparse, ask.dense)


def test_a_whole_bench_writes_its_result_and_requests_that_can_be_replayed(tmp_path: Path, neighbours: str):
    bundle = open_bundle(build_fake_bundle(tmp_path / "bundles", items=60))
    with StubGateway(Behaviour(bundle=bundle.short)) as stub:
        wanted = Options(
            gateway=stub.url,
            triton=neighbours,
            retrieval=neighbours,
            bundles=tmp_path / "bundles",
            requests=5,
            rounds=2,
            out=tmp_path / "out",
        )
        result = run(wanted, Console(file=io.StringIO()))
        recorded = tmp_path / "out" / "bench-requests.jsonl"
        first = recorded.read_bytes()
        again = dataclasses.replace(wanted, replay=recorded, seed=99)
        assert run(again, Console(file=io.StringIO())).requests == 5
    assert recorded.read_bytes() == first, "a replay asks the same things"
    assert msgspec.json.decode((tmp_path / "out" / "bench.json").read_bytes(), type=BenchResult).rounds == 2
    times = msgspec.json.decode((tmp_path / "out" / "service-times.json").read_bytes(), type=Recorded)
    assert len(times.ms["onprem/1"]) == result.requests * result.rounds
    assert (result.requests, result.rounds, result.bundle) == (5, 2, bundle.short)
    assert result.gateway.p50_ms > 0
    assert len(Neighbours.asked) == 2 * (1 + 2) * 5, "each request once in warm-up and in every round"


def test_profiles_that_cannot_be_read_are_named_before_anything_is_measured(tmp_path: Path, neighbours: str):
    bundle = open_bundle(build_fake_bundle(tmp_path / "bundles", items=60))
    with StubGateway(Behaviour(bundle=bundle.short)) as stub:
        wanted = Options(
            gateway=stub.url, triton=neighbours, retrieval=neighbours, bundles=tmp_path / "bundles", out=tmp_path
        )
        wanted = dataclasses.replace(wanted, vault=tmp_path / "no.sqlite", profiles=str(tmp_path / "none.sqlite"))
        with pytest.raises(DeskError, match="profiles cannot be read"):
            run(wanted, Console(file=io.StringIO()))
    assert not Neighbours.queries


def test_nobody_listening_ends_with_the_remedy_and_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert main(["--gateway", f"http://127.0.0.1:{port}", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "nothing answers at" in said
    assert "rankbridge up" in said


def test_a_bundle_that_is_not_here_is_said_with_the_remedy(tmp_path: Path):
    with StubGateway() as stub, pytest.raises(DeskError, match="serves bundle 000000000000"):
        run(Options(gateway=stub.url, bundles=tmp_path, out=tmp_path, requests=2, rounds=1), Console())


@pytest.mark.parametrize("content", ["", '{"k": 0}\n', "nonsense\n"])
def test_a_file_of_requests_that_holds_none_is_refused(tmp_path: Path, content: str):
    path = tmp_path / "requests.jsonl"
    path.write_text(content)
    with StubGateway() as stub, pytest.raises(DeskError, match=r"requests\.jsonl"):
        run(Options(gateway=stub.url, replay=path, out=tmp_path), Console())


def test_the_table_shows_the_sums_the_gateway_its_own_time_and_the_ratios():
    result = summarise([timings([6.0] * 100)], [0.5], best_rung=1)
    out = io.StringIO()
    show(result, Console(file=out, width=100))
    said = out.getvalue()
    for line in (
        "features, in this process",
        "sum of the four stages",
        "gateway / its stages called bare at p50: 1.50",
        "gateway / retrieval and Triton alone at p50: 2.00",
        "its own time",
        "stage rank",
        "goal 1.3",
    ):
        assert line in said
    assert msgspec.json.decode(msgspec.json.encode(result), type=BenchResult) == result
