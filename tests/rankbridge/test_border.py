"""What crosses the border is timed by what gateways say, and not by what they said before."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from rankbridge import border, bundles
from rankbridge.cloud import Cloud
from rankbridge.faults import DeskError
from rankbridge.layout import Layout
from workloads.contract.http import Readiness
from workloads.delta import __main__ as delta

CLOUD = Cloud("data", "models", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"})


def _ready(bundle: str, deltas: int) -> bytes:
    answer = Readiness(
        ready=True,
        site="onprem",
        bundle=bundle[:12],
        delta=deltas,
        draining=0,
        revision=1,
        faults={},
        backends={},
        missing=[],
    )
    return msgspec.json.encode(answer)


def test_an_edition_with_items_of_an_earlier_rehearsal_is_not_taken_for_the_bundle(monkeypatch: pytest.MonkeyPatch):
    bundle = "a" * 64
    said = iter([_ready(bundle, 1), b"", _ready(bundle, 1), _ready(bundle, 0)])
    asked: list[str] = []

    def get(url: str) -> bytes:
        asked.append(url)
        return next(said)

    monkeypatch.setattr(border, "_get", get)
    monkeypatch.setattr(border, "LOOK_EVERY_S", 0)
    assert set(border.served_after({"onprem": "http://gateway"}, bundle, time.monotonic())) == {"onprem"}
    assert len(asked) == 4


def test_a_key_whose_password_is_not_at_hand_is_a_fault_with_a_remedy(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(bundles.PASSWORD, "correct horse")
    bundles.trusted_key(layout)
    monkeypatch.delenv(bundles.PASSWORD)
    with pytest.raises(DeskError, match="cannot be opened") as error:
        border.Publisher(layout, CLOUD).publish(tmp_path)
    assert "password" in error.value.remedy


def test_a_rehearsal_adds_its_item_on_the_bundle_at_hand_and_keeps_no_second_copy(layout: Layout):
    arguments = border.Publisher(layout, CLOUD).add_arguments(layout.home / "new.jsonl")
    options = delta._arguments(arguments)
    assert options.work / "bundles" == layout.bundles
