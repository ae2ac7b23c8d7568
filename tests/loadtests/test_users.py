"""Real Locust runs against a stub gateway: arrivals do not wait, and the gate decides the exit code.

Locust patches the process that imports it, so each run is a process of its own.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from loadtests import budgets
from loadtests.gate import EXIT_BREACHED, EXIT_PASSED, EXIT_REFUSED, LoadResult
from loadtests.samples import Run, read
from loadtests.stub import Behaviour, StubGateway

pytestmark = pytest.mark.real_parts
SUITES = Path(__file__).parents[2] / "loadtests"


class Locust:
    """One headless Locust process, its exit code and what it wrote."""

    def __init__(self, folder: Path, suite: str, host: str, *arguments: str) -> None:
        self._folder = folder
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "locust", "-f", str(SUITES / f"{suite}.py")),
                *("--host", host, "--headless", "--only-summary"),
                *("--samples", str(folder / "samples.jsonl"), "--gate-out", str(folder / "gate.json")),
                *("--acknowledged", str(folder / "acknowledged.txt"), *arguments),
            ],
            cwd=folder,
            env=os.environ | {"PYTHONWARNINGS": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        """Wait for its end; exit code and log."""
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said

    @property
    def result(self) -> LoadResult:
        return msgspec.json.decode((self._folder / "gate.json").read_bytes(), type=LoadResult)

    @property
    def run(self) -> Run:
        return read(self._folder / "samples.jsonl")

    @property
    def acknowledged(self) -> list[str]:
        return (self._folder / "acknowledged.txt").read_text().split()


def small(seconds: float = 2, users: int = 60, samples: int = 5) -> list[str]:
    return ["-u", f"{users}", "-r", "100", "-t", f"{seconds}s", "--warmup", "0.5", "--min-samples", f"{samples}"]


def patient(folder: Path) -> list[str]:
    """Budgets of time that a busy machine keeps too: what the test is about is not the time."""
    whole = budgets.promise()
    loose = tuple(
        msgspec.structs.replace(b, p50_ms=None, p95_ms=None, p99_ms=5000.0, stage_p99_ms={}) for b in whole.endpoints
    )
    path = folder / "budgets.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(whole, endpoints=loose, lateness_p99_ms=5000.0)))
    return ["--budgets", str(path)]


def test_a_healthy_gateway_passes_and_everything_is_recorded(tmp_path: Path):
    with StubGateway() as stub:
        locust = Locust(tmp_path, "mix", stub.url, *small(), *patient(tmp_path))
        code, said = locust.end()
    assert code == EXIT_PASSED, said
    assert locust.result.passed
    judged = {m.endpoint: m for m in locust.result.measures.endpoints}
    assert judged["/v1/recommend"].requests > 2.5 * judged["/v1/search"].requests
    assert judged["/v1/recommend"].ranked_min == 200
    assert {s.stage for s in judged["/v1/search"].stages} >= {"features", "candidates", "rank", "rules"}
    assert all(s.site == "onprem" and s.bundle == "0" * 12 for s in locust.run.samples if s.rung)
    assert any(s.warmup for s in locust.run.samples)
    assert locust.result.measures.warmup_requests == sum(s.warmup for s in locust.run.samples)
    assert sorted(locust.acknowledged) == sorted(stub.acknowledged), "every acknowledged id is known, and no other"
    assert len(locust.run.samples) == sum(stub.requests.values()) - 2, "all but the sample and the probe"


def test_a_stall_of_one_second_shows_in_p95_because_arrivals_do_not_wait(tmp_path: Path):
    with StubGateway(Behaviour(stall_after_s=1.5, stall_s=1.0)) as stub:
        locust = Locust(tmp_path, "recommend", stub.url, *small(seconds=4))
        code, said = locust.end()
    assert code == EXIT_BREACHED, said
    found = locust.result.measures.endpoints[0]
    assert found.p95_ms is not None
    # more than a quarter of the judged seconds: arrivals during the stall wait between 0 and 1 s, so a closed
    # loop, whose 60 users would each have lost one request, would have said a few milliseconds
    assert found.p95_ms > 500
    during = [s for s in locust.run.samples if s.latency_ms > 100]
    assert len(during) > 30, "requests went on being sent while the server stood still"
    assert {"p95", "p99"} <= {b.what for b in locust.result.breaches}
    assert locust.result.measures.lateness_p99_ms < 100, "it was the server that was late"


def test_a_slow_ranker_turns_it_red_and_is_named(tmp_path: Path):
    late = {"features": 1.0, "candidates": 3.0, "rank": 90.0, "rules": 1.0}
    with StubGateway(Behaviour(waits=True, stages_ms=late)) as stub:
        locust = Locust(tmp_path, "mix", stub.url, *small())
        code, said = locust.end()
    assert code == EXIT_BREACHED
    assert "the ranker (stage rank) took 90.0 ms at p99" in said
    assert "rank" in {b.stage for b in locust.result.breaches}


def test_answers_from_a_lower_rung_turn_it_red(tmp_path: Path):
    with StubGateway(Behaviour(rung=3, reason="ranker_late", ranked=None)) as stub:
        locust = Locust(tmp_path, "mix", stub.url, *small())
        code, said = locust.end()
    assert code == EXIT_BREACHED
    assert "the ranker was late or gone" in said
    assert "ranker_late" in said


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(refuse=503), "http 503: Refused as told"),
        (Behaviour(items=9), "9 items instead of 10"),
        (Behaviour(garbage=True), "not an"),
    ],
)
def test_a_wrong_answer_is_an_error(tmp_path: Path, behaviour: Behaviour, kind: str):
    with StubGateway(behaviour) as stub:
        locust = Locust(tmp_path, "mix", stub.url, *small(seconds=2, users=30, samples=1))
        code, said = locust.end()
    assert code == EXIT_BREACHED
    assert any(b.what == "errors" and kind in b.sentence for b in locust.result.breaches), said


def test_requests_without_an_answer_are_errors_and_not_forgotten(tmp_path: Path):
    with StubGateway(Behaviour(hang=True)) as stub:
        locust = Locust(tmp_path, "events", stub.url, *small(seconds=2, users=20, samples=1), "--timeout", "1.5")
        code, said = locust.end()
    assert code == EXIT_BREACHED, said
    assert {s.error for s in locust.run.samples} == {"timeout"}
    assert len(locust.run.samples) == stub.requests["/v1/events"]
    assert locust.acknowledged == []


def test_arrivals_beyond_what_may_be_in_flight_are_errors(tmp_path: Path):
    with StubGateway(Behaviour(hang=True)) as stub:
        arguments = [*small(seconds=2, users=30, samples=1), "--timeout", "1.5", "--max-outstanding", "5"]
        locust = Locust(tmp_path, "events", stub.url, *arguments)
        locust.end()
    kinds = {s.error for s in locust.run.samples}
    assert "generator_overrun" in kinds
    assert sum(s.error == "generator_overrun" for s in locust.run.samples) > 20


def test_nobody_listening_is_said_with_the_remedy_before_any_load(tmp_path: Path):
    with StubGateway() as stub:
        nobody = stub.url
    locust = Locust(tmp_path, "mix", nobody, *small(seconds=30))
    code, said = locust.end()
    assert code == EXIT_REFUSED
    assert "check that a gateway is running there" in said
    assert [b.what for b in locust.result.breaches] == ["run", "no_requests"]


def test_two_sites_get_their_shares(tmp_path: Path):
    with StubGateway() as home, StubGateway(Behaviour(site="aws", users=0)) as cloud:
        arguments = ["--also-host", cloud.url, "--also-share", "0.25"]
        locust = Locust(tmp_path, "mix", home.url, *small(seconds=3), *arguments, *patient(tmp_path))
        code, said = locust.end()
    assert code == EXIT_PASSED, said
    per_site = {site: sum(s.site == site for s in locust.run.samples) for site in ("onprem", "aws")}
    assert 0.15 < per_site["aws"] / sum(per_site.values()) < 0.35
    assert [(t.site, t.share) for t in locust.run.header.targets] == [("onprem", 0.75), ("aws", 0.25)]


def test_an_interrupted_run_is_judged_by_what_it_has(tmp_path: Path):
    with StubGateway() as stub:
        locust = Locust(tmp_path, "mix", stub.url, *small(seconds=60))
        deadline = time.monotonic() + 20
        while sum(stub.requests.values()) < 120 and time.monotonic() < deadline:
            time.sleep(0.1)
        locust.process.send_signal(signal.SIGTERM)
        code, said = locust.end()
    assert code in {EXIT_PASSED, EXIT_BREACHED}, said
    assert len(locust.run.samples) > 80


def test_several_processes_are_refused_because_samples_must_be_judged_together(tmp_path: Path):
    with StubGateway() as stub:
        code, said = Locust(tmp_path, "mix", stub.url, *small(), "--master").end()
    assert code != EXIT_PASSED
    assert "it runs in one process" in said


def test_the_same_seed_sends_the_same_requests_at_the_same_moments(tmp_path: Path):
    due: list[list[float]] = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        with StubGateway() as stub:
            locust = Locust(folder, "search", stub.url, *small(seconds=2, users=1, samples=1), "--rate-per-user", "30")
            locust.end()
        times = sorted(s.at_s for s in locust.run.samples)
        due.append([round(b - a, 6) for a, b in itertools.pairwise(times)][:20])
    assert due[0] == due[1]
