"""Floors under quality: published baselines on real data, and the planted signal of a simulated shop."""

from __future__ import annotations

import io
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from workloads.contract.quality import QualityReport
from workloads.data.dataset import Dataset
from workloads.data.features import ItemTables
from workloads.data.preparation import Request, prepare
from workloads.data.simulator import SimulatorConfig
from workloads.models.item_knn import ItemKnnConfig
from workloads.telemetry.progress import Progress
from workloads.training import job
from workloads.training.evaluation import Asked, table
from workloads.training.job import TrainingConfig, train
from workloads.training.journal import read
from workloads.training.lists import Shop
from workloads.training.requests import People, requests_of
from workloads.training.snapshots import tables_at

pytestmark = pytest.mark.real_parts

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def online_retail() -> Path:
    folder = Path(os.environ.get("RANKBRIDGE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    source = folder / "online-retail" / "online_retail.csv.gz"
    if not source.is_file():
        pytest.skip("no real data here: ../shared/data is missing, and RANKBRIDGE_SHARED_DATA is not set")
    return source


def test_the_baselines_on_online_retail_are_those_that_others_measured(online_retail: Path, tmp_path: Path):
    """Next basket, split 90/10 by time, recall@20; others: .0365, .0714 (novel), .0646, .0986 (repeats), kNN .0808."""
    made = prepare(Request("online-retail", path=online_retail), tmp_path, Progress(io.StringIO()))
    dataset = Dataset.load(made.dataset)
    catalogue, journal = read(dataset)
    cut = dataset.meta.validation_end_ms
    shop = Shop.of(ItemTables.of(tables_at(catalogue, journal, cut, ItemKnnConfig())), {})
    requests = requests_of(journal.between(cut, dataset.meta.end_ms).wanted())
    _, first = np.unique(requests.person, return_index=True)
    requests = requests.take(np.sort(first))
    people = People(journal.positives())
    states = people.states(requests)
    known = np.flatnonzero([len(state.items) > 0 for state in states])
    vectors = np.zeros((len(known), shop.tables.vectors.shape[1]), dtype=np.float32)
    asked = Asked(requests.take(known), [states[at] for at in known], vectors)

    rows, *_ = table(
        shop, asked, lambda sparse, _dense: np.zeros(len(sparse), np.float32), knn_boost=3.0, heard=lambda _done: None
    )
    recall = {(row.name, row.protocol): row.metrics["recall@20"] for row in rows}
    assert 950 < len(known) < 1050
    assert recall["popularity", "novel"] == pytest.approx(0.0365, abs=0.003)
    assert recall["popularity_30d", "novel"] == pytest.approx(0.0714, abs=0.003)
    assert recall["popularity", "repeats"] == pytest.approx(0.0646, abs=0.003)
    assert recall["popularity_30d", "repeats"] == pytest.approx(0.0986, abs=0.007)
    assert recall["item_knn", "novel"] > 0.0808, "our kNN is no straw man"
    assert recall["item_knn", "repeats"] > 0.2878
    assert recall["personal_frequency", "repeats"] > 0.27


def test_the_planted_taste_of_a_simulated_shop_is_found(tmp_path: Path):
    shop = SimulatorConfig(users=1_200, items=400, events=60_000, seed=11)
    made = prepare(Request("simulator", simulation=shop), tmp_path, Progress(io.StringIO()))
    config = TrainingConfig(threads=1).small()
    report = msgspec.json.decode(
        (train(made.dataset, tmp_path, config, Progress(io.StringIO())) / job.METRICS).read_bytes(), type=QualityReport
    )
    recall = {(row.name, row.protocol): row.metrics["recall@20"] for row in report.rows}
    for protocol in ("novel", "repeats"):
        assert recall["ours", protocol] > 1.3 * recall["popularity", protocol], protocol
        assert recall["two_tower", protocol] > 1.3 * recall["popularity", protocol], protocol
    assert recall["two_tower", "search"] > 2 * recall["popularity", "search"]
    assert report.ranker.auc > 0.6
    assert 0.5 < report.ranker.calibration < 2.0
    first, taught = (next(row for row in report.rungs if row.rung == rung) for rung in (1, 2))
    assert first.auc is not None
    assert taught.auc is not None
    assert taught.auc > first.auc - 0.02, "the student finds what its teacher found"
