"""Both ends of the echo over loopback: sizes both ways, clocks, and no flood for strangers."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterator

import pytest

from rankbridge.doctor.echo import Asking, EchoEnd, Exchange, NoEcho, whole_packets
from rankbridge.doctor.examination import udp
from rankbridge.doctor.hole import search


@contextlib.contextmanager
def answering(ahead_s: float = 0.0) -> Iterator[tuple[str, int]]:
    """An echo end whose clock is ahead."""
    with udp() as bound:
        bound.bind(("127.0.0.1", 0))
        end = EchoEnd(bound, lambda: 1_790_000_000.0 + ahead_s)
        thread = threading.Thread(target=end.serve)
        thread.start()
        try:
            yield bound.getsockname()
        finally:
            end.stop()
            thread.join()


@contextlib.contextmanager
def asking(peer: tuple[str, int]) -> Iterator[Asking]:
    with udp() as made:
        yield Asking(made, peer, lambda: 1_790_000_000.0)


def test_large_packets_pass_both_ways_where_the_path_is_wide():
    with answering() as peer, asking(peer) as flow:
        answered, lost = flow.meet()
        assert (len(answered), lost) == (10, 0)
        assert search([flow.there()], 9_000).mtu == 9_000
        assert search([flow.back()], 9_000).mtu == 9_000


@pytest.mark.parametrize("ahead", [0.0, 3600.0, -3600.0])
def test_the_other_clock_is_measured_in_either_direction(ahead: float):
    with answering(ahead) as peer, asking(peer) as flow:
        answered, _ = flow.meet()
    assert all(one.offset_s == pytest.approx(ahead, abs=0.5) for one in answered)


def test_where_nobody_listens_that_is_said_at_once():
    with udp() as bound:
        bound.bind(("127.0.0.1", 0))
        gone = bound.getsockname()
    with asking(gone) as flow, pytest.raises(NoEcho, match="nobody listens"):
        flow.meet()


def test_where_nobody_answers_that_is_said_after_a_while():
    with udp() as silent:
        silent.bind(("127.0.0.1", 0))
        with asking(silent.getsockname()) as flow, pytest.raises(NoEcho, match="nobody answers"):
            flow.meet(tries=2)


def test_a_stranger_gets_no_more_than_it_sent():
    with answering() as peer, udp() as stranger:
        stranger.settimeout(2)
        question = b"RBD1" + struct.pack("!I8sH", 1, bytes(8), 9_000)
        stranger.sendto(question, peer)
        answer = stranger.recv(10_000)
        assert len(answer) <= len(question) + 28
        # Having shown its token it gets what it asks for.
        stranger.sendto(b"RBD1" + struct.pack("!I8sH", 2, answer[8:16], 9_000), peer)
        assert len(stranger.recv(10_000)) == 9_000 - 28
        # Another caller's token is worth nothing.
        with udp() as other:
            other.settimeout(2)
            other.sendto(b"RBD1" + struct.pack("!I8sH", 3, answer[8:16], 9_000), peer)
            assert len(other.recv(10_000)) <= len(question) + 28


@pytest.mark.parametrize("raw", [b"", b"RBD1", b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\xff" * 46])
def test_what_is_no_question_gets_no_answer_and_the_end_goes_on(raw: bytes):
    with answering() as peer:
        with udp() as stranger:
            stranger.settimeout(0.2)
            stranger.sendto(raw, peer)
            with pytest.raises(TimeoutError):
                stranger.recv(100)
        with asking(peer) as flow:
            assert flow.meet()[1] == 0


def test_an_answer_to_another_question_is_not_taken_for_this_one():
    with udp() as impostor, udp() as made:
        impostor.bind(("127.0.0.1", 0))
        flow = Asking(made, impostor.getsockname())

        def reply() -> None:
            _, caller = impostor.recvfrom(100)
            impostor.sendto(b"RBD1" + struct.pack("!I8sHHdd", 0, bytes(8), 64, 0, 1.0, 1.0), caller)

        thread = threading.Thread(target=reply)
        thread.start()
        assert not isinstance(flow.ask(64, 64), Exchange)
        thread.join()


def test_a_packet_that_the_own_machine_cannot_send_whole_is_told_with_the_size_that_it_can():
    with udp() as made:
        whole_packets(made)
        made.connect(("127.0.0.1", 9))
        flow = Asking(made, ("127.0.0.1", 9))
        assert flow.ask(65_535 + 10, 64) == 65_536 or isinstance(flow.ask(65_535 + 10, 64), int)
