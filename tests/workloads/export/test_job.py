"""A training run becomes a bundle that agrees with it, or one sentence and nothing on disk."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import polars as pl
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from workloads.bundle.store import Bundle, open_bundle, verify
from workloads.contract.slo import STUDENT_LOSS_MAX
from workloads.contract.tensors import ITEM_TOWER, RANKER, RANKER_DENSE, RANKER_SPARSE, SIGNATURES, STUDENT, Signature
from workloads.data.dataset import Dataset
from workloads.export import job, samples
from workloads.export.__main__ import main
from workloads.export.quantising import wide_products
from workloads.models import ranker
from workloads.models.ladder import LADDER_FILE, RankedLists
from workloads.telemetry.progress import FaultLine, ProgressLine, ResultLine, parse

pytestmark = pytest.mark.real_parts


def _arguments(training: Path, dataset: Path, home: Path) -> list[str]:
    return ["--training", str(training), "--dataset", str(dataset), "--home", str(home)]


@pytest.fixture(scope="module")
def home(training: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the run was exported once, for real."""
    home = tmp_path_factory.mktemp("home")
    assert main(_arguments(training, dataset.path, home)) == 0
    return home


@pytest.fixture(scope="module")
def bundle(home: Path) -> Bundle:
    (path,) = (home / "bundles").iterdir()
    return open_bundle(path)


def _quantised_before(source: Path, target: Path, _batches: object) -> None:
    """In place of quantising: the file comes from a bundle."""
    shutil.copyfile(source, target)


