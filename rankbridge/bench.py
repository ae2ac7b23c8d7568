"""What the gateway costs beyond its parts: the same requests to it and to the bare parts, by turns.

The parts are a recommendation's four stages, called bare: features (who asks, their profile, the ranker's inputs) and
rules as plain calls in this process, retrieval with the query that the gateway would send for this person, and Triton
with the tensors of the candidates that come back, over the same kind of connection that the gateway is asked over.
Beside them stand the two calls to neighbours by themselves, and the arithmetic alone (user tower and vector search in
this process, no service at all). Each recorded request goes to the gateway and to the parts one right after the other,
so that both meet the same machine; sums are taken per request and only then summarised. The client is the standard
library's and, for Triton, its own: what they take is in both, twice in the sum and once in the gateway's time, and an
empty call shows how much that is at the most. It starts nothing: `rankbridge up` does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import os
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from loadtests.draws import Shopper, check
from loadtests.measures import quantile
from loadtests.samples import write_whole
from rankbridge.faults import DeskError
from rankbridge.layout import Layout
from rankbridge.verdict import Machine, machine
from workloads.bundle import store
from workloads.bundle.store import Bundle
from workloads.bundle.verification import BundleFault
from workloads.contract.http import (
    PATH_CANDIDATES,
    PATH_HEALTH,
    PATH_SAMPLE,
    CandidatesAnswer,
    CandidatesQuery,
    CatalogueSample,
    ItemsAnswer,
    RecommendRequest,
    Served,
)
from workloads.contract.sites import HOME, AddressBook, Listener
from workloads.contract.slo import BELOW_BEST_RUNG_SHARE, CANDIDATES_RANKED, Endpoint, Rung, Stage
from workloads.contract.tensors import CONTEXT, HISTORY_LENGTH, RANKER, USER_TOWER
from workloads.data.definitions import Touch
from workloads.data.features import ItemTables, UserState, rank_features
from workloads.data.fusion import Candidates
from workloads.data.profiles import ProfilesDownError, ProfileStoreError, open_profiles
from workloads.gateway import rules
from workloads.gateway.pipeline import count_for, of_state
from workloads.gateway.simulator import Recorded
from workloads.privacy.pseudonym import KeyFileError
from workloads.privacy.vault import SqliteVault, VaultError

SCHEMA_VERSION: Final = 1
GOAL_RATIO: Final = 1.3
GOAL_OWN_P50_MS: Final = 1.5
"""Where the gateway is to get; a bench measures and fails nothing."""
REQUESTS: Final = 200
ROUNDS: Final = 7
TIMEOUT_S: Final = 10.0
_PAUSE_S: Final = 0.002
_NOT_OURS: Final = "is this a rankbridge gateway of this version?"
WAITED_FOR: Final = (Stage.CANDIDATES.value, Stage.RANK.value)
"""Stages that call a backend; what is left of a request is the gateway's own time."""

_T = TypeVar("_T")
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds over all requests of all rounds, by nearest rank."""

    p50_ms: float
    p99_ms: float


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio over the rounds."""

    median: float
    low: float
    high: float


class BenchResult(msgspec.Struct, frozen=True, kw_only=True):
    """`bench.json`."""

    schema_version: int = SCHEMA_VERSION
    bundle: str
    requests: int
    rounds: int
    candidates: int
    """Rows of the bare ranker's tensor, at the median."""
    gateway: Part
    bare: Part
    """Quantiles of the per-request sums of all four stages, called bare."""
    calls: Part
    """The same of the two that call a neighbour."""
    features: Part
    rules: Part
    retrieval: Part
    triton: Part
    arithmetic: Part
    """Per-request sums of tower, vector search and Triton: what is left when retrieval is no service."""
    tower: Part
    ann: Part
    empty: Part
    """A call of the gateway that does nothing: client, network and server."""
    ratio_p50: Spread
    """Gateway's p50 over that of the bare sums, round by round; the same for p99."""
    ratio_p99: Spread
    calls_ratio_p50: Spread
    """Gateway's p50 over that of `calls`."""
    arithmetic_ratio_p50: Spread
    """Gateway's p50 over that of `arithmetic`."""
    own: Part
    """The gateway's own time: the whole request less the stages that call a backend; to ask them, and what is done
    while they work, is theirs."""
    stages: dict[str, Part]
    below_best: int
    """Answers without the ranker; they make the gateway look faster than it is."""
    goal_ratio: float = GOAL_RATIO
    goal_own_p50_ms: float = GOAL_OWN_P50_MS
    machine: Machine


