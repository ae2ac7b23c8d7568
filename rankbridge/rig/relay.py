"""`python -m rankbridge.rig.relay`: the wire between two tunnel boxes, which passes frames on, late, seldom or not.

One process a tunnel, in the rig's relay namespace, between two devices. It takes every frame as it is, so that what a
box does with addresses, fragments and "do not fragment" stays as on a real wire. Told what to do over a socket; it
answers once that holds. It does not know what it carries; `rankbridge.rig.packets` looks at that.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import os
import random
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from rankbridge.link import Direction, Shape
from rankbridge.rig.tap import ETHERNET, FRAME_MAX, tap

QUEUE_S: Final = 0.5
"""What a slow wire keeps waiting; more is dropped, as by a router whose buffer is full."""
_BUFFER_BYTES: Final = 8 << 20
_AT_ONCE: Final = 64
_MESSAGE_MAX: Final = 65_536
_CONTROL_WITHIN_S: Final = 5.0


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A request: from now on do this; None only asks."""

    shape: Shape | None = None


class Passed(msgspec.Struct, frozen=True, kw_only=True):
    """What went over the wire one way since the start."""

    frames: int = 0
    bytes: int = 0
    dropped: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What is done now, and what was passed on."""

    shape: Shape
    to_cloud: Passed
    from_cloud: Passed


class Wire:
    """One way of a wire: when a frame comes out at the other end, if it does. Pure: time and chance are given."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._free_at = 0.0
        self._last_due = 0.0
        self.shape = Shape()

    def tell(self, shape: Shape) -> None:
        """From now on do this to what comes."""
        self.shape = shape

    def due(self, size: int, now: float) -> float | None:
        """When a frame of `size` bytes is to be passed on; None when it is lost. Never before an earlier one."""
        shape = self.shape
        if shape.cut or (shape.loss and self._chance.random() < shape.loss):
            return None
        if shape.largest is not None and size - ETHERNET > shape.largest:
            return None
        leaves = now
        if shape.rate_mbit is not None:
            begins = max(now, self._free_at)
            if begins - now > QUEUE_S:
                return None
            leaves = self._free_at = begins + shape.occupies_s(size)
        self._last_due = max(self._last_due, leaves + shape.late_s(self._chance))
        return self._last_due


@dataclasses.dataclass
class _Way:
    """One direction: where frames come from, where they go, what waits."""

    wire: Wire
    source: socket.socket
    target: socket.socket
    waiting: list[tuple[float, int, bytes]] = dataclasses.field(default_factory=list)
    frames: int = 0
    bytes: int = 0
    dropped: int = 0

    def passed(self) -> Passed:
        return Passed(frames=self.frames, bytes=self.bytes, dropped=self.dropped)


class Relay:
    """Both ways of one wire, and the socket over which it is told what to do."""

    def __init__(self, home: str, cloud: str, control: Path, seed: int) -> None:
        near, far = (tap(device, buffer_bytes=_BUFFER_BYTES) for device in (home, cloud))
        self._ways = {
            Direction.TO_CLOUD: _Way(Wire(random.Random(seed)), near, far),  # noqa: S311 - losses, no secrets
            Direction.FROM_CLOUD: _Way(Wire(random.Random(seed + 1)), far, near),  # noqa: S311 - as above
        }
        self._shape = Shape()
        self._order = itertools.count()
        self._buffer = bytearray(FRAME_MAX)
        control.unlink(missing_ok=True)
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.bind(str(control))
        self._control.listen(8)

    def run(self) -> None:
        """Until the process is ended."""
        with selectors.DefaultSelector() as selector:
            for way in self._ways.values():
                selector.register(way.source, selectors.EVENT_READ, way)
            selector.register(self._control, selectors.EVENT_READ, None)
            while True:
                for key, _ in selector.select(self._pause()):
                    if isinstance(key.data, _Way):
                        self._take(key.data)
                    else:
                        self._listen()
                self._pass_on()

    def _pause(self) -> float | None:
        dues = [way.waiting[0][0] for way in self._ways.values() if way.waiting]
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def _take(self, way: _Way) -> None:
        view = memoryview(self._buffer)
        for _ in range(_AT_ONCE):
            try:
                size = way.source.recv_into(self._buffer)
            except BlockingIOError:
                return
            now = time.monotonic()
            due = way.wire.due(size, now)
            if due is None:
                way.dropped += 1
            elif due <= now and not way.waiting:
                self._send(way, view[:size])
            else:
                heapq.heappush(way.waiting, (due, next(self._order), bytes(view[:size])))

    def _pass_on(self) -> None:
        for way in self._ways.values():
            now = time.monotonic()
            while way.waiting and way.waiting[0][0] <= now:
                self._send(way, heapq.heappop(way.waiting)[2])

    @staticmethod
    def _send(way: _Way, frame: bytes | memoryview) -> None:
        try:
            way.target.send(frame)
        except OSError:  # a full buffer, or a device that is going: a wire does not wait
            way.dropped += 1
            return
        way.frames += 1
        way.bytes += len(frame)

    def _listen(self) -> None:
        caller, _ = self._control.accept()
        with caller:
            caller.settimeout(_CONTROL_WITHIN_S)
            try:
                told = msgspec.json.decode(caller.recv(_MESSAGE_MAX), type=Told)
                if told.shape is not None:
                    self._tell(told.shape)
                caller.send(msgspec.json.encode(self._answer()))
            except (OSError, msgspec.DecodeError) as error:
                sys.stderr.write(f"not understood: {error}\n")

    def _tell(self, shape: Shape) -> None:
        self._shape = shape
        for direction, way in self._ways.items():
            way.wire.tell(shape.toward(direction))
            if way.wire.shape.cut:  # a cut wire delivers nothing that was still on it
                way.dropped += len(way.waiting)
                way.waiting.clear()

    def _answer(self) -> Answer:
        there, back = self._ways[Direction.TO_CLOUD], self._ways[Direction.FROM_CLOUD]
        return Answer(shape=self._shape, to_cloud=there.passed(), from_cloud=back.passed())


def tell(control: Path, shape: Shape | None = None) -> Answer:
    """Tell a running relay what to do, or with None ask it; when this returns, it holds. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.settimeout(_CONTROL_WITHIN_S)
        caller.connect(str(control))
        caller.send(msgspec.json.encode(Told(shape=shape)))
        return msgspec.json.decode(caller.recv(_MESSAGE_MAX), type=Answer)


def main() -> int:
    """Pass frames on until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m rankbridge.rig.relay")
    parser.add_argument("--home", required=True, help="device of the private end's wire")
    parser.add_argument("--cloud", required=True, help="device of the cloud end's wire")
    parser.add_argument("--control", required=True, type=Path, help="socket to be told over")
    parser.add_argument("--seed", type=int, default=1, help="what losses are drawn from")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    Relay(given.home, given.cloud, given.control, given.seed).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
