"""Work beside a server that goes on answering: in a thread, without long pauses for who waits on the event loop.

Opening a bundle is a second of Python. Two things of the interpreter would stop answers meanwhile: the lock, which a
busy thread hands over only every 5 ms, and the collector, which a thread that makes many objects sets going with
everything stopped. Knows nothing of the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

T = TypeVar("T")

SWITCH_S: Final = 0.0005
"""How long the thread may keep the interpreter from the event loop."""


async def beside(work: Callable[[], T]) -> T:
    """As `in_thread`, for work that is Python itself, beside an event loop that is in a hurry."""
    with _undisturbed():
        return await in_thread(work)


async def in_thread(work: Callable[[], T]) -> T:
    """What `work` returns or raises; it runs in a thread of its own.

    A thread cannot be stopped: when the caller is cancelled, the work goes on and its result is dropped. It does not
    keep the process from ending, as threads of the loop's own pool do.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # None only where T is

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped meanwhile
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="beside", daemon=True).start()
    return await done


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    before = sys.getswitchinterval()
    collecting = gc.isenabled()
    sys.setswitchinterval(SWITCH_S)
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        if collecting:
            gc.enable()


def settle() -> None:
    """Call when something large was loaded or dropped: it is not looked at again, and freed memory goes back.

    What is loaded lives until it is replaced, and what a request makes dies without the collector's help. Only
    objects younger than the last call are looked at, so that it takes milliseconds.
    """
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):  # musl and others have no such function
        ctypes.CDLL(None).malloc_trim(0)
