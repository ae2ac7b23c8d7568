"""A person's profile: what it says, what costs nothing when it is lost, and how it is forgotten."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from urllib.parse import quote

import httpx
import msgspec
import pytest

from workloads.bundle.fake import CREATED_MS
from workloads.bundle.store import Bundle
from workloads.contract.events import EventType
from workloads.contract.http import ItemsAnswer, ProfileAnswer
from workloads.data.definitions import Sign, Touch
from workloads.data.features import ItemTables, UserState
from workloads.data.profiles import MemoryProfiles, Watermark
from workloads.gateway.ladder import FAILURES_IN_A_ROW, Reason
from workloads.gateway.people import INTERESTS_MAX, Catalogue, profile_answer
from workloads.gateway.timing import FakeClock
from workloads.privacy.vault import MemoryVault

DAY_MS = 86_400_000


def at(user: str) -> str:
    return f"/v1/users/{quote(user, safe='')}/profile"


async def profile(client: httpx.AsyncClient, user: str) -> ProfileAnswer:
    answer = await client.get(at(user))
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return msgspec.json.decode(answer.content, type=ProfileAnswer)


async def recommend(client: httpx.AsyncClient, **message: object) -> ItemsAnswer:
    answer = await client.post("/v1/recommend", json=message)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=ItemsAnswer)


async def test_a_profile_says_what_home_knows_and_names_no_pseudonym(
    client: httpx.AsyncClient, user: str, bundle: Bundle, vault: MemoryVault
):
    answer = await client.get(at(user))
    assert str(vault.pseudonym(user)) not in answer.text
    known = msgspec.json.decode(answer.content, type=ProfileAnswer)
    assert known.request_id == answer.headers["rankbridge-request-id"]
    assert known.interests == ["item-00004", "item-00003"]  # newest first
    assert (known.cold_start, known.touches, known.recency_days) == (False, 2, pytest.approx(1.0, abs=1e-3))
    tables, names = bundle.tables, bundle.features.categories
    mine = [names[tables["category"][bundle.index[item]] - 1] for item in known.interests]
    assert {interest.category for interest in known.categories} == set(mine)
    assert sum(interest.share for interest in known.categories) == pytest.approx(1.0)
    shares = [interest.share for interest in known.categories]
    assert shares == sorted(shares, reverse=True)
    by_name = {interest.category: interest.last_ms for interest in known.categories}
    assert by_name[mine[0]] == CREATED_MS - DAY_MS
    prices = [float(tables["price"][bundle.index[item]]) for item in known.interests]
    assert known.price_band is not None
    assert min(prices) <= known.price_band[0] <= known.price_band[1] <= max(prices)


async def test_somebody_unknown_is_a_cold_start_and_not_an_error(client: httpx.AsyncClient, vault: MemoryVault):
    for user in ("never seen", "a/b?c#d%2F", "ünïcødé 人", "p1-" + "0" * 32):
        known = await profile(client, user)
        assert known.cold_start
        assert (known.interests, known.categories, known.price_band) == ([], [], None)
        assert (known.touches, known.recency_days) == (0, None)
    assert list(vault.all_users()) == ["raw-user-alice@example.org"]  # asking makes nobody known


async def test_a_profile_of_items_that_the_catalogue_does_not_have_cannot_personalise(
    client: httpx.AsyncClient, profiles: MemoryProfiles, vault: MemoryVault
):
    name = vault.admit(["bob"])["bob"]
    profiles.apply([Sign(1, name, "gone", EventType.VIEW, CREATED_MS, CREATED_MS)], Watermark(1, CREATED_MS))
    known = await profile(client, "bob")
    assert (known.cold_start, known.interests, known.as_of_ms) == (True, ["gone"], CREATED_MS)


@pytest.mark.parametrize(
    "path", ["/v1/users//profile", "/v1/users/%FF/profile", "/v1/users/a%0Ab/profile", f"/v1/users/{'x' * 129}/profile"]
)
async def test_an_id_that_can_be_nobodys_is_refused_and_not_repeated(client: httpx.AsyncClient, path: str):
    for method in ("GET", "DELETE"):
        answer = await client.request(method, path)
        assert answer.status_code == 422, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["field"] == "id"
        assert "xxxx" not in answer.text


async def test_other_methods_are_named(client: httpx.AsyncClient):
    answer = await client.post(at("bob"), json={})
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, DELETE")


async def test_a_cloud_gateway_says_that_profiles_stay_at_home(cloud: httpx.AsyncClient, user: str):
    for method in ("GET", "DELETE"):
        answer = await cloud.request(method, at(user))
        assert (answer.status_code, answer.json()["type"]) == (403, "/problems/not-at-home")
        assert user not in answer.text


async def test_who_is_forgotten_is_a_cold_start_at_once_and_twice_is_no_error(
    client: httpx.AsyncClient,
    user: str,
    profiles: MemoryProfiles,
    vault: MemoryVault,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    name = vault.pseudonym(user)
    assert name is not None
    bought = "item-00003"
    before = await recommend(client, user=user, k=100, use_model=False)
    assert bought not in {item.item for item in before.items}
    for _ in range(2):
        answer = await client.delete(at(user))
        assert (answer.status_code, answer.content) == (204, b"")
        assert "content-length" not in answer.headers
    assert profiles.get(name) is None
    assert vault.pseudonym(user) is None
    assert [erasure.pseudonyms for erasure in vault.queue()] == [[name]]
    assert (await profile(client, user)).cold_start
    after = await recommend(client, user=user, k=100, use_model=False)
    stranger = await recommend(client, user="never seen", k=100, use_model=False)
    assert after.items == stranger.items
    assert (await client.delete(at("never seen"))).status_code == 204
    said = "".join(capsys.readouterr()) + "".join(r.getMessage() for r in caplog.records if r.name != "httpx")
    for secret in (user, quote(user, safe=""), name):
        assert secret not in said


async def test_a_store_that_is_down_when_somebody_is_forgotten_leaves_nobody_behind(
    client: httpx.AsyncClient, user: str, profiles: MemoryProfiles, vault: MemoryVault
):
    profiles.fault = "redis at 127.0.0.1:6379: connection refused"
    assert (await client.delete(at(user))).status_code == 204
    profiles.fault = None
    assert (await profile(client, user)).cold_start  # the pseudonym cannot be made any more
    assert len(vault.queue()) == 1  # and the erasure takes the row away


async def test_a_lost_store_is_a_cold_start_that_says_so_and_is_not_asked_by_everybody(
    client: httpx.AsyncClient,
    user: str,
    profiles: MemoryProfiles,
    clock: FakeClock,
    faults: list[Reason],
    counted: Callable[[str], float],
):
    profiles.fault = "redis at 127.0.0.1:6379: connection refused"
    answer = await recommend(client, user=user)
    assert (answer.served.rung, answer.served.reason) == (1, "profiles_down")
    await asyncio.sleep(0)  # counted once the answer is on its way
    assert counted('rankbridge_answers_total{endpoint="/v1/recommend",reason="profiles_down",rung="1"}') == 1
    assert faults == [Reason.PROFILES_DOWN]
    refused = await client.get(at(user))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    ready = (await client.get("/readyz")).json()
    assert ready["missing"] == ["profiles"]
    for _ in range(FAILURES_IN_A_ROW):
        await recommend(client, user=user)
    profiles.fault = None
    assert (await recommend(client, user=user)).served.reason == "profiles_down"  # the circuit is open
    assert (await recommend(client)).served.reason is None  # somebody without an id misses nothing
    clock.run(1.0)
    assert (await recommend(client, user=user)).served.reason is None
    assert (await client.get("/readyz")).json()["missing"] == []


async def test_the_description_names_both_methods_and_their_answers(client: httpx.AsyncClient):
    path = (await client.get("/openapi.json")).json()["paths"]["/v1/users/{id}/profile"]
    assert set(path["delete"]["responses"]) == {"204", "403", "422", "503"}
    assert path["get"]["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("ProfileAnswer")
    assert path["parameters"][0]["name"] == "id"


def test_the_gateway_loads_no_redis_and_no_polars_for_a_file():
    code = (
        "import sys, json, workloads.gateway.__main__;"
        "print(json.dumps([name in sys.modules for name in ('redis', 'polars', 'torch')]))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert json.loads(said.stdout) == [False, False, False]


def test_touches_are_read_newest_first_and_cut(bundle: Bundle):
    touches = [Touch(f"item-{n:05d}", EventType.CLICK, 1, 0, CREATED_MS - DAY_MS + n) for n in range(1, 100)]
    tables = ItemTables.of(bundle.tables)
    state = UserState.of(touches, (), CREATED_MS, bundle.index)
    answer = profile_answer("r", touches, state, CREATED_MS, Catalogue(bundle, tables))
    assert (len(answer.interests), answer.interests[0], answer.touches) == (INTERESTS_MAX, "item-00099", 99)
