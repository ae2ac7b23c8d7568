"""The link of who is not root: cuts stand still and heal, one of two tunnels is left, slow is slow, loss is felt."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rankbridge.drills.relay import TcpLink, Way
from rankbridge.link import Direction, Shape

MOVES_S = 0.6


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with connection:
                while data := _received(connection):
                    connection.sendall(data)

        def accept() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[:2]
        listener.shutdown(socket.SHUT_RDWR)


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:
        return b""


@pytest.fixture
def at() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[:2]


@pytest.fixture
def link(echo: tuple[str, int], at: tuple[str, int]) -> Iterator[TcpLink]:
    with TcpLink([Way(at, echo, Direction.TO_CLOUD)], moves_after_s=MOVES_S) as link:
        yield link


class Caller:
    """One connection through the link."""

    def __init__(self, at: tuple[str, int]) -> None:
        self.socket = socket.create_connection(at, timeout=5)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def ask_until_reset(self) -> None:
        for _ in range(20):
            self.ask()
            time.sleep(0.05)

    def ask(self, within_s: float = 5.0) -> float | None:
        """Seconds until the echo was there; None when it was not within the time."""
        self.socket.settimeout(within_s)
        began = time.monotonic()
        try:
            self.socket.sendall(b"hello")
            got = self.socket.recv(100)
        except TimeoutError:
            return None
        if not got:
            raise ConnectionResetError("reset")
        assert got == b"hello"
        return time.monotonic() - began


Call = Callable[[], Caller]


@pytest.fixture
def call(link: TcpLink, at: tuple[str, int]) -> Iterator[Call]:  # noqa: ARG001 - what it calls through
    """Makes connections through the link, and closes them."""
    callers: list[Caller] = []

    def make() -> Caller:
        callers.append(Caller(at))
        return callers[-1]

    yield make
    for caller in callers:
        caller.socket.close()


def test_a_whole_link_passes_everything_on(call: Call):
    caller = call()
    data = bytes(range(256)) * 4000
    sender = threading.Thread(target=caller.socket.sendall, args=(data,))
    sender.start()
    got = b""
    while len(got) < len(data):
        got += caller.socket.recv(65536)
    sender.join()
    assert got == data


def test_the_end_of_one_side_is_passed_on(call: Call):
    caller = call()
    caller.socket.sendall(b"last words")
    caller.socket.shutdown(socket.SHUT_WR)
    got = b""
    while data := caller.socket.recv(100):
        got += data
    assert got == b"last words"


def test_what_is_on_a_cut_link_stands_still_and_goes_on_when_it_is_healed(link: TcpLink, call: Call):
    caller = call()
    assert caller.ask() is not None
    link.shape(Shape(cut=True))
    caller.socket.sendall(b"one")
    caller.socket.settimeout(0.4)
    with pytest.raises(TimeoutError):
        caller.socket.recv(100)
    link.heal()
    caller.socket.settimeout(2)
    assert caller.socket.recv(100) == b"one"


def test_a_new_connection_waits_out_a_cut_too(link: TcpLink, call: Call):
    link.shape(Shape(cut=True))
    caller = call()
    assert caller.ask(0.4) is None
    link.heal()
    assert caller.socket.recv(100) == b"hello"


def test_one_tunnel_cut_holds_up_half_of_the_connections_until_the_route_moves(link: TcpLink, call: Call):
    callers = [call() for _ in range(4)]
    assert all(one.ask() is not None for one in callers)
    link.shape(Shape(cut=True), 1)
    waits = [one.ask(3.0) for one in callers]
    assert None not in waits
    # Asked one after another: only the first of those that were on tunnel 1 waits for the route.
    assert max(wait for wait in waits if wait is not None) == pytest.approx(MOVES_S, abs=0.4)
    assert sum(wait < 0.1 for wait in waits if wait is not None) >= 2


def test_a_cut_of_one_direction_lets_the_other_pass(link: TcpLink, call: Call):
    caller = call()
    link.shape(Shape(cut=True, direction=Direction.FROM_CLOUD))
    caller.socket.sendall(b"gets there")
    caller.socket.settimeout(0.4)
    with pytest.raises(TimeoutError):
        caller.socket.recv(100)
    link.shape(Shape(cut=True, direction=Direction.TO_CLOUD))
    caller.socket.settimeout(2)
    assert caller.socket.recv(100) == b"gets there"


def test_a_slow_link_is_as_late_as_it_was_told_to_be(link: TcpLink, call: Call):
    caller = call()
    link.shape(Shape(delay_ms=100.0))
    waited = caller.ask()
    assert waited is not None
    assert waited >= 0.2
    link.shape(Shape(rate_mbit=1.0))
    began = time.monotonic()
    caller.socket.sendall(b"x" * 25_000)
    got = 0
    while got < 25_000:
        got += len(caller.socket.recv(65536))
    assert time.monotonic() - began >= 0.3  # 200 kbit there and back again at 1 Mbit/s, the two overlapping


def test_loss_resets_the_connection_that_it_meets(link: TcpLink, call: Call):
    caller = call()
    assert caller.ask() is not None
    link.shape(Shape(loss=1.0))
    with pytest.raises(OSError, match="reset"):
        caller.ask_until_reset()


def test_who_refuses_is_refused_through_the_link(at: tuple[str, int]):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        ways = [Way(at, nobody.getsockname()[:2], Direction.TO_CLOUD)]
        with TcpLink(ways), Caller(at) as caller, pytest.raises(OSError, match="reset"):
            caller.ask_until_reset()
