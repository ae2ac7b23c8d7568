"""Publishers and fetchers that are killed before and after every step: old or new, never between; a rerun completes."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
from mortality import ACTOR, Made, Mortal, MortalObjects

from workloads.bundle.registry import Registry
from workloads.bundle.signature import sign, verify_signature
from workloads.bundle.store import verify
from workloads.contract.storage import Release
from workloads.objects.memory import Crash

LONG = os.environ.get("RANKBRIDGE_LONG") == "1"


def _content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


class _Heads:
    """An audit log in a list."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, *, action: str, actor: str, subject: str, detail: object) -> str:
        self.lines.append((action, subject))
        return f"{len(self.lines)}:{'a' * 64}"


def _publish_and_promote(registry: Registry, signed: Made, signature: Path) -> None:
    if not signature.exists():
        sign(signed.new, signed.key.private, signature=signature)
    registry.publish(signed.new, signature, actor=ACTOR)
    registry.publish_delta(signed.delta, signed.signature(signed.delta), actor=ACTOR)
    release = Release(bundle=signed.new.name, deltas=[signed.delta.name.split("-")[1]])
    registry.promote("stable", release, ACTOR)


def test_a_publisher_killed_at_any_step_leaves_the_channel_old_or_new_and_a_rerun_completes(
    signed: Made, mortal: Mortal, tmp_path: Path
) -> None:
    signature = tmp_path / "new.sig"

    def begin() -> tuple[Registry, _Heads]:
        audit = _Heads()
        registry = Registry(MortalObjects(mortal), signed.trust, audit=audit, parallel=1)
        mortal.live()
        registry.publish(signed.old, signed.signature(signed.old), actor=ACTOR)
        registry.promote("stable", signed.old_release, ACTOR)
        signature.unlink(missing_ok=True)
        return registry, audit

    registry, _ = begin()
    old, _ = registry.pointer("stable")
    mortal.live()
    _publish_and_promote(registry, signed, signature)
    steps = list(mortal.steps)
    new, _ = registry.pointer("stable")
    assert {step.split()[0] for step in steps} >= {"fsync", "replace", "put_new", "head", "get"}
    seen = set()
    for step, after in itertools.product(range(1, len(steps) + 1), (False, True)):
        where = f"{'after' if after else 'before'} {steps[step - 1]}"
        registry, audit = begin()
        mortal.live(step, after=after)
        with pytest.raises(Crash):
            _publish_and_promote(registry, signed, signature)
        mortal.live()
        pointer, _ = registry.pointer("stable")
        assert pointer.current in (old.current, new.current), where
        seen.add(pointer.sequence)
        # What the channel points to is there whole: pointing to it again finds nothing missing.
        assert registry.promote("stable", pointer.current, "somebody else") == pointer, where
        _publish_and_promote(registry, signed, signature)
        done, _ = registry.pointer("stable")
        assert (done.current, done.previous, done.sequence) == (new.current, old.current, 2), where
        assert ("bundle.publish", signed.new.name) in audit.lines, where
        line = 1 + max(number for number, (action, _) in enumerate(audit.lines) if action == "channel.promote")
        assert done.audit_head == f"{line}:{'a' * 64}", where
    assert seen == {1, 2}


def test_a_fetcher_killed_at_any_step_shows_nothing_half_and_goes_on_behind_what_it_had(
    signed: Made, mortal: Mortal, tmp_path: Path
) -> None:
    objects = MortalObjects(mortal)
    registry = Registry(objects, signed.trust, parallel=1)
    registry.publish(signed.new, signed.signature(signed.new), actor=ACTOR)
    mortal.live()
    whole = _content(registry.fetch(signed.new.name, tmp_path / "whole"))
    total = len(mortal.steps)
    reads = sum(1 for step in mortal.steps if step.startswith("get_range"))
    assert total > 30
    assert whole == _content(signed.new)
    for step, after in itertools.product(range(1, total + 1), (False, True)):
        bundles = tmp_path / f"site-{step}"
        mortal.live(step, after=after)
        with pytest.raises(Crash):
            registry.fetch(signed.new.name, bundles)
        had = sum(1 for one in mortal.steps if one.startswith("replace ") and "partial" in one)
        had -= not after and mortal.steps[-1].startswith("replace ") and "partial" in mortal.steps[-1]
        visible = [path.name for path in bundles.iterdir() if not path.name.startswith(".")]
        assert set(visible) <= {signed.new.name, f"{signed.new.name}.sig"}
        if signed.new.name in visible:
            verify(bundles / signed.new.name)
            assert f"{signed.new.name}.sig" in visible
        mortal.live()
        fetched = registry.fetch(signed.new.name, bundles)
        assert _content(fetched) == whole
        assert sorted(path.name for path in bundles.iterdir()) == [signed.new.name, f"{signed.new.name}.sig"]
        again = sum(1 for one in mortal.steps if one.startswith("get_range"))
        assert again == (0 if signed.new.name in visible else reads - had), f"step {step} fetched {again} ranges anew"
        shutil.rmtree(bundles)


def test_a_delta_fetcher_killed_at_any_step_completes_when_it_is_run_again(
    signed: Made, mortal: Mortal, tmp_path: Path
) -> None:
    registry = Registry(MortalObjects(mortal), signed.trust, parallel=1)
    registry.publish_delta(signed.delta, signed.signature(signed.delta), actor=ACTOR)
    identity = signed.delta.name.split("-")[1]
    mortal.live()
    registry.fetch_delta(identity, tmp_path / "whole", signed.new.name, 1)
    for step in range(1, len(mortal.steps) + 1):
        deltas = tmp_path / f"site-{step}"
        mortal.live(step)
        with pytest.raises(Crash):
            registry.fetch_delta(identity, deltas, signed.new.name, 1)
        mortal.live()
        fetched = registry.fetch_delta(identity, deltas, signed.new.name, 1)
        assert fetched == deltas / signed.new.name / signed.delta.name
        assert _content(fetched) == _content(signed.delta)
        verify_signature(fetched, signed.signature(fetched), signed.trust)


@pytest.mark.parametrize("parallel", [4])
def test_threads_of_a_killed_fetcher_leave_nothing_half_either(
    signed: Made, mortal: Mortal, tmp_path: Path, parallel: int
) -> None:
    registry = Registry(MortalObjects(mortal), signed.trust, parallel=parallel)
    registry.publish(signed.new, signed.signature(signed.new), actor=ACTOR)
    for step in range(5, 30, 1 if LONG else 5):
        mortal.live(step)
        with pytest.raises(Crash):
            registry.fetch(signed.new.name, tmp_path / str(step))
        mortal.live()
        assert _content(registry.fetch(signed.new.name, tmp_path / str(step))) == _content(signed.new)
