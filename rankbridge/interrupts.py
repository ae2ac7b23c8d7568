"""Ctrl-C and SIGTERM as exceptions that unwind the desk, and a shield for work that must not be cut in two.

Signals are never blocked in the kernel's sense: children would inherit that and could not be ended.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """The desk was asked to stop by `number`. Not a KeyboardInterrupt: command line libraries swallow those."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it."""
        return 128 + self.number


def listen() -> None:
    """From now on each of these signals raises Interrupted in the main thread. The command line calls it once."""
    for number in _SIGNALS:
        signal.signal(number, _raise)


@contextlib.contextmanager
def shield() -> Iterator[None]:
    """Within it, a signal waits; it raises Interrupted at the end, unless another exception is on its way already."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    waiting: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        waiting.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        raise Interrupted(waiting[0])


def _raise(number: int, _: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number))
