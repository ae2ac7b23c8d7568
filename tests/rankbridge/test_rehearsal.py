"""A rehearsal interrupted anywhere goes on from there; with hands that do nothing but note what they were asked."""

from __future__ import annotations

import contextlib
import io
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from loadtests.budgets import small
from loadtests.gate import Breach, LoadResult, judge
from loadtests.samples import Run, RunHeader
from rankbridge import asked
from rankbridge.asked import DataSource, Request, reproduce
from rankbridge.cloud import Cloud
from rankbridge.faults import DeskError
from rankbridge.interrupts import Interrupted
from rankbridge.layout import Layout
from rankbridge.rehearsal import Hands, Loaded, Rehearsal, durability
from rankbridge.verdict import Durability, LakeFacts, ProcessMemory
from workloads.bundle.fake import build_fake_bundle
from workloads.contract.sites import HOME
from workloads.telemetry.progress import ResultLine


def judged(*, passed: bool) -> LoadResult:
    header = RunHeader(suite="mix", started_ms=0, warmup_s=0, arrivals="poisson", rate_per_user=1, seed=1, targets=[])
    result = judge(Run(header=header, samples=[], seconds=1), small(1))
    breaches = [] if passed else [Breach(what="p99", sentence="/v1/recommend: p99 is late.")]
    return msgspec.structs.replace(result, passed=passed, breaches=breaches)


HOME_JOBS = ["data", "lake", "replication"]


class FakeHands:
    """Notes each call; raises what it was told to at a step."""

    def __init__(self, home: Path, at: dict[str, BaseException] | None = None, *, passed: bool = True) -> None:
        self.calls: list[str] = []
        self.arguments: dict[str, list[str]] = {}
        self._home = home
        self._at = at if at is not None else {}
        self._passed = passed
        self.served_after_s = 4.5

    def check(self, request: Request) -> None:
        self._call("check")

    def job(self, module: str, arguments: Sequence[str], log: Path, *, append: bool) -> ResultLine:
        name = module.removeprefix("workloads.")
        self.arguments[name] = [*arguments, f"append={append}"]
        self._call(name)
        made = self._home / name
        match name:
            case "data":
                made.mkdir(exist_ok=True)
                return ResultLine(made={"dataset": str(made)})
            case "lake":
                return ResultLine(made={})
            case "replication":
                return ResultLine(made={"replica": "simulator-0123"}, figures={"bytes": 5e6, "parts": 2, "events": 9})
            case "training":
                made.mkdir(exist_ok=True)
                return ResultLine(made={"training": str(made), "dataset": str(self._home / "data")})
            case _:
                return ResultLine(made={"bundle": str(build_fake_bundle(self._home / "bundles"))})

    @contextlib.contextmanager
    def cloud(self, request: Request) -> Iterator[Cloud]:
        yield Cloud("the-data", "the-models", {})

    def load(self, request: Request, bundle: Path, folder: Path, cloud: Cloud) -> Loaded:
        self._call("load")
        return Loaded(
            load=judged(passed=self._passed),
            memory=[ProcessMemory(site="onprem", role="gateway", pss_mb=60)],
            durability=Durability(acknowledged=3, found=3),
            served_after_s={"onprem": 4.0, "aws": self.served_after_s},
            new_item_after_s={"onprem": 5.0, "aws": 6.0},
            lake=LakeFacts(events=3),
        )

    def newest_bundle(self) -> Path:
        self._call("newest")
        return build_fake_bundle(self._home / "bundles")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self._at:
            raise self._at.pop(name)


Run1 = Callable[..., bool]


@pytest.fixture
def rehearse(layout: Layout, tmp_path: Path) -> Callable[[FakeHands], bool]:
    layout.home.mkdir()

    def run(hands: Hands, **changes: object) -> bool:
        request = Request(data=DataSource("simulator", None), out=tmp_path / "out", **changes)  # type: ignore[arg-type]  # a test's shorthand
        return Rehearsal(layout, request, console=Console(file=io.StringIO()), hands=hands).run()

    return run


def test_a_rehearsal_does_every_step_once_and_writes_verdict_and_report(rehearse: Run1, layout: Layout, tmp_path: Path):
    hands = FakeHands(layout.home)
    rehearse(hands)
    assert hands.calls == ["check", "data", "lake", "replication", "training", "export", "load"]
    found = msgspec.json.decode((tmp_path / "out" / "verdict.json").read_bytes())
    assert isinstance(found["passed"], bool)
    assert isinstance(found["breaches"], list)
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000


