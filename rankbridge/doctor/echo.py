"""UDP packets that may not be fragmented, and the end that answers them: sizes, losses and clocks, both ways.

`EchoEnd` runs at the other site for as long as an operator wants (`rankbridge doctor --answer`). An answer larger than
its question is given only to who has shown, by repeating a token, that answers reach it: nobody is flooded by our
hand. It judges nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import hmac
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from rankbridge.doctor.hole import SMALLEST, Sent

PORT = 8085
"""Next to the sites' own ports."""
HEADERS = 28
"""IPv4 and UDP."""
LARGEST = 9_001
"""AWS's jumbo frames; nothing between two sites is larger."""
TRIES = 6
"""A size is given up after so many: at 30 % loss each way, one in sixty then looks like a hole and is not."""
_PATIENCE_S = 0.25
_MAGIC = b"RBD1"
_TOKEN = 8
_QUESTION = struct.Struct(f"!4sI{_TOKEN}sH")  # magic, number, token, size wanted of the answer
_ANSWER = struct.Struct(f"!4sI{_TOKEN}sHH")  # ..., size wanted, MTU told instead (0: none), then both clocks' times
_TIMES = struct.Struct("!dd")
_SMALL = HEADERS + _ANSWER.size + _TIMES.size

# Linux's numbers; the socket module has none of them.
_IP_MTU_DISCOVER, _IP_PMTUDISC_DO, _IP_MTU = 10, 2, 14


class NoEcho(Exception):  # noqa: N818 - a state of the other end, not a mistake
    """Nobody answers there."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One question and its answer. Seconds."""

    told: int | None
    round_trip_s: float
    offset_s: float
    """How much the other clock is ahead, give or take half of the round trip."""


def whole_packets(made: socket.socket) -> socket.socket:
    """Let the kernel send nothing of this socket in pieces."""
    made.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
    return made


class EchoEnd:
    """The answering end at a bound UDP socket; `clock` in Unix seconds."""

    def __init__(self, bound: socket.socket, clock: Callable[[], float] = time.time) -> None:
        self._socket = whole_packets(bound)
        self._clock = clock
        self._secret = secrets.token_bytes(16)
        self._ended = threading.Event()

    def serve(self) -> None:
        """Answer until `stop`."""
        while not self._ended.is_set():
            with contextlib.suppress(OSError):  # what a router said of an earlier answer is no end of ours
                if select.select([self._socket], [], [], 0.2)[0]:
                    self._answer(*self._socket.recvfrom(LARGEST))

    def stop(self) -> None:
        """Let `serve` return."""
        self._ended.set()

    def _answer(self, question: bytes, caller: tuple[str, int]) -> None:
        received = self._clock()
        if len(question) < _QUESTION.size or not question.startswith(_MAGIC):
            return
        _, number, token, wanted = _QUESTION.unpack_from(question)
        known = hmac.digest(self._secret, repr(caller).encode(), hashlib.sha256)[:_TOKEN]
        size = min(wanted, LARGEST) if hmac.compare_digest(token, known) else min(wanted, len(question) + HEADERS)
        told = 0
        try:
            self._socket.sendto(self._packet(number, known, size, 0, received), caller)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            told = self._mtu_to(caller)
            self._socket.sendto(self._packet(number, known, _SMALL, told, received), caller)

    def _packet(self, number: int, token: bytes, size: int, told: int, received: float) -> bytes:
        head = _ANSWER.pack(_MAGIC, number, token, size, told) + _TIMES.pack(received, self._clock())
        return head + bytes(max(size - HEADERS - len(head), 0))

    def _mtu_to(self, caller: tuple[str, int]) -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            whole_packets(asking).connect(caller)
            return asking.getsockopt(socket.IPPROTO_IP, _IP_MTU)


class Asking:
    """The asking end: a UDP socket of the site that is examined, towards an echo end. Close it after use."""

    def __init__(self, made: socket.socket, peer: tuple[str, int], clock: Callable[[], float] = time.time) -> None:
        self._socket = whole_packets(made)
        self._socket.connect(peer)
        self._peer = peer
        self._clock = clock
        self._number = int.from_bytes(os.urandom(3), "big")
        self._token = bytes(_TOKEN)
        self._patience_s = _PATIENCE_S

    def meet(self, tries: int = 10) -> tuple[list[Exchange], int]:
        """Small questions: their answers, and how many were lost. Raises NoEcho when none is answered."""
        answered = [one for one in (self.ask(_SMALL, _SMALL) for _ in range(tries)) if isinstance(one, Exchange)]
        if not answered:
            raise NoEcho(f"nobody answers at {self._peer[0]}:{self._peer[1]}")
        self._patience_s = max(_PATIENCE_S, 3 * max(one.round_trip_s for one in answered))
        return answered, tries - len(answered)

    def ask(self, size: int, wanted: int) -> Exchange | int | None:
        """One question of `size` bytes, for an answer of `wanted`: None is silence, a number the MTU of the way there.

        Raises NoEcho when the other machine says that nobody listens.
        """
        self._number = (self._number + 1) % 2**32
        head = _QUESTION.pack(_MAGIC, self._number, self._token, wanted)
        begun, asked = time.monotonic(), self._clock()
        try:
            self._socket.send(head + bytes(max(size - HEADERS - len(head), 0)))
            while (left := begun + self._patience_s - time.monotonic()) > 0:
                if not select.select([self._socket], [], [], left)[0]:
                    return None
                exchange = self._read(self._socket.recv(LARGEST), begun, asked)
                if exchange is not None:
                    return exchange
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                return self._socket.getsockopt(socket.IPPROTO_IP, _IP_MTU)
            if error.errno == errno.ECONNREFUSED:
                raise NoEcho(f"nobody listens at {self._peer[0]}:{self._peer[1]}") from None
            if error.errno not in {errno.EHOSTUNREACH, errno.ENETUNREACH}:
                raise
        return None

    def _read(self, answer: bytes, begun: float, asked: float) -> Exchange | None:
        """None for what is late, or no answer of ours."""
        if len(answer) < _ANSWER.size + _TIMES.size or not answer.startswith(_MAGIC):
            return None
        _, number, token, _, told = _ANSWER.unpack_from(answer)
        if number != self._number:
            return None
        received, sent = _TIMES.unpack_from(answer, _ANSWER.size)
        self._token = token
        round_trip = time.monotonic() - begun
        offset = ((received - asked) + (sent - (asked + round_trip))) / 2
        return Exchange(told or None, round_trip - (sent - received), offset)

    def there(self) -> There:
        """Packets that grow on the way to the other site."""
        return There(self)

    def back(self) -> Back:
        """Packets that grow on the way from it."""
        return Back(self)


@dataclasses.dataclass(frozen=True)
class There:
    """See `rankbridge.doctor.hole.Prober`."""

    asking: Asking

    def send(self, size: int) -> Sent:
        """Raises NoEcho."""
        told = None
        for _ in range(TRIES):
            got = self.asking.ask(size, SMALLEST)
            if isinstance(got, Exchange):
                return Sent(passed=True)
            told = got if got is not None else told
        return Sent(passed=False, told=told)


@dataclasses.dataclass(frozen=True)
class Back:
    """See `rankbridge.doctor.hole.Prober`."""

    asking: Asking

    def send(self, size: int) -> Sent:
        """Raises NoEcho."""
        told = None
        for _ in range(TRIES):
            got = self.asking.ask(_SMALL, size)
            if isinstance(got, Exchange) and got.told is None:
                return Sent(passed=True)
            told = got.told if isinstance(got, Exchange) else told
        return Sent(passed=False, told=told)
