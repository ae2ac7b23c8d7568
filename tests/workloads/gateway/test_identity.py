"""What passes the edge, at home and in the cloud."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.contract.events import CONTEXT_KEYS, Event, EventType
from workloads.contract.http import PSEUDONYM_PATTERN, SESSION_PATTERN
from workloads.gateway.identity import CloudEdge, HomeEdge
from workloads.gateway.problems import Refused
from workloads.privacy.vault import MemoryVault, VaultError

PSEUDONYM = "p3-" + "0a" * 16
texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]),  # the contract's ids: no surrogates, no control characters
    min_size=5,
    max_size=60,
)


def event(**fields: object) -> Event:
    return Event(
        event_id="01890a5d-ac96-774b-bcce-b302099a8057",
        type=EventType.VIEW,
        timestamp_ms=1_790_000_000_000,
        item="an item",
        **fields,
    )


@given(texts)
async def test_at_home_who_acts_becomes_known_and_keeps_one_pseudonym(user: str):
    vault = MemoryVault()
    edge = HomeEdge(vault)
    one, other = await edge.events([event(user=user), event(user=user)])
    assert one.user == other.user == edge.user(user, "$.user") == vault.pseudonym(user)
    assert re.fullmatch(PSEUDONYM_PATTERN, one.user or "")
    CloudEdge().user(one.user or "", "$.user")


def test_at_home_who_only_asks_stays_unknown():
    vault = MemoryVault()
    assert HomeEdge(vault).user("alice", "$.user") is None
    assert list(vault.all_users()) == []


@given(texts, texts)
async def test_at_home_no_event_keeps_a_raw_id_anywhere(user: str, session: str):
    raw = event(user=user, session=session, context={"device": user, "surface": session, "page": "home"})
    (passed,) = await HomeEdge(MemoryVault()).events([raw])
    assert user not in {passed.user, passed.session, *passed.context.values()}
    assert session not in {passed.user, passed.session, *passed.context.values()}
    assert passed.context["page"] == "home" or "home" in {user, session}
    assert (passed.event_id, passed.item, passed.type) == (raw.event_id, raw.item, raw.type)


async def test_a_session_named_after_its_user_does_not_tell_them_apart():
    vault = MemoryVault()
    (passed,) = await HomeEdge(vault).events([event(user="alice", session="alice")])
    assert passed.user == passed.session == vault.pseudonym("alice")


async def test_an_event_of_nobody_passes_as_it_is():
    raw = event(context={"page": "home"})
    assert await HomeEdge(MemoryVault()).events([raw]) == [raw]


async def test_at_home_what_looks_like_a_pseudonym_is_mapped_as_any_other_id():
    (passed,) = await HomeEdge(MemoryVault()).events([event(user=PSEUDONYM)])
    assert passed.user not in {None, PSEUDONYM}


class SlowVault(MemoryVault):
    """Commits only when it is let, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()
        self.commits: list[set[str]] = []

    def admit(self, users: Iterable[str]) -> dict[str, str]:
        wanted = set(users)
        self.commits.append(wanted)
        self.begun.set()
        assert self.go.wait(10)
        return super().admit(wanted)


async def test_new_people_of_requests_that_come_at_once_share_a_commit_beside_the_loop():
    vault = SlowVault()
    edge = HomeEdge(vault)
    first = asyncio.create_task(edge.events([event(user="first")]))
    assert await asyncio.to_thread(vault.begun.wait, 10)
    rest = [asyncio.create_task(edge.events([event(user=f"user-{number}")])) for number in range(20)]
    for _ in range(5):
        await asyncio.sleep(0)  # the loop is free while the commit waits for its disk
    assert vault.commits == [{"first"}]
    vault.go.set()
    passed = [await task for task in (first, *rest)]
    assert vault.commits == [{"first"}, {f"user-{number}" for number in range(20)}]
    assert len({events[0].user for events in passed}) == 21


