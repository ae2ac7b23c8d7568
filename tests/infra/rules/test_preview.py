"""The rules read what `pulumi preview --json` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.recording import Recording
from infra.rules import SECRET, UNKNOWN, preview

UNKNOWN_TEXT = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"


def document(recorded: Recording) -> dict[str, Any]:
    """The preview that the engine would print for a recorded program (step and state fields of pulumi 3)."""

    def wire(value: object) -> object:
        if value is UNKNOWN:
            return UNKNOWN_TEXT
        if value is SECRET:
            return "[secret]"
        if isinstance(value, dict):
            return {k: wire(v) for k, v in value.items()}
        return [wire(v) for v in value] if isinstance(value, list) else value

    return {
        "steps": [
            {
                "op": "create",
                "urn": r.urn,
                "newState": {
                    "urn": r.urn,
                    "custom": r.custom,
                    "type": r.type,
                    "inputs": {"__defaults": [], **{k: wire(v) for k, v in r.resource().inputs.items()}},
                },
            }
            for r in recorded.resources
        ]
    }


def test_a_clean_preview_passes(recorded: Callable[..., Recording], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = recorded("foundation-prod", preview=True)
    path = tmp_path / "preview.json"
    path.write_text(json.dumps(document(run)))
    assert preview.main([str(path)]) == 0
    assert f"{len(run.custom())} resources, 0 violation(s)" in capsys.readouterr().out


def test_a_violation_in_a_preview_is_one_line_and_exit_code_one(
    recorded: Callable[..., Recording], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    changed = document(recorded("foundation-prod", preview=True))
    for step in changed["steps"]:
        if step["newState"]["type"] == "aws:ec2/subnet:Subnet":
            step["newState"]["inputs"]["mapPublicIpOnLaunch"] = True
    path = tmp_path / "preview.json"
    path.write_text(json.dumps(changed))
    assert preview.main([str(path)]) == 1
    assert capsys.readouterr().out.count("no-public-node: aws:ec2/subnet:Subnet aws-private-eu-central-1") == 3


def test_secrets_and_unknowns_are_told_apart():
    hidden = {"4dabf18193072939515e22adb298388d": "x", "ciphertext": "y"}
    inputs = {"a": UNKNOWN_TEXT, "b": "[secret]", "c": [hidden]}
    step = {"op": "update", "newState": {"urn": "a::b", "custom": True, "type": "t", "inputs": inputs}}
    (resource,) = preview.resources({"steps": [step]})
    assert resource.inputs == {"a": UNKNOWN, "b": SECRET, "c": [SECRET]}


def test_what_is_deleted_is_not_judged():
    state = {"urn": "a::b", "custom": True, "type": "t", "inputs": {}}
    assert (
        preview.resources({"steps": [{"op": "delete", "newState": state}, {"op": "delete", "oldState": state}]}) == []
    )


def test_a_preview_without_its_unchanged_resources_is_not_judged(
    recorded: Callable[..., Recording], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = document(recorded("foundation-prod", preview=True))
    for step in whole["steps"]:
        step["op"] = "same"
    path = tmp_path / "preview.json"
    path.write_text(json.dumps({**whole, "changeSummary": {"same": len(whole["steps"])}}))
    assert preview.main([str(path)]) == 0
    path.write_text(json.dumps({"steps": whole["steps"][:1], "changeSummary": {"same": len(whole["steps"])}}))
    assert preview.main([str(path)]) == 2
    assert "--show-sames" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"steps": [1]}', "nonsense"])
def test_what_is_no_preview_is_exit_code_two(tmp_path: Path, text: str):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert preview.main([str(path)]) == 2


def test_an_empty_preview_is_no_pass(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text('{"steps": []}')
    assert preview.main([str(path)]) == 1
