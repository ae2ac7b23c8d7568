"""Flips of real processes under load: nothing fails, nothing is mixed; and an agent that is killed at every point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_site import Answered, Load, RealSite, eventually, quantile

from infra.emulator import Emulator
from workloads.agent.crash import POINTS
from workloads.bundle.fake import build_fake_bundle
from workloads.objects.s3 import s3_client

pytestmark = pytest.mark.real_parts

FLIPS = 20 if os.environ.get("RANKBRIDGE_LONG") else 3
ITEMS = int(os.environ.get("RANKBRIDGE_FLIP_ITEMS", "300"))
KILLED_AT = POINTS if os.environ.get("RANKBRIDGE_LONG") else ("loaded", "announced", "turned")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles without an item in common: every id says which of them it is of."""
    folder = tmp_path_factory.mktemp("bundles")
    return (
        build_fake_bundle(folder, items=ITEMS, seed=1, prefix="made"),
        build_fake_bundle(folder, items=ITEMS + 50, seed=2, prefix="other"),
    )


@pytest.fixture
def site(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path]
) -> Iterator[RealSite]:
    """A site that is down, with both bundles published and the first one promoted."""
    environment = {
        "AWS_ENDPOINT_URL": emulator.endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"models-{uuid.uuid4().hex[:12]}"
    s3_client().create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    made = RealSite(tmp_path, bucket, environment)
    for bundle in pair:
        bundle.with_name(bundle.name + ".sig").unlink(missing_ok=True)
        made.publish(bundle)
    made.promote(pair[0])
    try:
        yield made
    finally:
        made.down()


def _mixed(answers: list[Answered], pair: tuple[Path, Path]) -> list[Answered]:
    prefixes = {pair[0].name[:12]: "made-", pair[1].name[:12]: "other-"}
    return [
        answer
        for answer in answers
        if answer.bundle not in prefixes or not all(item.startswith(prefixes[answer.bundle]) for item in answer.items)
    ]


def _rollback(site: RealSite) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workloads.agent", "rollback", "--site-dir", str(site.directory.root)],
        env=site.environment,
        capture_output=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout


def test_flips_and_a_rollback_under_load_fail_nothing_and_mix_nothing(site: RealSite, pair: tuple[Path, Path]) -> None:
    site.up()
    first_s = eventually(lambda: site.settled_on(pair[0]), "the first bundle is served")
    with Load(site.gateway) as load:
        time.sleep(3)
        calm = [answer.ms for answer in load.answers]
        flips: list[tuple[float, float]] = []
        for number in range(FLIPS):
            target = pair[(number + 1) % 2]
            begun = time.monotonic()
            site.promote(target)
            eventually(lambda target=target: site.settled_on(target), f"flip {number} is over")  # type: ignore[misc]
            flips.append((begun, time.monotonic()))
            time.sleep(0.5)
        _rollback(site)
        back = pair[(FLIPS + 1) % 2]
        assert site.settled_on(back)
        time.sleep(0.5)
    answers = load.answers
    during = [one.ms for one in answers if any(begun <= one.at_s <= end for begun, end in flips)]
    turned = [
        min(one.at_s for one in answers if one.at_s > begun and one.bundle == pair[(number + 1) % 2].name[:12]) - begun
        for number, (begun, _) in enumerate(flips)
    ]
    figures = {
        "answers": len(answers),
        "first_served_s": first_s,
        "publish_to_served_s": [round(one, 2) for one in turned],
        "p50_calm_ms": quantile(calm, 0.5),
        "p99_calm_ms": quantile(calm, 0.99),
        "p50_flip_ms": quantile(during, 0.5),
        "p99_flip_ms": quantile(during, 0.99),
        "max_flip_ms": max(during),
        "below_best": dict(Counter(one.reason for one in answers if one.reason is not None)),
        "pss_mb": site.pss_mb(),
    }
    print(json.dumps(figures))  # noqa: T201 - shown with -s: what the run measured
    assert {one.bundle for one in answers} == {pair[0].name[:12], pair[1].name[:12]}
    assert [one for one in answers if one.status != 200] == []
    assert _mixed(answers, pair) == []
    metrics = site.metrics()
    counted = [line for line in metrics.splitlines() if line.startswith(("rankbridge_flips", "rankbridge_neighbour"))]
    assert 'rankbridge_neighbour_faults_total{reason="retrieval_other_bundle"} 0.0' in counted
    assert f"rankbridge_flips_total {FLIPS + 1}.0" in counted


@pytest.mark.parametrize("point", KILLED_AT)
def test_a_real_agent_that_is_killed_at_a_point_leaves_a_whole_edition_and_its_successor_reaches_the_new_one(
    site: RealSite, pair: tuple[Path, Path], point: str
) -> None:
    for name in ("triton", "retrieval", "gateway"):
        site.start(name)
    first = site.start("agent")
    eventually(lambda: site.settled_on(pair[0]), "the first bundle is served")
    first.kill()
    first.wait()
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
    site: RealSite, pair: tuple[Path, Path]
) -> None:
    site.up()
    eventually(lambda: site.settled_on(pair[0]), "the first bundle is served")
    client = s3_client()
    keys = [one["Key"] for one in client.list_objects_v2(Bucket=site.bucket, Prefix="objects/")["Contents"]]
    mine = {entry.sha256 for entry in site.registry.manifest(pair[1].name).files.values()}
    theirs = {entry.sha256 for entry in site.registry.manifest(pair[0].name).files.values()}
    victim = next(key for key in keys if key.rsplit("/", 1)[1] in mine - theirs)
    body = client.get_object(Bucket=site.bucket, Key=victim)["Body"].read()
    client.put_object(Bucket=site.bucket, Key=victim, Body=body[:-1] + bytes([body[-1] ^ 1]))
    site.promote(pair[1])
    eventually(lambda: bool(site.ask(site.agent, "/readyz")[1].get("refused")), "the agent refuses it")
    status, said = site.ask(site.agent, "/readyz")
    assert (status, said["serves"]) == (200, f"{pair[0].name[:12]}+0")
    assert "was altered" in said["refused"][f"{pair[1].name[:12]}+0"]
    assert not site.directory.bundle(pair[1].name).exists()
    time.sleep(3)
    assert site.log("agent").read_text().count('"event":"refused"') == 1