async def test_a_request_that_is_given_up_takes_nobody_elses_commit_away():
    vault = SlowVault()
    edge = HomeEdge(vault)
    given_up = asyncio.create_task(edge.events([event(user="alice")]))
    assert await asyncio.to_thread(vault.begun.wait, 10)
    waits = asyncio.create_task(edge.events([event(user="alice")]))
    await asyncio.sleep(0)
    given_up.cancel()
    vault.go.set()
    assert (await waits)[0].user == vault.pseudonym("alice")


class LostVault(MemoryVault):
    """Cannot be used."""

    def pseudonym(self, user: str) -> str | None:
        raise VaultError("the disk is gone", "bring it back")

    def forget(self, user: str) -> None:
        raise VaultError("the disk is gone", "bring it back")


async def test_without_its_vault_a_home_answers_strangers_and_acknowledges_nothing():
    edge = HomeEdge(LostVault())
    assert edge.user("alice", "$.user") is None
    with pytest.raises(Refused) as caught:
        await edge.events([event(user="alice")])
    assert caught.value.problem.status == 503
    with pytest.raises(Refused) as caught:
        await edge.forget("alice")
    assert caught.value.problem.status == 503
    assert "alice" not in str(caught.value.problem)


async def test_who_is_forgotten_is_a_stranger_at_once_and_comes_back_as_somebody_else():
    vault = MemoryVault()
    edge = HomeEdge(vault)
    (before,) = await edge.events([event(user="alice")])
    assert await edge.forget("alice") == [before.user]
    assert await edge.forget("alice") == []
    assert edge.user("alice", "$.user") is None
    (after,) = await edge.events([event(user="alice")])
    assert after.user != before.user


async def test_of_a_context_only_what_the_contract_names_passes_and_the_rest_is_counted():
    given = {"page": "home", "email": "alice@example.org", "device": "alice@example.org", "name": "Alice"}
    for edge_of in (lambda count: HomeEdge(MemoryVault(), count), CloudEdge):
        dropped: list[int] = []
        (passed,) = await edge_of(dropped.append).events([event(context=given)])
        assert passed.context == {"page": "home"}
        assert dropped == [3]


async def test_every_key_of_the_contract_passes():
    context = dict.fromkeys(CONTEXT_KEYS, "a-name")
    for edge in (HomeEdge(MemoryVault()), CloudEdge()):
        assert (await edge.events([event(context=context)]))[0].context == context


@pytest.mark.parametrize(
    "user",
    ["alice", "p1-" + "0a" * 15, "p1-" + "0A" * 16, "p1-" + "0a" * 16 + "\n", " p1-" + "0a" * 16, "p-" + "0a" * 16],
)
def test_in_the_cloud_only_a_pseudonym_passes(user: str):
    with pytest.raises(Refused) as caught:
        CloudEdge().user(user, "$.user")
    assert caught.value.problem.status == 422
    assert user not in str(caught.value.problem)


async def test_in_the_cloud_the_event_at_fault_is_named_by_its_place():
    with pytest.raises(Refused) as caught:
        await CloudEdge().events([event(), event(user=PSEUDONYM), event(user="alice")])
    assert caught.value.problem.field == "$.events[2].user"


@given(texts)
async def test_in_the_cloud_a_raw_session_groups_its_events_and_passes_nowhere(session: str):
    edge = CloudEdge()
    one, other, alone = await edge.events(
        [event(session=session), event(session=session, context={"page": session}), event(session=session + "x")]
    )
    assert re.fullmatch(SESSION_PATTERN, one.session or "")
    assert one.session == other.session == other.context["page"] != alone.session
    assert session not in {one.session, other.session, *other.context.values()}


async def test_a_cloud_session_leads_back_to_nobody_by_guessing():
    (one,), (other,) = [await CloudEdge().events([event(session="alice-1")]) for _ in range(2)]
    assert one.session != other.session


@pytest.mark.parametrize("session", ["s3-" + "0b" * 16, PSEUDONYM, None])
async def test_a_session_that_home_has_mapped_passes_the_cloud_as_it_is(session: str | None):
    raw = event(session=session, context={"page": session or "none"})
    assert await CloudEdge().events([raw]) == [raw]
