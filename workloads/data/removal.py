"""People out of what was prepared, or under other names in it: data sets are written anew, samples forget people.

A data set without somebody is another data set: it gets its own digest and name, and the old directory goes. It keeps
its `input_digest`, so that preparing the same input again finds it and does not bring the person back. (Preparing with
`--again` does: the source is the operator's, and whoever stands in it is admitted as somebody new.) Each step may be
repeated; a call after a crash does what was left. Who is to be forgotten, and where else, is `workloads.erasure`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import polars as pl

from workloads.data.dataset import EVENTS, META, TRUTH, Dataset, DatasetError, read_meta, write_dataset
from workloads.data.events import EventLog
from workloads.data.preparation import Places, follow, write_private
from workloads.data.split import SplitError, SplitReport, compare
from workloads.data.truth import Truth

_DROPPED = ".dropped-"


@dataclass(frozen=True)
class Removed:
    """What one call did; `renamed` maps the directory names of data sets to their successors, None for none."""

    events: int
    renamed: dict[str, str | None]


def remove_people(folder: Path, people: Collection[str], settled: Callable[[str, str], object]) -> Removed:
    """Write every data set below `folder` anew that knows one of these pseudonyms, and remove what it was.

    `settled(old, new)` is called when the new one is there and before the old one goes. A data set that is damaged, or
    that would have an empty part without them, is removed. Raises OSError.
    """
    events, renamed = 0, dict[str, str | None]()
    for path in _datasets(folder):
        found = _rows_of(path, people)
        if found == 0:
            continue
        new = None if found is None else _without(path, people)
        if new is not None and new.name == path.name:  # nothing but the truth knew them
            continue
        if new is not None:
            settled(path.name, new.name)
        _drop(path)
        events += found or 0
        renamed[path.name] = None if new is None else new.name
    for left in folder.glob(f"{_DROPPED}*"):
        shutil.rmtree(left)
    return Removed(events, renamed)


def rename_people(home: Path, change: Callable[[str], str], key_epoch: int) -> dict[str, str]:
    """Give every user and session of the data sets at home its `change`, those of another key epoch; old to new names.

    A data set that cannot be read is left; it cannot be used either. Raises OSError.
    """
    places, renamed = Places(home), dict[str, str]()
    for path in _datasets(places.datasets):
        try:
            if read_meta(path).key_epoch == key_epoch:
                continue
            old = Dataset.load(path)
        except DatasetError:
            continue
        frame = old.events
        for column in ("user", "session"):
            values = frame[column].drop_nulls().unique().to_list()
            new_values = [change(value) for value in values]
            frame = frame.with_columns(
                pl.col(column).replace_strict(values, new_values, default=None, return_dtype=pl.String)
            )
        truth = None if old.truth is None else Truth.load(old.truth)
        if truth is not None:
            truth = dataclasses.replace(truth, users=np.array([change(user) for user in truth.users.tolist()]))
        made = _written(old, EventLog(frame), truth, old.splits, key_epoch)
        follow(places, path.name, made.name)
        _drop(path)
        renamed[path.name] = made.name
    return renamed


def drop_data_sets(folder: Path, *, key_epoch: int) -> int:
    """Remove the data sets below `folder` whose names are of this key epoch, and what is half made; how many."""
    gone = 0
    for path in _datasets(folder):
        with contextlib.suppress(DatasetError):
            if read_meta(path).key_epoch != key_epoch:
                continue
        _drop(path)
        gone += 1
    for draft in folder.glob(".fetch-*"):
        shutil.rmtree(draft)
    return gone


def remove_from_home(home: Path, people: Collection[str]) -> Removed:
    """`remove_people` for the data sets at home, with the marks that follow them. Raises OSError."""
    places = Places(home)
    return remove_people(places.datasets, people, lambda old, new: follow(places, old, new))


def thin_sample(home: Path, knows: Callable[[str], bool]) -> int:
    """Take raw ids that home does not know any more out of the sample of users; the number taken."""
    places = Places(home)
    try:
        sample = msgspec.json.decode(places.users_sample.read_bytes(), type=list[str])
    except FileNotFoundError:
        return 0
    except msgspec.DecodeError:
        places.users_sample.unlink()
        return 0
    kept = [user for user in sample if knows(user)]
    if len(kept) < len(sample):
        write_private(places.users_sample, msgspec.json.encode(kept))
        follow(places)
    return len(sample) - len(kept)


def _datasets(folder: Path) -> Iterator[Path]:
    """Directories of data sets; what has none of their files is somebody else's."""
    if folder.is_dir():
        yield from (path for path in sorted(folder.iterdir()) if (path / META).is_file() and path.name[0] != ".")


def _rows_of(path: Path, people: Collection[str]) -> int | None:
    """Events of these people in a data set, at least 1 where anything else knows them; None where it cannot be read."""
    wanted = pl.Series(sorted(people), dtype=pl.String).implode()
    try:
        read_meta(path)
        rows = pl.scan_parquet(path / EVENTS).select(
            pl.any_horizontal(pl.col(name).is_in(wanted).fill_null(value=False) for name in ("user", "session")).sum()
        )
        count = int(rows.collect().item())
        if not count and (path / TRUTH).is_dir():
            count = int(bool(np.isin(Truth.load(path / TRUTH).users, sorted(people)).any()))
    except (DatasetError, pl.exceptions.PolarsError, OSError, ValueError, KeyError):
        return None
    return count


def _without(path: Path, people: Collection[str]) -> Path | None:
    wanted = pl.Series(sorted(people), dtype=pl.String).implode()
    try:
        old = Dataset.load(path)
        theirs = pl.any_horizontal(pl.col(name).is_in(wanted).fill_null(value=False) for name in ("user", "session"))
        log = EventLog(old.events.filter(~theirs))
        splits = compare(log, old.items, old.meta.boundaries)
        truth = None if old.truth is None else _truth_without(Truth.load(old.truth), people)
    except (DatasetError, SplitError, OSError, ValueError, KeyError, pl.exceptions.PolarsError):
        return None
    return _written(old, log, truth, splits, old.meta.key_epoch)


def _written(old: Dataset, log: EventLog, truth: Truth | None, splits: SplitReport, key_epoch: int) -> Path:
    """A data set like `old` of other events."""
    meta = old.meta
    return write_dataset(
        old.path.parent,
        name=meta.name,
        source=meta.source,
        input_digest=meta.input_digest,
        key_epoch=key_epoch,
        protocol=meta.protocol,
        cut=meta.boundaries,
        log=log,
        items=old.items,
        splits=splits,
        rules=meta.rules,
        faults=meta.faults,
        parameters=meta.parameters,
        write_truth=None if truth is None else lambda folder: truth.save(folder, truth.users.tolist()),
        replica=meta.replica,
    ).path


def _truth_without(truth: Truth, people: Collection[str]) -> Truth:
    kept = ~np.isin(truth.users, sorted(people))
    rows = {name: getattr(truth, name)[kept] for name in Truth.__dataclass_fields__ if name.startswith("user")}
    return dataclasses.replace(truth, **rows)


def _drop(path: Path) -> None:
    """Remove a directory so that no half of it is ever taken for a data set."""
    gone = path.with_name(f"{_DROPPED}{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(gone)
