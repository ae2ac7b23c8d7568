"""A bad bundle has the fault that it is to have and no other, and the good one that it is made of stays good."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from rankbridge.drills import bad_bundles
from rankbridge.drills.scene import BadBundle
from workloads.bundle import store
from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.manifest import MANIFEST, decode
from workloads.bundle.signature import SignatureFault, Trust, make_key, verify_signature
from workloads.bundle.verification import BundleFault
from workloads.contract.storage import manifest_key, object_key, signature_key

TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32}


class FakeS3:
    """Keeps what is put."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def put_object(self, *, Bucket: str, Key: str, Body: bytes) -> None:  # noqa: N803 - boto3's names
        self.objects[Key] = Body


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return build_fake_bundle(tmp_path / "bundles")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def answers(bundle: Path, rows: int = 4) -> tuple[np.ndarray, float]:
    """What its ranker answers to zeros, and how long that took."""
    session = onnxruntime.InferenceSession(bundle / "ranker.onnx", providers=["CPUExecutionProvider"])
    feeds = {one.name: np.zeros((rows, one.shape[1]), dtype=TYPES[one.type]) for one in session.get_inputs()}
    began = time.perf_counter()
    (scores,) = session.run(None, feeds)
    return np.asarray(scores), time.perf_counter() - began


def test_a_twin_is_good_and_another(good: Path, scratch: Path):
    twin = bad_bundles.twin(good, scratch, "twin")
    assert twin.name != good.name
    store.verify(twin)
    store.verify(good)
    assert np.array_equal(answers(twin)[0], answers(good)[0])


@pytest.mark.parametrize("what", [BadBundle.SHAPE, BadBundle.NAN, BadBundle.SLOW])
def test_a_spoilt_ranker_leaves_the_good_bundle_as_it_was(good: Path, scratch: Path, what: BadBundle):
    before = (good / "ranker.onnx").read_bytes()
    bad = bad_bundles.make(good, scratch, what)
    assert bad.name == hashlib.sha256((bad / MANIFEST).read_bytes()).hexdigest()
    assert (bad / "ranker.onnx").read_bytes() != before
    assert (good / "ranker.onnx").read_bytes() == before
    store.verify(good)


def test_another_width_is_what_the_contract_refuses(good: Path, scratch: Path):
    with pytest.raises(BundleFault, match=r"ranker\.onnx"):
        store.verify(bad_bundles.make(good, scratch, BadBundle.SHAPE))


def test_nan_and_slowness_pass_every_check_of_files(good: Path, scratch: Path):
    nan = bad_bundles.make(good, scratch, BadBundle.NAN)
    slow = bad_bundles.make(good, scratch, BadBundle.SLOW)
    for bundle in (nan, slow):
        store.verify(bundle)
    assert np.isnan(answers(nan)[0]).all()
    scores, seconds = answers(slow, rows=200)
    assert np.array_equal(scores, answers(good, rows=200)[0])
    assert seconds > 0.05


def test_what_is_put_is_whole_but_for_its_fault(good: Path, scratch: Path):
    key = make_key(scratch / "publisher.key")
    client = FakeS3()
    cut = bad_bundles.make(good, scratch, BadBundle.TRUNCATED)
    bad_bundles.put(client, "models", cut, BadBundle.TRUNCATED, key=key.private, scratch=scratch)  # type: ignore[arg-type]
    entries = decode(client.objects[manifest_key(cut.name)]).files
    short = [name for name, entry in entries.items() if len(client.objects[object_key(entry.sha256)]) != entry.size]
    assert short == ["MODEL_CARD.md"]
    assert signature_key(cut.name) in client.objects


def test_a_strangers_signature_is_one_but_nobodys(good: Path, scratch: Path):
    key = make_key(scratch / "publisher.key")
    bad = bad_bundles.make(good, scratch, BadBundle.SIGNATURE)
    bad_bundles.put(FakeS3(), "models", bad, BadBundle.SIGNATURE, key=key.private, scratch=scratch)  # type: ignore[arg-type]
    signature = scratch / f"{bad.name}.sig"
    with pytest.raises(SignatureFault, match="is signed by the key"):
        verify_signature(bad, signature, Trust.of(key))
    store.verify(bad)
