"""From a finished training run to a bundle, or to one sentence that says why not.

Each model is exported, asked what the trained one was asked, and compared; a bundle is written only
when all of them agree. Item vectors are made anew by the exported item tower and must be those that
training used: data, text and age must have come out the same on both ways. The student is quantised on the
way, and the ladder measured again with the files that will be served: what rung 2 loses has a budget.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import torch
from torch import nn

from workloads.bundle import manifest as m
from workloads.bundle.store import BundleFault, write_bundle
from workloads.bundle.tables import Array, open_tables
from workloads.contract.quality import QualityReport
from workloads.contract.slo import Rung
from workloads.contract.tensors import (
    ITEM_TOWER,
    PAD,
    QUERY_TOWER,
    RANKER,
    SIGNATURES,
    STUDENT,
    USER_TOWER,
    FeatureSchema,
    Signature,
)
from workloads.data.dataset import ITEMS, Dataset, DatasetError
from workloads.data.features import ItemTables
from workloads.export import samples
from workloads.export.ann import write_index
from workloads.export.card import model_card
from workloads.export.graphs import ONNXRUNTIME, Runner, write_onnx
from workloads.export.parity import (
    PROBABILITY_LIMIT,
    STUDENT_AGREEMENT_FLOOR,
    STUDENT_LIMIT,
    Limits,
    ParityFault,
    compare,
    vector_limit,
)
from workloads.export.quantising import quantise
from workloads.models import ladder, ranker, student, two_tower
from workloads.models.ladder import RankedLists
from workloads.telemetry.progress import Progress

STAGE: Final = "export"
STEPS: Final = len(SIGNATURES) + 5
WEIGHTS: Final = "weights"
TRAINING: Final = "training.json"
METRICS: Final = "metrics.json"


class ExportFault(Exception):  # noqa: N818 - a fault is what the domain calls it
    """Why no bundle was written, and what to do about it."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.remedy = remedy


class TrainingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What of `training.json` a bundle has to know; the file says more."""

    digest: str
    dataset: str
    """Name of the data set."""
    dataset_digest: str


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A finished training run, read."""

    facts: TrainingFacts
    quality: QualityReport
    schema: FeatureSchema
    tables: ItemTables
    models: Mapping[str, nn.Module]
    """By role, in eval mode."""
    lists: RankedLists
    """Test requests that the ladder is measured on."""

    @classmethod
    def read(cls, directory: Path) -> TrainedRun:
        """Raises ExportFault that names the file at fault."""
        try:
            facts = msgspec.json.decode((directory / TRAINING).read_bytes(), type=TrainingFacts)
            quality = msgspec.json.decode((directory / METRICS).read_bytes(), type=QualityReport)
            schema = msgspec.json.decode((directory / m.FEATURES).read_bytes(), type=FeatureSchema)
            tables = ItemTables.of(open_tables(directory / m.ITEM_TABLES_FILE))
            towers = two_tower.load(directory / WEIGHTS)
            models = {
                USER_TOWER.role: towers.user,
                ITEM_TOWER.role: towers.item,
                QUERY_TOWER.role: towers.query,
                RANKER.role: ranker.load(directory / WEIGHTS),
                STUDENT.role: student.load(directory / WEIGHTS),
            }
            lists = RankedLists.load(directory / ladder.LADDER_FILE)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise ExportFault(
                f"{directory} is not a finished training run: {error}",
                "give the directory that `python -m workloads.training` printed last",
            ) from error
        return cls(facts, quality, schema, tables, models, lists)


