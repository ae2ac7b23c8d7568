"""A whole verdict made of invented but possible figures, for the tests of what is done with one."""

import random
from collections.abc import Callable, Sequence

import msgspec
import pytest

from loadtests import budgets, gate
from loadtests.samples import Run, RunHeader, Sample, Target
from rankbridge import verdict
from rankbridge.verdict import (
    BundleFacts,
    Curve,
    DatasetFacts,
    Durability,
    ProcessMemory,
    Rule,
    SplitPart,
    Step,
    Verdict,
)
from workloads.contract.quality import QualityReport, QualityRow, RankerQuality, RungQuality

Change = Callable[[Sample], Sample]
SECONDS = 118.0
RATES = {"/v1/recommend": 40, "/v1/search": 10, "/v1/events": 10}


def sample(rng: random.Random, endpoint: str, at_s: float) -> Sample:
    """A healthy answer."""
    lateness = rng.expovariate(1 / 0.6)
    common = {"endpoint": endpoint, "at_s": at_s, "lateness_ms": lateness, "status": 200, "warmup": at_s < 5}
    if endpoint == "/v1/events":
        return Sample(**common, site="onprem", latency_ms=4 + rng.lognormvariate(0.6, 0.7))  # type: ignore[arg-type]
    stages = {
        "features": rng.lognormvariate(0.2, 0.3),
        "candidates": rng.lognormvariate(1.9, 0.35),
        "rank": rng.lognormvariate(2.3, 0.4),
        "rules": rng.lognormvariate(-0.6, 0.3),
    }
    if endpoint == "/v1/search":
        del stages["rank"]
    best = 3 if endpoint == "/v1/search" else 1
    stepped = best == 1 and rng.random() < 0.003
    return Sample(
        **common,  # type: ignore[arg-type]
        site="aws" if rng.random() < 0.25 else "onprem",
        latency_ms=sum(stages.values()) + 2 + lateness + rng.lognormvariate(0.5, 0.9),
        rung=3 if stepped else best,
        best_rung=best,
        reason="ranker_late" if stepped else None,
        ranked=None if stepped or best != 1 else 200,
        stages_ms=stages,
        bundle="3f9c2a7be410",
    )


def load_result(change: Change = lambda s: s) -> gate.LoadResult:
    """Two minutes of the promised traffic after 5 s of warm-up."""
    rng = random.Random(7)
    samples = []
    for endpoint, rate in RATES.items():
        at = 0.0
        while (at := at + rng.expovariate(rate)) < SECONDS + 5:
            samples.append(change(sample(rng, endpoint, at)))
    best = {"/v1/recommend": 1, "/v1/search": 3, "/v1/similar": 3}
    header = RunHeader(
        suite="mix",
        started_ms=1_790_000_000_000.0,
        warmup_s=5.0,
        arrivals="poisson",
        rate_per_user=1.0,
        seed=1,
        targets=[Target(site="onprem", share=0.75, best_rung=best), Target(site="aws", share=0.25, best_rung=best)],
    )
    samples.sort(key=lambda s: s.at_s)
    return gate.judge(Run(header=header, samples=samples, seconds=SECONDS), budgets.promise())


def with_a_late_ranker(found: Sample) -> Sample:
    """What an injected delay of 80 ms does to a sample: the stage gives up and the answer steps down."""
    if found.endpoint != "/v1/recommend":
        return found
    stages = found.stages_ms | {"rank": 51.3}
    slower = found.latency_ms + 51.3 - found.stages_ms["rank"]
    return msgspec.structs.replace(
        found, stages_ms=stages, latency_ms=slower, rung=3, reason="ranker_late", ranked=None
    )


