"""The generated documents are what the declared resources make them, and a type without a row is no document."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree.ElementTree import Element

import pytest
from defusedxml.ElementTree import fromstring

from infra import drawing, fidelity, paper
from infra.recording import Recording

Record = Callable[..., Recording]


def test_the_committed_documents_are_up_to_date(capsys: pytest.CaptureFixture[str]):
    assert paper.main(["--check"]) == 0, capsys.readouterr().out


def test_a_type_without_a_row_is_refused():
    with pytest.raises(LookupError, match=r"without a row for \['aws:new/thing:Thing'\]"):
        fidelity.page({*fidelity.LEDGER, "aws:new/thing:Thing"})


def test_a_row_without_a_type_is_refused():
    with pytest.raises(LookupError, match="a row too many"):
        fidelity.page(set(fidelity.LEDGER) - {"aws:ec2/vpc:Vpc"})


def test_what_is_said_to_be_emulated_is_in_the_local_stack(recorded: Record):
    declared = {r.type for r in recorded("foundation-local").custom()}
    said = {t for t, row in fidelity.LEDGER.items() if row.emulator in (fidelity.LOCALSTACK, fidelity.MOTO)}
    assert said == declared


def texts(svg: str) -> list[str]:
    root: Element = fromstring(svg)
    return [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_shows_sites_tunnels_groups_and_buckets(recorded: Record):
    shown = texts(drawing.draw(recorded("foundation-prod")))
    for expected in (
        "onprem (home, home, 10.10.0.0/16)",
        "aws (cloud, eu-central-1, 10.20.0.0/16)",
        "tunnel 1: 169.254.10.0/30",
        "tunnel 2: 169.254.10.4/30",
        "GPU nodes rankbridge-prod-aws-gpu-burst",
        "home-server-3",
        "models",
    ):
        assert expected in shown
    assert shown[0] == f"foundation-prod: {len(recorded('foundation-prod').custom())} resources"


def test_the_picture_shows_what_is_declared_and_nothing_else(recorded: Record):
    shown = texts(drawing.draw(recorded("foundation-dev")))
    assert "GPU nodes rankbridge-dev-aws-gpu" in shown
    assert not [t for t in shown if "burst" in t or "home-server-3" in t or "replica" in t]
