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
from rankbridge.roles import Process, Role, injection_faults, parse_ports
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


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("web=9080", "no listener is called 'web'"),
        ("gateway=many", "'many' is no port"),
        ("gateway", "'' is no port"),
        ("gateway=80", "between 1024 and 65535"),
        ("gateway=8081", "given to both"),
    ],
)
def test_a_port_override_that_cannot_be_is_a_fault(setting: str, fault: str):
    book, (found,) = parse_ports([setting])
    assert fault in found.fault
    assert book.port(Listener.GATEWAY) == 8080


def test_every_wrong_override_is_told_and_a_right_one_holds():
    assert len(parse_ports(["web=1", "intake=x", "gateway=9080"])[1]) == 2
    book, faults = parse_ports(["gateway=9080"])
    assert (book.port(Listener.GATEWAY), faults) == (9080, [])


def test_only_a_known_injection_passes():
    assert injection_faults(["ranker-delay=80ms"]) == []
    wrong = ["ranker-delay", "ranker-delay=80", "ranker-delay=-1ms", "retrieval-delay=80ms"]
    assert [f"cannot inject {text!r}" for text in wrong] == [fault.fault for fault in injection_faults(wrong)]


def test_faults_within_faults_are_told_one_by_one():
    inner = ManyFaults([DeskError("one", "a"), DeskError("two", "b")])
    with pytest.raises(ManyFaults) as error:
        preflight.refuse([inner, DeskError("three", "c")])
    assert [fault.fault for fault in error.value.faults] == ["one", "two", "three"]
