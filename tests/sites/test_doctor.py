"""The doctor between real tunnels: a whole path has no fault, and each planted one is found and named."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from infra import stackfile
from rankbridge.doctor.findings import Finding, Findings, Verdict
from rankbridge.link import Shape
from rankbridge.rig.rig import Rig, until
from workloads.contract.sites import SiteName

pytestmark = pytest.mark.real_parts

HOME, CLOUD = SiteName.ONPREM, SiteName.AWS
GATEWAY, ECHO = 8080, 8085
STUB = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"x" * (100_000 if self.path == "/openapi.json" else 2))
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.answer(b"{}")
    def answer(self, body):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.fixture
def stack(rig: Rig, tmp_path: Path) -> Path:
    """The rig's plan as a stack file: its daemons take smaller packets than AWS's."""
    text = (stackfile.STACKS / "Pulumi.foundation-local.yaml").read_text()
    changed = text.replace("    mtu: 1446", f"    mtu: {rig.mtu}")
    assert changed != text
    made = tmp_path / "Pulumi.foundation-local.yaml"
    made.write_text(changed)
    return made


@pytest.fixture
def other_end(rig: Rig) -> Iterator[None]:
    """In the cloud: the doctor's echo end, and something that answers as a gateway does."""
    at = rig.hosts[CLOUD]
    commands = (
        [sys.executable, "-m", "rankbridge.cli", "doctor", "--answer", f"{at}:{ECHO}"],
        [sys.executable, "-c", STUB, at, str(GATEWAY)],
    )
    running = [subprocess.Popen([*rig.entry(CLOUD), *command], stdout=subprocess.PIPE) for command in commands]
    try:
        assert running[0].stdout is not None
        assert b"answering" in running[0].stdout.readline()
        curl = [*rig.entry(CLOUD), "bash", "-c", f"echo > /dev/tcp/{at}/{GATEWAY}"]
        until(lambda: subprocess.run(curl, capture_output=True, check=False).returncode == 0, 10, lambda: "no stub")
        yield
    finally:
        for process in running:
            process.terminate()
            process.communicate(timeout=10)


@pytest.fixture
def routers(rig: Rig, tmp_path: Path) -> list[str]:
    """For each box at home a command that takes swanctl's and vtysh's words to its daemons."""
    commands = []
    for number in rig.tunnels:
        daemons = rig.boxes[HOME, number].daemons
        script = tmp_path / f"box{number}"
        script.write_text(
            "#!/bin/sh\ntool=$1; shift\ncase $tool in\n"
            f'swanctl) exec swanctl "$@" --uri unix://{daemons.folder}/vici ;;\n'
            f'vtysh) exec vtysh --vty_socket {daemons.folder} "$@" ;;\nesac\n'
        )
        script.chmod(0o755)
        commands.append(str(script))
    return commands


class Doctor:
    """Runs `rankbridge doctor` at home, as an operator would."""

    def __init__(self, rig: Rig, stack: Path, routers: list[str]) -> None:
        self.rig = rig
        at = rig.hosts[CLOUD]
        self.command = [sys.executable, "-m", "rankbridge.cli", "doctor", "--json", "--stack", str(stack)]
        self.command += ["--peer", at, "--echo", f"{at}:{ECHO}"]
        self.command += [word for one in routers for word in ("--router", one)]

    def examine(self) -> tuple[int, dict[str, Finding]]:
        """The exit code, and what was found by name."""
        quiet = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true"}
        command = [*self.rig.entry(HOME), *self.command]
        done = subprocess.run(command, capture_output=True, check=False, timeout=180, env=quiet)
        assert done.stdout, done.stderr.decode()
        found = msgspec.json.decode(done.stdout, type=Findings)
        return done.returncode, {one.name: one for one in found.findings}


@pytest.fixture
def doctor(rig: Rig, stack: Path, routers: list[str], other_end: None) -> Doctor:  # noqa: ARG001 - must be there first
    return Doctor(rig, stack, routers)


