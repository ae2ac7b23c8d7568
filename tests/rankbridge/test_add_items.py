"""`rankbridge bundle add-items`: the job is asked for what the job understands, from wherever one stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankbridge import cli, interrupts, jobs
from rankbridge.cloud import MODELS_BUCKET
from rankbridge.layout import HOME_VARIABLE, Layout
from workloads.contract.sites import SiteName
from workloads.delta import __main__ as delta
from workloads.telemetry.progress import ResultLine

MADE = {"delta": "/x/2-abc", "bundle": "b" * 64, "deltas": "2", "channel": "canary", "sequence": "7"}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines of the job, which succeeds."""
    lines: list[list[str]] = []

    def run(module: str, arguments: list[str], **_: object) -> ResultLine:
        assert module == "workloads.delta"
        lines.append(arguments)
        return ResultLine(made=MADE)

    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setenv(MODELS_BUCKET, "models")
    monkeypatch.setattr(interrupts, "listen", lambda: None)  # pytest keeps its own handlers
    monkeypatch.setattr(jobs, "run", run)
    monkeypatch.chdir(tmp_path)
    return lines


def test_the_job_gets_the_publishers_key_homes_log_and_absolute_paths(
    asked: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["bundle", "add-items", "new.csv", "canary"]) == 0
    layout = Layout.of({HOME_VARIABLE: str(tmp_path / "home")})
    options = delta._arguments(asked[0])
    assert (options.job, options.channel, options.models_bucket) == ("add", "canary", "models")
    assert options.items == tmp_path / "new.csv"
    assert (options.key, options.audit) == (layout.publisher_key, layout.audit)
    assert (options.work, options.trust) == (layout.training_home, layout.trust(SiteName.ONPREM))
    said = capsys.readouterr().out
    assert "canary: bbbbbbbbbbbb with 2 deltas (sequence 7)" in said
    assert "rankbridge bundle rollback canary" in said


@pytest.mark.usefixtures("asked")
def test_programs_get_json_and_nothing_else(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bundle", "add-items", "new.csv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == MADE


def test_without_a_bucket_nothing_is_started(asked: list[list[str]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(MODELS_BUCKET)
    assert cli.main(["bundle", "add-items", "new.csv"]) != 0
    assert asked == []
