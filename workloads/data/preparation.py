"""From a source to what the rest of the product reads: data set, profiles, user sample, fault report.

This is the home edge of the data: raw user ids come in here, and only pseudonyms go into the data set.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
import polars as pl

from workloads.contract.events import POSITIVE_TYPES, Event
from workloads.data import adapters, lake_source, simulator
from workloads.data.cleaning import RuleCount, drop_repeats, drop_unknown_items, drop_unseen_items
from workloads.data.custody import CustodyError, custody
from workloads.data.dataset import DatasetMeta, FaultSummary, find_prepared, read_meta, write_dataset
from workloads.data.definitions import REMEMBERED_MAX
from workloads.data.events import POSITIVE, EventLog, RowFaults, TooManyFaultsError
from workloads.data.profile_builder import build_activity, build_profiles, with_clocks
from workloads.data.profiles import Watermark, filled_from, refill_mark, write_profiles
from workloads.data.reading import SourceError, file_digest
from workloads.data.source import SourceData
from workloads.data.split import SplitError, boundaries, compare
from workloads.privacy import pseudonym
from workloads.privacy.pseudonym import KeyFileError, PseudonymKey
from workloads.privacy.vault import SqliteVault, VaultError
from workloads.telemetry.progress import Progress

SourceKind = Literal["simulator", "online-retail", "sequences", "events", "lake"]
USERS_SAMPLE: Final = 2000
VALIDATION_SHARE: Final = 0.1
TEST_SHARE: Final = 0.1

_SHAPING: Final = (
    "adapters", "cleaning", "dataset", "definitions", "events", "lake_source", "point_in_time", "preparation",
    "profile_builder", "profiles", "reading", "simulator", "split", "truth", "vocabulary",
)  # fmt: skip
"""Modules whose code decides what comes out: a change in one makes what was prepared before stale."""


@dataclass(frozen=True)
class Request:
    """What to prepare. `path` is None for the simulator; `columns` is for event logs."""

    kind: SourceKind
    path: Path | None = None
    simulation: simulator.SimulatorConfig = field(default_factory=simulator.SimulatorConfig)
    columns: Mapping[str, str] | None = None
    max_bad_share: float = adapters.DEFAULT_MAX_BAD_SHARE
    origin: str = ""
    """lake: the data set whose catalogue counts; `path` is the lake's folder."""


@dataclass(frozen=True)
class Places:
    """Where the results go, below the product's home directory."""

    home: Path

    @property
    def vault(self) -> Path:
        """Who is behind a pseudonym; the keys lie beside it."""
        return self.home / "onprem" / "vault.sqlite"

    @property
    def datasets(self) -> Path:
        """Prepared data sets, a directory each."""
        return self.home / "onprem" / "datasets"

    @property
    def profiles(self) -> Path:
        """Profiles by pseudonym."""
        return self.home / "onprem" / "profiles.sqlite"

    @property
    def users_sample(self) -> Path:
        """Raw user ids for load users; never leaves home."""
        return self.home / "onprem" / "users-sample.json"

    @property
    def mark(self) -> Path:
        """Which data set the profiles and the sample belong to; written last."""
        return self.home / "onprem" / "prepared.json"

    @property
    def fault_reports(self) -> Path:
        """Row-level fault reports, one JSON line a fault."""
        return self.home / "onprem" / "faults"


@dataclass(frozen=True)
class Prepared:
    """What is there after a run."""

    dataset: Path
    profiles: Path
    users_sample: Path
    vault: Path
    fault_report: Path | None
    reused: bool
    events: int
    users: int
    items: int


def prepare(request: Request, home: Path, progress: Progress, *, again: bool = False) -> Prepared:
    """Prepare a data set and what home serves from it, or find that this was done already.

    With `again` it is done even then, and replaces what is there.

    Everybody in the source becomes known to the vault, the gateway's own: whom it knows keeps their pseudonym, so that
    the same input gives the same data set in the same home.

    Raises SourceError, TooManyFaultsError, SplitError, VaultError or KeyFileError when nothing can be made; then
    what was there before is still there.
    """
    places = Places(home)
    progress.step("read", 0, 1)
    try:
        with custody(home, alone=False), contextlib.closing(SqliteVault(places.vault, create=True)) as vault:
            return _prepare(request, places, vault, progress, again=again)
    except CustodyError as error:
        raise SourceError(error.fault, error.remedy) from None


