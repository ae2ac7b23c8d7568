"""A pulse through the tunnels: small questions in many flows, from which one sees when packets pass again, and where.

UDP, so that nothing is repeated by a kernel: each question has one chance. It knows no tunnel.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Final

from rankbridge.faults import DeskError
from rankbridge.rig.rig import Rig
from workloads.contract.sites import SiteName

FLOWS: Final = 16
"""Enough that both tunnels carry some: the chance that one of two gets none is 2 in 65,536."""
EVERY_S: Final = 0.05
PORT: Final = 9000
_LISTEN_S: Final = 0.2


class Pulse:
    """Flows from home to the cloud and back, from the beginning of its context to the end."""

    def __init__(self, rig: Rig) -> None:
        self._there = (rig.hosts[SiteName.AWS], PORT)
        self._server = rig.inside(SiteName.AWS, self._bound)
        self._flows = [rig.inside(SiteName.ONPREM, _udp) for _ in range(FLOWS)]
        self.answered = [0.0] * FLOWS
        """When the newest question that was answered had been asked, by flow (monotonic)."""
        self._done = threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._echo, self._ask)]

    def __enter__(self) -> Pulse:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
        for one in (self._server, *self._flows):
            one.close()

    def after(self, since: float, within_s: float) -> float:
        """Seconds from `since` (monotonic) until every flow had asked something that was answered.

        Raises DeskError when some are silent for so long.
        """
        while min(self.answered) <= since:
            if time.monotonic() - since > within_s:
                silent = sum(one <= since for one in self.answered)
                raise DeskError(f"after {within_s:.0f} s {silent} of {FLOWS} flows are not answered", "see `rig.state`")
            time.sleep(EVERY_S / 2)
        return min(self.answered) - since

    def _bound(self) -> socket.socket:
        server = _udp()
        server.bind(self._there)
        return server

    def _echo(self) -> None:
        while not self._done.is_set():
            try:
                question, who = self._server.recvfrom(64)
                self._server.sendto(question, who)
            except OSError:  # nothing came, or there is no way back at the moment
                continue

    def _ask(self) -> None:
        while not self._done.wait(EVERY_S):
            for number, flow in enumerate(self._flows):
                self._hear(number, flow)
                try:
                    flow.sendto(f"{time.monotonic()}".encode(), self._there)
                except OSError:  # no route: a question that nobody hears
                    continue

    def _hear(self, number: int, flow: socket.socket) -> None:
        flow.settimeout(0)
        while True:
            try:
                asked = float(flow.recv(64))
            except OSError:  # nothing more has come, or somebody on the way said why not
                return
            self.answered[number] = max(self.answered[number], asked)


def _udp() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(_LISTEN_S)
    return made
