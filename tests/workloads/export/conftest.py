"""A small simulated data set, and a training run of models that learned nothing: enough to export."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from workloads.contract.http import SOURCES
from workloads.contract.quality import QualityReport, QualityRow, RankerQuality
from workloads.contract.tensors import NEIGHBOURS, RANKER_DENSE, RANKER_SPARSE, VECTOR_DIM, FeatureSchema
from workloads.data.__main__ import main as prepare_data
from workloads.data.dataset import Dataset
from workloads.data.features import ItemTables, price_bands
from workloads.export.samples import catalogue_inputs
from workloads.models import ranker, student, two_tower
from workloads.models.ladder import LADDER_FILE, RankedLists


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Jobs take the signals of their process; here that is the test run's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module", autouse=True)
def handlers() -> Iterator[None]:
    with _handlers_kept():
        yield


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """166 people, 120 items, 6,000 events."""
    home = tmp_path_factory.mktemp("home")
    sizes = ("--users", "300", "--items", "120", "--events", "6000", "--days", "60")
    with _handlers_kept():
        assert prepare_data(["--source", "simulator", *sizes, "--home", str(home)]) == 0
    (path,) = (home / "onprem" / "datasets").iterdir()
    return Dataset.load(path)


def _tables(dataset: Dataset, random: np.random.Generator) -> dict[str, np.ndarray]:
    count = dataset.items.height

    def padded(values: np.ndarray) -> np.ndarray:
        return np.concatenate((np.zeros_like(values[:1]), values))

    names = sorted(dataset.items["category"].unique().to_list())
    price = dataset.items["price"].fill_null(0.0).to_numpy().astype(np.float32)
    share = random.dirichlet(np.ones(count)).astype(np.float32)
    neighbours = np.stack([random.permutation(count)[:NEIGHBOURS] + 1 for _ in range(count)]).astype(np.int32)
    return {
        "vectors": np.zeros((count + 1, VECTOR_DIM), np.float32),
        "category": padded(np.array([names.index(n) + 1 for n in dataset.items["category"].to_list()], np.int32)),
        "price": padded(price),
        "price_band": padded(price_bands(price, [5.0, 20.0])),
        "popularity": padded(share),
        "popularity_recent": padded(random.permutation(share)),
        "popularity_category": padded(share),
        "first_seen_ms": padded(dataset.items["first_seen_ms"].to_numpy().astype(np.int64)),
        "in_stock": padded(dataset.items["in_stock"].to_numpy().astype(np.uint8)),
        "neighbours": padded(neighbours),
        "neighbour_scores": padded(-np.sort(-random.random((count, NEIGHBOURS)), axis=1).astype(np.float32)),
    }


def _lists(items: int, random: np.random.Generator, count: int = 80, long: int = 30) -> RankedLists:
    """Test requests that wanted all their candidates: no order of them is worse than another."""
    sparse = np.zeros((count, long, len(RANKER_SPARSE)), np.int32)
    sparse[:, :, RANKER_SPARSE.index("item")] = [random.permutation(items)[:long] + 1 for _ in range(count)]
    return RankedLists(
        protocol=(np.arange(count) % 2).astype(np.int8),
        offsets=np.arange(count + 1) * long,
        sparse=sparse.reshape(-1, len(RANKER_SPARSE)),
        dense=random.normal(size=(count * long, len(RANKER_DENSE))).astype(np.float32),
        wanted=sparse[:, :, RANKER_SPARSE.index("item")].reshape(-1),
        wanted_offsets=np.arange(count + 1) * long,
        traditional=np.full(count, 0.5, np.float32),
    )


@pytest.fixture(scope="session")
def training(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m workloads.training` leaves; read only."""
    directory = tmp_path_factory.mktemp("work") / "train-0123456789ab"
    (directory / "weights").mkdir(parents=True)
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    tables = _tables(dataset, random)
    categories = sorted(dataset.items["category"].unique().to_list())
    schema = FeatureSchema(
        items=dataset.items.height,
        categories=categories,
        price_edges=[5.0, 20.0],
        dense_mean=[0.1] * len(RANKER_DENSE),
        dense_scale=[2.0] * len(RANKER_DENSE),
        reference_ms=dataset.meta.train_end_ms,
    )
    towers = two_tower.TwoTower(two_tower.TwoTowerConfig(items=schema.items, categories=len(categories))).eval()
    inputs = catalogue_inputs(dataset, ItemTables.of(tables), schema)
    tables["vectors"] = towers.bake({name: torch.from_numpy(values) for name, values in inputs.items()}).numpy()
    two_tower.save(towers, directory / "weights")
    config = ranker.RankerConfig(items=schema.items, categories=len(categories), price_bands=3, sources=len(SOURCES))
    ranker.save(ranker.Ranker(config), directory / "weights")
    pupil = student.Student(
        student.StudentConfig(items=schema.items, categories=len(categories), price_bands=3, sources=len(SOURCES))
    )
    with torch.no_grad():
        pupil.head.weight *= 10  # it has learned nothing, and is to say different things of different rows
    student.save(pupil, directory / "weights")
    _lists(schema.items, random).save(directory / LADDER_FILE)
    rows = [
        QualityRow(name=name, protocol="novel", rung=rung, metrics={"recall@20": recall, "ndcg@10": recall}, requests=9)
        for name, rung, recall in (("popularity", None, 0.11), ("item_knn", 4, 0.21), ("ours", 1, 0.31))
    ]
    quality = QualityReport(
        dataset=dataset.meta.name,
        rows=rows,
        ranker=RankerQuality(auc=0.5, log_loss=0.7, calibration=1.0, base_rate=0.1, rows=10, reliability=[]),
        statements=["Ours is above item-kNN."],
    )
    facts = {
        "digest": "0123456789ab",
        "dataset": dataset.meta.name,
        "dataset_digest": dataset.meta.digest,
        "more": "than export reads",
    }
    save_file(
        {name: np.ascontiguousarray(table) for name, table in tables.items()}, directory / "item_tables.safetensors"
    )
    (directory / "features.json").write_bytes(msgspec.json.encode(schema))
    (directory / "metrics.json").write_bytes(msgspec.json.encode(quality))
    (directory / "training.json").write_bytes(msgspec.json.encode(facts))
    return directory