@pytest.mark.parametrize(
    ("step", "first", "second"),
    [
        ("data", [], [*HOME_JOBS, "training", "export", "load"]),
        # These jobs run again each time: they find their own earlier results, unless another data set or an empty
        # cloud took their place.
        ("replication", ["data", "lake"], [*HOME_JOBS, "training", "export", "load"]),
        ("training", HOME_JOBS, [*HOME_JOBS, "training", "export", "load"]),
        ("export", [*HOME_JOBS, "training"], [*HOME_JOBS, "export", "load"]),
        ("load", [*HOME_JOBS, "training", "export"], [*HOME_JOBS, "load"]),
    ],
)
def test_the_next_run_goes_on_from_the_step_that_was_interrupted(
    rehearse: Run1, layout: Layout, step: str, first: list[str], second: list[str]
):
    hands = FakeHands(layout.home, at={step: Interrupted(signal.SIGINT)})
    with pytest.raises(Interrupted):
        rehearse(hands)
    assert hands.calls == ["check", *first, step]
    again = FakeHands(layout.home)
    rehearse(again)
    assert again.calls == ["check", *second]


def test_an_interrupted_training_goes_on_from_its_checkpoint_and_not_from_scratch(rehearse: Run1, layout: Layout):
    hands = FakeHands(layout.home, at={"training": Interrupted(signal.SIGTERM)})
    with pytest.raises(Interrupted):
        rehearse(hands)
    assert "--reuse" not in hands.arguments["training"]
    assert "--again" in hands.arguments["data"]
    again = FakeHands(layout.home)
    rehearse(again)
    assert "--reuse" in again.arguments["training"]
    assert "append=True" in again.arguments["training"]
    assert "--again" not in again.arguments["data"]


def test_a_continued_step_says_so_and_counts_the_time_before(rehearse: Run1, layout: Layout, tmp_path: Path):
    class Slow(FakeHands):
        def job(self, module: str, arguments: Sequence[str], log: Path, *, append: bool) -> ResultLine:
            if module == "workloads.training":
                time.sleep(0.3)
            return super().job(module, arguments, log, append=append)

    with pytest.raises(Interrupted):
        rehearse(Slow(layout.home, at={"training": Interrupted(signal.SIGINT)}))
    rehearse(FakeHands(layout.home))
    steps = {
        step["name"]: step for step in msgspec.json.decode((tmp_path / "out" / "verdict.json").read_bytes())["steps"]
    }
    assert steps["train"]["seconds"] >= 0.3
    assert steps["train"]["note"] == "continued after an interruption"
    assert steps["export"]["note"] == ""


def test_after_a_finished_rehearsal_everything_is_done_again(rehearse: Run1, layout: Layout):
    rehearse(FakeHands(layout.home))
    again = FakeHands(layout.home)
    rehearse(again)
    assert again.calls == ["check", *HOME_JOBS, "training", "export", "load"]
    assert "--again" in again.arguments["data"]


def test_a_rehearsal_that_asks_for_something_else_starts_anew(rehearse: Run1, layout: Layout):
    with pytest.raises(Interrupted):
        rehearse(FakeHands(layout.home, at={"training": Interrupted(signal.SIGINT)}))
    other = FakeHands(layout.home)
    rehearse(other, users=77)
    assert other.calls[1] == "data"


def test_a_step_whose_result_has_gone_is_done_again(rehearse: Run1, layout: Layout):
    with pytest.raises(Interrupted):
        rehearse(FakeHands(layout.home, at={"export": Interrupted(signal.SIGINT)}))
    (layout.home / "training").rmdir()
    again = FakeHands(layout.home)
    rehearse(again)
    assert again.calls == ["check", *HOME_JOBS, "training", "export", "load"]


def test_a_ledger_cut_short_by_a_crash_starts_a_new_one(rehearse: Run1, layout: Layout):
    with pytest.raises(Interrupted):
        rehearse(FakeHands(layout.home, at={"training": Interrupted(signal.SIGINT)}))
    (ledger,) = layout.work.glob("rehearsal-*.json")
    ledger.write_text("{")
    again = FakeHands(layout.home)
    rehearse(again)
    assert again.calls[1] == "data"


def test_a_breach_of_load_fails_the_rehearsal(rehearse: Run1, layout: Layout, tmp_path: Path):
    assert rehearse(FakeHands(layout.home, passed=False)) is False
    found = msgspec.json.decode((tmp_path / "out" / "verdict.json").read_bytes())
    assert not found["passed"]
    assert any(breach["what"] == "p99" for breach in found["breaches"])