def export(training: Path, dataset_path: Path, bundles: Path, progress: Progress, *, now_ms: Callable[[], int]) -> Path:
    """Write the bundle of a training run into `bundles` and return its directory. Raises ExportFault."""
    progress.step(STAGE, 0, STEPS)
    run = TrainedRun.read(training)
    try:
        dataset = Dataset.load(dataset_path)
    except (DatasetError, OSError) as error:
        raise ExportFault(str(error), "prepare the data again with `python -m workloads.data`") from error
    _must_belong(run, dataset)
    progress.step(STAGE, 1, STEPS)
    with tempfile.TemporaryDirectory(prefix="rankbridge-export-") as scratch:
        source = Path(scratch)
        for number, signature in enumerate(SIGNATURES, start=2):
            write_onnx(run.models[signature.role], signature, _graph(source, signature))
            progress.step(STAGE, number, STEPS)
        try:
            parity, asked, lists = check_parity(run, dataset, source)
        except ParityFault as error:
            raise ExportFault(
                f"an exported model is not the trained one: {error}",
                "nothing was written; train again, and if it happens again report it with the versions of torch, "
                "onnx and onnxruntime",
            ) from error
        progress.step(STAGE, STEPS - 3, STEPS, max_abs_error=max(one.max_abs_error for one in parity.values()))
        quality = measured(run, source)
        progress.step(STAGE, STEPS - 2, STEPS)
        samples.record(lists, Runner(source / f"{RANKER.role}.onnx").run, source / m.PROBES)
        ann = write_index(run.tables.vectors[1:], asked, source / m.ANN)
        progress.step(STAGE, STEPS - 1, STEPS, recall_at_10=ann.recall_at_10)
        facts = m.Facts(
            dataset=dataset.meta.name,
            dataset_digest=dataset.meta.digest,
            training_digest=run.facts.digest,
            key_epoch=dataset.meta.key_epoch,
            created_ms=now_ms(),
            quality=quality,
            parity=parity,
            ann=ann,
            requires=m.Requires(onnxruntime=ONNXRUNTIME),
        )
        for name in (m.FEATURES, m.ITEM_TABLES_FILE):
            shutil.copyfile(training / name, source / name)
        shutil.copyfile(dataset_path / ITEMS, source / m.CATALOGUE)
        (source / m.MODEL_CARD).write_text(model_card(facts, dataset.meta, run.schema), encoding="utf-8")
        try:
            bundle = write_bundle(bundles, source, facts)
        except BundleFault as error:
            raise ExportFault(
                f"what was made is no bundle: {error}", "train again; if it happens again, report it"
            ) from (error)
    progress.step(STAGE, STEPS, STEPS)
    return bundle


def _must_belong(run: TrainedRun, dataset: Dataset) -> None:
    """Raises ExportFault unless the run was trained on this very data set."""
    remedy = "give the data set that the run was trained on, or train on this one"
    if run.facts.dataset_digest != dataset.meta.digest:
        raise ExportFault(
            f"the run was trained on the data set {run.facts.dataset} with digest {run.facts.dataset_digest[:12]}; "
            f"{dataset.path.name} has {dataset.meta.digest[:12]}",
            remedy,
        )
    if run.schema.items != dataset.items.height or len(run.tables.category) != run.schema.items + 1:
        raise ExportFault(
            f"the run has {run.schema.items} items and tables of {len(run.tables.category)} rows; "
            f"the catalogue has {dataset.items.height}",
            remedy,
        )


def check_parity(
    run: TrainedRun, dataset: Dataset, folder: Path
) -> tuple[dict[str, m.Parity], Array, list[samples.RankedList]]:
    """Parity of each `<role>.onnx` in `folder`, and what was made on the way.

    That is the vectors of users and queries, [Q, D], and the lists that the ranker was asked for; these are what
    the student is quantised by, before it is compared.

    Raises ParityFault at the first model that differs, or when the item tower does not give the
    vectors that the run's tables hold.
    """
    runners = {one.role: Runner(_graph(folder, one)) for one in SIGNATURES if one is not STUDENT}
    vectors = run.tables.vectors  # [N + 1, D]
    states = samples.user_states(dataset)

    items = samples.catalogue_inputs(dataset, run.tables, run.schema)
    trained_items, exported_items = _both(run, runners, ITEM_TOWER.role, items)
    users = samples.tower_inputs(states)
    trained_users, exported_users = _both(run, runners, USER_TOWER.role, users)
    tokens = {"tokens": samples.query_tokens(dataset)}
    trained_queries, exported_queries = _both(run, runners, QUERY_TOWER.role, tokens)

    parity = {
        USER_TOWER.role: compare(
            USER_TOWER.role,
            trained=trained_users,
            exported=exported_users,
            scores=(trained_users @ vectors[1:].T, exported_users @ vectors[1:].T),
            limits=vector_limit(trained_users),
        ),
        ITEM_TOWER.role: compare(
            ITEM_TOWER.role,
            trained=trained_items,
            exported=exported_items,
            scores=(trained_users @ trained_items[1:].T, trained_users @ exported_items[1:].T),
            limits=vector_limit(trained_items),
        ),
        QUERY_TOWER.role: compare(
            QUERY_TOWER.role,
            trained=trained_queries,
            exported=exported_queries,
            scores=(trained_queries @ vectors[1:].T, exported_queries @ vectors[1:].T),
            limits=vector_limit(trained_queries),
        ),
    }
    apart = float(np.abs(exported_items[1:] - vectors[1:]).max(initial=0.0))
    if not apart <= vector_limit(vectors).error or np.any(vectors[PAD]):
        raise ParityFault(
            f"item_tower: its vectors are up to {apart:.3g} from those in {m.ITEM_TABLES_FILE}: "
            "training read other texts, prices or ages"
        )
    lists = samples.ranked_lists(states, exported_users, run.tables, run.schema)
    parity[RANKER.role] = _compare_rankers(run, runners, RANKER, lists, Limits(error=PROBABILITY_LIMIT))
    batches = [{"sparse": one.sparse, "dense": one.dense} for one in lists]
    quantise(_graph(folder, STUDENT), folder / f"{STUDENT.role}.onnx", batches or [_nothing(STUDENT)])
    _graph(folder, STUDENT).unlink()
    runners[STUDENT.role] = Runner(folder / f"{STUDENT.role}.onnx")
    limits = Limits(error=STUDENT_LIMIT, agreement=STUDENT_AGREEMENT_FLOOR)
    parity[STUDENT.role] = _compare_rankers(run, runners, STUDENT, lists, limits)
    return parity, np.concatenate((exported_users, exported_queries)), lists


