"""Requests stand where people really were, and see only what came before."""

from __future__ import annotations

import numpy as np

from workloads.data.dataset import Dataset
from workloads.data.features import EVENT_TYPES
from workloads.training.journal import Journal, read
from workloads.training.requests import People, requests_of, tower_inputs

VIEW = next(code for code, kind in enumerate(EVENT_TYPES) if kind.value == "view")


def journal(*rows: tuple[int, int, int, int]) -> Journal:
    """Of (person, visit, item, time)."""
    person, visit, item, time = (np.array([row[at] for row in rows], dtype=np.int64) for at in range(4))
    none = np.full(len(rows), -1, dtype=np.int64)
    return Journal(
        person=person,
        visit=visit,
        item=item,
        kind=np.full(len(rows), VIEW, dtype=np.int64),
        time_ms=time,
        position=none,
        query=none,
        queries=[],
        people=int(person.max(initial=-1)) + 1,
    )


LOG = journal((0, 5, 3, 10), (1, 6, 4, 15), (0, 5, 2, 20), (0, 5, 3, 25), (0, 7, 9, 90))


def test_a_visit_is_one_request_at_its_start_for_all_it_held():
    made = requests_of(LOG)
    assert made.time_ms.tolist() == [10, 15, 90]
    assert made.person.tolist() == [0, 1, 0]
    assert [made.wanted(at).tolist() for at in range(3)] == [[2, 3], [4], [9]]


def test_a_request_in_the_middle_of_a_visit_asks_for_what_was_left():
    found = set()
    for seed in range(40):
        made = requests_of(LOG, rng=np.random.default_rng(seed))
        first = next(at for at in range(len(made)) if made.visit[at] == 5)
        found.add((int(made.time_ms[first]), tuple(made.wanted(first).tolist())))
    assert found == {(10, (2, 3)), (20, (2, 3)), (25, (3,))}


def test_no_visits_are_no_requests():
    assert len(requests_of(LOG.take(np.empty(0, dtype=np.int64)))) == 0


def test_taking_some_requests_keeps_their_items_with_them():
    made = requests_of(LOG).take(np.array([2, 0]))
    assert [made.wanted(at).tolist() for at in range(2)] == [[9], [2, 3]]
    assert len(requests_of(LOG).sample(2, np.random.default_rng(0))) == 2


def test_a_state_is_read_strictly_before_the_request():
    people = People(LOG.positives())
    assert people.state(0, 20).items.tolist() == [3]
    assert people.state(0, 21).items.tolist() == [3, 2]
    assert people.state(1, 15).items.tolist() == []


def test_no_request_of_a_real_log_sees_its_own_answer(dataset: Dataset):
    """Everything that a request wants and its state holds must have happened before, too."""
    _, log = read(dataset)
    wanted = log.wanted()
    requests = requests_of(wanted, rng=np.random.default_rng(0))
    people = People(log.positives())
    touched = log.positives()
    for at in range(0, len(requests), 7):
        state = people.state(int(requests.person[at]), int(requests.time_ms[at]))
        mine = (touched.person == requests.person[at]) & (touched.time_ms < requests.time_ms[at])
        assert set(state.items.tolist()) == set(touched.item[mine].tolist())


def test_tower_inputs_are_a_row_per_state_and_none_for_none():
    people = People(LOG.positives())
    inputs = tower_inputs([people.state(0, 21), people.state(1, 5)])
    assert inputs["history"][0, -2:].tolist() == [3, 2]
    assert not inputs["history"][1].any()
    assert len(tower_inputs([])["history"]) == 0
