"""What passes the edge, at home and in the cloud."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.contract.events import Event, EventType
from workloads.contract.http import SESSION_PATTERN
from workloads.gateway.identity import CloudEdge, HomeEdge
from workloads.gateway.problems import Refused
from workloads.privacy.pseudonym import PseudonymKey

KEY = PseudonymKey(epoch=3, secret=b"s" * 32)
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
def test_at_home_every_user_becomes_a_pseudonym_and_always_the_same(user: str):
    made = HomeEdge(KEY).user(user, "$.user")
    assert made == HomeEdge(KEY).user(user, "$.user")
    assert made.startswith("p3-")
    assert user not in made
    CloudEdge().user(made, "$.user")


@given(texts, texts)
def test_at_home_no_event_keeps_a_raw_id_anywhere(user: str, session: str):
    raw = event(user=user, session=session, context={"who": user, "visit": session, "page": "home"})
    (passed,) = HomeEdge(KEY).events([raw])
    assert user not in {passed.user, passed.session, *passed.context.values()}
    assert session not in {passed.user, passed.session, *passed.context.values()}
    assert passed.context["page"] == "home" or "home" in {user, session}
    assert (passed.event_id, passed.item, passed.type) == (raw.event_id, raw.item, raw.type)


def test_a_session_named_after_its_user_does_not_tell_them_apart():
    (passed,) = HomeEdge(KEY).events([event(user="alice", session="alice")])
    assert passed.user == passed.session == KEY.pseudonym("alice")


def test_an_event_of_nobody_passes_as_it_is():
    raw = event(context={"page": "home"})
    assert HomeEdge(KEY).events([raw]) == [raw]


def test_at_home_what_looks_like_a_pseudonym_is_mapped_as_any_other_id():
    looks = "p3-" + "0a" * 16
    assert HomeEdge(KEY).user(looks, "$.user") != looks


@pytest.mark.parametrize(
    "user",
    ["alice", "p1-" + "0a" * 15, "p1-" + "0A" * 16, "p1-" + "0a" * 16 + "\n", " p1-" + "0a" * 16, "p-" + "0a" * 16],
)
def test_in_the_cloud_only_a_pseudonym_passes(user: str):
    with pytest.raises(Refused) as caught:
        CloudEdge().user(user, "$.user")
    assert caught.value.problem.status == 422
    assert user not in str(caught.value.problem)


def test_in_the_cloud_the_event_at_fault_is_named_by_its_place():
    pseudonym = KEY.pseudonym("alice")
    with pytest.raises(Refused) as caught:
        CloudEdge().events([event(), event(user=pseudonym), event(user="alice")])
    assert caught.value.problem.field == "$.events[2].user"


@given(texts)
def test_in_the_cloud_a_raw_session_groups_its_events_and_passes_nowhere(session: str):
    edge = CloudEdge()
    one, other, alone = edge.events(
        [event(session=session), event(session=session, context={"visit": session}), event(session=session + "x")]
    )
    assert re.fullmatch(SESSION_PATTERN, one.session or "")
    assert one.session == other.session == other.context["visit"] != alone.session
    assert session not in {one.session, other.session, *other.context.values()}


def test_a_cloud_session_leads_back_to_nobody_by_guessing():
    (one,), (other,) = (CloudEdge().events([event(session="alice-1")]) for _ in range(2))
    assert one.session != other.session


@pytest.mark.parametrize("session", [KEY.session("visit"), KEY.pseudonym("alice"), None])
def test_a_session_that_home_has_mapped_passes_the_cloud_as_it_is(session: str | None):
    raw = event(session=session, context={"visit": session or "none"})
    assert CloudEdge().events([raw]) == [raw]
