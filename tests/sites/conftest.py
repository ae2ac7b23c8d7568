"""One rig for the whole suite, and a pulse through its tunnels. `make test-sites` runs it; `make test` skips it.

Figures that tests measure are printed at the end in one table.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from infra.controlplane.harness import Figures
from rankbridge.rig import rig as rigs
from rankbridge.rig.pulse import Pulse
from rankbridge.rig.rig import Rig

FIGURES = Figures()


def pytest_terminal_summary(terminalreporter: Any) -> None:  # noqa: ANN401 - pytest does not export its type
    if FIGURES.rows:
        terminalreporter.section("measured between the sites")
        for line in FIGURES.lines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def figures() -> Figures:
    return FIGURES


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The rig as the last test left it: tests use `rig`."""
    if os.environ.get("RANKBRIDGE_SITES") != "1":
        pytest.skip("needs network namespaces and root: make test-sites")
    if faults := rigs.faults():
        pytest.fail("; ".join(f"{fault.fault}: {fault.remedy}" for fault in faults))
    began = time.monotonic()
    with rigs.opened(tmp_path_factory.mktemp("rig")) as opened:
        FIGURES.add("two tunnels with BGP up, from nothing", f"{time.monotonic() - began:.1f} s", "at most 60 s")
        yield opened


@pytest.fixture
def rig(shared: Rig) -> Iterator[Rig]:
    """The rig, whole at the start of each test."""
    shared.heal()
    shared.await_up()
    yield shared
    shared.heal()


@pytest.fixture
def pulse(rig: Rig) -> Iterator[Pulse]:
    """A pulse that beats in every flow."""
    with Pulse(rig) as beating:
        beating.after(time.monotonic(), within_s=5)
        yield beating