class Gateway(Protocol):
    """The one door to the gateway."""

    def recommend(self, body: bytes) -> ItemsAnswer:
        """One answer. Raises DeskError when there is none."""


class Parts(Protocol):
    """The bare parts; each call is one unit of the work that a request needs."""

    def features(self, ask: Ask) -> None:
        """Who asks, what is known of them, and the ranker's inputs. Raises DeskError when profiles cannot be read."""

    def rules(self, ask: Ask) -> None:
        """From the ranker's order to the items of the answer."""

    def candidates(self, query: bytes) -> CandidatesAnswer:
        """One call of retrieval with an encoded CandidatesQuery. Raises DeskError when it does not answer."""

    def tower(self, history: Ints) -> Floats:
        """The user's vector [1, VECTOR_DIM] from item indices [HISTORY_LENGTH]."""

    def search(self, vector: Floats) -> None:
        """The nearest items."""

    def rank(self, sparse: Ints, dense: Floats) -> None:
        """One call of the ranker for all candidates. Raises DeskError when it does not answer."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One recorded request, and what its stages are asked."""

    body: bytes
    message: RecommendRequest
    query: bytes
    """CandidatesQuery, encoded."""
    history: Ints
    candidates: Candidates
    exclude: npt.NDArray[np.int32]
    sparse: Ints
    dense: Floats


@dataclasses.dataclass(frozen=True)
class Timing:
    """One request, milliseconds."""

    gateway: float
    features: float
    retrieval: float
    triton: float
    rules: float
    tower: float
    ann: float
    served: Served

    @property
    def bare(self) -> float:
        """The sum of the stages."""
        return self.features + self.retrieval + self.triton + self.rules

    @property
    def calls(self) -> float:
        """The sum of those that call a neighbour."""
        return self.retrieval + self.triton

    @property
    def arithmetic(self) -> float:
        """The sum with retrieval's part done in this process."""
        return self.tower + self.ann + self.triton

    @property
    def own(self) -> float:
        """What the gateway took for itself, the way there and back included."""
        return self.gateway - sum(self.served.stages_ms.get(stage, 0.0) for stage in WAITED_FOR)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to bench; the defaults are the home site as the contract lays it out."""

    gateway: str = AddressBook().url(HOME, Listener.GATEWAY)
    triton: str = AddressBook().host_port(HOME, Listener.TRITON_HTTP)
    retrieval: str = AddressBook().url(HOME, Listener.RETRIEVAL)
    vault: Path | None = None
    """With `profiles`: who a recorded user is. Without, every request is asked of the parts as by somebody unknown."""
    profiles: str | None = None
    bundles: Path | None = None
    """Folder that holds the bundle which the gateway serves; None is the home site's."""
    requests: int = REQUESTS
    rounds: int = ROUNDS
    seed: int = 1
    replay: Path | None = None
    """Recorded requests, one JSON object a line; None draws and records new ones."""
    out: Path = Path("out")


