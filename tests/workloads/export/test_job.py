"""A training run becomes a bundle that agrees with it, or one sentence and nothing on disk."""

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
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from workloads.bundle.store import Bundle, open_bundle, verify
from workloads.contract.tensors import ITEM_TOWER, RANKER, SIGNATURES, Signature
from workloads.data.dataset import Dataset
from workloads.export import job, samples
from workloads.export.__main__ import main
from workloads.models import ranker
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


@pytest.fixture
def quick(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting takes the files that were exported already: seconds less for each test."""

    def copy(_module: object, signature: Signature, path: Path) -> None:
        shutil.copyfile(bundle.model_path(signature), path)

    monkeypatch.setattr(job, "write_onnx", copy)


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


def test_the_exported_ranker_answers_any_batch(bundle: Bundle) -> None:
    session = ort.InferenceSession(bundle.model_path(RANKER))
    for rows in (1, 2, 200, RANKER.max_batch):
        inputs = {spec.name: np.ones((rows, *spec.shape), spec.dtype) for spec in RANKER.inputs}
        (answer,) = session.run(None, inputs)
        assert answer.shape == (rows, 1)
        np.testing.assert_allclose(answer, answer[0, 0], rtol=1e-6)


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
    """Change the weights of a model file a little, as a wrong operator would."""

    def change(path: Path) -> None:
        model = onnx.load(path)
        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
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
