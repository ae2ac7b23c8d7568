"""A repository follows from the contract and the bundle; nothing in it is written by hand."""

import os
import re
from pathlib import Path

import pytest

from workloads.agent.injection import Injection, parse_injections
from workloads.agent.repository import config, render_repository
from workloads.contract.sites import SiteClass
from workloads.contract.tensors import ITEM_TOWER, RANKER, RANKER_DENSE, RANKER_SPARSE


def _files(repository: Path) -> set[str]:
    return {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}


def test_a_cpu_site_runs_the_ranker_in_the_python_backend(made: Path, tmp_path: Path) -> None:
    (name,) = render_repository(made, tmp_path, SiteClass.CPU)
    assert name == f"ranker-{made.name[:12]}"
    assert _files(tmp_path) == {f"{name}/config.pbtxt", f"{name}/1/model.py", f"{name}/1/model.onnx"}
    text = (tmp_path / name / "config.pbtxt").read_text()
    assert 'backend: "python"' in text
    assert "KIND_CPU" in text
    assert "KIND_GPU" not in text
    assert (tmp_path / name / "1/model.onnx").read_bytes() == (made / "ranker.onnx").read_bytes()


def test_a_gpu_site_runs_the_same_file_in_the_onnxruntime_backend(made: Path, tmp_path: Path) -> None:
    (name,) = render_repository(made, tmp_path, SiteClass.GPU)
    assert _files(tmp_path) == {f"{name}/config.pbtxt", f"{name}/1/model.onnx"}
    text = (tmp_path / name / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in text
    assert 'default_model_filename: "model.onnx"' in text
    assert "count: 1 kind: KIND_GPU" in text
    assert "KIND_CPU" not in text
    assert "dynamic_batching { }" in text


@pytest.mark.parametrize("site_class", SiteClass)
def test_inputs_and_outputs_are_the_contracts(site_class: SiteClass) -> None:
    text = config(RANKER, "ranker-x", site_class)
    tensors = re.findall(r'(\w+) \[ \{ name: "(\w+)" data_type: (\w+) dims: \[ (\d+) \]', text)
    assert tensors == [
        ("input", "sparse", "TYPE_INT64", str(len(RANKER_SPARSE))),
        ("input", "dense", "TYPE_FP32", str(len(RANKER_DENSE))),
        ("output", "probability", "TYPE_FP32", "1"),
    ]
    assert f"max_batch_size: {RANKER.max_batch}" in text


def test_a_scalar_is_an_axis_of_one_to_triton_and_none_to_the_model() -> None:
    text = config(ITEM_TOWER, "item_tower-x", SiteClass.GPU)
    assert 'input [ { name: "item" data_type: TYPE_INT64 dims: [ 1 ] reshape { shape: [ ] } } ]' in text


@pytest.mark.parametrize("site_class", SiteClass)
def test_no_queue_policy_is_set_because_triton_loses_wake_ups_with_one(site_class: SiteClass) -> None:
    assert "queue_policy" not in config(RANKER, "ranker-x", site_class)


def test_an_injected_delay_is_a_parameter_and_its_absence_is_none() -> None:
    slow = config(RANKER, "ranker-x", SiteClass.CPU, Injection(ranker_delay_ms=80))
    assert 'parameters { key: "inject_delay_ms" value { string_value: "80" } }' in slow
    assert "parameters" not in config(RANKER, "ranker-x", SiteClass.CPU)


def test_a_gpu_site_refuses_a_delay_that_it_cannot_plant(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class cpu only"):
        render_repository(made, tmp_path, SiteClass.GPU, Injection(ranker_delay_ms=80))
    assert list(tmp_path.iterdir()) == []


def test_rendering_again_changes_nothing_and_another_injection_replaces_the_model(made: Path, tmp_path: Path) -> None:
    (name,) = render_repository(made, tmp_path, SiteClass.CPU)
    (tmp_path / name / "1/__pycache__").mkdir()
    (tmp_path / name / "1/__pycache__/model.pyc").touch()
    before = (tmp_path / name).stat().st_ino
    render_repository(made, tmp_path, SiteClass.CPU)
    assert (tmp_path / name).stat().st_ino == before
    render_repository(made, tmp_path, SiteClass.CPU, Injection(ranker_delay_ms=5))
    assert "inject_delay_ms" in (tmp_path / name / "config.pbtxt").read_text()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_model_file_that_was_altered_is_rendered_anew(made: Path, tmp_path: Path) -> None:
    (name,) = render_repository(made, tmp_path, SiteClass.CPU)
    altered = tmp_path / name / "1/model.onnx"
    altered.unlink()
    altered.write_bytes(b"other")
    render_repository(made, tmp_path, SiteClass.CPU)
    assert altered.read_bytes() == (made / "ranker.onnx").read_bytes()


def test_a_disk_without_hard_links_gets_a_copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    (name,) = render_repository(made, tmp_path, SiteClass.CPU)
    assert (tmp_path / name / "1/model.onnx").stat().st_nlink == 1


def test_a_delay_is_read_in_milliseconds() -> None:
    assert parse_injections(["ranker-delay=80ms"]) == Injection(ranker_delay_ms=80.0)
    assert parse_injections(["ranker-delay=0.5ms"]) == Injection(ranker_delay_ms=0.5)
    assert parse_injections([]) == Injection()


@pytest.mark.parametrize(
    "text", ["ranker-delay=80", "ranker-delay=-1ms", "ranker-delay=80s", "gateway-delay=8ms", "", "ranker-delay=ms"]
)
def test_an_unknown_injection_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"unknown injection .*known is ranker-delay=<milliseconds>ms"):
        parse_injections([text])


@pytest.mark.parametrize("text", ["ranker-delay=0ms", "ranker-delay=10001ms"])
def test_a_delay_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 10000 ms"):
        parse_injections([text])
