"""Flips of real processes under load: nothing fails, nothing is mixed; and an agent that is killed at every point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_site import Answered, Load, RealSite, eventually, quantile

from infra.emulator import Emulator
from workloads.agent.crash import POINTS
from workloads.bundle.fake import build_fake_bundle
from workloads.contract.storage import object_key
from workloads.objects.s3 import s3_client

pytestmark = pytest.mark.real_parts

LONG = bool(os.environ.get("RANKBRIDGE_LONG"))
FLIPS = 20 if LONG else 2
ITEMS = int(os.environ.get("RANKBRIDGE_FLIP_ITEMS", "300"))
KILLED_AT = POINTS if LONG else ("turned",)
BUCKET = "models-flips"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles without an item in common: every id says which of them it is of."""
    folder = tmp_path_factory.mktemp("bundles")
    return (
        build_fake_bundle(folder, items=ITEMS, seed=1, prefix="made"),
        build_fake_bundle(folder, items=ITEMS + 50, seed=2, prefix="other"),
    )


@pytest.fixture(scope="module")
def running(
    emulator: Emulator, tmp_path_factory: pytest.TempPathFactory, pair: tuple[Path, Path]
) -> Iterator[RealSite]:
    """A site whose processes run all the time, but for its agent, which tests start and kill."""
    environment = {
        "AWS_ENDPOINT_URL": emulator.endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        s3_client().create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
        site = RealSite(tmp_path_factory.mktemp("flips"), BUCKET, environment)
        try:
            for name in ("triton", "retrieval", "gateway"):
                site.start(name)
            for bundle in pair:
                site.publish(bundle)
            yield site
        finally:
            site.down()


@pytest.fixture
def site(running: RealSite, pair: tuple[Path, Path]) -> Iterator[RealSite]:
    """The site with an agent, on the first of the pair."""
    running.promote(pair[0])
    if "agent" not in running.running:
        running.start("agent")
    eventually(lambda: running.settled_on(pair[0]), "the first bundle is served")
    yield running
    if "agent" in running.running and running.running["agent"].poll() is not None:
        running.running.pop("agent")


def _mixed(answers: list[Answered], pair: tuple[Path, Path]) -> list[Answered]:
    prefixes = {pair[0].name[:12]: "made-", pair[1].name[:12]: "other-"}
    return [
        answer
        for answer in answers
        if answer.bundle not in prefixes or not all(item.startswith(prefixes[answer.bundle]) for item in answer.items)
    ]


MIXES = 'rankbridge_neighbour_faults_total{reason="retrieval_other_bundle"}'


def _counted(site: RealSite, sample: str) -> float:
    """A sample of the gateway's metrics."""
    found = [line for line in site.metrics().splitlines() if line.startswith(sample + " ")]
    return float(found[0].rsplit(" ", 1)[1]) if found else 0.0


def _by_hand(site: RealSite, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workloads.agent", command, "--site-dir", str(site.directory.root)],
        env=site.environment,
        capture_output=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout


def test_flips_and_a_rollback_under_load_fail_nothing_and_mix_nothing(site: RealSite, pair: tuple[Path, Path]) -> None:
    flips_before = _counted(site, "rankbridge_flips_total")
    mixes_before = _counted(site, MIXES)
    with Load(site.gateway) as load:
        time.sleep(3)
        calm = [answer.ms for answer in load.answers]
        before_mb = site.pss_mb()
        flips: list[tuple[float, float]] = []
        for number in range(FLIPS):
            target = pair[(number + 1) % 2]
            begun = time.monotonic()
            site.promote(target)
            eventually(lambda target=target: site.settled_on(target), f"flip {number} is over")  # type: ignore[misc]
            flips.append((begun, time.monotonic()))
            time.sleep(0.5)
        _by_hand(site, "rollback")
        assert site.settled_on(pair[(FLIPS + 1) % 2])
        time.sleep(1.5)  # in which the channel is read again, and moves nobody
        assert site.settled_on(pair[(FLIPS + 1) % 2])
        _by_hand(site, "resume")
        eventually(lambda: site.settled_on(pair[FLIPS % 2]), "the channel is followed again")
    answers = load.answers
    during = [one.ms for one in answers if any(begun <= one.at_s <= end for begun, end in flips)]
    turned = [
        min(one.at_s for one in answers if one.at_s > begun and one.bundle == pair[(number + 1) % 2].name[:12]) - begun
        for number, (begun, _) in enumerate(flips)
    ]
    figures = {
        "answers": len(answers),
        "publish_to_served_s": [round(one, 2) for one in turned],
        "p50_calm_ms": quantile(calm, 0.5),
        "p99_calm_ms": quantile(calm, 0.99),
        "p50_flip_ms": quantile(during, 0.5),
        "p99_flip_ms": quantile(during, 0.99),
        "max_flip_ms": max(during),
        "below_best_after_s": sorted(
            round(one.at_s - max((begun for begun, _ in flips if begun <= one.at_s), default=0.0), 1)
            for one in answers
            if one.reason is not None
        ),
        "below_best": dict(Counter(one.reason for one in answers if one.reason is not None)),
        "pss_before_mb": before_mb,
        "pss_after_mb": site.pss_mb(),
    }
    print(json.dumps(figures))  # noqa: T201 - shown with -s: what the run measured
    assert {one.bundle for one in answers} == {pair[0].name[:12], pair[1].name[:12]}
    assert [one for one in answers if one.status != 200] == []
    assert _mixed(answers, pair) == []
    assert _counted(site, "rankbridge_flips_total") == flips_before + FLIPS + 2
    assert _counted(site, MIXES) == mixes_before


@pytest.mark.parametrize("point", KILLED_AT)
def test_a_real_agent_that_is_killed_at_a_point_leaves_a_whole_edition_and_its_successor_reaches_the_new_one(
    site: RealSite, pair: tuple[Path, Path], point: str
) -> None:
    site.kill("agent")
    with Load(site.gateway, rate=30) as load:
        doomed = site.start("agent", "--crash-at", point)
        site.promote(pair[1])
        assert doomed.wait(60) == -9
        site.whole()
        assert site.serves() in {pair[0].name[:12], pair[1].name[:12]}
        time.sleep(0.3)
        site.start("agent")
        eventually(lambda: site.settled_on(pair[1]), "the new bundle is served")
    assert [one for one in load.answers if one.status != 200] == []
    assert _mixed(load.answers, pair) == []


def test_a_tampered_object_is_refused_and_the_reason_is_in_the_agents_readiness(
    site: RealSite, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    bad = build_fake_bundle(tmp_path, items=40, seed=3, prefix="bad")
    site.publish(bad)
    key = object_key(site.registry.manifest(bad.name).files["ranker.onnx"].sha256)
    body = s3_client().get_object(Bucket=BUCKET, Key=key)["Body"].read()
    s3_client().put_object(Bucket=BUCKET, Key=key, Body=body[:-1] + bytes([body[-1] ^ 1]))
    site.promote(bad)
    eventually(lambda: bool(site.ask(site.agent, "/readyz")[1].get("refused")), "the agent refuses it")
    time.sleep(3)  # in which a hot loop would show
    status, said = site.ask(site.agent, "/readyz")
    assert (status, said["serves"]) == (200, f"{pair[0].name[:12]}+0")
    assert "was altered" in said["refused"][f"{bad.name[:12]}+0"]
    assert not site.directory.bundle(bad.name).exists()
    refused = [
        line for line in site.log("agent").read_text().splitlines() if '"refused"' in line and bad.name[:12] in line
    ]
    assert len(refused) == 1
