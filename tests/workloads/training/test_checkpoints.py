"""What is interrupted leaves the state before or the state after, never half of one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from workloads.training.checkpoints import CHECKPOINTS, BusyError, Checkpoints, draft_of, settle, write_whole


def test_a_state_comes_back_as_it_was(tmp_path: Path):
    kept = Checkpoints(tmp_path)
    assert kept.load("towers") is None
    kept.save("towers", {"round": 3, "model": {"weight": torch.arange(3.0)}, "curve": [0.5]})
    found = Checkpoints(tmp_path).load("towers")
    assert found is not None
    assert found["round"] == 3
    assert torch.equal(found["model"]["weight"], torch.arange(3.0))


def test_a_damaged_state_counts_as_none(tmp_path: Path):
    kept = Checkpoints(tmp_path)
    kept.save("towers", {"round": 3})
    file = tmp_path / "towers.pt"
    file.write_bytes(file.read_bytes()[:-20])
    assert kept.load("towers") is None


def test_a_state_that_would_run_code_is_not_read(tmp_path: Path):
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return eval, ("1/0",)

    torch.save({"trap": Trap()}, tmp_path / "towers.pt")
    assert Checkpoints(tmp_path).load("towers") is None


def test_a_write_that_fails_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "metrics.json"
    write_whole(file, b"before")

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, b"after")
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_two_runs_of_the_same_thing_do_not_share_a_draft(tmp_path: Path):
    final = tmp_path / "train-1"
    with draft_of(final), pytest.raises(BusyError, match="another process"), draft_of(final):
        pass
    with draft_of(final):
        pass


def test_a_failed_draft_stays_for_the_next_run(tmp_path: Path):
    final = tmp_path / "train-1"
    with contextlib.suppress(RuntimeError), draft_of(final) as draft:
        (draft / "half").touch()
        raise RuntimeError
    with draft_of(final) as draft:
        assert (draft / "half").exists()
    assert not final.exists()


def test_a_finished_draft_takes_the_place_of_the_run_before(tmp_path: Path):
    final = tmp_path / "train-1"
    for content in ("old", "new"):
        with draft_of(final) as draft:
            Checkpoints(draft / CHECKPOINTS).save("towers", {"round": 1})
            (draft / "metrics.json").write_text(content)
            settle(draft, final)
    assert [path.name for path in tmp_path.iterdir()] == ["train-1"]
    assert [path.name for path in final.iterdir()] == ["metrics.json"]
    assert (final / "metrics.json").read_text() == "new"
