"""The retrieval as the process that is really started, over a fake bundle."""

from __future__ import annotations

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import msgspec
import pytest

from workloads.bundle.fake import build_fake_bundle
from workloads.contract.http import PATH_CANDIDATES, SOURCES, CandidatesAnswer, CandidatesQuery
from workloads.data.fusion import Candidates

pytestmark = pytest.mark.real_parts

ITEMS = 500


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=ITEMS)


@pytest.fixture(scope="module")
def url(bundle: pathlib.Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [sys.executable, "-m", "workloads.retrieval", "--site", "onprem", "--listen", address, "--bundle", str(bundle)],
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, process.stderr.read()
        try:
            if httpx.get(f"http://{address}/readyz").status_code == 200:
                break
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    yield f"http://{address}"
    process.send_signal(signal.SIGTERM)
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(20) == 0, errors
    assert {json.loads(line)["role"] for line in errors.splitlines()} == {"retrieval"}


def ask(url: str, query: CandidatesQuery) -> httpx.Response:
    return httpx.post(
        url + PATH_CANDIDATES,
        content=msgspec.msgpack.encode(query),
        headers={"content-type": "application/msgpack"},
    )


def make_query(served: pathlib.Path, **changes: object) -> CandidatesQuery:
    query = CandidatesQuery(
        bundle=served.name,
        kind="recommend",
        history=[3, 4],
        history_strength=[1.0, 0.3],
        history_age_hours=[48.0, 0.0],
        context=[0.0, 1.0, 0.0, 1.0],
        count=200,
    )
    return msgspec.structs.replace(query, **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"ann", "item_to_item", "history"}),
        ({"history": [], "history_strength": [], "history_age_hours": []}, {"ann", "popular"}),
        ({"kind": "search", "query": "red lantern"}, {"lexical", "vector"}),
        ({"kind": "search", "query": "lanterm"}, {"lexical", "vector"}),
        ({"kind": "similar"}, {"item_to_item", "vector"}),
    ],
)
def test_each_kind_of_query_is_answered_from_its_sources(
    url: str, bundle: pathlib.Path, changes: dict[str, object], expected: set[str]
):
    answer = msgspec.msgpack.decode(ask(url, make_query(bundle, **changes)).content, type=CandidatesAnswer)
    assert answer.bundle == bundle.name
    found = Candidates.read(answer)
    items, scores = found.items.tolist(), found.scores.tolist()
    assert len(items) == len(set(items)) == 200
    assert all(1 <= item <= ITEMS for item in items)
    assert scores == sorted(scores, reverse=True)
    assert expected <= {SOURCES[source] for source in found.source.tolist()}


def test_a_query_of_another_bundle_is_a_conflict(url: str, bundle: pathlib.Path):
    assert ask(url, make_query(bundle, bundle="0" * 64)).status_code == 409


def test_metrics_tell_the_time_of_each_source(url: str, bundle: pathlib.Path):
    ask(url, make_query(bundle))
    text = httpx.get(f"{url}/metrics").text
    for source in ("user_tower", "ann", "item_to_item", "fuse"):
        assert f'stage="{source}"' in text


@pytest.mark.parametrize("fault", ["no such directory", "an index of another bundle"])
def test_a_bundle_that_cannot_be_served_is_one_line_with_a_remedy(tmp_path: pathlib.Path, fault: str):
    path = tmp_path / "nothing"
    if fault == "an index of another bundle":
        path = build_fake_bundle(tmp_path / "one", items=20)
        other = build_fake_bundle(tmp_path / "other", items=21)
        (path / "ann.faiss").chmod(0o644)
        (path / "ann.faiss").write_bytes((other / "ann.faiss").read_bytes())
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "workloads.retrieval",
            "--site",
            "aws",
            "--listen",
            "127.0.0.1:0",
            "--bundle",
            str(path),
        ],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert b"Traceback" not in done.stderr
    (record,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert record["remedy"]
    assert record["site"] == "aws"
