"""What the plan says is read from a stack file without its secrets, and refused with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import stackfile
from rankbridge.doctor.expected import Expected, sizes
from rankbridge.doctor.findings import Verdict
from rankbridge.faults import DeskError

LOCAL = stackfile.STACKS / "Pulumi.foundation-local.yaml"


def test_sizes_and_peers_come_from_the_stack_by_name_or_by_path():
    by_name, by_path = Expected.of_stack("foundation-local"), Expected.of_stack(str(LOCAL))
    assert by_name == by_path
    assert (by_name.mtu, by_name.mss, by_name.path_mtu) == (1446, 1406, 1500)
    assert [str(peer) for peer in by_name.peers] == ["169.254.210.1", "169.254.210.5"]
    assert by_name.names == ()  # an emulator has no names


def test_a_stack_with_encrypted_secrets_is_read_without_them(tmp_path: Path):
    secrets = "".join(f"  rankbridge:psk-onprem-aws-{n}:\n    secure: AAABAK{n}==\n" for n in (1, 2))
    file = tmp_path / LOCAL.name
    file.write_text(LOCAL.read_text() + secrets)
    assert Expected.of_stack(str(file)) == Expected.of_stack("foundation-local")


@pytest.mark.parametrize("stack", ["foundation-nowhere", "/nowhere/Pulumi.x.yaml", "../x", ""])
def test_a_stack_that_is_not_there_is_a_fault_with_those_that_are(stack: str):
    with pytest.raises(DeskError) as error:
        Expected.of_stack(stack)
    assert "foundation-prod" in error.value.remedy


@pytest.mark.parametrize("text", ["", "- a\n", "config:\n  rankbridge:owner: x\n", "config: [\n", "\x00"])
def test_a_file_that_is_no_stack_file_is_a_fault_and_no_traceback(tmp_path: Path, text: str):
    file = tmp_path / "Pulumi.foundation-x.yaml"
    file.write_text(text)
    with pytest.raises(DeskError):
        Expected.of_stack(str(file))


def test_a_plan_whose_packets_do_not_fit_the_outer_ones_is_a_fault_with_the_size_that_does():
    assert sizes(Expected(mtu=1438, path_mtu=1500, nat_traversal=True, peers=())).verdict is Verdict.OK
    found = sizes(Expected(mtu=1446, path_mtu=1480, nat_traversal=True, peers=()))
    assert found.verdict is Verdict.FAULT
    assert found.remedy.endswith("to 1418")
