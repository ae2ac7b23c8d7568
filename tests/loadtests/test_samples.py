"""A run's file gives back the run, and a file that is not whole says so."""

from pathlib import Path

import pytest

from loadtests.recorder import Recorder
from loadtests.samples import RunHeader, Sample, Target, read, write_whole

HEADER = RunHeader(
    suite="mix",
    started_ms=1.0,
    warmup_s=5.0,
    arrivals="poisson",
    rate_per_user=1.0,
    seed=7,
    targets=[Target(site="onprem", share=1.0, best_rung={"/v1/recommend": 1})],
)
SAMPLE = Sample(
    endpoint="/v1/recommend",
    site="onprem",
    at_s=1.5,
    latency_ms=12.0,
    lateness_ms=0.3,
    status=200,
    rung=1,
    best_rung=1,
    ranked=200,
    stages_ms={"rank": 5.0},
    bundle="abc",
    warmup=True,
)


def test_what_is_recorded_is_read_back(tmp_path: Path):
    recorder = Recorder(HEADER, samples=tmp_path / "out" / "samples.jsonl", acknowledged=tmp_path / "ids.txt")
    recorder.record(SAMPLE)
    recorder.acknowledge(["id-1", "id-2"])
    assert (tmp_path / "ids.txt").read_text() == "id-1\nid-2\n", "an acknowledged id is on disk at once"
    run = recorder.finish(seconds=3.0)
    assert run.samples == [SAMPLE]
    assert read(tmp_path / "out" / "samples.jsonl") == run


def test_a_run_that_was_cut_short_leaves_no_file_under_the_final_name(tmp_path: Path):
    recorder = Recorder(HEADER, samples=tmp_path / "samples.jsonl")
    recorder.record(SAMPLE)
    assert not (tmp_path / "samples.jsonl").exists()
    recorder.finish(seconds=1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize(
    ("keep", "said"), [(slice(0, -1), "cut short"), (slice(1, None), "no header"), (slice(0, 0), "no header")]
)
def test_a_file_that_is_not_whole_says_so(tmp_path: Path, keep: slice, said: str):
    path = tmp_path / "samples.jsonl"
    recorder = Recorder(HEADER, samples=path)
    recorder.record(SAMPLE)
    recorder.finish(seconds=1.0)
    path.write_bytes(b"\n".join(path.read_bytes().splitlines()[keep]))
    with pytest.raises(ValueError, match=said):
        read(path)


def test_a_broken_line_is_named_by_its_number(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    Recorder(HEADER, samples=path).finish(seconds=1.0)
    path.write_bytes(path.read_bytes() + b"{nonsense\n")
    with pytest.raises(ValueError, match="line 3"):
        read(path)


def test_a_file_of_another_version_is_refused(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    Recorder(HEADER, samples=path).finish(seconds=1.0)
    path.write_bytes(path.read_bytes().replace(b'"schema_version":1', b'"schema_version":2'))
    with pytest.raises(ValueError, match="schema version 2"):
        read(path)


def test_a_whole_file_replaces_what_was_there(tmp_path: Path):
    write_whole(tmp_path / "a" / "x.json", b"1")
    write_whole(tmp_path / "a" / "x.json", b"22")
    assert (tmp_path / "a" / "x.json").read_bytes() == b"22"
    assert len(list((tmp_path / "a").iterdir())) == 1