def quality_report(ours: float = 0.0931) -> QualityReport:
    def row(name: str, protocol: str, recall: float, rung: int | None = None) -> QualityRow:
        metrics = {
            "recall@10": recall * 0.63,
            "recall@20": recall,
            "ndcg@20": recall * 0.52,
            "hr@20": recall * 2.1,
            "coverage@20": 0.02 if "pop" in name else 0.41,
        }
        return QualityRow(name=name, protocol=protocol, rung=rung, metrics=metrics, requests=1843)  # type: ignore[arg-type]

    return QualityReport(
        dataset="simulator",
        rows=[
            row("popularity", "novel", 0.0365),
            row("popularity_30d", "novel", 0.0714),
            row("item_knn", "novel", 0.0808, rung=4),
            row("two_tower", "novel", 0.0851, rung=3),
            row("ours", "novel", ours, rung=1),
            row("popularity", "repeats", 0.0646),
            row("item_knn", "repeats", 0.2878, rung=4),
            row("personal_frequency", "repeats", 0.2411),
            row("ours", "repeats", 0.2702, rung=1),
        ],
        ranker=RankerQuality(
            auc=0.7812,
            log_loss=0.2311,
            calibration=1.014,
            base_rate=0.071,
            rows=120_000,
            reliability=[(0.01 * 1.6**i, 0.01 * 1.6**i * (1 + 0.1 * (-1) ** i), 40_000 // (i + 1)) for i in range(8)],
        ),
        statements=[
            "On new items, ours finds 1.15 times as much as item-to-item kNN (recall@20 0.0931 against 0.0808).",
            "With repeats, item-to-item kNN is better than ours (recall@20 0.2878 against 0.2702).",
        ],
        rungs=[
            RungQuality(
                rung=rung,
                protocol=protocol,  # type: ignore[arg-type]
                ndcg_at_10=0.05 * (1 - loss),
                auc=auc,
                loss=loss,
                loss_error=0.004,
                requests=1843,
            )
            for protocol in ("novel", "repeats")
            for rung, loss, auc in ((1, 0.0, 0.7812), (2, 0.0137, 0.7768), (3, -0.021, 0.7011), (4, 0.2345, None))
        ],
    )


def dataset_facts() -> DatasetFacts:
    return DatasetFacts(
        name="simulator",
        digest="9e107d9d372b",
        source="simulator",
        protocol="next_basket",
        users=20_000,
        items=10_000,
        events={"impression": 700_000, "click": 120_000, "view": 90_000, "cart": 40_000, "purchase": 30_000},
        days=90.0,
        rows_read=1_000_031,
        bad_rows=31,
        rules=[Rule(rule="duplicate event ids", rows=31, effect="dropped")],
        parts=[
            SplitPart(part="train", events=800_000, users=19_800, items=9_700, days=72.0),
            SplitPart(part="validation", events=90_000, users=9_000, items=6_000, days=9.0),
            SplitPart(part="test", events=90_000, users=9_100, items=6_100, days=9.0),
        ],
        agreement=["train, validation and test agree in every measure"],
    )


def memory() -> list[ProcessMemory]:
    roles = {"gateway": 142.0, "retrieval": 168.0, "tritonserver": 391.0, "agent": 48.0}
    found = [ProcessMemory(site=s, role=r, pss_mb=mb) for s in ("onprem", "aws") for r, mb in roles.items()]
    return [*found, ProcessMemory(site="onprem", role="intake", pss_mb=44.0)]


def training_curves() -> list[Curve]:
    steps = range(1, 21)
    return [
        Curve(stage="two-tower", figure="loss", unit="epochs", points=[(s, 6.1 + 2.4 / s) for s in steps]),
        Curve(stage="two-tower", figure="recall@20", unit="epochs", points=[(s, 0.09 - 0.06 / s) for s in steps]),
        Curve(stage="ranker", figure="AUC", unit="epochs", points=[(s, 0.782 - 0.09 / s) for s in steps]),
    ]


Make = Callable[..., Verdict]


@pytest.fixture(scope="session")
def make_verdict() -> Make:
    """Builds a verdict; `change` is done to every sample of the load, other arguments go to `verdict.build`."""

    def make(change: Change = lambda s: s, *, injected: Sequence[str] = (), **changes: object) -> Verdict:
        parts: dict[str, object] = {
            "dataset": dataset_facts(),
            "bundle": BundleFacts(
                id="3f9c2a7be410",
                files=9,
                size_mb=21.4,
                parity={"user_tower": 2.4e-7, "item_tower": 3.1e-7, "query_tower": 1.9e-7, "ranker": 4.2e-7},
                ann="flat",
                ann_recall_at_10=1.0,
            ),
            "quality": quality_report(),
            "load": load_result(change),
            "memory": memory(),
            "durability": Durability(acknowledged=5301, found=5301),
            "steps": [
                Step(name="data", seconds=21.4),
                Step(name="training", seconds=93.7),
                Step(name="export", seconds=14.2),
                Step(name="sites up", seconds=9.1),
                Step(name="load", seconds=126.0),
                Step(name="verdict", seconds=2.3),
            ],
            "curves": training_curves(),
            "reproduce": ["make rehearse"],
        }
        return verdict.build(**(parts | changes), injected=injected)  # type: ignore[arg-type]  # the test's own

    return make


@pytest.fixture(scope="session")
def good_verdict(make_verdict: Make) -> Verdict:
    return make_verdict()


@pytest.fixture(scope="session")
def red_verdict(make_verdict: Make) -> Verdict:
    """What `--inject ranker-delay=80ms` leads to."""
    return make_verdict(with_a_late_ranker, injected=["ranker-delay=80ms"])