def _prepare(request: Request, places: Places, vault: SqliteVault, progress: Progress, *, again: bool) -> Prepared:
    key = vault.key()
    digest = _input_digest(request, vault.identity)
    if not again and (done := _find_done(places, digest, vault.epochs().valid)) is not None:
        progress.note("read", f"{done.dataset.name} was prepared before from the same input; using it")
        return done
    source = _load(request, progress)
    progress.step("read", 1, 1, "source", events=len(source.log))
    log, items, rules = _clean(source, progress)
    cut = source.cut or boundaries(log, validation_share=VALIDATION_SHARE, test_share=TEST_SHARE, basis="rows")
    splits = compare(log, items, cut)
    for statement in splits.statements:
        progress.note("split", statement)
    progress.step("split", 1, 1)

    raw_users = log.frame.filter(pl.col("type").is_in(POSITIVE))["user"].drop_nulls().unique().sort()
    truth = source.truth
    planted: list[str] = [] if truth is None else truth.users.tolist()
    if source.pseudonymous:
        names, hidden = {name: name for name in planted}, log
    else:
        names = vault.admit([*log.frame["user"].drop_nulls().unique().sort().to_list(), *planted])
        hidden = _pseudonymised(log, names, key)
    progress.step("pseudonyms", 1, 1, "users", users=len(raw_users))
    dataset = write_dataset(
        places.datasets,
        name=source.name,
        source=source.source,
        input_digest=digest,
        key_epoch=key.epoch,
        protocol=source.protocol,
        cut=cut,
        log=hidden,
        items=items,
        splits=splits,
        rules=rules,
        faults=_summary(source.faults, request.max_bad_share),
        parameters=source.parameters,
        write_truth=None if truth is None else lambda folder: truth.save(folder, [names[user] for user in planted]),
    )
    progress.step("write", 1, 1, "data set", events=len(hidden))
    report = _write_fault_report(places.fault_reports / f"{dataset.path.name}.jsonl", source.faults)
    if not source.pseudonymous:
        _write_users_sample(places.users_sample, raw_users, seed=digest)
    elif not places.users_sample.exists():
        _write_users_sample(places.users_sample, raw_users.clear(), seed=digest)  # the lake knows no raw id
    known_ms = int(with_clocks(hidden, source.clocks)["received_ms"].max())  # type: ignore[arg-type]  # Int64, not empty
    write_profiles(
        places.profiles,
        build_profiles(hidden, REMEMBERED_MAX, clocks=source.clocks),
        {"dataset": dataset.path.name},
        items=build_activity(hidden, source.clocks),
        watermark=Watermark(source.spool_seq, known_ms),
    )
    write_private(places.mark, msgspec.json.encode(_mark(places, dataset.path.name)))
    progress.step("profiles", 1, 1, "users", users=len(raw_users))
    return _prepared(places, dataset.path, dataset.meta, report, reused=False)


def _load(request: Request, progress: Progress) -> SourceData:
    def note(text: str) -> None:
        progress.note("read", text)

    if request.kind == "simulator":
        config = request.simulation
        made = simulator.simulate(config, lambda share: progress.step("simulate", round(share, 3), 1))
        return SourceData(
            name="simulator",
            source="simulator",
            log=made.log,
            items=made.items,
            protocol="next_item",
            truth=made.truth,
            cut=config.cut,
            faults=RowFaults(rows_read=len(made.log)),
            parameters=msgspec.to_builtins(config),
        )
    if request.path is None:
        raise SourceError(f"source {request.kind} needs a file", f"say {request.kind}=PATH")
    share = request.max_bad_share
    if request.kind == "lake":
        return lake_source.load_lake(request.path, request.origin, note)
    if request.kind == "online-retail":
        return adapters.load_online_retail(request.path, max_bad_share=share, note=note)
    if request.kind == "sequences":
        return adapters.load_sequences(request.path, max_bad_share=share, note=note)
    return adapters.load_events(request.path, columns=request.columns, max_bad_share=share, note=note)


def _clean(source: SourceData, progress: Progress) -> tuple[EventLog, pl.DataFrame, list[RuleCount]]:
    rules = list(source.rules)
    log, repeats = drop_repeats(source.log)
    log, unknown = drop_unknown_items(log, source.items)
    items, unseen = drop_unseen_items(log, source.items)
    rules += [repeats, unknown, unseen]
    for rule in rules:
        if rule.rows:
            progress.note("clean", f"{rule.rule}: {rule.rows} {rule.effect}", rows=rule.rows)
    for total in source.faults.totals():
        progress.note("clean", f"bad rows: {total.field} {total.rule}", rows=total.rows)
    progress.step("clean", 1, 1)
    return log, items, rules


def _pseudonymised(log: EventLog, names: Mapping[str, str], key: PseudonymKey) -> EventLog:
    frame = log.frame
    for column, name in (("user", names.__getitem__), ("session", key.session)):
        raw = frame[column].drop_nulls().unique()
        named = pl.DataFrame(
            {column: raw, "named": pl.Series([name(value) for value in raw.to_list()], dtype=pl.String)}
        )
        frame = (
            frame.join(named, on=column, how="left", maintain_order="left")
            .with_columns(pl.col("named").alias(column))
            .drop("named")
        )
    return EventLog(frame)


