"""A site in memory around a real directory: Triton, retrieval and gateways as fakes that obey the editions file."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper
from prometheus_client import CollectorRegistry

from workloads.agent.crash import nowhere
from workloads.agent.deployment import Deployment
from workloads.agent.door import FakeTriton
from workloads.agent.keeper import Keeper
from workloads.agent.neighbours import FakeNeighbours
from workloads.agent.releases import FakeReleases
from workloads.bundle import manifest as m
from workloads.bundle.site import SiteDirectory, read_editions
from workloads.bundle.store import verify, write_bundle
from workloads.contract.editions import Edition
from workloads.contract.sites import SiteClass
from workloads.contract.tensors import RANKER
from workloads.telemetry.metrics import render

Array = np.ndarray


def model_of(bundle: Path) -> str:
    return RANKER.triton_name(bundle.name)


def altered(
    bundle: Path, into: Path, change: Callable[[Path], None] = lambda _: None, requires: m.Requires | None = None
) -> Path:
    """A bundle as `bundle` is, after `change` was let loose on its files: valid by its manifest, whatever is in it."""
    import shutil  # noqa: PLC0415 - only here

    facts = verify(bundle)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        shutil.copytree(bundle, source, ignore=shutil.ignore_patterns(m.MANIFEST))
        change(source)
        fields = {name: getattr(facts, name) for name in m.Facts.__struct_fields__}
        fields["created_ms"] += 1
        if requires is not None:
            fields["requires"] = requires
        return write_bundle(into, source, m.Facts(**fields))


def spoil_ranker(source: Path, value: float) -> None:
    """Let every weight of the ranker's dense part be `value`: the form stays, the answers do not."""
    path = source / "ranker.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "dense_weight":
            spoilt = np.full_like(numpy_helper.to_array(tensor), value)
            tensor.CopyFrom(numpy_helper.from_array(spoilt, tensor.name))
    onnx.save(model, path)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class World:
    """One site; `start` makes an agent, `run` lets everybody take turns until nothing moves."""

    root: Path
    releases: FakeReleases
    gateways: int = 1
    site_class: SiteClass = SiteClass.CPU

    def __post_init__(self) -> None:
        self.site = SiteDirectory(self.root)
        self.clock = Clock()
        self.triton = FakeTriton({"probability": (1,)}, *(model_of(path) for path in self.releases.bundles.values()))
        for path in self.releases.bundles.values():
            self.triton.answers[model_of(path)] = _runner(path)
        self.neighbours = FakeNeighbours(self.gateways)
        self.served: list[Edition] = []
        self.start()

    def start(self, reached: Callable[[str], None] = nowhere) -> None:
        """A new agent process over what is on disk."""
        self.registry = CollectorRegistry()
        self.keeper = Keeper(self.triton, {}, clock=self.clock)
        self.deployment = Deployment(
            self.site,
            self.site_class,
            releases=self.releases,
            door=self.triton,
            keeper=self.keeper,
            neighbours=self.neighbours,
            registry=self.registry,
            onnxruntime=ort.__version__,
            reached=reached,
            clock=self.clock,
        )

    def look(self) -> None:
        """Retrieval and gateways look at the file; what serves is held against the disk and Triton."""
        editions = read_editions(self.site.editions)
        if editions is None:
            return
        self.neighbours.follow(editions)
        for edition in {serves for serves in self.neighbours.serves if serves is not None}:
            assert verify(self.site.bundle(edition.bundle)), edition
            assert RANKER.triton_name(edition.bundle) in self.triton.ready, f"{edition} is served without its model"
            assert edition in self.neighbours.holds, f"{edition} is served and retrieval does not hold it"
            if not self.served or self.served[-1] != edition:
                self.served.append(edition)

    async def turn(self) -> bool:
        """Everybody once."""
        try:
            self.deployment.offer(self.releases.wanted())
        except Exception as error:
            del error
        await self.keeper.step()
        moving = await self.deployment.step()
        self.look()
        return moving

    async def run(self, turns: int = 12) -> None:
        """Take turns until nothing has moved for a while."""
        still = 0
        for _ in range(turns * 4):
            still = 0 if await self.turn() else still + 1
            self.clock.now += 0.5
            if still == turns:
                return

    @property
    def serves(self) -> str | None:
        """Id of the bundle that the first gateway answers from."""
        serves = self.neighbours.serves[0]
        return None if serves is None else serves.bundle

    def counted(self, sample: str) -> float:
        """A sample of /metrics; 0 where there is none."""
        for line in render(self.registry)[0].decode().splitlines():
            if line.startswith(sample + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


def _runner(bundle: Path) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    @functools.cache
    def session() -> ort.InferenceSession:
        return ort.InferenceSession(bundle / "ranker.onnx", providers=["CPUExecutionProvider"])

    return lambda inputs: {"probability": session().run(None, dict(inputs))[0]}
