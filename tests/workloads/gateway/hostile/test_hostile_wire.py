"""Bytes that nobody sends by accident, against a real gateway: refused in one form, cheap, and nobody else waits."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from siege import Case, Siege, corpus, read_answer

from workloads.telemetry.wire import MESSAGE_WAIT_S

pytestmark = pytest.mark.real_parts

HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(autouse=True)
def held(besieged: Siege):
    """Whatever a test did, the gateway lives, answers, and is no heavier than it may be."""
    yield
    besieged.holds()


@pytest.mark.parametrize("case", corpus())
def test_each_case_that_was_ever_found_is_answered_as_it_should_be(besieged: Siege, case: Case):
    answers, closed = besieged.exchange(*case.parts, at_least=len(case.status))
    assert tuple(answer.status for answer in answers) == case.status, [answer.body for answer in answers]
    for answer in answers:
        if answer.status >= 400:
            problem = answer.problem()
    if case.kind is not None:
        assert problem.type == case.kind
    if not answers:
        assert closed


def test_the_corpus_covers_what_the_issue_names():
    names = {case.id.partition("-")[0] for case in corpus()}
    assert names >= {"line", "path", "head", "smuggle", "chunk", "pipeline", "json"}
    assert all(case.values[0].why for case in corpus())


def test_slow_senders_take_no_place_from_others_and_are_given_up(besieged: Siege):
    """Silent ones, and those who trickle empty lines, headers, bodies and chunks: 60 of each at once."""
    openings = (
        b"",
        b"\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n",
        HEAD + b"Content-Length: 1000\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
    )
    drips = (b"", b"\r\n", b"X-A: b\r\n", b"[", b"1\r\n[\r\n")
    with contextlib.ExitStack() as stack:
        slow = [(stack.enter_context(besieged.connect()), drip) for drip in drips for _ in range(60)]
        for (sock, _), opening in zip(slow, [opening for opening in openings for _ in range(60)], strict=True):
            sock.sendall(opening)
        begun, open_now = time.monotonic(), list(slow)
        slowest = 0.0
        ended: dict[bytes, set[int]] = {drip: set() for drip in drips}
        while open_now and time.monotonic() - begun < MESSAGE_WAIT_S + 10:
            slowest = max(slowest, besieged.answers_well())
            still = []
            for sock, drip in open_now:
                status = _given_up(sock, drip)
                if status is None:
                    still.append((sock, drip))
                else:
                    ended[drip].add(status)
            open_now = still
            time.sleep(0.5)
        assert not open_now, f"{len(open_now)} connections are still held"
        assert slowest < 1.0
    # Who asked for something is told; who did not is just closed.
    assert ended == {drips[0]: {0}, drips[1]: {0}, drips[2]: {408}, drips[3]: {408}, drips[4]: {408}}


def _given_up(sock: socket.socket, drip: bytes) -> int | None:
    """The status that ended it, 0 for none; None while it lasts and was sent another drip."""
    sock.settimeout(0)
    try:
        said = sock.recv(4096)
    except BlockingIOError:
        with contextlib.suppress(ConnectionError):
            if drip:
                sock.sendall(drip)
        return None
    except ConnectionError:
        return 0
    return int(said.split(b" ")[1]) if said else 0


def test_who_reads_no_answers_is_given_up(besieged: Siege):
    """1,000 answers of 23 kB each, asked for at once and left where they are: more than a kernel keeps."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(20.0)
        sock.connect(("127.0.0.1", besieged.port))
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        while time.monotonic() - begun < 30:
            assert besieged.answers_well() < 1.0
            try:
                sock.send(b"\r\n")
            except ConnectionError:
                return
            time.sleep(0.5)
        raise AssertionError("the connection is still held after 30 s")


@pytest.mark.parametrize("declared", [True, False])
def test_a_gzip_bomb_is_not_unpacked(besieged: Siege, declared: bool):  # noqa: FBT001 - a parameter of pytest
    bomb = gzip.compress(b"[" * 200_000_000, compresslevel=9)
    assert len(bomb) < 256 * 1024
    encoding = b"Content-Encoding: gzip\r\n" if declared else b""
    ((answer,), _) = besieged.exchange(HEAD, encoding, b"Content-Length: %d\r\n\r\n" % len(bomb), bomb, at_least=1)
    assert answer.status == (415 if declared else 400)
    answer.problem()


def test_a_thousand_connections_that_say_nothing_shut_nobody_out(besieged: Siege):
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(besieged.connect())
        for _ in range(20):
            assert besieged.answers_well() < 1.0


_LINES = st.sampled_from([b"GET ", b"POST ", b"/v1/recommend", b"/healthz", b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\n"])
_FIELDS = st.sampled_from(
    [
        *(b"Host: x\r\n", b"Content-Length: 2\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n"),
        *(b"Content-Type: application/json\r\n", b"Connection: close\r\n", b"Connection: Upgrade\r\nUpgrade: x\r\n"),
        *(b"Expect: 100-continue\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"{}", b"\r\n\r\n", b":", b"\x00", b"\xff", b"\t "),
    ]
)
_BYTES = st.lists(st.one_of(_LINES, _FIELDS, st.binary(max_size=12)), max_size=24).map(b"".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=_BYTES, cut=st.integers(0, 200))
@example(raw=b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n\x00", cut=60)
def test_any_bytes_in_any_two_pieces_get_whole_answers_in_one_form(besieged: Siege, raw: bytes, cut: int):
    answers, _ = besieged.exchange(raw[:cut], raw[cut:], quiet_s=0.03)
    for answer in answers:
        assert answer.status < 500
        if answer.status >= 400:
            answer.problem()
    assert besieged.answers_well() < 2.0


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_NAMES = st.sampled_from(["user", "history", "k", "query", "item", "events", "repeats", "use_model", "context"])
_MESSAGES = st.one_of(_JSON, st.dictionaries(_NAMES, _JSON | st.integers(-5, 200), max_size=4))
_PATHS = st.sampled_from(["/v1/recommend", "/v1/search", "/v1/similar", "/v1/events", "/v1/ads"])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=_PATHS, message=_MESSAGES, spoilt=st.none() | st.tuples(st.integers(0, 300), st.binary(max_size=3)))
def test_any_json_whole_or_spoilt_is_answered_or_refused_in_one_form(
    besieged: Siege, path: str, message: object, spoilt: tuple[int, bytes] | None
):
    body = json.dumps(message).encode()
    if spoilt is not None:
        body = body[: spoilt[0]] + spoilt[1] + body[spoilt[0] + 1 :]
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with besieged.connect() as sock, sock.makefile("rb") as file:
        sock.sendall(head.encode() + body)
        answer = read_answer(file)
    assert answer is not None
    assert answer.status in {200, 400, 404, 422}
    if answer.status != 200:
        answer.problem()