def _input_digest(request: Request, identity: str) -> str:
    """What decides the outcome: input bytes, configuration, home, and the code of this package.

    Not the key: a data set whose people were renamed when it changed is still the one of this input.
    """
    digest = hashlib.sha256()
    facts = {
        "kind": request.kind,
        "file": None
        if request.path is None
        else lake_source.state(request.path, request.origin)
        if request.kind == "lake"
        else [request.path.name, file_digest(request.path)],
        "simulation": msgspec.to_builtins(request.simulation) if request.kind == "simulator" else None,
        "columns": dict(request.columns or {}),
        "max_bad_share": request.max_bad_share,
        "home": identity,
    }
    digest.update(msgspec.json.encode(facts, order="sorted"))
    package = Path(__file__).parent
    for name in _SHAPING:
        digest.update((package / f"{name}.py").read_bytes())
    digest.update(Path(pseudonym.__file__).read_bytes())
    digest.update(repr(msgspec.json.schema(Event)).encode())
    digest.update(repr(sorted(POSITIVE_TYPES)).encode())
    return digest.hexdigest()


def _summary(faults: RowFaults, max_bad_share: float) -> FaultSummary:
    return FaultSummary(
        rows_read=faults.rows_read, bad_rows=faults.bad_rows, max_bad_share=max_bad_share, totals=faults.totals()
    )


class _Mark(msgspec.Struct, frozen=True, kw_only=True):
    """`prepared.json`: a data set, and the sample beside it that was made from it.

    The profiles say themselves which data set they were filled from; they change with every event after that.
    """

    dataset: str
    users_sample_sha256: str


def _mark(places: Places, dataset: str) -> _Mark:
    return _Mark(
        dataset=dataset,
        users_sample_sha256=file_digest(places.users_sample),
    )


def follow(places: Places, old: str | None = None, new: str | None = None) -> None:
    """Let marks and reports that name data set `old` name `new`, and the mark have the sample's digest of today.

    For who takes people out of a prepared data set: what `prepare` would find stays found, without them.
    """
    if old is not None and new is not None:
        report = places.fault_reports / f"{old}.jsonl"
        if report.is_file():
            report.replace(places.fault_reports / f"{new}.jsonl")
        refill_mark(places.profiles, old, new)
    try:
        mark = msgspec.json.decode(places.mark.read_bytes(), type=_Mark)
        fresh = _mark(places, new if new is not None and mark.dataset == old else mark.dataset)
    except (OSError, msgspec.DecodeError, SourceError):
        return
    if fresh != mark:
        write_private(places.mark, msgspec.json.encode(fresh))


def _find_done(places: Places, digest: str, epochs: Collection[int]) -> Prepared | None:
    """Everything a run of this input would make, if all of it is there and whole."""
    path = find_prepared(places.datasets, digest)
    if path is None:
        return None
    try:
        mark = msgspec.json.decode(places.mark.read_bytes(), type=_Mark)
        if mark != _mark(places, path.name) or filled_from(places.profiles) != path.name:
            return None
        if read_meta(path).key_epoch not in epochs:
            return None
    except (OSError, msgspec.DecodeError, SourceError):
        return None
    report = places.fault_reports / f"{path.name}.jsonl"
    return _prepared(places, path, read_meta(path), report if report.is_file() else None, reused=True)


def _prepared(places: Places, path: Path, meta: DatasetMeta, report: Path | None, *, reused: bool) -> Prepared:
    return Prepared(
        dataset=path,
        profiles=places.profiles,
        users_sample=places.users_sample,
        vault=places.vault,
        fault_report=report,
        reused=reused,
        events=sum(meta.events.values()),
        users=meta.users,
        items=meta.items,
    )


def write_private(path: Path, content: bytes) -> None:
    """A file of mode 0600, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _write_users_sample(path: Path, raw_users: pl.Series, *, seed: str) -> None:
    """Up to 2,000 raw ids of users with a profile, drawn evenly; a JSON list."""
    generator = np.random.default_rng(int(seed[:16], 16))
    picked = generator.permutation(len(raw_users))[:USERS_SAMPLE]
    content = msgspec.json.encode(raw_users.gather(np.sort(picked)).to_list())
    write_private(path, content)


def _write_fault_report(path: Path, faults: RowFaults) -> Path | None:
    """Every kept fault as a JSON line, or no file when there is none."""
    if not faults.samples:
        path.unlink(missing_ok=True)
        return None
    content = b"\n".join(msgspec.json.encode(fault) for fault in sorted(faults.samples, key=lambda f: f.row)) + b"\n"
    write_private(path, content)
    return path


def fault_of(error: Exception) -> str:
    """What is wrong, without what to do about it."""
    return error.fault if isinstance(error, SourceError | KeyFileError | VaultError) else str(error)


def remedy_of(error: Exception) -> str:
    """What to do about an error of `prepare`."""
    if isinstance(error, SourceError | KeyFileError | VaultError):
        return error.remedy
    if isinstance(error, TooManyFaultsError):
        first = error.faults.samples[0] if error.faults.samples else None
        where = f" (first at line {first.row}: {first.field} = {first.value!r})" if first else ""
        return f"correct the rows{where}, or allow more with --max-bad-share"
    if isinstance(error, SplitError):
        return "use a log that covers a longer time"
    return "see the message"