def run(options: Options, console: Console) -> BenchResult:
    """Measure, print, and write `bench.json`, `bench-requests.jsonl` and `service-times.json` into `options.out`.

    Raises DeskError when the site does not answer, answers without its ranker, or serves a bundle
    that is not here.
    """
    if options.requests < 1 or options.rounds < 1:
        raise DeskError("there is nothing to do", "ask for at least one request and one round")
    with contextlib.closing(HttpGateway(options.gateway)) as gateway:
        recorded = _recorded(options, gateway)
        bundle = _bundle(options, gateway.recommend(recorded[0]).served.bundle)
        write_whole(options.out / "bench-requests.jsonl", b"".join(body + b"\n" for body in recorded))
        with (
            contextlib.closing(_known(options)) as people,
            contextlib.closing(BareParts(bundle, options.triton, options.retrieval, people)) as parts,
        ):
            asks = list(prepare(recorded, bundle, people, parts.candidates))
            rounds = _rounds(asks, gateway, parts, count=options.rounds, console=console)
        best_rung = gateway.sample().best_rung.get(Endpoint.RECOMMEND.value)
        empty = [_empty(gateway) for _ in range(options.requests)]
    result = summarise(rounds, empty, best_rung=best_rung)
    write_whole(options.out / "bench.json", msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    write_whole(options.out / "service-times.json", msgspec.json.encode(service_times(rounds, result.machine)) + b"\n")
    show(result, console)
    return result


def service_times(rounds: Sequence[Sequence[Timing]], on: Machine) -> Recorded:
    """What the home ranker took each time, for `rankbridge simulate`."""
    return Recorded(
        measured=f"bare calls to Triton at {HOME.name.value}, one at a time, {on.cores} cores",
        candidates=CANDIDATES_RANKED,
        ms={f"{HOME.name.value}/{Rung.FULL_RANKER}": [timing.triton for timings in rounds for timing in timings]},
    )


def _rounds(asks: Sequence[Ask], gateway: Gateway, parts: Parts, *, count: int, console: Console) -> list[list[Timing]]:
    with console.status("warming up") as status:
        measure(asks, gateway, parts)
        rounds = []
        for number in range(count):
            status.update(f"round {number + 1} of {count}")
            rounds.append(measure(asks, gateway, parts, parity=number))
    return rounds


def prepare(
    recorded: Sequence[bytes], bundle: Bundle, known: Known, find: Callable[[bytes], CandidatesAnswer]
) -> Iterable[Ask]:
    """What the stages of each request are asked, made as the gateway makes it."""
    tables = ItemTables.of(bundle.tables)
    encode = msgspec.msgpack.Encoder().encode
    for body in recorded:
        asked = msgspec.json.decode(body, type=RecommendRequest)
        state = _state(asked, bundle, known)
        session = np.array([bundle.index[item] for item in asked.history if item in bundle.index], dtype=np.int32)
        exclude = np.concatenate([state.bought_items, session])
        query = encode(
            CandidatesQuery(
                bundle=bundle.id,
                kind="recommend",
                **of_state(state),
                count=count_for(asked.k, ranked_after=True),
                exclude=exclude.tolist(),
            )
        )
        candidates = Candidates.read(find(query))
        history = np.zeros(HISTORY_LENGTH, dtype=np.int64)
        recent = state.items[-HISTORY_LENGTH:]
        if len(recent):
            history[-len(recent) :] = recent
        inputs = rank_features(state, candidates, tables, bundle.features)
        yield Ask(body, asked, query, history, candidates, exclude, *inputs)


def _state(asked: RecommendRequest, bundle: Bundle, known: Known) -> UserState:
    touches = known.touches(asked.user) if asked.user is not None else ()
    return UserState.of(touches, asked.history, time.time_ns() // 1_000_000, bundle.index)


class Known(Protocol):
    """What home knows of its users. Close it."""

    def touches(self, user: str) -> Sequence[Touch]:
        """Of a person by the raw id; none of somebody unknown. Raises DeskError."""
        ...

    def close(self) -> None:
        """Give its resources back."""


class Nobody:
    """Everybody is somebody unknown."""

    def touches(self, user: str) -> Sequence[Touch]:  # noqa: ARG002 - the door's
        """See `Known`."""
        return ()

    def close(self) -> None:
        """See `Known`."""


class HomeUsers:
    """Vault and profiles of the home site, read as its gateway reads them."""

    def __init__(self, vault: Path, profiles: str) -> None:
        """Raises DeskError when they cannot be opened."""
        with _readable(), contextlib.ExitStack() as held:
            self._profiles = held.enter_context(contextlib.closing(open_profiles(profiles, os.environ)))
            self._vault = held.enter_context(contextlib.closing(SqliteVault(vault)))
            self._held = held.pop_all()

    def touches(self, user: str) -> Sequence[Touch]:
        """See `Known`."""
        with _readable():
            pseudonym = self._vault.pseudonym(user)
            profile = None if pseudonym is None else self._profiles.get(pseudonym)
        return () if profile is None else profile.touches

    def close(self) -> None:
        """See `Known`."""
        self._held.close()


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (VaultError, KeyFileError, ProfileStoreError, ProfilesDownError) as fault:
        raise DeskError(f"profiles cannot be read: {fault}", "bench on the machine that serves home") from None


def _known(options: Options) -> Known:
    if options.vault is None or options.profiles is None:
        return Nobody()
    return HomeUsers(options.vault, options.profiles)


def measure(
    asks: Sequence[Ask],
    gateway: Gateway,
    parts: Parts,
    *,
    parity: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """One round: every request to both, by turns; who goes first changes with each request and round.

    `clock` gives seconds.
    """
    timings = []
    for number, ask in enumerate(asks):
        if (number + parity) % 2:
            whole, served = _whole(ask, gateway, clock)
            pieces = _pieces(ask, parts, clock)
        else:
            pieces = _pieces(ask, parts, clock)
            whole, served = _whole(ask, gateway, clock)
        timings.append(Timing(gateway=whole, served=served, **pieces))
    return timings


def _whole(ask: Ask, gateway: Gateway, clock: Callable[[], float]) -> tuple[float, Served]:
    began = clock()
    answer = gateway.recommend(ask.body)
    return (clock() - began) * 1000, answer.served


def _empty(gateway: HttpGateway) -> float:
    time.sleep(_PAUSE_S)  # as long as a request leaves the gateway alone
    began = time.perf_counter()
    gateway.health()
    return (time.perf_counter() - began) * 1000


def _pieces(ask: Ask, parts: Parts, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each part, by its name in `Timing`."""
    took: dict[str, float] = {}

    def timed(name: str, part: Callable[[], _T]) -> _T:
        began = clock()
        found = part()
        took[name] = (clock() - began) * 1000
        return found

    timed("features", lambda: parts.features(ask))
    timed("retrieval", lambda: parts.candidates(ask.query))
    timed("triton", lambda: parts.rank(ask.sparse, ask.dense))
    timed("rules", lambda: parts.rules(ask))
    vector = timed("tower", lambda: parts.tower(ask.history))
    timed("ann", lambda: parts.search(vector))
    return took


def summarise(rounds: Sequence[Sequence[Timing]], empty: Sequence[float], *, best_rung: int | None) -> BenchResult:
    """Quantiles over everything, ratios round by round. `empty`: calls that do nothing, milliseconds.

    Raises DeskError when more answers than the promise allows came without the ranker: the comparison
    would flatter the gateway.
    """
    every = [timing for timings in rounds for timing in timings]
    below = [t for t in every if best_rung is not None and t.served.rung > best_rung]
    if len(below) > BELOW_BEST_RUNG_SHARE * len(every):
        reasons = ", ".join(f"{r} ({n})" for r, n in Counter(t.served.reason for t in below).most_common())
        raise DeskError(
            f"{len(below)} of {len(every)} answers came from below rung {best_rung}: {reasons}",
            "`rankbridge status` says what is wrong with the ranker; a comparison without it would mean nothing",
        )
    stages: dict[str, list[float]] = defaultdict(list)
    for timing in every:
        for stage, spent in timing.served.stages_ms.items():
            stages[stage].append(spent)
    return BenchResult(
        bundle=every[0].served.bundle,
        requests=len(rounds[0]),
        rounds=len(rounds),
        candidates=statistics.median_low([t.served.ranked or 0 for t in every]),
        gateway=_part(t.gateway for t in every),
        bare=_part(t.bare for t in every),
        calls=_part(t.calls for t in every),
        features=_part(t.features for t in every),
        rules=_part(t.rules for t in every),
        retrieval=_part(t.retrieval for t in every),
        arithmetic=_part(t.arithmetic for t in every),
        tower=_part(t.tower for t in every),
        ann=_part(t.ann for t in every),
        empty=_part(empty),
        triton=_part(t.triton for t in every),
        ratio_p50=_spread(rounds, 0.5, lambda timing: timing.bare),
        ratio_p99=_spread(rounds, 0.99, lambda timing: timing.bare),
        calls_ratio_p50=_spread(rounds, 0.5, lambda timing: timing.calls),
        arithmetic_ratio_p50=_spread(rounds, 0.5, lambda timing: timing.arithmetic),
        own=_part(t.own for t in every),
        stages={stage: _part(spent) for stage, spent in stages.items()},
        below_best=len(below),
        machine=machine(),
    )


def show(result: BenchResult, console: Console) -> None:
    """The figures as a table."""
    console.print(
        f"{result.requests} requests in each of {result.rounds} rounds, {result.candidates} candidates each; "
        f"bundle {result.bundle}, {result.machine.cores} cores",
        highlight=False,
    )
    table = Table()
    table.add_column("milliseconds")
    table.add_column("p50", justify="right")
    table.add_column("p99", justify="right")
    rows = {
        "user tower, in this process": result.tower,
        "vector search, in this process": result.ann,
        "retrieval, called bare": result.retrieval,
        "Triton, called bare": result.triton,
        "features, in this process": result.features,
        "rules, in this process": result.rules,
        "sum of the four stages": result.bare,
        "an empty call of the gateway": result.empty,
        "gateway": result.gateway,
        **{f"  stage {name}": part for name, part in result.stages.items()},
        "  its own time": result.own,
    }
    for name, part in rows.items():
        style = "bold" if part in (result.bare, result.gateway, result.own) else ""
        table.add_row(name, f"{part.p50_ms:.2f}", f"{part.p99_ms:.2f}", style=style, end_section=part is result.bare)
    console.print(table)
    for name, ratio in (("p50", result.ratio_p50), ("p99", result.ratio_p99)):
        console.print(
            f"gateway / its stages called bare at {name}: {ratio.median:.2f} "
            f"(rounds {ratio.low:.2f} to {ratio.high:.2f}, goal {result.goal_ratio:g})",
            highlight=False,
        )
    calls = result.calls_ratio_p50
    console.print(
        f"gateway / retrieval and Triton alone at p50: {calls.median:.2f} (rounds {calls.low:.2f} to {calls.high:.2f})",
        highlight=False,
    )
    alone = result.arithmetic_ratio_p50
    console.print(
        f"gateway / tower, search and Triton alone at p50: {alone.median:.2f} "
        f"(rounds {alone.low:.2f} to {alone.high:.2f}; there retrieval is no service)",
        highlight=False,
    )
    console.print(f"own time at p50: {result.own.p50_ms:.2f} ms (goal {result.goal_own_p50_ms:g} ms)", highlight=False)


class Connection:
    """One kept-alive HTTP connection; what both sides of the comparison send over."""

    def __init__(self, host_port: str) -> None:
        self._name = host_port
        self._connection = http.client.HTTPConnection(host_port, timeout=TIMEOUT_S)

    def close(self) -> None:
        """Give the socket back."""
        self._connection.close()

    def call(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[bytes, str | None]:
        """Body, and the length of Triton's JSON part. Raises DeskError for anything but 200."""
        try:
            self._connection.request(method, path, body=body, headers=headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as fault:
            raise DeskError(
                f"nothing answers at {self._name}{path} ({str(fault) or type(fault).__name__})",
                "`rankbridge up` starts both sites; `rankbridge status` shows them",
            ) from fault
        if answer.status != http.client.OK:
            said = content[:300].decode(errors="replace")
            raise DeskError(f"{self._name}{path} answered {answer.status}: {said}", "`rankbridge status` may say why")
        return content, answer.getheader("Inference-Header-Content-Length")


class HttpGateway:
    """A running gateway. Close it."""

    def __init__(self, url: str) -> None:
        self._at = Connection(url.removeprefix("http://").rstrip("/"))
        self._decoder = msgspec.json.Decoder(ItemsAnswer)

    def close(self) -> None:
        """Give its socket back."""
        self._at.close()

    def recommend(self, body: bytes) -> ItemsAnswer:
        """See `Gateway`."""
        content, _ = self._at.call("POST", Endpoint.RECOMMEND.value, body, {"Content-Type": "application/json"})
        try:
            return self._decoder.decode(content)
        except msgspec.DecodeError as fault:
            raise DeskError(
                f"an answer is not what the contract says: {fault}", "is this a rankbridge gateway?"
            ) from None

    def health(self) -> None:
        """A call that does nothing."""
        self._at.call("GET", PATH_HEALTH, None, {})

    def sample(self) -> CatalogueSample:
        """What requests are drawn from."""
        content, _ = self._at.call("GET", PATH_SAMPLE, None, {})
        try:
            return msgspec.json.decode(content, type=CatalogueSample)
        except msgspec.DecodeError as fault:
            raise DeskError(f"the catalogue sample cannot be read: {fault}", _NOT_OURS) from None


class BareParts:
    """The site's retrieval and Triton; features, rules, tower and index of a bundle in this process. Close it."""

    def __init__(self, bundle: Bundle, triton: str, retrieval: str, known: Known) -> None:
        # both are heavy, and only a bench has use for them at the desk
        import faiss  # noqa: PLC0415
        import onnxruntime  # noqa: PLC0415
        import tritonclient.http as triton_http  # noqa: PLC0415

        self._bundle, self._known = bundle, known
        # As in the gateway: plain arrays, for numpy's memmap type pays for its bookkeeping on every operation.
        self._tables = ItemTables.of({name: table.view(np.ndarray) for name, table in bundle.tables.items()})
        self._in_stock = self._tables.in_stock != 0
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self._tower: Any = onnxruntime.InferenceSession(
            str(bundle.model_path(USER_TOWER)), settings, providers=["CPUExecutionProvider"]
        )
        faiss.omp_set_num_threads(1)
        self._index: Any = faiss.read_index(str(bundle.ann_path))
        self._triton: Any = triton_http
        self._at = Connection(triton)
        self._retrieval = Connection(retrieval.removeprefix("http://").rstrip("/"))
        self._decode = msgspec.msgpack.Decoder(CandidatesAnswer).decode
        self._path = f"/v2/models/{RANKER.triton_name(bundle.id)}/infer"
        self._strength = np.ones((1, HISTORY_LENGTH), dtype=np.float32)
        self._context = np.zeros((1, len(CONTEXT)), dtype=np.float32)
        self._count = min(CANDIDATES_RANKED, bundle.features.items)

    def close(self) -> None:
        """Give its sockets back."""
        self._at.close()
        self._retrieval.close()

    def features(self, ask: Ask) -> None:
        """See `Parts`."""
        state = _state(ask.message, self._bundle, self._known)
        rank_features(state, ask.candidates, self._tables, self._bundle.features)

    def rules(self, ask: Ask) -> None:
        """See `Parts`."""
        order = np.argsort(-ask.candidates.scores, kind="stable")
        items = ask.candidates.items[order]
        shown = rules.showable(self._in_stock, ask.exclude)
        rules.choose(items, ask.message.k, shown, self._tables.category)

    def candidates(self, query: bytes) -> CandidatesAnswer:
        """See `Parts`."""
        content, _ = self._retrieval.call("POST", PATH_CANDIDATES, query, {"Content-Type": "application/msgpack"})
        return self._decode(content)

    def tower(self, history: Ints) -> Floats:
        """See `Parts`."""
        vector: Floats = self._tower.run(
            None,
            {
                "history": history[None],
                "history_strength": self._strength,
                "history_age_hours": self._strength,
                "context": self._context,
            },
        )[0]
        return vector

    def search(self, vector: Floats) -> None:
        """See `Parts`."""
        self._index.search(vector, self._count)

    def rank(self, sparse: Ints, dense: Floats) -> None:
        """See `Parts`."""
        inputs = []
        for name, values, kind in (("sparse", sparse, "INT64"), ("dense", dense, "FP32")):
            tensor = self._triton.InferInput(name, values.shape, kind)
            tensor.set_data_from_numpy(values)
            inputs.append(tensor)
        output = RANKER.outputs[0].name
        client = self._triton.InferenceServerClient
        body, json_size = client.generate_request_body(inputs, outputs=[self._triton.InferRequestedOutput(output)])
        headers = {"Content-Type": "application/octet-stream"}
        if json_size is not None:
            headers["Inference-Header-Content-Length"] = str(json_size)
        content, length = self._at.call("POST", self._path, body, headers)
        scores = client.parse_response_body(content, header_length=int(length) if length else None).as_numpy(output)
        if scores is None or len(scores) != len(sparse):
            raise DeskError("Triton answered no score for each candidate", "`rankbridge status` may say why")


def _recorded(options: Options, gateway: HttpGateway) -> list[bytes]:
    if options.replay is not None:
        try:
            lines = [line for line in options.replay.read_bytes().splitlines() if line.strip()]
            for line in lines:
                msgspec.json.decode(line, type=RecommendRequest)
        except (OSError, msgspec.DecodeError) as fault:
            raise DeskError(f"{options.replay}: {fault}", "give a file of recorded requests, one a line") from None
        if not lines:
            raise DeskError(f"{options.replay} holds no requests", "give a file of recorded requests, one a line")
        return lines
    sample = gateway.sample()
    wrong = check(sample, [Endpoint.RECOMMEND.value])
    if wrong is not None:
        raise DeskError(f"requests cannot be drawn from the catalogue sample: {wrong}", "is the bundle complete?")
    shopper = Shopper(sample, random.Random(options.seed))  # noqa: S311 - reproducible on purpose
    return [msgspec.json.encode(shopper.recommend()) for _ in range(options.requests)]


def _bundle(options: Options, short: str) -> Bundle:
    bundles = options.bundles or Layout.of(os.environ).site(HOME.name) / "bundles"
    try:
        return store.open_bundle(store.find(bundles, short))
    except (LookupError, BundleFault) as fault:
        raise DeskError(
            f"the gateway serves bundle {short}, and it cannot be opened here: {fault}",
            "bench on the machine that serves, with the same RANKBRIDGE_HOME",
        ) from None


def _part(values: Iterable[float]) -> Part:
    ordered = sorted(values)
    return Part(p50_ms=quantile(ordered, 0.5), p99_ms=quantile(ordered, 0.99))


def _spread(rounds: Sequence[Sequence[Timing]], share: float, of: Callable[[Timing], float]) -> Spread:
    ratios = [
        quantile(sorted(t.gateway for t in timings), share) / quantile(sorted(of(t) for t in timings), share)
        for timings in rounds
    ]
    return Spread(median=statistics.median(ratios), low=min(ratios), high=max(ratios))


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m rankbridge.bench`: 0, or 2 when it could not be done."""
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m rankbridge.bench", description=__doc__)
    parser.add_argument("--gateway", default=default.gateway, help="URL of the home gateway (%(default)s)")
    parser.add_argument("--triton", default=default.triton, help="host:port of its Triton (%(default)s)")
    parser.add_argument("--retrieval", default=default.retrieval, help="URL of its retrieval (%(default)s)")
    parser.add_argument("--vault", type=Path, help="home's vault.sqlite: who the recorded users are")
    parser.add_argument("--profiles", help="their profiles: profiles.sqlite, or redis://host:port/db")
    parser.add_argument("--bundles", type=Path, help="folder with the bundle that is served")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="requests a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the requests that are drawn")
    parser.add_argument("--replay", type=Path, help="requests recorded by an earlier bench")
    parser.add_argument("--out", type=Path, default=default.out, help="folder for the results (%(default)s)")
    console = Console()
    try:
        run(Options(**vars(parser.parse_args(arguments))), console)
    except DeskError as fault:
        console.print(f"{fault.fault}\n{fault.remedy}", style="red", highlight=False, markup=False, soft_wrap=True)
        return int(fault.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