@contextlib.contextmanager
def hole(rig: Rig, size: int, tunnels: tuple[int, ...], device: str) -> Iterator[None]:
    """Boxes at home forward nothing larger that came in by `device`, and tell nobody."""
    boxes = [rig.boxes[HOME, number].daemons for number in tunnels]
    rule = (
        "add table ip hole; add chain ip hole forward { type filter hook forward priority 0; }; "
        f"add rule ip hole forward {device} ip length > {size} drop"
    )
    for box in boxes:
        box.run("nft", rule)
    try:
        yield
    finally:
        for box in boxes:
            box.run("nft", "delete table ip hole")


def faults(found: dict[str, Finding]) -> set[str]:
    return {name for name, one in found.items() if one.verdict is Verdict.FAULT}


def test_a_whole_path_has_no_fault_and_its_sizes_are_the_plans(doctor: Doctor):
    code, found = doctor.examine()
    assert faults(found) == set()
    assert code == 0
    for way in ("mtu onprem to aws", "mtu aws to onprem"):
        assert (found[way].verdict, found[way].measured) == (Verdict.OK, f"packets of {doctor.rig.mtu} bytes pass")
    assert found["64 kB POST to aws"].verdict is Verdict.OK
    assert found["clock of aws"].verdict is Verdict.OK
    for endpoint in doctor.rig.endpoints:
        assert found[f"tunnel {endpoint.name}"].verdict is Verdict.OK
        assert found[f"BGP {endpoint.tunnel.aws_inside}"].verdict is Verdict.OK


def test_a_hole_on_the_way_to_the_cloud_is_found_and_named_and_the_other_way_is_whole(doctor: Doctor):
    with hole(doctor.rig, 1_320, (1, 2), "iifname lan"):
        code, found = doctor.examine()
    assert code == 1
    way = found["mtu onprem to aws"]
    assert way.measured == (
        f"packets of 1321..{doctor.rig.mtu} bytes vanish between onprem and aws: "
        f"path MTU is 1320, the plan needs {doctor.rig.mtu}"
    )
    assert "lower `network.mtu` in the stack file to 1320 (MSS 1280, pods 1270)" in way.remedy
    assert found["mtu aws to onprem"].verdict is Verdict.OK
    assert faults(found) == {"mtu onprem to aws", "64 kB POST to aws"}


def test_a_hole_on_the_way_back_in_one_tunnel_alone_is_found_and_told_apart(doctor: Doctor):
    # Whether four flows use both tunnels is chance; over a few examinations some do.
    with hole(doctor.rig, 1_300, (2,), "oifname lan"):
        for _ in range(6):
            _, found = doctor.examine()
            if "vanish" in found["mtu aws to onprem"].measured and "of 4 flows" in found["mtu aws to onprem"].measured:
                break
    way = found["mtu aws to onprem"]
    assert way.verdict is Verdict.FAULT
    assert "packets of 1301.." in way.measured
    assert "between aws and onprem: path MTU is 1300" in way.measured
    assert "not in every tunnel" in way.measured
    assert found["mtu onprem to aws"].verdict is Verdict.OK


def test_a_dead_tunnel_is_named_by_its_session_while_the_path_still_works(doctor: Doctor):
    rig = doctor.rig
    rig.shape(Shape(cut=True), tunnel=1)
    until(lambda: rig.state().tunnels[0].bgp[HOME] != "Established", 30, lambda: "BGP holds on to a dead tunnel")
    time.sleep(1)  # until the routes have followed
    code, found = doctor.examine()
    assert code == 1
    assert f"BGP {rig.endpoints[0].tunnel.aws_inside}" in faults(found)
    assert found[f"BGP {rig.endpoints[1].tunnel.aws_inside}"].verdict is Verdict.OK
    assert found["mtu onprem to aws"].verdict is Verdict.OK


def test_without_an_echo_end_the_doctor_says_what_to_start(doctor: Doctor):
    doctor.command[doctor.command.index("--echo") + 1] = f"{doctor.rig.hosts[CLOUD]}:{ECHO + 1}"
    code, found = doctor.examine()
    assert code == 1
    assert "rankbridge doctor --answer" in found["mtu onprem to aws"].remedy