def measured(run: TrainedRun, folder: Path) -> QualityReport:
    """The run's quality with the ladder as the exported ranker and student make it.

    Raises ExportFault when the student loses more than its budget.
    """
    mean, scale = (np.array(values, np.float32) for values in (run.schema.dense_mean, run.schema.dense_scale))
    inputs = {"sparse": run.lists.sparse.astype(np.int64), "dense": (run.lists.dense - mean) / scale}
    scores: dict[int, Array] = {
        rung: Runner(folder / f"{one.role}.onnx").run_in_batches(inputs, one.max_batch)[:, 0]
        for rung, one in ((Rung.FULL_RANKER, RANKER), (Rung.DISTILLED_RANKER, STUDENT))
    }
    rungs = ladder.measure(run.lists, scores)
    if fault := ladder.student_fault(rungs):
        raise ExportFault(
            f"the student is no rung of the ladder: {fault}",
            "nothing was written; train again with more `--student-epochs`, or on a log of more people",
        )
    said = [*run.quality.statements, *ladder.statements(rungs)]
    return msgspec.structs.replace(run.quality, rungs=rungs, statements=said)


def _graph(folder: Path, signature: Signature) -> Path:
    """Where a model lies as torch gave it; the student is not yet what a bundle holds."""
    return folder / f"{signature.role}{'.float' if signature is STUDENT else ''}.onnx"


def _nothing(signature: Signature) -> dict[str, Array]:
    """One row about nobody and nothing."""
    return {spec.name: np.zeros((1, *spec.shape), spec.dtype) for spec in signature.inputs}


def _compare_rankers(
    run: TrainedRun,
    runners: Mapping[str, Runner],
    signature: Signature,
    lists: list[samples.RankedList],
    limits: Limits,
) -> m.Parity:
    width = max((len(one.sparse) for one in lists), default=0)
    joined = {
        name: np.concatenate([getattr(one, name) for one in lists])
        if lists
        else np.zeros((0, *RANKER.inputs[place].shape), RANKER.inputs[place].dtype)
        for place, name in enumerate(("sparse", "dense"))
    }
    trained, exported = _both(run, runners, signature.role, joined)
    scores = tuple(np.full((len(lists), width), -np.inf) for _ in range(2))
    at = 0
    for row, one in enumerate(lists):
        for table, answer in zip(scores, (trained, exported), strict=True):
            table[row, : len(one.sparse)] = answer[at : at + len(one.sparse), 0]
        at += len(one.sparse)
    return compare(signature.role, trained=trained, exported=exported, scores=(scores[0], scores[1]), limits=limits)


def _both(
    run: TrainedRun, runners: Mapping[str, Runner], role: str, inputs: Mapping[str, Array]
) -> tuple[Array, Array]:
    """What the trained and the exported model answer to the same rows."""
    signature = next(one for one in SIGNATURES if one.role == role)
    with torch.no_grad():
        trained = run.models[role](*(torch.from_numpy(np.ascontiguousarray(inputs[s.name])) for s in signature.inputs))
    return trained.numpy(), runners[role].run_in_batches(dict(inputs), signature.max_batch)
