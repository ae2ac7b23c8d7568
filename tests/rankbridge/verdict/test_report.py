"""The page says what the verdict says, all by itself."""

import html
import html.parser
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from loadtests.gate import Breach
from loadtests.ledger import Ledger
from loadtests.windows import Window
from rankbridge.drills.records import Check, Row
from rankbridge.report import render, write
from rankbridge.verdict import Verdict, read
from rankbridge.verdict import write as write_verdict

Make = Callable[..., Verdict]


class Page(html.parser.HTMLParser):
    """Text, tags and ids of a page; complains about tags that do not match."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, content: str) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(content)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style"}:
            self.text += data.replace("\u00a0", " ")


@pytest.fixture(scope="module")
def good(good_verdict: Verdict) -> str:
    return render(good_verdict)


@pytest.fixture(scope="module")
def red(red_verdict: Verdict) -> str:
    return render(red_verdict)


def test_the_page_asks_nobody_for_anything(good: str):
    page = Page(good)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
        assert all((attributes.get(name) or "#").startswith("#") for _, attributes in page.tags)
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", good)
    assert "http://" not in without_names
    assert "https://" not in without_names
    assert not re.search(r"url\((?!#)", good), "nothing but clip paths of the page itself"
    assert "@import" not in good


def test_a_passed_verdict_says_so(good: str):
    text = Page(good).text
    assert "Passed" in text
    assert "Failed" not in text
    assert re.search(r"All \d+ budgets held", text)


def test_a_failed_verdict_lists_every_breach_in_its_own_words(red: str, red_verdict: Verdict):
    text = Page(red).text
    assert "Failed" in text
    for breach in red_verdict.breaches:
        assert breach.sentence in text
    assert "the ranker" in text
    assert "ranker-delay=80ms" in text


def test_popularity_knn_and_ours_stand_in_one_table(good: str):
    tables = re.findall(r'<table class="quality">.*?</table>', good, re.DOTALL)
    assert tables
    for name in ("Popularity, all time", "Item-to-item kNN", "Ours"):
        assert name in tables[0]
    assert "item-to-item kNN is better than ours" in Page(good).text


def test_the_ladder_stands_with_what_each_step_down_costs(good: str, make_verdict: Make, good_verdict: Verdict):
    table = re.findall(r'<table class="quality">.*?</table>', good, re.DOTALL)[-1]
    words = re.sub(r"\s*<[^>]+>\s*", " ", table)
    for said in (
        "2 distilled ranker 0.0493 1.4% 0.4% 0.7768",
        "3 retrieval score 0.0510 -2.1% 0.4% 0.7011",
        "4 traditional recommender 0.0383 23.4% 0.4%",
        "All items, repeats included",
    ):
        assert said in re.sub(r" +", " ", words), said
    assert "Rung 2 may lose 5 %." in Page(good).text
    assert good_verdict.quality is not None
    without = make_verdict(quality=msgspec.structs.replace(good_verdict.quality, rungs=[]))
    assert "What a step down the ladder costs" not in render(without)


def test_every_part_of_a_verdict_is_on_the_page(good: str):
    text = Page(good).text
    for said in (
        *("/v1/recommend", "/v1/search", "/v1/events", "Where the time goes", "Over the run", "Which rung answered"),
        *("onprem tritonserver", "aws gateway", "training", "GPU of aws", "emulated", "make rehearse", "3f9c2a7be410"),
        *("duplicate event ids", "two-tower: loss", "AUC 0.7812", "Acknowledged events that are not in the store"),
    ):
        assert said in text, said


def test_drawings_are_well_formed_and_take_their_colours_from_the_page(good: str):
    drawings = re.findall(r"<svg.*?</svg>", good, re.DOTALL)
    assert len(drawings) > 10
    for drawing in drawings:
        ET.fromstring(drawing)  # noqa: S314 - our own drawing
        assert "var(--" in drawing
        assert not re.search(r"#0101[0-9a-f]{2}", drawing), "no placeholder colour is left"
    css = good[: good.index("</style>")]
    used = set(re.findall(r"var\((--[\w-]+)\)", good))
    assert used <= set(re.findall(r"(--[\w-]+):", css))
    assert "prefers-color-scheme: dark" in css


def test_no_two_drawings_share_an_id(good: str):
    ids = Page(good).ids
    assert len(ids) == len(set(ids))


def test_what_others_wrote_is_text_and_never_markup(make_verdict: Make):
    evil = "<script>alert(1)</script>"
    found = make_verdict(notes=[evil], reproduce=[evil])
    breach = Breach(what="p99", sentence=evil)
    content = render(msgspec.structs.replace(found, breaches=[breach], passed=False))
    assert "<script" not in content
    assert html.escape(evil) in content


def test_a_verdict_with_next_to_nothing_is_still_a_page(make_verdict: Make):
    bare = make_verdict(
        dataset=None,
        bundle=None,
        quality=None,
        load=None,
        memory=(),
        durability=None,
        steps=(),
        curves=(),
        reproduce=(),
    )
    text = Page(render(bare)).text
    assert "Failed" in text
    assert "No load was run" in text


def test_the_page_is_made_from_the_file_of_a_verdict_alone(tmp_path: Path, good_verdict: Verdict, good: str):
    write_verdict(good_verdict, tmp_path / "verdict.json")
    write(read(tmp_path / "verdict.json"), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == good


def test_the_same_verdict_gives_the_same_page(good_verdict: Verdict, good: str):
    assert render(good_verdict) == good


def test_the_page_is_small(good: str):
    assert len(good) < 400_000


def test_a_cut_of_the_vpn_is_drawn_with_what_was_expected_of_it(good_verdict: Verdict, good: str):
    second = Window(
        at_s=0.0, requests=50, answered=50, late=0, below_best=0, p50_ms=8.0, p99_ms=20.0, rungs={"1": 40}, ranked_at={}
    )
    cut = Row(
        id="F2",
        title="both tunnels cut",
        how="everything between the sites vanishes",
        rate=60.0,
        fault_s=2.0,
        heal_s=7.0,
        ledger=Ledger(sent=5000, ok=4998, degraded=2, rejected={}, timed_out=0, broken=0, wrong=0, stray=0),
        checks=[Check(what="nobody is refused", bound="0", measured="3 of 5,000", held=False)],
        windows=[msgspec.structs.replace(second, at_s=float(at)) for at in range(10)],
    )
    page = Page(render(good_verdict, cut))
    assert "5000 sent = 4998 ok + 2 degraded" in page.text
    assert "3 of 5,000" in page.text
    assert "is cut" not in Page(good).text
