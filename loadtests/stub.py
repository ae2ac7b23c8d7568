"""A stand-in for a gateway: answers by the contract, ranks nothing, and can be told to misbehave.

The fake behind the suites' one door (HTTP), for tests and for trying a suite without a site:
`python -m loadtests.stub --listen 127.0.0.1:8090`. Every time in its answers is what it was told.
"""

from __future__ import annotations

import argparse
import dataclasses
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from workloads.contract.http import (
    PATH_HEALTH,
    PATH_READY,
    PATH_SAMPLE,
    CatalogueSample,
    EventsAnswer,
    EventsRequest,
    ItemsAnswer,
    Problem,
    RankedItem,
    Readiness,
    RecommendRequest,
    SearchRequest,
    Served,
)
from workloads.contract.slo import CANDIDATES_RANKED, Endpoint, Rung, Stage

BUNDLE = "0" * 12


@dataclasses.dataclass
class Behaviour:
    """How the stub answers; may be changed while it runs."""

    site: str = "onprem"
    bundle: str = BUNDLE
    stages_ms: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {
            Stage.FEATURES.value: 1.0,
            Stage.CANDIDATES.value: 3.0,
            Stage.RANK.value: 4.0,
            Stage.RULES.value: 0.5,
        }
    )
    """Told in every answer, and waited for when `waits`."""
    waits: bool = False
    rung: int = Rung.FULL_RANKER
    reason: str | None = None
    ranked: int | None = CANDIDATES_RANKED
    refuse: int | None = None
    """HTTP status instead of an answer."""
    hang: bool = False
    """Never answers a POST; gives up when the client does."""
    items: int = 10
    """Items answered, whatever was asked for, at the most."""
    garbage: bool = False
    """Answers 200 and something else than was asked for."""
    users: int = 50
    stall_after_s: float | None = None
    """So long after the first POST the stub stands still..."""
    stall_s: float = 1.0
    """...for so long; what arrives meanwhile waits for its end."""


class StubGateway:
    """A running stub. Use as a context manager; `url` is where it listens, `behaviour` how it behaves."""

    def __init__(self, behaviour: Behaviour | None = None, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.behaviour = behaviour or Behaviour()
        self.requests: dict[str, int] = {}
        self.acknowledged: list[str] = []
        self._first_post: float | None = None
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._server = _Server((host, port), _Handler)
        self._server.stub = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        """`http://host:port`."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> StubGateway:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _get(self, path: str) -> tuple[int, bytes]:
        if path == PATH_SAMPLE:
            return 200, msgspec.json.encode(self._sample())
        if path == PATH_HEALTH:
            return 200, b'{"alive":true}'
        if path == PATH_READY:
            ready = Readiness(
                ready=True, site=self.behaviour.site, bundle=self.behaviour.bundle, backends={}, missing=[]
            )
            return 200, msgspec.json.encode(ready)
        return _problem(404, "Unknown path")

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body for one request; waits where the behaviour says so."""
        with self._lock:
            self.requests[path] = self.requests.get(path, 0) + 1
        if method == "GET":
            return self._get(path)
        if method != "POST":
            return _problem(404, "Unknown path")
        self._wait()
        if self.behaviour.refuse is not None:
            return _problem(self.behaviour.refuse, "Refused as told")
        try:
            return self._post(path, body)
        except msgspec.DecodeError as fault:
            return _problem(422, str(fault))

    def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        if self.behaviour.garbage:
            return 200, b'{"items": "none"}'
        match path:
            case Endpoint.RECOMMEND.value:
                return 200, self._items(msgspec.json.decode(body, type=RecommendRequest).k)
            case Endpoint.SEARCH.value:
                return 200, self._items(msgspec.json.decode(body, type=SearchRequest).k)
            case Endpoint.EVENTS.value:
                return 200, self._take(msgspec.json.decode(body, type=EventsRequest))
            case _:
                return _problem(404, "Unknown path")

    def _wait(self) -> None:
        behaviour = self.behaviour
        now = time.monotonic()
        with self._lock:
            if self._first_post is None:
                self._first_post = now
            since = now - self._first_post
        if behaviour.hang:
            self._released.wait()
        if behaviour.stall_after_s is not None:
            left = behaviour.stall_after_s + behaviour.stall_s - since
            if 0 < left <= behaviour.stall_s:
                self._released.wait(left)
        if behaviour.waits:
            self._released.wait(sum(behaviour.stages_ms.values()) / 1000)

    def _items(self, k: int) -> bytes:
        behaviour = self.behaviour
        count = min(k, behaviour.items)
        return msgspec.json.encode(
            ItemsAnswer(
                request_id="stub",
                items=[RankedItem(item=f"item-{i}", score=1.0 / (i + 1), source="popular") for i in range(count)],
                served=Served(
                    rung=int(behaviour.rung),
                    site=behaviour.site,
                    bundle=behaviour.bundle,
                    stages_ms=dict(behaviour.stages_ms),
                    reason=behaviour.reason,
                    ranked=behaviour.ranked,
                    ranked_at=None if behaviour.ranked is None else behaviour.site,
                ),
            )
        )

    def _take(self, sent: EventsRequest) -> bytes:
        with self._lock:
            self.acknowledged += [e.event_id for e in sent.events]
        return msgspec.json.encode(EventsAnswer(accepted=len(sent.events), duplicates=0))

    def _sample(self) -> CatalogueSample:
        return CatalogueSample(
            items=[f"item-{i}" for i in range(200)],
            item_weights=[1.0 / (i + 1) for i in range(200)],
            queries=["red mug", "glass lantern", "paper bag"],
            users=[f"user-{i}" for i in range(self.behaviour.users)],
            best_rung={e.value: int(Rung.FULL_RANKER) for e in (Endpoint.RECOMMEND, Endpoint.SEARCH, Endpoint.SIMILAR)},
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512
    stub: StubGateway


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one write per answer; two would meet Nagle and a delayed acknowledgement
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it that
        """Say nothing; a test's output is its own."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, content = self.server.stub.answer(self.command, self.path, body)
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()
        except OSError:
            self.close_connection = True  # the client gave up waiting; there is nobody to tell


def _problem(status: int, title: str) -> tuple[int, bytes]:
    return status, msgspec.json.encode(Problem(type="about:blank", title=title, status=status, detail=title))


def main() -> None:
    """Answer until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.stub", description=__doc__)
    parser.add_argument("--listen", default="127.0.0.1:8090", metavar="HOST:PORT")
    host, _, port = parser.parse_args().listen.rpartition(":")
    with StubGateway(host=host, port=int(port)):
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