def test_the_newest_bundle_can_be_served_without_training(rehearse: Run1, layout: Layout):
    hands = FakeHands(layout.home)
    rehearse(hands, reuse_bundle=True)
    assert "data" not in hands.calls
    assert "load" in hands.calls


def test_a_refused_check_does_no_work(rehearse: Run1, layout: Layout):
    hands = FakeHands(layout.home, at={"check": DeskError("port 8080 is taken", "end it")})
    with pytest.raises(DeskError):
        rehearse(hands)
    assert hands.calls == ["check"]
    assert not list(layout.work.glob("rehearsal-*")) if layout.work.exists() else True


def test_two_rehearsals_do_not_run_at_once(rehearse: Run1, layout: Layout):
    class Nested(FakeHands):
        def load(self, request: Request, bundle: Path, folder: Path, cloud: Cloud) -> Loaded:
            rehearse(FakeHands(layout.home))
            return super().load(request, bundle, folder, cloud)

    with pytest.raises(DeskError, match="another rehearsal is running"):
        rehearse(Nested(layout.home))


def test_a_lost_event_is_counted(tmp_path: Path):
    acknowledged, store = tmp_path / "acknowledged.txt", tmp_path / "events.sqlite"
    ids = [f"id-{number}" for number in range(1200)]
    acknowledged.write_text("\n".join(ids))
    events = sqlite3.connect(store)
    events.execute("CREATE TABLE events (event_id TEXT NOT NULL UNIQUE)")
    events.executemany("INSERT INTO events VALUES (?)", [(one,) for one in ids[1:]])
    events.commit()
    events.close()
    found = durability(acknowledged, store)
    assert (found.acknowledged, found.found, found.lost) == (1200, 1199, 1)
    assert durability(acknowledged, tmp_path / "none.sqlite").lost == 1200


def test_the_command_that_reproduces_a_run_names_no_folder_of_this_machine(tmp_path: Path):
    request = Request(
        data=DataSource.parse(f"online-retail={tmp_path}/online_retail.csv.gz"),
        out=tmp_path,
        load_seconds=20.0,
        injections=("ranker-delay=80ms",),
    )
    (line,) = reproduce(request)
    assert line == (
        'make rehearse DATA=online-retail=online_retail.csv.gz ARGS="--load-seconds 20 --inject ranker-delay=80ms"'
    )


def test_data_is_named_by_kind_and_path():
    assert DataSource.parse("simulator") == DataSource("simulator", None)
    assert DataSource.parse("events=/a=b.csv") == DataSource("events", Path("/a=b.csv"))
    for wrong in ("retail=/a.csv", "events", "events=", "simulator=/a.csv", ""):
        with pytest.raises(DeskError):
            DataSource.parse(wrong)


def test_a_data_file_that_changed_is_another_rehearsal(tmp_path: Path):
    file = tmp_path / "log.csv"
    file.write_text("a\n")
    request = Request(data=DataSource("events", file), out=tmp_path)
    before = request.digest()
    file.write_text("a\nb\n")
    assert request.digest() != before


def test_what_is_missing_names_the_command_that_makes_it(layout: Layout):
    with pytest.raises(DeskError, match="there is no prepared data set") as error:
        asked.newest_dataset(layout)
    assert "rankbridge data" in error.value.remedy
    with pytest.raises(DeskError, match="nothing has been trained"):
        asked.newest_training(layout)


def test_training_gets_the_name_of_the_replica_and_no_path_of_home(rehearse: Run1, layout: Layout):
    hands = FakeHands(layout.home)
    rehearse(hands)
    told = hands.arguments["training"]
    assert told[told.index("--replica") + 1] == "simulator-0123"
    assert told[told.index("--data-bucket") + 1] == "the-data"
    assert "--confine" in told
    assert not [word for word in told if str(layout.site(HOME.name)) in word]
    assert "--confine" in hands.arguments["export"]


def test_a_site_that_is_slow_to_serve_what_was_published_breaches(rehearse: Run1, layout: Layout, tmp_path: Path):
    hands = FakeHands(layout.home)
    hands.served_after_s = 31.0
    assert not rehearse(hands)
    breaches = msgspec.json.decode((tmp_path / "out" / "verdict.json").read_bytes())["breaches"]
    assert any("aws had not served the bundle 30 s after" in breach["sentence"] for breach in breaches)
