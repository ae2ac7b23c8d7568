"""The renderer's files bring up two real tunnels, BGP moves traffic between them, and nothing is ever in clear."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.controlplane.harness import Figures
from infra.vpn import render
from rankbridge.link import Direction, Shape
from rankbridge.rig import namespaces
from rankbridge.rig import rig as rigs
from rankbridge.rig.pulse import Pulse
from rankbridge.rig.rig import Rig, until
from rankbridge.rig.wiring import WAN, Wiring
from workloads.contract.sites import SiteName

pytestmark = pytest.mark.real_parts

HOME, CLOUD = SiteName.ONPREM, SiteName.AWS
MOVED_WITHIN_S = 15.0
HEALED_WITHIN_S = 5.0
TRANSFER_BYTES = 8 << 20
PORT = 9100


@contextlib.contextmanager
def listening(rig: Rig, take: int) -> Iterator[list[bytes]]:
    """A server in the cloud that reads `take` bytes of one connection and says their digest."""

    def made() -> socket.socket:
        return socket.create_server((rig.hosts[CLOUD], PORT), reuse_port=True)

    server, digests = rig.inside(CLOUD, made), []

    def serve() -> None:
        with contextlib.suppress(OSError):
            caller, _ = server.accept()
            with caller:
                caller.settimeout(20)
                digest, got = hashlib.sha256(), 0
                while got < take and (part := caller.recv(1 << 16)):
                    digest.update(part)
                    got += len(part)
                digests.append(digest.digest())
                caller.sendall(digest.digest())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield digests
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def calling(rig: Rig) -> socket.socket:
    """A TCP connection from home to the cloud."""
    made = rig.inside(HOME, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    made.settimeout(20)
    made.connect((rig.hosts[CLOUD], PORT))
    return made


def given_up(rig: Rig, tunnel: int) -> None:
    """Until home's end has given the tunnel up."""
    until(lambda: not rig.boxes[HOME, tunnel].sa().up, 20, lambda: f"home holds on to tunnel {tunnel}")


def test_both_tunnels_come_up_from_the_renderers_files_with_an_authenticated_cipher(rig: Rig):
    state = rig.state()
    assert [one.number for one in state.tunnels] == [1, 2]
    assert all(sa.up and sa.cipher == "AES_GCM_16" for one in state.tunnels for sa in one.sas.values())
    assert state.routes == {HOME: (1, 2), CLOUD: (1, 2)}
    assert rig.boxes[HOME, 1].files().keys() == {
        render.SWANCTL,
        render.STRONGSWAN,
        render.FRR,
        render.NFT,
        render.INTERFACES,
    }


def test_a_large_tcp_transfer_crosses_whole_and_nothing_of_it_is_seen_on_the_wires(rig: Rig, figures: Figures):
    sent = os.urandom(TRANSFER_BYTES)
    with rig.watched() as seen, listening(rig, len(sent)):
        began = time.monotonic()
        with calling(rig) as call:
            call.sendall(sent)
            said = call.recv(32)
            mss = call.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        took = time.monotonic() - began
    assert said == hashlib.sha256(sent).digest()
    found = seen()
    assert found.clean, found
    assert found.kinds["esp"] > len(sent) // rig.mtu
    assert found.largest <= 1500
    assert mss <= rig.transport.mss
    figures.add("TCP through one tunnel", f"{len(sent) * 8 / took / 1e6:.0f} Mbit/s")
    figures.add("frames looked at, none in clear", f"{found.frames}")


def test_a_packet_in_clear_on_a_wire_is_caught(rig: Rig):
    box = rig.wiring.namespace("home1")
    with rig.watched() as seen:

        def send() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as leak:
                leak.bind((str(rig.wiring.lan(HOME, rig.endpoints[0].tunnel)[1].ip), 0))
                leak.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, WAN.encode())
                leak.sendto(b"behaviour data", (str(rig.wiring.outside(CLOUD, rig.endpoints[0].tunnel)), 4500))

        namespaces.inside(box, send)
    found = seen()
    assert not found.clean
    assert found.wrong >= 1
    assert "an inner address in clear" in found.faults[0]


def test_one_cut_tunnel_moves_its_flows_to_the_other_and_comes_back(rig: Rig, pulse: Pulse, figures: Figures):
    with rig.watched() as seen:
        cut = time.monotonic()
        rig.shape(Shape(cut=True), tunnel=1)
        moved = pulse.after(cut, within_s=40)
        until(lambda: rig.routes(HOME) == (2,), 10, lambda: f"home uses {rig.routes(HOME)}")
        given_up(rig, 1)  # a shorter cut would heal by itself
        healed = time.monotonic()
        rig.heal()
        back = rig.await_up()
        whole = pulse.after(healed, within_s=5)
    figures.add("one tunnel cut: every flow passes again", f"{moved:.1f} s", f"at most {MOVED_WITHIN_S:.0f} s")
    figures.add("one tunnel healed: both in use again", f"{back:.1f} s")
    assert moved <= MOVED_WITHIN_S
    assert whole <= HEALED_WITHIN_S, "flows must not be lost while a tunnel comes back"
    assert seen().wrong == 0, seen().faults


