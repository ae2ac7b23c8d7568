"""What keeps processes from starting is found before any work, and all at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from rankbridge import preflight
from rankbridge.faults import DeskError, ManyFaults
from rankbridge.layout import Layout
from rankbridge.roles import Process, Role, check_injections, parse_ports
from workloads.contract.sites import Listener

MakeStub = Callable[..., Process]


def test_a_taken_port_is_named_with_its_holder_and_a_way_out(stub: MakeStub):
    process = stub(Role.GATEWAY)
    with socket.socket() as holder:
        holder.bind(process.sockets[0])
        holder.listen()
        (fault,) = preflight.ports([process])
    port = process.sockets[0][1]
    assert fault.fault.startswith(f"port 127.0.0.1:{port} is taken by pid {os.getpid()} (")
    assert "--port gateway=" in fault.remedy


def test_a_free_port_is_no_fault(stub: MakeStub):
    assert preflight.ports([stub(Role.GATEWAY)]) == []


def test_every_taken_port_is_told_in_one_go(stub: MakeStub):
    several = [stub(Role.GATEWAY), stub(Role.RETRIEVAL)]
    with socket.socket() as one, socket.socket() as other:
        for holder, process in zip((one, other), several, strict=True):
            holder.bind(process.sockets[0])
            holder.listen()
        with pytest.raises(ManyFaults) as error:
            preflight.refuse(preflight.ports(several))
    assert len(error.value.faults) == 2


def test_missing_tools_are_told_with_the_command_that_makes_them(layout: Layout):
    (fault,) = preflight.tools(layout)
    assert "tritonserver is not unpacked" in fault.fault
    assert "make setup" in fault.remedy


def test_too_little_memory_and_disk_are_told_with_figures(layout: Layout):
    assert "of memory are available; 1000000 GB are needed" in preflight.memory(1_000_000)[0].fault
    assert "of disk are free" in preflight.disk(layout.home, 1_000_000)[0].fault
    assert preflight.memory(0.001) == []
    assert preflight.disk(layout.home, 0.001) == []


def test_a_data_file_that_is_missing_a_folder_or_empty_is_a_fault(tmp_path: Path):
    (tmp_path / "empty.csv").touch()
    (tmp_path / "good.csv").write_text("a,b\n")
    assert "no such file" in preflight.readable(tmp_path / "none.csv")[0].fault
    assert "is a directory" in preflight.readable(tmp_path)[0].fault
    assert "is empty" in preflight.readable(tmp_path / "empty.csv")[0].fault
    assert preflight.readable(tmp_path / "good.csv") == []
    assert preflight.readable(None) == []


def test_results_cannot_go_into_a_file(tmp_path: Path):
    (tmp_path / "file").touch()
    assert "is not a folder" in preflight.writable(tmp_path / "file" / "out")[0].fault
    assert preflight.writable(tmp_path / "new" / "out") == []


def test_a_rehearsal_is_told_all_faults_together(layout: Layout, stub: MakeStub, tmp_path: Path):
    layout.root.joinpath("file").touch()
    faults = preflight.rehearsal(layout, [stub()], tmp_path / "none.csv", tmp_path / "file")
    assert len(faults) >= 3


def test_a_port_override_that_cannot_be_is_refused_with_the_names_there_are():
    with pytest.raises(DeskError, match="no listener is called 'web'") as error:
        parse_ports(("web=9080",))
    assert "gateway" in error.value.remedy
    with pytest.raises(DeskError, match="is no port"):
        parse_ports(("gateway=many",))
    with pytest.raises(DeskError, match="between 1024 and 65535"):
        parse_ports(("gateway=80",))
    with pytest.raises(DeskError, match="given to both"):
        parse_ports(("gateway=8081",))
    assert parse_ports(("gateway=9080",)).port(Listener.GATEWAY) == 9080


def test_only_a_known_injection_passes():
    check_injections(("ranker-delay=80ms",))
    for wrong in ("ranker-delay", "ranker-delay=80", "ranker-delay=-1ms", "retrieval-delay=80ms"):
        with pytest.raises(DeskError, match="cannot inject"):
            check_injections((wrong,))
