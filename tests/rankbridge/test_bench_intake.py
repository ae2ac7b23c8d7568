"""The intake's bench: like with like, by turns, and every figure from what was really done."""

from __future__ import annotations

import io
import pathlib
import sqlite3

import msgspec
import pytest
from rich.console import Console

from rankbridge import bench_intake
from rankbridge.bench_intake import IntakeBench, Options, compare, run


def test_each_loop_writes_the_same_events_in_every_round(tmp_path: pathlib.Path):
    rounds, fsyncs = compare(tmp_path, rounds=3, batches=2)
    assert [set(one) for one in rounds] == [{"plain", "unique", "store", "decoded"}] * 3
    assert [next(iter(one)) for one in rounds] == ["unique", "store", "decoded"]  # each is first in its turn
    assert all(spent > 0 for one in rounds for spent in one.values())
    assert len(fsyncs) == 3 * bench_intake.FSYNCS
    counts = []
    for name in ("plain", "unique", "store", "decoded"):
        with sqlite3.connect(tmp_path / f"{name}.sqlite") as reader:
            counts.append(reader.execute("SELECT count(*), count(DISTINCT event_id) FROM events").fetchone())
        reader.close()
    assert counts == [(4 * 2 * bench_intake.BATCH,) * 2] * 4


@pytest.mark.real_parts
def test_a_bench_measures_posts_to_a_real_intake_and_leaves_only_its_result(tmp_path: pathlib.Path):
    told = io.StringIO()
    options = Options(folder=tmp_path / "work", out=tmp_path / "out", rounds=1, batches=1, rate=100, seconds=1)
    result = run(options, Console(file=told, width=120))
    written = (tmp_path / "out" / "bench-intake.json").read_bytes()
    assert msgspec.json.decode(written, type=IntakeBench) == result
    assert result.posts.failed == 0
    assert 50 < result.posts.sent < 200
    assert result.posts.latency.p50_ms <= result.posts.latency.p99_ms
    assert result.ratio.low <= result.ratio.median <= result.ratio.high
    assert "fsync of a page" in told.getvalue()
    assert list((tmp_path / "work").iterdir()) == []
