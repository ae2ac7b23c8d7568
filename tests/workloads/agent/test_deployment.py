"""From edition to edition: what is served at every moment, who is waited for, and what is refused."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_world import World, altered, model_of, spoil_ranker

from workloads.agent import memory
from workloads.agent.crash import POINTS
from workloads.agent.keeper import RETIRE_AFTER_S
from workloads.agent.memory import Hold
from workloads.agent.neighbours import Silence
from workloads.agent.refusal import Hindrance, Refusal
from workloads.agent.releases import Wanted
from workloads.bundle import manifest as m
from workloads.bundle.delta import write_delta
from workloads.bundle.site import read_editions
from workloads.bundle.store import open_bundle
from workloads.contract.editions import Edition
from workloads.contract.sites import SiteClass
from workloads.contract.tensors import ITEM_TABLES, NEIGHBOURS, VECTOR_DIM


async def _served(world: World, bundle: Path) -> None:
    world.releases.promote(bundle.name)
    await world.run()
    assert world.serves == bundle.name


async def test_a_site_without_anything_says_so_and_takes_the_first_release(world: World, made: Path) -> None:
    await world.run()
    assert world.deployment.missing() == {"edition": "nothing was brought here yet"}
    await _served(world, made)
    assert world.deployment.missing() == world.keeper.missing == {}
    assert world.triton.ready == [model_of(made)]


async def test_a_flip_goes_from_one_edition_to_the_other_and_keeps_the_first_on_disk(
    world: World, made: Path, other: Path
) -> None:
    await _served(world, made)
    await _served(world, other)
    assert [edition.bundle for edition in world.served] == [made.name, other.name]
    assert world.triton.ready == [model_of(other)]
    editions = read_editions(world.site.editions)
    assert editions is not None
    assert (editions.load, editions.previous) == ([Edition(bundle=other.name)], Edition(bundle=made.name))
    assert (editions.channel, editions.sequence) == ("stable", 2)
    assert {path.name for path in world.site.bundles.iterdir()} == {made.name, other.name}


async def test_only_the_current_and_the_previous_bundle_stay_on_disk(
    world: World, made: Path, other: Path, third: Path
) -> None:
    for bundle in (made, other, third):
        await _served(world, bundle)
    assert {path.name for path in world.site.bundles.iterdir()} == {other.name, third.name}
    assert {path.name for path in world.site.triton.iterdir()} == {model_of(other), model_of(third)}


async def test_gateways_turn_only_when_retrieval_holds_the_new_edition(world: World, made: Path, other: Path) -> None:
    await _served(world, made)
    for silence in Silence:
        world.neighbours.retrieval_silence = silence
        world.releases.promote(other.name)
        await world.run()
        assert world.serves == made.name
        assert "retrieval to hold" in str(world.deployment.detail()["waits_for"])
    world.neighbours.retrieval_silence = None
    await world.run()
    assert world.serves == other.name


@pytest.mark.parametrize("hanging", ["draining", "mute"])
async def test_the_old_model_stays_until_every_gateway_is_done_with_it(
    world: World, made: Path, other: Path, hanging: str
) -> None:
    await _served(world, made)
    world.releases.promote(other.name)
    if hanging == "draining":
        world.neighbours.draining = 3
    else:
        world.neighbours.gateway_silence = Silence.MUTE
    await world.run()
    assert set(world.triton.ready) == {model_of(made), model_of(other)}
    assert Edition(bundle=made.name) in world.neighbours.holds
    world.neighbours.draining, world.neighbours.gateway_silence = 0, None
    await world.run()
    assert world.triton.ready == [model_of(other)]


async def test_a_gateway_that_does_not_run_is_not_waited_for(world: World, made: Path, other: Path) -> None:
    await _served(world, made)
    world.neighbours.gateway_silence = Silence.ABSENT
    world.releases.promote(other.name)
    await world.run()
    assert world.triton.ready == [model_of(other)]


async def test_the_same_release_again_moves_nothing(world: World, made: Path) -> None:
    await _served(world, made)
    calls = len(world.triton.calls)
    world.releases.promote(made.name)
    await world.run()
    assert len(world.triton.calls) == calls


async def test_a_cloud_that_is_gone_changes_nothing(world: World, made: Path) -> None:
    await _served(world, made)
    world.releases.fault = Hindrance("no route to the cloud")
    world.start()
    await world.run()
    assert (world.serves, world.deployment.missing(), world.keeper.missing) == (made.name, {}, {})


async def test_what_hinders_a_fetch_is_tried_again_with_growing_patience_and_then_done(
    world: World, made: Path, other: Path
) -> None:
    await _served(world, made)
    world.releases.promote(other.name)
    world.deployment.offer(world.releases.wanted())
    world.releases.fault = Hindrance("the disk is full")
    before = world.releases.fetches
    for _ in range(120):
        await world.turn()
        world.clock.now += 0.5
    assert world.releases.fetches - before <= 7
    assert world.serves == made.name
    assert world.deployment.detail()["hindered_by"] == "the disk is full"
    world.releases.fault = None
    world.clock.now += 60
    await world.run()
    assert world.serves == other.name


async def test_an_older_pointer_than_one_seen_before_moves_nobody_also_after_a_restart(
    world: World, made: Path, other: Path
) -> None:
    await _served(world, made)
    old = world.releases.wanted()
    await _served(world, other)
    world.start()
    world.releases.pointer = old
    await world.run()
    assert world.serves == other.name
    assert world.counted('rankbridge_agent_refusals_total{reason="old_pointer"}') == 1


@pytest.mark.parametrize("left", [None, b"", b'{"channel":"stable","sequence":1}'])
async def test_an_older_pointer_moves_nobody_where_the_note_of_the_newest_was_lost(
    world: World, made: Path, other: Path, left: bytes | None
) -> None:
    await _served(world, made)
    old = world.releases.wanted()
    await _served(world, other)
    note = world.root / memory.CHANNEL_FILE
    note.unlink()
    if left is not None:
        note.write_bytes(left)
    world.start()
    world.releases.pointer = old
    await world.run()
    assert world.serves == other.name


async def test_an_agent_that_was_given_a_bundle_is_ready_when_that_is_served_and_not_while_another_is(
    world: World, made: Path, other: Path
) -> None:
    await _served(world, made)
    world.releases.channel = None  # as `--bundle DIR`
    world.releases.pointer = Wanted(other.name)
    world.start()
    world.neighbours.draining = 1
    await world.run()
    missing = world.deployment.missing()["edition"]
    assert missing.startswith(f"{other.name[:12]}+0 is not served alone yet")
    assert "to finish 1 requests" in missing
    world.neighbours.draining = 0
    await world.run()
    assert world.deployment.missing() == {}
    # By hand goes before.
    _hold(world, made, 0)
    await world.run()
    assert (world.serves, world.deployment.missing()) == (made.name, {})


async def test_a_bundle_that_was_given_and_refused_is_missing_with_the_reason(
    make_world: Callable[..., World], made: Path, tmp_path: Path
) -> None:
    bad = altered(made, tmp_path / "bad", _nan)
    world = make_world(made, bad)
    await _served(world, made)
    world.releases.channel = None
    world.releases.pointer = Wanted(bad.name)
    world.start()
    await world.run(40)
    assert world.serves == made.name
    assert "nonsense" in world.deployment.missing()["edition"]


async def test_an_edition_that_went_from_the_disk_goes_from_the_file_too(world: World, made: Path, other: Path) -> None:
    await _served(world, made)
    world.neighbours.draining = 1
    world.releases.promote(other.name)
    await world.run()
    before = read_editions(world.site.editions)
    assert before is not None
    assert [edition.bundle for edition in before.load] == [made.name, other.name]
    shutil.rmtree(world.site.bundle(made.name))
    world.start()
    after = read_editions(world.site.editions)
    assert after is not None
    assert (after.load, after.serve) == ([Edition(bundle=other.name)], Edition(bundle=other.name))
    assert after.revision > before.revision
    assert (after.channel, after.sequence) == ("stable", 2)


async def test_a_previous_edition_that_went_from_the_disk_is_not_promised(
    world: World, made: Path, other: Path
) -> None:
    await _served(world, made)
    await _served(world, other)
    shutil.rmtree(world.site.bundle(made.name))
    world.start()
    assert world.deployment.detail()["previous"] is None


async def test_a_fault_that_nobody_thought_of_is_tried_with_patience_and_said(
    world: World, made: Path, other: Path
) -> None:
    await _served(world, made)
    world.releases.fault = RuntimeError("what is this")
    world.deployment.offer(Wanted(other.name, channel="stable", sequence=2))
    fetches = world.releases.fetches
    await world.run()
    assert 0 < world.releases.fetches - fetches < 6
    assert "what is this" in str(world.deployment.detail()["hindered_by"])
    assert world.serves == made.name


async def test_what_killed_agents_left_half_done_goes(world: World, made: Path, other: Path, tmp_path: Path) -> None:
    _offer(world, made, _delta(tmp_path / "deltas", made))
    await world.run()
    leftovers = [
        world.site.triton / ".incoming-0123abcd",
        world.site.deltas / made.name / ".doomed-2-x",
        world.site.bundles / f"{'e' * 64}.sig",
        world.site.deltas / made.name / f"2-{'e' * 64}.sig",
    ]
    for path in leftovers:
        path.write_bytes(b"") if path.suffix == ".sig" else path.mkdir()
    kept = world.site.bundles / f"{made.name}.sig"
    kept.write_bytes(b"")
    await _served(world, other)
    assert [path for path in leftovers if path.exists()] == []
    assert kept.exists()


# what is refused


def _nan(source: Path) -> None:
    spoil_ranker(source, float("nan"))


BAD: dict[str, tuple[Callable[[Path], None] | None, str]] = {
    "NaN weights": (_nan, "nonsense"),
    "other weights": (functools.partial(spoil_ranker, value=0.3), "parity"),
    "for other hardware": (None, "site_class"),
}


@pytest.mark.parametrize("fault", BAD)
async def test_a_bad_release_is_refused_once_and_the_old_one_serves_on(
    make_world: Callable[..., World], made: Path, tmp_path: Path, fault: str
) -> None:
    change, reason = BAD[fault]
    requires = m.Requires(site_classes=[SiteClass.GPU]) if change is None else None
    bad = altered(made, tmp_path / "bad", change or (lambda _: None), requires)
    world = make_world(made, bad)
    await _served(world, made)
    world.releases.promote(bad.name)
    await world.run(40)
    assert world.serves == made.name
    assert world.triton.ready == [model_of(made)]
    assert world.counted(f'rankbridge_agent_refusals_total{{reason="{reason}"}}') == 1
    assert world.releases.fetches == 2
    assert world.deployment.detail()["refused"]
    assert world.deployment.missing() == {}
    assert {path.name for path in world.site.bundles.iterdir()} == {made.name}
    # What was refused is forgotten when the channel says something else.
    world.releases.promote(made.name)
    await world.run()
    assert world.deployment.detail()["refused"] == {}


async def test_a_bundle_that_needs_a_later_onnx_runtime_is_refused_before_anything_is_loaded(
    make_world: Callable[..., World], made: Path, tmp_path: Path
) -> None:
    later = altered(made, tmp_path, requires=m.Requires(onnxruntime="99.1"))
    world = make_world(made, later)
    await _served(world, made)
    calls = list(world.triton.calls)
    world.releases.promote(later.name)
    await world.run()
    assert world.serves == made.name
    assert world.triton.calls == calls
    refused = str(world.deployment.detail()["refused"])
    assert "onnxruntime: manifest.json: it needs ONNX Runtime 99.1 or later" in refused


@pytest.mark.parametrize("damage", ["truncated", "altered", "added"])
async def test_a_damaged_bundle_is_refused_with_its_file_and_nothing_of_it_is_loaded(
    make_world: Callable[..., World], made: Path, other: Path, tmp_path: Path, damage: str
) -> None:
    import shutil  # noqa: PLC0415 - only here

    bad = Path(shutil.copytree(other, tmp_path / "bad" / other.name))
    file = bad / ("extra.json" if damage == "added" else "ranker.onnx")
    data = b"{}" if damage == "added" else file.read_bytes()
    file.write_bytes(
        data[:-5] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]) if data != b"{}" else data
    )
    world = make_world(made, bad)
    await _served(world, made)
    world.releases.promote(bad.name)
    await world.run()
    assert world.serves == made.name
    assert model_of(bad) not in {model for _, model in world.triton.calls}
    (why,) = dict(world.deployment.detail()["refused"]).values()  # type: ignore[call-overload]  # a dict by name
    assert file.name in why


async def test_a_signature_that_is_not_trusted_is_refused_by_name(world: World, made: Path, other: Path) -> None:
    await _served(world, made)
    world.releases.promote(other.name)
    world.deployment.offer(world.releases.wanted())
    world.releases.fault = Refusal("signature", "is signed by the key deadbeef")
    await world.run()
    assert world.serves == made.name
    assert world.counted('rankbridge_agent_refusals_total{reason="signature"}') == 1


async def test_a_model_that_triton_cannot_load_is_refused_in_its_own_words(
    world: World, made: Path, other: Path
) -> None:
    await _served(world, made)
    world.triton.models.discard(model_of(other))
    world.releases.promote(other.name)
    await world.run()
    assert world.serves == made.name
    assert "failed to load" in str(world.deployment.detail()["refused"])


async def test_a_triton_that_is_away_refuses_nobody(world: World, made: Path, other: Path) -> None:
    await _served(world, made)
    world.triton.live = False
    world.releases.promote(other.name)
    for _ in range(5):
        world.deployment.offer(world.releases.wanted())
        await world.deployment.step()
        world.clock.now += 0.5
    assert world.deployment.detail()["refused"] == {}
    world.triton.live = True
    world.clock.now += 60
    await world.run()
    assert world.serves == other.name


async def test_a_slow_model_is_refused_with_its_time_and_the_budget(
    world: World, made: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _served(world, made)
    monkeypatch.setattr("workloads.agent.probing.LATENCY_BUDGET_MS", -1.0)
    monkeypatch.setattr("workloads.agent.probing.BETWEEN_ROUNDS_S", 0.0)
    world.releases.promote(other.name)
    await world.run()
    assert world.serves == made.name
    assert "the budget is -1 ms" in str(world.deployment.detail()["refused"])


async def test_an_edition_that_retrieval_cannot_open_is_taken_back(world: World, made: Path, other: Path) -> None:
    await _served(world, made)
    world.neighbours.retrieval_fault = (Edition(bundle=other.name), "ann.faiss cannot be read")
    world.releases.promote(other.name)
    await world.run()
    editions = read_editions(world.site.editions)
    assert editions is not None
    assert (world.serves, editions.load) == (made.name, [Edition(bundle=made.name)])
    assert "ann.faiss cannot be read" in str(world.deployment.detail()["refused"])
    assert world.triton.ready == [model_of(made)]


async def test_an_edition_that_one_gateway_cannot_open_is_taken_back_at_all_of_them(
    make_world: Callable[..., World], made: Path, other: Path, third: Path
) -> None:
    world = make_world(made, other, third, gateways=2)
    await _served(world, third)
    await _served(world, made)
    world.neighbours.gateway_fault = (Edition(bundle=other.name), "out of memory")
    world.releases.promote(other.name)
    await world.run()
    assert world.neighbours.serves == [Edition(bundle=made.name)] * 2
    editions = read_editions(world.site.editions)
    assert editions is not None
    assert editions.previous == Edition(bundle=third.name)  # as before: nothing was flipped
    assert world.counted('rankbridge_agent_refusals_total{reason="gateway"}') == 1


# deltas


def _delta(folder: Path, bundle: Path, *before: Path, item: str = "new") -> Path:
    """A delta with one item, on a bundle and the deltas before it."""
    axes = {"N+1": 1, "VECTOR_DIM": VECTOR_DIM, "NEIGHBOURS": NEIGHBOURS}
    tables = {name: np.zeros([axes[axis] for axis in shape], dtype) for name, (dtype, shape) in ITEM_TABLES.items()}
    catalogue: dict[str, list[Any]] = {
        "item": [f"{item}-{len(before) + 1}"],
        "title": ["A new lantern"],
        "description": ["It came today."],
        "category": ["Lighting"],
        "price": [9.5],
        "image": [[]],
        "first_seen_ms": [1_790_000_000_000],
        "in_stock": [True],
    }
    return write_delta(folder, open_bundle(bundle, before).next_delta(1_790_000_000_000), catalogue, tables)


def _id(delta: Path) -> str:
    return delta.name.partition("-")[2]


def _offer(world: World, bundle: Path, *deltas: Path) -> None:
    world.releases.deltas |= {_id(delta): delta for delta in deltas}
    world.releases.promote(bundle.name, *map(_id, deltas))


async def test_a_delta_is_flipped_to_without_touching_triton_and_can_be_gone_back_from(
    world: World, made: Path, tmp_path: Path
) -> None:
    await _served(world, made)
    calls = list(world.triton.calls)
    delta = _delta(tmp_path / "deltas", made)
    _offer(world, made, delta)
    await world.run()
    assert world.neighbours.serves == [Edition(bundle=made.name, delta=1)]
    assert world.triton.calls == calls
    _hold(world, made, 2)
    await world.run()
    assert world.neighbours.serves == [Edition(bundle=made.name)]
    assert world.site.installed_deltas(made.name) == {1: _id(delta)}


async def test_a_delta_that_does_not_stand_on_the_one_before_is_refused(
    world: World, made: Path, tmp_path: Path
) -> None:
    await _served(world, made)
    first = _delta(tmp_path / "deltas", made)
    second = _delta(tmp_path / "deltas", made, _delta(tmp_path / "fork", made, item="other"), item="after")
    _offer(world, made, first, second)
    await world.run()
    assert world.neighbours.serves == [Edition(bundle=made.name)]
    assert "does not stand on delta 1" in str(world.deployment.detail()["refused"])


async def test_another_delta_of_a_number_is_gone_to_by_way_of_what_both_stand_on(
    world: World, made: Path, tmp_path: Path
) -> None:
    first = _delta(tmp_path / "deltas", made)
    one, another = (_delta(tmp_path / name, made, first, item=name) for name in ("one", "another"))
    _offer(world, made, first, one)
    await world.run()
    _offer(world, made, first, another)
    await world.run()
    assert [edition.delta for edition in world.served] == [2, 1, 2]
    assert world.site.installed_deltas(made.name) == {1: _id(first), 2: _id(another)}
    assert world.deployment.detail()["refused"] == {}
    editions = read_editions(world.site.editions)
    assert editions is not None
    assert (editions.load, editions.previous) == (
        [Edition(bundle=made.name, delta=2)],
        Edition(bundle=made.name, delta=1),
    )


async def test_a_delta_that_was_taken_back_is_not_served_again_for_another_of_its_number(
    world: World, made: Path, tmp_path: Path
) -> None:
    one, another = (_delta(tmp_path / name, made, item=name) for name in ("one", "another"))
    _offer(world, made, one)
    await world.run()
    world.neighbours.draining = 1  # the way back is not finished when the channel moves on
    _offer(world, made)
    await world.run()
    _offer(world, made, another)
    await world.run()
    assert [edition.delta for edition in world.served] == [1, 0]
    world.neighbours.draining = 0
    await world.run()
    assert [edition.delta for edition in world.served] == [1, 0, 1]
    assert world.site.installed_deltas(made.name) == {1: _id(another)}


async def test_deltas_go_with_their_bundle(world: World, made: Path, other: Path, third: Path, tmp_path: Path) -> None:
    _offer(world, made, _delta(tmp_path / "deltas", made))
    await world.run()
    await _served(world, other)
    assert world.site.installed_deltas(made.name)
    await _served(world, third)
    assert not world.site.installed_deltas(made.name)
    assert not (world.site.deltas / made.name).exists()


# back by hand


def _hold(world: World, bundle: Path, sequence: int) -> None:
    memory.write_hold(world.root, Hold(edition=Edition(bundle=bundle.name), sequence=sequence))


async def test_a_rollback_needs_no_cloud_and_holds_until_the_channel_moves_on(
    world: World, made: Path, other: Path, third: Path
) -> None:
    await _served(world, made)
    await _served(world, other)
    world.releases.fault = Hindrance("gone")
    _hold(world, made, 2)
    await world.run()
    assert world.serves == made.name
    world.start()  # also after a restart, with the cloud back at the same pointer
    world.releases.fault = None
    await world.run()
    assert world.serves == made.name
    await _served(world, third)
    assert memory.read_hold(world.root) is None


async def test_a_rollback_to_a_bundle_that_was_damaged_on_disk_is_refused_and_answered(
    world: World, made: Path, other: Path
) -> None:
    await _served(world, made)
    await _served(world, other)
    damaged = world.site.bundle(made.name) / "ranker.onnx"
    damaged.chmod(0o644)
    damaged.write_bytes(b"other")
    _hold(world, made, 2)
    await world.run()
    assert world.serves == other.name
    hold = memory.read_hold(world.root)
    assert hold is not None
    assert "ranker.onnx" in str(hold.refused)


async def test_a_flip_that_hangs_on_a_gateway_can_be_taken_back(world: World, made: Path, other: Path) -> None:
    await _served(world, made)
    world.neighbours.draining = 1
    world.releases.promote(other.name)
    await world.run()
    assert world.serves == other.name
    _hold(world, made, 2)
    await world.run()
    assert world.serves == made.name
    world.neighbours.draining = 0
    await world.run()
    assert world.triton.ready == [model_of(made)]


# crashes


class _Crash(BaseException):
    """The process is gone: nothing after it runs."""


def _crash_at(point: str) -> Callable[[str], None]:
    def reached(name: str) -> None:
        if name == point:
            raise _Crash

    return reached


@pytest.mark.parametrize("triton_survives", [True, False])
@pytest.mark.parametrize("point", POINTS)
async def test_an_agent_that_dies_at_any_point_leaves_the_old_or_the_new_edition_and_reaches_the_new_one(
    world: World, made: Path, other: Path, point: str, *, triton_survives: bool
) -> None:
    await _served(world, made)
    world.start(_crash_at(point))
    world.releases.promote(other.name)
    with pytest.raises(_Crash):
        await world.run()
    world.look()  # the others live on: what they serve is whole
    assert world.serves in {made.name, other.name}
    if not triton_survives:
        world.triton.restart()
    world.start()
    if not triton_survives:
        await world.keeper.step()
    world.look()
    await world.run()
    assert world.serves == other.name
    assert [edition.bundle for edition in world.served] == [made.name, other.name]
    world.clock.now += RETIRE_AFTER_S
    await world.run()
    assert world.triton.ready == [model_of(other)]


@pytest.mark.parametrize("point", [*POINTS[: POINTS.index("announced")], "alone", "unloaded", "cleaned"])
async def test_an_agent_that_dies_while_bringing_the_first_edition_brings_it_when_it_is_started_again(
    world: World, made: Path, point: str
) -> None:
    world.start(_crash_at(point))
    world.releases.promote(made.name)
    with pytest.raises(_Crash):
        await world.run()
    world.start()
    await world.run()
    assert world.serves == made.name


@pytest.mark.parametrize("point", POINTS)
async def test_an_agent_that_dies_in_a_flip_and_finds_the_channel_rolled_back_goes_back(
    world: World, made: Path, other: Path, point: str
) -> None:
    await _served(world, made)
    world.start(_crash_at(point))
    world.releases.promote(other.name)
    with pytest.raises(_Crash):
        await world.run()
    world.start()
    await _served(world, made)
    world.clock.now += RETIRE_AFTER_S
    await world.run()
    assert world.triton.ready == [model_of(made)]
