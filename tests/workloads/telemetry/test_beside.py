"""Work beside an event loop: the loop goes on, faults come back, and the interpreter is left as it was."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading

import pytest

from workloads.telemetry.beside import SWITCH_S, beside, in_thread, settle


async def test_the_loop_goes_on_while_the_work_is_done_and_gets_its_result():
    release = threading.Event()
    task = asyncio.create_task(beside(lambda: release.wait(20) and threading.current_thread().name))
    await asyncio.sleep(0)
    assert not task.done()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
    assert not gc.isenabled()
    release.set()
    assert await task == "beside"
    assert sys.getswitchinterval() > SWITCH_S
    assert gc.isenabled()


async def test_what_the_work_raises_is_raised_and_everything_is_as_before():
    def fail() -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        await beside(fail)
    assert gc.isenabled()


async def test_a_caller_that_is_cancelled_does_not_wait_and_the_late_result_hurts_nobody():
    release = threading.Event()
    task = asyncio.create_task(in_thread(lambda: release.wait(20)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()
    await asyncio.sleep(0.02)


def test_settling_keeps_what_is_there_from_the_collector():
    before = gc.get_freeze_count()
    settle()
    assert gc.get_freeze_count() >= before
    gc.unfreeze()
