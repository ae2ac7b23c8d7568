"""A verdict passes only when everything that was promised was measured and held."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from loadtests.samples import Sample
from rankbridge.faults import ExitCode
from rankbridge.verdict import (
    Durability,
    ProcessMemory,
    Verdict,
    VpnFacts,
    check_quality,
    curves,
    local_ledger,
    read,
    write,
)
from workloads.contract.quality import DATASET_BUDGETS, QualityReport
from workloads.telemetry.progress import Line, NoteLine, ProgressLine

Make = Callable[..., Verdict]


def whats(found: Verdict) -> list[str]:
    return [b.what for b in found.breaches]


def having(report: QualityReport, name: str, protocol: str, recall: float | None) -> QualityReport:
    """The report with another recall@20 in one row, or without that row."""
    rows = []
    for row in report.rows:
        if (row.name, row.protocol) != (name, protocol):
            rows.append(row)
        elif recall is not None:
            rows.append(msgspec.structs.replace(row, metrics=row.metrics | {"recall@20": recall}))
    return msgspec.structs.replace(report, rows=rows)


def test_a_rehearsal_that_kept_every_promise_passes(good_verdict: Verdict):
    assert good_verdict.breaches == []
    assert good_verdict.passed
    assert good_verdict.exit_code is ExitCode.OK


def test_an_injected_ranker_delay_turns_it_red_and_the_ranker_is_named(red_verdict: Verdict):
    assert not red_verdict.passed
    assert red_verdict.exit_code is ExitCode.VERDICT_FAILED
    assert red_verdict.injected == ["ranker-delay=80ms"]
    assert all("ranker" in b.sentence for b in red_verdict.breaches)
    assert {"stage_p99", "rung_mix"} <= set(whats(red_verdict))


def test_the_file_has_what_scripts_rely_on_at_its_top(tmp_path: Path, red_verdict: Verdict):
    write(red_verdict, tmp_path / "out" / "verdict.json")
    plain = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert plain["schema_version"] == 1
    assert plain["passed"] is False
    assert [set(b) >= {"what", "sentence"} for b in plain["breaches"]] == [True] * len(red_verdict.breaches)
    assert list(plain)[:3] == ["schema_version", "passed", "breaches"]


def test_a_verdict_survives_its_file(tmp_path: Path, good_verdict: Verdict):
    write(good_verdict, tmp_path / "verdict.json")
    assert read(tmp_path / "verdict.json") == good_verdict


def test_a_verdict_of_another_version_and_a_file_that_is_none_are_refused(tmp_path: Path, good_verdict: Verdict):
    path = tmp_path / "verdict.json"
    write(msgspec.structs.replace(good_verdict, schema_version=99), path)
    with pytest.raises(ValueError, match="schema version 99"):
        read(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no verdict"):
        read(path)


def test_nothing_measured_is_a_breach_and_no_pass(make_verdict: Make):
    found = make_verdict(quality=None, load=None, memory=(), durability=None)
    assert whats(found) == ["quality", "no_requests"]


def test_worse_than_popularity_is_a_breach(make_verdict: Make, good_verdict: Verdict):
    assert good_verdict.quality is not None
    found = make_verdict(quality=having(good_verdict.quality, "ours", "novel", 0.05))
    assert whats(found) == ["quality"]
    assert "popularity_30d has 0.0714: 0.70 times as good" in found.breaches[0].sentence


@pytest.mark.parametrize("missing", ["ours", "popularity"])
def test_a_row_that_was_not_measured_is_a_breach(make_verdict: Make, good_verdict: Verdict, missing: str):
    assert good_verdict.quality is not None
    found = make_verdict(quality=having(good_verdict.quality, missing, "novel", None))
    assert "quality" in whats(found)
    assert f"{missing} was not measured" in found.breaches[0].sentence


def test_a_data_sets_own_goals_replace_the_general_ones(good_verdict: Verdict):
    assert good_verdict.quality is not None
    report = msgspec.structs.replace(good_verdict.quality, dataset="online-retail")
    checks = check_quality(report)
    assert [c.budget for c in checks] == list(DATASET_BUDGETS["online-retail"])
    assert [c.held for c in checks] == [True, True, True]
    assert not check_quality(having(report, "ours", "repeats", 0.2))[-1].held
    assert not check_quality(having(report, "ours", "novel", 0.072))[0].held


def test_too_much_memory_is_a_breach_that_names_the_largest(make_verdict: Make):
    hungry = [
        ProcessMemory(site="aws", role="tritonserver", pss_mb=2900.0),
        ProcessMemory(site="aws", role="x", pss_mb=400),
    ]
    found = make_verdict(memory=hungry)
    assert whats(found) == ["memory"]
    assert "3300 MiB together" in found.breaches[0].sentence
    assert "tritonserver at aws" in found.breaches[0].sentence


def test_one_lost_event_is_a_breach(make_verdict: Make):
    assert whats(make_verdict(durability=Durability(acknowledged=100, found=99))) == ["lost_events"]


def test_every_breach_of_every_kind_is_listed(make_verdict: Make, good_verdict: Verdict):
    assert good_verdict.quality is not None

    def broken(sample: Sample) -> Sample:
        return msgspec.structs.replace(sample, latency_ms=sample.latency_ms + 500)

    found = make_verdict(
        broken,
        quality=having(good_verdict.quality, "ours", "novel", 0.01),
        memory=[ProcessMemory(site="aws", role="x", pss_mb=4000.0)],
        durability=Durability(acknowledged=1, found=0),
    )
    assert {"quality", "p50", "p95", "p99", "memory", "lost_events"} <= set(whats(found))
    assert len(found.breaches) == 2 + 9 + 1 + 1


def test_the_ledger_calls_a_simulation_emulated_and_recorded_behaviour_real():
    for simulated in (True, False):
        ledger = {line.part: line.real for line in local_ledger(simulated=simulated)}
        assert ledger["Behaviour"] is not simulated
        assert ledger["GPU of aws"] is False
        assert ledger["Inference server"] is True


def vpn(**changes: object) -> VpnFacts:
    usual = {"tunnels": 2, "up": 2, "cipher": "AES_GCM_16", "mtu": 1400, "frames": 9000, "encrypted": 8900}
    rest = {"missed": 0, "wrong": 0, "faults": []}
    return msgspec.convert(usual | rest | changes, type=VpnFacts)


def test_the_ledger_says_whether_there_was_a_vpn_between_the_sites(make_verdict: Make):
    without, between = ({one.part: one for one in make_verdict(vpn=there).ledger} for there in (None, vpn()))
    assert without["VPN"].real is False
    assert between["VPN"].real is True
    assert "AES_GCM_16" in between["VPN"].what
    assert [*without] == [*between]
    assert between["Distance between sites"].real is False


def test_a_packet_in_clear_or_one_that_nobody_looked_at_fails_a_run(make_verdict: Make):
    assert make_verdict(vpn=vpn()).passed
    leaked = make_verdict(vpn=vpn(wrong=1, faults=["UDP with 10.210.1.10: an inner address in clear"]))
    assert whats(leaked) == ["seen_in_clear"]
    assert "10.210.1.10" in leaked.breaches[0].sentence
    assert whats(make_verdict(vpn=vpn(missed=3))) == ["unseen_frames"]
    assert whats(make_verdict(vpn=vpn(encrypted=0))) == ["unseen_frames"]


def test_a_small_run_is_called_one(make_verdict: Make, good_verdict: Verdict):
    assert good_verdict.load is not None
    assert good_verdict.notes == []
    small = msgspec.structs.replace(good_verdict.load, budgets=good_verdict.load.budgets.with_min_samples(50))
    assert any("small run" in note and "50 samples" in note for note in make_verdict(load=small).notes)


def test_figures_of_progress_lines_become_curves():
    lines: list[Line] = [
        ProgressLine(stage="ranker", done=1, total=3, unit="epochs", figures={"loss": 0.5}),
        NoteLine(stage="ranker", text="early stop"),
        ProgressLine(stage="ranker", done=2, total=3, unit="epochs", figures={"loss": 0.4, "auc": 0.7}),
        ProgressLine(stage="data", done=1, total=1, unit="rows"),
    ]
    found = curves(lines)
    assert [(c.stage, c.figure, c.points) for c in found] == [("ranker", "loss", [(1, 0.5), (2, 0.4)])]


def test_a_verdict_names_no_path(good_verdict: Verdict):
    said = msgspec.json.encode(good_verdict).decode()
    for word in (str(Path.home()), str(Path.cwd())):
        assert not re.search(rf"\b{re.escape(word)}\b", said)
    assert not re.search(r'"/(?!v1/)', said), "no absolute path but those of endpoints"
