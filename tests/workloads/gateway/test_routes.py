"""Which routes a gateway has and what they cost, and that a scrape tells of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from workloads.bundle.store import Bundle
from workloads.contract.editions import Edition
from workloads.contract.sites import PRICE_OF_THE_WAY, PRICE_PER_1000, SiteKind
from workloads.gateway.router import Outcome, Route, Router
from workloads.gateway.routes import Peer, open_rankers, peer_of, price_of, route_facts, tell
from workloads.gateway.timing import FakeClock
from workloads.telemetry.metrics import new_registry, render

PEER = Peer("aws", "http://127.0.20.1:8080")


def test_a_site_without_a_neighbour_has_its_triton_and_its_student():
    assert [facts.route for facts in route_facts("onprem", SiteKind.HOME, None, {})] == [("onprem", 1), ("onprem", 2)]


@pytest.mark.parametrize(("site", "kind"), [("onprem", SiteKind.HOME), ("aws", SiteKind.CLOUD)])
def test_a_sites_own_ranker_is_cheaper_to_it_than_the_way_to_another(site: str, kind: SiteKind):
    other = "aws" if site == "onprem" else "onprem"
    prices = {facts.route: facts.price for facts in route_facts(site, kind, Peer(other, "http://127.0.0.1:1"), {})}
    assert prices[Route(site, 1)] == PRICE_PER_1000[kind]
    assert prices[Route(other, 1)] > PRICE_OF_THE_WAY > prices[Route(site, 1)]


def test_an_operators_prices_go_before_ours():
    prices = {
        facts.route: facts.price for facts in route_facts("onprem", SiteKind.HOME, PEER, {"aws": 0.5, "onprem": 2})
    }
    assert (prices[Route("aws", 1)], prices[Route("onprem", 1)]) == (0.5, 2)


def test_a_peer_and_a_price_are_read_from_a_command_line():
    assert peer_of("aws=http://127.0.20.1:8080") == PEER
    assert price_of("aws=0.3") == ("aws", 0.3)


@pytest.mark.parametrize("text", ["", "aws", "aws=", "=http://127.0.0.1:1", "AWS=http://127.0.0.1:1", "aws=127.0.0.1"])
def test_what_is_no_peer_is_refused(text: str):
    with pytest.raises(ValueError, match=r"address|name of a site"):
        peer_of(text)


@pytest.mark.parametrize("text", ["", "aws", "aws=", "aws=dear", "aws=-1", "aws=nan", "aws=inf", "=1"])
def test_what_is_no_price_is_refused(text: str):
    with pytest.raises(ValueError, match=r"price|float|name of a site"):
        price_of(text)


def test_every_route_has_a_door_of_the_edition(bundle: Bundle):
    doors = open_rankers("onprem", "127.0.0.1:8000", PEER, bundle, Edition(bundle=bundle.id))
    assert set(doors) == {facts.route for facts in route_facts("onprem", SiteKind.HOME, PEER, {})}


def test_a_bundle_whose_student_cannot_be_opened_is_not_served(bundle: Bundle, tmp_path: Path):
    broken = tmp_path / "student.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(ValueError, match="student"):
        open_rankers("onprem", "127.0.0.1:8000", None, _at(bundle, tmp_path), Edition(bundle=bundle.id))


def _at(bundle: Bundle, path: Path) -> Bundle:
    return Bundle(path, bundle.id, bundle.manifest, bundle.features, bundle.tables, bundle.item_ids, bundle.index)


def test_a_scrape_tells_of_every_route_and_whether_predictions_were_kept():
    clock, registry = FakeClock(0), new_registry()
    router = Router(route_facts("onprem", SiteKind.HOME, PEER, {}), random=lambda: 0.5)
    tell(router, clock, registry)
    choice = router.choose(200, 50.0, clock.now_s())
    assert choice is not None
    ticket = router.began(choice, clock.now_s())
    text = render(registry)[0].decode()
    assert 'rankbridge_route_in_flight{rung="1",site="onprem"} 1.0' in text
    clock.run(0.004)
    router.ended(ticket, Outcome.ANSWERED, clock.now_s())
    text = render(registry)[0].decode()
    assert 'rankbridge_route_in_flight{rung="1",site="onprem"} 0.0' in text
    assert 'rankbridge_route_share{rung="1",site="aws"} 1.0' in text
    assert 'rankbridge_predictions_total{up_to_ms="16"} 1.0' in text
    assert 'rankbridge_predictions_kept_total{up_to_ms="16"} 1.0' in text