@pytest.fixture
def quick(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting takes the files that were exported already: seconds less for each test."""

    def copy(_module: object, signature: Signature, path: Path) -> None:
        shutil.copyfile(bundle.model_path(signature), path)

    monkeypatch.setattr(job, "write_onnx", copy)
    monkeypatch.setattr(job, "quantise", _quantised_before)


@pytest.fixture
def own_training(training: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(training, tmp_path / training.name))


def _lines(capsys: pytest.CaptureFixture[str]) -> list[object]:
    return [parse(line) for line in capsys.readouterr().out.splitlines()]


def _fault(capsys: pytest.CaptureFixture[str]) -> FaultLine:
    line = _lines(capsys)[-1]
    assert isinstance(line, FaultLine)
    assert line.remedy
    return line


def test_what_is_written_passes_every_check_of_a_bundle(bundle: Bundle, dataset: Dataset) -> None:
    manifest = verify(bundle.path)
    assert manifest.dataset_digest == dataset.meta.digest
    assert manifest.key_epoch == dataset.meta.key_epoch
    assert manifest.requires.onnxruntime == "1.18"
    assert set(manifest.parity) == {signature.role for signature in SIGNATURES}
    assert manifest.ann.kind == "flat"
    assert manifest.ann.recall_at_10 == 1.0
    assert bundle.item_ids[1:] == dataset.items["item"].to_list()


def test_no_bundle_knows_a_person(bundle: Bundle, dataset: Dataset) -> None:
    people = dataset.events["user"].drop_nulls().unique().to_list()
    sessions = dataset.events["session"].drop_nulls().unique().to_list()
    hidden = [name.encode() for name in (*people, *sessions)] + [bytes.fromhex(name[3:]) for name in people]
    assert len(people) > 100
    rows = {len(people) + more for more in (-1, 0, 1)}
    for file in sorted(path for path in bundle.path.rglob("*") if path.is_file()):
        content = file.read_bytes()
        if file.suffix == ".parquet":  # compressed: look at the values too
            content += pl.read_parquet(file).write_ndjson().encode()
        assert not any(name in content for name in hidden), file.name
        assert re.search(rb"[ps][0-9]{1,3}-[0-9a-f]{32}", content) is None, file.name
        shapes = []
        if file.suffix == ".onnx":
            shapes = [list(weight.dims) for weight in onnx.load(file).graph.initializer]
        elif file.suffix == ".safetensors":
            shapes = [list(table.shape) for table in load_file(file).values()]
        assert not any(shape and shape[0] in rows for shape in shapes), f"{file.name} has a row for each person"


def test_the_exported_item_tower_gives_the_vectors_of_the_tables(bundle: Bundle, dataset: Dataset) -> None:
    run_tables = job.ItemTables.of(bundle.tables)
    inputs = samples.catalogue_inputs(dataset, run_tables, bundle.features)
    session = ort.InferenceSession(bundle.model_path(ITEM_TOWER))
    np.testing.assert_allclose(session.run(None, inputs)[0][1:], bundle.tables["vectors"][1:], atol=1e-5)


@pytest.mark.parametrize("signature", [RANKER, STUDENT], ids=lambda signature: signature.role)
def test_the_exported_ranker_and_its_student_answer_any_batch(bundle: Bundle, signature: Signature) -> None:
    session = ort.InferenceSession(bundle.model_path(signature))
    for rows in (1, 2, 200, RANKER.max_batch):
        inputs = {spec.name: np.ones((rows, *spec.shape), spec.dtype) for spec in RANKER.inputs}
        (answer,) = session.run(None, inputs)
        assert answer.shape == (rows, 1)
        np.testing.assert_allclose(answer, answer[0, 0], rtol=1e-6)


def test_every_product_of_the_student_is_of_8_bits_with_int8_weights(bundle: Bundle) -> None:
    model = onnx.load(bundle.model_path(STUDENT))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    products = [node for node in model.graph.node if node.op_type in {"Gemm", "MatMul"}]
    assert len(products) == 3
    for node in products:
        read, weight = (made_by[name] for name in node.input[:2])
        assert read.op_type == weight.op_type == "DequantizeLinear"
        assert made_by[read.input[0]].op_type == "QuantizeLinear"
        values = numpy_helper.to_array(weights[weight.input[0]])
        assert values.dtype == np.int8
        assert values.size >= 32
        assert 32 < np.abs(values.astype(int)).max() <= 64, "all of 7 bits are used, and no more"
    # What is left in float32 are tables that are only looked up, and scales.
    wide = [w for w in weights.values() if w.data_type == onnx.TensorProto.FLOAT and len(w.dims) > 1]
    assert all(weight.name.startswith("tables.") for weight in wide)


def test_a_row_has_the_same_answer_in_any_batch(bundle: Bundle) -> None:
    """Ranges found at run time would make it depend on its neighbours."""
    random = np.random.default_rng(0)
    session = ort.InferenceSession(bundle.model_path(STUDENT))
    sparse = np.zeros((50, len(RANKER_SPARSE)), np.int64)
    dense = random.normal(size=(50, len(RANKER_DENSE))).astype(np.float32)
    (together,) = session.run(None, {"sparse": sparse, "dense": dense})
    assert np.ptp(together) > 0.1
    for row in (0, 20, 49):
        one = slice(row, row + 1)
        np.testing.assert_allclose(
            session.run(None, {"sparse": sparse[one], "dense": dense[one]})[0], together[one], rtol=1e-5
        )


def test_a_product_left_in_float32_is_found(bundle: Bundle) -> None:
    assert wide_products(onnx.load(bundle.model_path(STUDENT))) == []
    assert len(wide_products(onnx.load(bundle.model_path(RANKER)))) > 3


def test_the_bundle_tells_the_ladder_as_its_own_files_make_it(bundle: Bundle) -> None:
    quality = bundle.manifest.quality
    assert quality.loss(2) == 0.0, "whatever order: all was wanted"
    assert quality.loss(3, "repeats") == 0.0
    assert quality.loss(4) == pytest.approx(0.5)
    assert quality.loss(1, "search") is None
    assert "the INT8 student loses 0.0%" in " ".join(quality.statements)
    assert bundle.manifest.parity["student"].limit > bundle.manifest.parity["ranker"].limit
    assert bundle.manifest.parity["student"].max_abs_error > 0, "8 bits are not 32"


@pytest.mark.usefixtures("quick")
def test_a_student_that_loses_more_than_its_budget_is_refused_with_budget_loss_and_remedy(
    own_training: Path, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wanted is what the ranker puts first, and the student of this run has learned nothing of it."""
    lists = RankedLists.load(own_training / LADDER_FILE)
    run = job.TrainedRun.read(own_training)
    scale = np.float32(run.schema.dense_scale[0])
    with torch.no_grad():
        scores = run.models[RANKER.role](
            torch.from_numpy(lists.sparse.astype(np.int64)),
            torch.from_numpy((lists.dense - np.float32(run.schema.dense_mean[0])) / scale),
        ).numpy()[:, 0]
    first = [lists.sparse[lists.rows(place), 0][np.argmax(scores[lists.rows(place)])] for place in range(len(lists))]
    wanted = np.array(first, np.int32)
    dataclasses.replace(lists, wanted=wanted, wanted_offsets=np.arange(len(lists) + 1)).save(own_training / LADDER_FILE)

    assert main(_arguments(own_training, dataset.path, tmp_path)) == 2
    line = _fault(capsys)
    assert f"rung 2 may lose {STUDENT_LOSS_MAX:.1%}" in line.fault
    assert re.search(r"the student loses [4-9][0-9]\.[0-9]% .* on 40 requests", line.fault)
    assert "--student-epochs" in line.remedy
    assert not list((tmp_path / "bundles").glob("*"))


def test_the_graphs_say_nothing_of_the_machine_that_made_them(bundle: Bundle) -> None:
    for signature in SIGNATURES:
        data = bundle.model_path(signature).read_bytes()
        assert str(Path(__file__).parents[3]).encode() not in data
        assert b"stack_trace" not in data
        model = onnx.load_from_string(data)
        assert {entry.domain for entry in model.opset_import} == {""}, "only standard operators are portable"


def test_the_model_card_shows_the_measured_table_and_its_limits(bundle: Bundle) -> None:
    card = (bundle.path / "MODEL_CARD.md").read_text()
    assert "| item_knn | 4 | 0.2100 | 0.2100 | 9 |" in card
    assert "- Ours is above item-kNN." in card
    assert "recall@10 1.0000" in card
    assert "| 2 distilled ranker, INT8 | 1.0000 | 0.0% |" in card
    assert "## Limits" in card


@pytest.mark.usefixtures("quick")
def test_the_job_says_how_far_it_is_and_names_the_bundle_last(
    training: Path, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments(training, dataset.path, tmp_path)) == 0
    lines = _lines(capsys)
    steps = [line for line in lines if isinstance(line, ProgressLine)]
    assert steps[-1].done == steps[-1].total
    assert isinstance(lines[-1], ResultLine)
    assert verify(Path(lines[-1].made["bundle"]))


def _nudge(name: str, by: float) -> Callable[[Path], None]:
    """Change the weights of a model file a little, as a wrong operator would; of the student, the scales of all."""

    def change(path: Path) -> None:
        model = onnx.load(path)
        scales = [tensor for tensor in model.graph.initializer if tensor.name.endswith("weight_scale")]
        for tensor in scales or [max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))]:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * (1 + by), tensor.name))
        onnx.save(model, path)

    change.__name__ = name
    return change


