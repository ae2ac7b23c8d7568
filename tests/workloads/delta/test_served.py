"""A new item is similar, found and recommended: the job's delta under real retrieval and gateway code, in process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import onnxruntime
import pytest

from workloads.bundle.fake import CREATED_MS
from workloads.bundle.store import Bundle, open_bundle
from workloads.contract.editions import Edition
from workloads.contract.http import BackendState, CandidatesAnswer, CandidatesQuery
from workloads.contract.sites import SiteName
from workloads.contract.tensors import RANKER
from workloads.data.fusion import Candidates
from workloads.gateway.app import Gateway
from workloads.gateway.catalogue_sample import Sampler
from workloads.gateway.doors import FakeIntake, Floats, Sparse
from workloads.gateway.editions import Editions, Serving
from workloads.gateway.identity import CloudEdge
from workloads.gateway.pipeline import Pipeline
from workloads.gateway.ranking import Ranking
from workloads.gateway.timing import FakeClock
from workloads.retrieval.retriever import open_retriever
from workloads.telemetry.metrics import StageMetrics, new_registry

NOW = CREATED_MS + 86_400_000
UP = BackendState(up=True, detail="in process")


class RetrievalInProcess:
    """The real retriever behind the gateway's door, messages encoded as on the wire."""

    def __init__(self, bundle: Bundle) -> None:
        self._retriever = open_retriever(bundle)

    async def candidates(self, query: CandidatesQuery, timeout_s: float) -> CandidatesAnswer:
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(query), type=CandidatesQuery)
        answer = msgspec.msgpack.encode(self._retriever.candidates(sent))
        return msgspec.msgpack.decode(answer, type=CandidatesAnswer)

    async def state(self) -> BackendState:
        return UP

    async def close(self) -> None:
        pass


class RankerInProcess:
    """The bundle's own ranker without Triton. ONNX Runtime raises for an index beyond its tables."""

    def __init__(self, bundle: Bundle) -> None:
        self._session = onnxruntime.InferenceSession(bundle.model_path(RANKER))

    async def probabilities(self, sparse: Sparse, dense: Floats, timeout_s: float) -> Floats:
        found: Floats = self._session.run(None, {"sparse": sparse, "dense": dense})[0]
        return found[:, 0]

    async def state(self) -> BackendState:
        return UP

    async def close(self) -> None:
        pass


@pytest.fixture
def bundle(made: Path, delta: Path) -> Bundle:
    return open_bundle(made, [delta])


@pytest.fixture
async def client(bundle: Bundle) -> AsyncIterator[httpx.AsyncClient]:
    metrics, clock = StageMetrics(new_registry()), FakeClock(NOW)
    retrieval, ranker = RetrievalInProcess(bundle), RankerInProcess(bundle)
    pipeline = Pipeline(
        site=SiteName.AWS,
        bundle=bundle,
        delta=bundle.delta,
        ranking=Ranking.alone(SiteName.AWS, ranker, clock),
        retrieval=retrieval,
        people=None,
        clock=clock,
    )
    pipeline.warm_up()
    edition = Edition(bundle=bundle.id, delta=bundle.delta)
    serving = Serving(edition, pipeline, Sampler(bundle, [], pipeline.best_rung))
    app = Gateway(
        site=SiteName.AWS,
        editions=Editions(metrics.registry, serving),
        retrieval=retrieval,
        intake=FakeIntake(clock.sleep),
        edge=CloudEdge(),
        people=None,
        metrics=metrics,
        clock=clock,
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as made_client:
        yield made_client


async def ask(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:  # noqa: ANN401 - of the message
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["served"]["delta"] == 1
    assert found["served"].get("reason") is None, "nothing was late, lost or wrong: the best rung answered"
    return found


def names(answer: dict[str, Any]) -> list[str]:
    return [one["item"] for one in answer["items"]]


def of_category(bundle: Bundle, name: str) -> list[str]:
    return [bundle.item_ids[row] for row in range(1, bundle.base_items + 1) if bundle.categories[row] == name]


async def test_it_has_similar_items_and_is_similar_to_them(client: httpx.AsyncClient, bundle: Bundle):
    found = names(await ask(client, "/v1/similar", item="new-feeder"))
    assert len(found) == 10
    assert set(found) <= set(of_category(bundle, "Garden"))
    nearest = bundle.item_ids[bundle.tables["neighbours"][bundle.index["new-feeder"], 0]]
    assert "new-feeder" in names(await ask(client, "/v1/similar", item=nearest, k=20))


async def test_it_is_found_by_its_title_and_by_a_misspelt_one(client: httpx.AsyncClient):
    assert names(await ask(client, "/v1/search", query="Copper dragonfly lamp"))[0] == "new-lamp"
    assert names(await ask(client, "/v1/search", query="zepelin"))[0] == "new-mug"


async def test_it_is_recommended_to_who_likes_its_category(client: httpx.AsyncClient, bundle: Bundle):
    history = of_category(bundle, "Garden")[:5]
    found = names(await ask(client, "/v1/recommend", history=history, k=50))
    assert "new-feeder" in found, "the fake's ranker loves what is popular, so not among the first ten"
    assert not {"new-mug", "new-lamp"} & set(found)


async def test_a_history_of_new_items_alone_is_understood(client: httpx.AsyncClient, bundle: Bundle):
    share = len(of_category(bundle, "Garden")) / bundle.base_items
    answer = await ask(client, "/v1/recommend", history=["new-feeder"], k=20)
    kinds = [bundle.categories[bundle.index[item]] for item in names(answer)]
    assert kinds.count("Garden") / 20 > 2 * share


async def test_the_traditional_recommender_knows_it_too(client: httpx.AsyncClient, bundle: Bundle):
    answer = await client.post("/v1/recommend", json={"history": ["new-mug"], "use_model": False})
    found = answer.json()
    assert found["served"]["rung"] == 4
    assert {bundle.categories[bundle.index[item]] for item in names(found)[:3]} == {"Kitchen"}


async def test_without_the_delta_nobody_knows_it(made: Path):
    base = open_bundle(made)
    assert "new-feeder" not in base.index
    answer = await RetrievalInProcess(base).candidates(
        CandidatesQuery(
            bundle=base.id,
            kind="search",
            history=[],
            history_strength=[],
            history_age_hours=[],
            context=[0.0, 1.0, 0.0, 1.0],
            query="dragonfly",
            count=10,
        ),
        1.0,
    )
    assert Candidates.read(answer).items.max() <= base.base_items
