"""An answer is right only when all of it is."""

import msgspec

from loadtests.answers import read_events, read_items
from workloads.contract.http import EventsAnswer, ItemsAnswer, Problem, RankedItem, Served

SERVED = Served(rung=1, site="onprem", bundle="0" * 12, stages_ms={"rank": 4.0}, ranked=200)


def body(*items: str) -> bytes:
    ranked = [RankedItem(item=i, score=1.0, source="ann") for i in items]
    return msgspec.json.encode(ItemsAnswer(request_id="r", items=ranked, served=SERVED))


def test_k_different_items_are_right():
    reading = read_items(200, body("a", "b"), k=2)
    assert reading.error is None
    assert reading.served == SERVED


def test_too_few_and_too_many_items_are_wrong():
    assert read_items(200, body("a"), k=2).error == "1 items instead of 2"
    assert read_items(200, body("a", "b", "c"), k=2).error == "3 items instead of 2"


def test_the_same_item_twice_is_wrong():
    assert read_items(200, body("a", "a"), k=2).error == "an item was answered twice"


def test_an_answer_of_another_shape_is_wrong_and_says_where():
    assert "$.items" in (read_items(200, b'{"request_id": "r", "items": 3}', k=2).error or "")
    assert "not an ItemsAnswer" in (read_items(200, b"<html>", k=2).error or "")
    assert len(read_items(200, b'{"items": ["%s"]}' % (b"x" * 1000), k=2).error or "") <= 160


def test_a_problem_is_told_by_its_title():
    problem = msgspec.json.encode(Problem(type="about:blank", title="Busy", status=503, detail="shed"))
    assert read_items(503, problem, k=2).error == "http 503: Busy"
    assert read_items(502, b"bad gateway", k=2).error == "http 502"
    assert read_events(503, problem, sent=1).error == "http 503: Busy"


def test_events_are_acknowledged_only_when_all_of_them_are_new_and_on_disk():
    assert read_events(200, msgspec.json.encode(EventsAnswer(accepted=3, duplicates=0)), sent=3).error is None
    assert read_events(200, msgspec.json.encode(EventsAnswer(accepted=2, duplicates=0)), sent=3).error is not None
    assert read_events(200, msgspec.json.encode(EventsAnswer(accepted=2, duplicates=1)), sent=3).error is not None
    assert "not an EventsAnswer" in (read_events(200, b"{}", sent=3).error or "")