@pytest.mark.parametrize("role", [signature.role for signature in SIGNATURES])
def test_an_exported_model_that_is_not_the_trained_one_is_refused_and_no_bundle_is_written(
    role: str,
    bundle: Bundle,
    training: Path,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def plant(_module: object, signature: Signature, path: Path) -> None:
        shutil.copyfile(bundle.model_path(signature), path)
        if signature.role == role:
            _nudge(role, 0.2)(path)

    monkeypatch.setattr(job, "write_onnx", plant)
    monkeypatch.setattr(job, "quantise", _quantised_before)
    assert main(_arguments(training, dataset.path, tmp_path)) == 2
    assert f"an exported model is not the trained one: {role}: outputs differ by up to" in _fault(capsys).fault
    assert not list((tmp_path / "bundles").glob("*"))


@pytest.mark.usefixtures("quick")
def test_item_vectors_that_the_item_tower_does_not_give_are_refused(
    own_training: Path, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = load_file(own_training / "item_tables.safetensors")
    tables["popularity"][3] *= 1.5
    save_file(tables, own_training / "item_tables.safetensors")
    assert main(_arguments(own_training, dataset.path, tmp_path)) == 2
    assert "training read other texts, prices or ages" in _fault(capsys).fault


def _forget(name: str) -> Callable[[Path], None]:
    return lambda training: (training / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    def change(training: Path) -> None:
        (training / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (_forget("training.json"), "training.json"),
        (_forget("metrics.json"), "metrics.json"),
        (_forget("weights/ranker.safetensors"), "ranker.safetensors"),
        (_forget("weights/student.json"), "student.json"),
        (_forget("ladder.safetensors"), "ladder.safetensors"),
        (_write("ladder.safetensors", "short"), "cut short"),
        (_forget("item_tables.safetensors"), "item_tables.safetensors"),
        (_write("features.json", "{}"), "missing required field"),
        (_write("metrics.json", "nonsense"), "malformed"),
        (_write("training.json", "{}"), "missing required field"),
        (_write("item_tables.safetensors", "short"), "cut short"),
    ],
)
def test_an_unfinished_training_run_is_refused_with_what_is_missing(
    spoil: Callable[[Path], None],
    fault: str,
    own_training: Path,
    dataset: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(own_training)
    assert main(_arguments(own_training, dataset.path, tmp_path)) == 2
    line = _fault(capsys)
    assert "is not a finished training run" in line.fault
    assert fault in line.fault


def test_weights_that_do_not_fit_their_config_are_refused(
    own_training: Path, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = own_training / "weights" / ranker.CONFIG_FILE
    sizes = json.loads(config.read_text())
    config.write_text(json.dumps(sizes | {"items": sizes["items"] + 1}))
    assert main(_arguments(own_training, dataset.path, tmp_path)) == 2
    assert "size mismatch" in _fault(capsys).fault


def test_another_data_set_than_the_one_trained_on_is_refused_with_both_digests(
    own_training: Path, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((own_training / "training.json").read_text())
    (own_training / "training.json").write_text(json.dumps(facts | {"dataset_digest": "f" * 64}))
    assert main(_arguments(own_training, dataset.path, tmp_path)) == 2
    fault = _fault(capsys).fault
    assert "f" * 12 in fault
    assert dataset.meta.digest[:12] in fault


def test_a_data_set_that_is_none_is_refused(training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_arguments(training, tmp_path, tmp_path)) == 2
    assert "dataset.json" in _fault(capsys).fault


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_job_that_is_told_to_end_ends_and_leaves_nothing(
    number: int, code: int, training: Path, dataset: Dataset, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "workloads.export", *_arguments(training, dataset.path, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert process.stdout is not None
    assert isinstance(parse(process.stdout.readline()), ProgressLine)
    time.sleep(1)  # somewhere in the middle of exporting
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in output
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
