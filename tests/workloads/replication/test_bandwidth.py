"""The limit on bytes per second."""

from __future__ import annotations

import threading
import time

import pytest

from workloads.replication.bandwidth import Bandwidth, StoppedError, parse_bytes


@pytest.mark.parametrize(
    ("text", "amount"),
    [("500000", 500_000), ("10MB", 10_000_000), ("64MiB", 64 << 20), ("1.5 gb", 1_500_000_000), ("8Ki", 8192)],
)
def test_amounts_are_read_in_both_kinds_of_units(text: str, amount: int):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "ten", "10 apples", "-1", "10MB/s"])
def test_what_is_no_amount_is_refused(text: str):
    with pytest.raises(ValueError, match="no amount"):
        parse_bytes(text)


def test_a_rate_may_say_per_second():
    assert parse_bytes("10MB/s", per_second=True) == 10_000_000


def test_turns_are_as_far_apart_as_the_bytes_before_them_take(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    waits: list[float] = []

    def wait(timeout: float) -> bool:
        nonlocal now
        waits.append(timeout)
        now += timeout
        return False

    bandwidth = Bandwidth(1000, clock=lambda: now)
    monkeypatch.setattr(bandwidth._stopped, "wait", wait)
    for size in (500, 2000, 100):
        bandwidth.turn(size)
    assert waits == [0.0, 0.5, 2.0]
    now += 60  # an idle minute is not saved up: the next two are apart again
    bandwidth.turn(1000)
    bandwidth.turn(1000)
    assert waits[3:] == [0.0, 1.0]


def test_many_senders_together_keep_the_limit_and_each_gets_its_share():
    """Turns are counted over the time that really passed: nobody is ahead by more than a few, and all keep the rate."""
    bandwidth = Bandwidth(1_000_000)
    turns = dict.fromkeys(range(4), 0)
    over = threading.Event()

    def sender(number: int) -> None:
        while not over.is_set():
            bandwidth.turn(10_000)  # 10 ms
            turns[number] += 1

    threads = [threading.Thread(target=sender, args=(number,)) for number in turns]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    time.sleep(0.6)
    over.set()
    for thread in threads:
        thread.join()
    lasted = time.monotonic() - begun
    assert sum(turns.values()) <= lasted * 100 + 1
    assert min(turns.values()) >= 1
    assert max(turns.values()) - min(turns.values()) <= 3


def test_without_a_limit_nobody_waits():
    bandwidth = Bandwidth(None)
    for _ in range(1000):
        bandwidth.turn(1 << 40)


def test_who_waits_when_the_job_ends_is_woken():
    bandwidth = Bandwidth(1)
    bandwidth.turn(10_000)
    caught: list[BaseException] = []

    def sender() -> None:
        try:
            bandwidth.turn(1)
        except StoppedError as error:
            caught.append(error)

    thread = threading.Thread(target=sender)
    thread.start()
    bandwidth.stop()
    thread.join(10)
    assert len(caught) == 1
