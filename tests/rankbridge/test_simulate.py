"""The desk's simulation: what it plays, says and writes."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from rankbridge import simulate
from rankbridge.cli import app
from rankbridge.faults import DeskError
from rankbridge.simulate import Options, SimulationResult
from workloads.gateway.simulator import Condition, Recorded

BRIEF = {"loads": (0.6, 1.2), "seconds": 5.0}


def played(out: Path, **options: object) -> tuple[SimulationResult, str]:
    console = Console(file=io.StringIO(), width=160)
    result = simulate.run(Options(out=out, **{**BRIEF, **options}), console)  # type: ignore[arg-type]  # as the test says
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


def test_a_simulation_prints_a_row_per_policy_and_writes_what_it_found(tmp_path: Path):
    result, said = played(tmp_path)
    for name in ("rankbridge", "round-robin", "least-request", "power of two", "least cost"):
        assert said.count(name) >= 2, name
    assert msgspec.json.decode((tmp_path / "simulation.json").read_bytes(), type=SimulationResult) == result
    drawing = ET.fromstring((tmp_path / "simulation.svg").read_text())  # noqa: S314 - our own file
    assert drawing.tag.endswith("svg")


def test_ours_is_the_cheapest_at_every_load_and_never_late(tmp_path: Path):
    result, _ = played(tmp_path)
    for load in result.loads:
        ours, *others = load.policies
        assert ours.name == simulate.OURS
        assert ours.late_share == 0.0
        assert all(ours.cost_per_1000 < other.cost_per_1000 for other in others)


def test_measured_service_times_are_played_and_drawn_ones_are_said_to_be(tmp_path: Path):
    recorded = Recorded(measured="a ranker on a bench", candidates=200, ms={"onprem/1": [8.0, 10.0, 12.0]})
    (tmp_path / "times.json").write_bytes(msgspec.json.encode(recorded))
    result, said = played(tmp_path, recorded=tmp_path / "times.json")
    assert result.loads[0].rate == pytest.approx(60.0)
    assert "onprem/1: a ranker on a bench" in said
    assert "aws/1: drawn" in said


@pytest.mark.parametrize("content", [None, b"", b'{"measured": "", "candidates": 1, "ms": {"onprem/1": [-1]}}'])
def test_service_times_that_cannot_be_read_are_named_with_the_remedy(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "times.json").write_bytes(content)
    with pytest.raises(DeskError, match="cannot read"):
        played(tmp_path, recorded=tmp_path / "times.json")


def test_a_fault_of_the_home_ranker_can_be_played(tmp_path: Path):
    calm, _ = played(tmp_path, loads=(0.6,), seconds=9.0)
    stopped, said = played(tmp_path, loads=(0.6,), seconds=9.0, fault=Condition.STOPPED)
    assert "stopped in the middle third" in said
    ours = stopped.loads[0].policies[0]
    assert ours.cost_per_1000 > calm.loads[0].policies[0].cost_per_1000
    assert ours.rungs[3] < 0.01
    assert all(other.late_share > 0.1 for other in stopped.loads[0].policies[1:2])


@pytest.mark.parametrize("loads", ["much", "0", "0.5,-1", "11"])
def test_loads_that_make_no_sense_end_with_the_remedy(loads: str, tmp_path: Path):
    result = CliRunner().invoke(app, ["simulate", "--loads", loads, "--out", str(tmp_path)])
    assert isinstance(result.exception, DeskError)
    assert not list(tmp_path.iterdir())