def test_both_cut_there_is_no_way_and_healed_traffic_flows_again(rig: Rig, pulse: Pulse, figures: Figures):
    rig.shape(Shape(cut=True))
    gone = until(lambda: not rig.routes(HOME), 40, lambda: f"home still uses {rig.routes(HOME)}")
    for number in rig.tunnels:
        given_up(rig, number)
    with rig.inside(HOME, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as call:
        assert call.connect_ex((rig.hosts[CLOUD], PORT)) == errno.ENETUNREACH
    with socket.socket() as desk:
        assert desk.connect_ex((rig.hosts[CLOUD], PORT)) == errno.ECONNREFUSED, "the desk reaches both sites always"
    healed = time.monotonic()
    rig.heal()
    flows = pulse.after(healed, within_s=40)
    figures.add("both tunnels cut: route gone", f"{gone:.1f} s", f"at most {MOVED_WITHIN_S:.0f} s")
    figures.add("both tunnels healed: every flow passes again", f"{flows:.1f} s", f"at most {HEALED_WITHIN_S:.0f} s")
    assert gone <= MOVED_WITHIN_S
    assert flows <= HEALED_WITHIN_S


def test_a_one_way_cut_is_seen_by_both_ends(rig: Rig, pulse: Pulse, figures: Figures):
    cut = time.monotonic()
    rig.shape(Shape(cut=True, direction=Direction.FROM_CLOUD), tunnel=2)
    moved = pulse.after(cut, within_s=40)
    figures.add("one tunnel cut one way: every flow passes again", f"{moved:.1f} s", f"at most {MOVED_WITHIN_S:.0f} s")
    assert moved <= MOVED_WITHIN_S
    passed = rig.passed(2)
    assert passed.from_cloud.dropped > 0
    assert passed.shape.direction is Direction.FROM_CLOUD


@pytest.mark.parametrize("site", [HOME, CLOUD])
def test_a_wrong_key_is_refused_and_named(rig: Rig, site: SiteName):
    good, wrong = rig.endpoints[0].psk, "w" * 40
    rig.use_key(site, 1, wrong)
    try:
        state = rig.state().tunnels[0]
        assert not state.up
        assert "pre-shared keys differ" in (state.refusals[HOME] or ""), state
        assert wrong not in rig.described()
        assert rig.state().tunnels[1].up, "the other tunnel has a key of its own"
    finally:
        rig.use_key(site, 1, good)
    rig.await_up()
    assert rig.state().tunnels[0].refusals[HOME] is None


def test_a_tunnel_whose_far_end_is_replaced_comes_back(rig: Rig, pulse: Pulse, figures: Figures):
    lost = time.monotonic()
    rig.replace_box(CLOUD, 1)
    moved = pulse.after(lost, within_s=40)
    back = rig.await_up()
    figures.add("far end replaced: every flow passes again", f"{moved:.1f} s", f"at most {MOVED_WITHIN_S:.0f} s")
    figures.add("far end replaced: both in use again", f"{time.monotonic() - lost:.1f} s")
    assert moved <= MOVED_WITHIN_S
    assert back < 40


def test_delay_loss_and_rate_are_what_was_asked_for(rig: Rig, figures: Figures):
    rig.shape(Shape(delay_ms=75, rate_mbit=2))
    sent = os.urandom(500_000)
    with listening(rig, len(sent)), calling(rig) as call:
        began = time.monotonic()
        call.sendall(sent)
        call.recv(32)
        took = time.monotonic() - began
    figures.add("500 kB over 2 Mbit/s, 150 ms there and back", f"{took:.1f} s", "at least 2.0 s")
    assert 500_000 * 8 / 2e6 <= took < 6


def test_inner_packets_are_as_large_as_planned_and_no_larger(rig: Rig):
    assert rig.mtu == render.LIBIPSEC_MTU
    for box in rig.boxes.values():
        assert f"mtu {rig.mtu} " in box.daemons.run("ip", "link", "show", render.LIBIPSEC_DEVICE)


def test_an_mtu_hole_swallows_large_packets_and_lets_small_ones_through(rig: Rig, pulse: Pulse):
    rig.shape(Shape(largest=1300))
    pulse.after(time.monotonic(), within_s=5)
    with listening(rig, 100_000) as digests, calling(rig) as call:
        call.settimeout(3)
        call.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # nothing is sent again
        call.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)
        call.sendall(os.urandom(100_000))
        with pytest.raises(TimeoutError):
            call.recv(32)
    assert not digests
    assert rig.state().tunnels[0].up, "no daemon sees such a hole: its own packets are small"


def test_a_killed_rig_ends_by_itself_and_the_next_removes_what_is_left(rig: Rig, tmp_path: Path):
    program = (
        "import sys, time; from pathlib import Path; from rankbridge.rig import rig\n"
        "with rig.opened(Path(sys.argv[1]), wait=False) as opened:\n"
        "    print(opened.wiring.slot, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as killed:
        said = killed.stdout.readline() if killed.stdout else ""
        killed.kill()
    wiring = Wiring(rig.wiring.link, int(said))
    assert wiring.slot != rig.wiring.slot, "rigs do not meet"
    assert any((namespaces.NAMED / name).exists() for name in wiring.namespaces)
    until(lambda: not any(namespaces.pids(name) for name in wiring.namespaces), 15, lambda: "daemons live on")
    rigs.remove_leftovers()
    assert not any((namespaces.NAMED / name).exists() for name in wiring.namespaces)
    assert rig.state().up, "a rig that is held is nobody's leftover"
