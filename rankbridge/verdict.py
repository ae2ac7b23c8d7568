"""The verdict of a rehearsal: what was promised, what was measured, passed or failed and why.

`build` puts together what others measured and decides; `verdict.json` is exactly its `Verdict`.
Nothing is measured here but the machine's own facts, and no path or host name gets in.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import psutil

from loadtests.gate import Breach, LoadResult
from loadtests.samples import write_whole
from rankbridge.faults import ExitCode
from workloads.bundle.manifest import SHORT, Manifest
from workloads.contract.quality import BUDGETS, DATASET_BUDGETS, QualityBudget, QualityReport
from workloads.contract.slo import NEW_ITEM_MAX_S, P99_SAMPLES, SERVED_AFTER_MAX_S, SERVING_PSS_MAX_MB
from workloads.data.dataset import DatasetMeta
from workloads.data.split import SplitReport
from workloads.telemetry.progress import Line, ProgressLine

SCHEMA_VERSION: Final = 1
SIMULATOR: Final = "simulator"
_DAY_MS: Final = 86_400_000
_VERSIONED: Final = ("torch", "onnxruntime", "faiss-cpu", "tantivy", "litestar", "uvicorn", "tritonclient", "locust")


_VPN: Final = "VPN"
_DISTANCE: Final = "Distance between sites"
_LOCAL: Final = {
    "Training": (True, "both models trained in PyTorch, checkpoints and early stopping included"),
    "Models served": (True, "ONNX, compared with the trained ones before a bundle is written"),
    "Inference server": (True, "NVIDIA Triton 2.51, one process per site, explicit loads only"),
    "Gateway, retrieval, intake": (True, "the processes of production, one group per site"),
    "Requests": (True, "HTTP over sockets, timed by the client from the moment they were due"),
    "Acknowledgements": (True, "an event is answered after its fsync"),
    "Lake": (True, "Parquet under an Iceberg catalogue, counted against the intake's spool"),
    "Training in aws": (True, "from the replica in the bucket alone; the kernel keeps it from home's files"),
    "Way of a bundle": (True, "signed, published, pulled and verified by the agent of each site"),
    "S3": (False, "LocalStack, an empty AWS on this machine, or what the environment named"),
    "GPU of aws": (False, "the same ONNX models on this machine's CPU"),
    "Triton's ONNX backend": (False, "ONNX Runtime inside Triton's Python backend; costs 0.5 to 1 ms more"),
    _VPN: (False, "none: both sites are loopback addresses of one machine"),
    _DISTANCE: (False, "none: no delay, no loss"),
    "Kubernetes and AWS": (False, "not part of this run; processes are supervised directly"),
    "Customers": (False, "load users, drawn by the catalogue's popularity"),
    "Machines": (False, "sites and load generator share one machine and slow each other down"),
}
"""What is real (True) and what is emulated when both sites run on one machine, whatever the data."""


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What one rule of cleaning did to the rows."""

    rule: str
    rows: int
    effect: str


class SplitPart(msgspec.Struct, frozen=True, kw_only=True):
    """Train, validation or test."""

    part: str
    events: int
    users: int
    items: int
    days: float


class DatasetFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The behaviour data that everything was made from."""

    name: str
    digest: str
    source: str
    protocol: str
    users: int
    items: int
    events: dict[str, int]
    """Per event type."""
    days: float
    rows_read: int
    bad_rows: int
    rules: list[Rule]
    parts: list[SplitPart]
    agreement: list[str]
    """Where validation and test differ from train, or that they do not."""

    @property
    def simulated(self) -> bool:
        """Whether nobody really did any of it."""
        return self.source.startswith(SIMULATOR)

    @classmethod
    def of(cls, meta: DatasetMeta, splits: SplitReport) -> DatasetFacts:
        """From a prepared data set's own records."""
        return cls(
            name=meta.name,
            digest=meta.digest[:SHORT],
            source=meta.source,
            protocol=meta.protocol,
            users=meta.users,
            items=meta.items,
            events=dict(meta.events),
            days=(meta.boundaries.end_ms - meta.boundaries.start_ms) / _DAY_MS,
            rows_read=meta.faults.rows_read,
            bad_rows=meta.faults.bad_rows,
            rules=[Rule(rule=r.rule, rows=r.rows, effect=r.effect) for r in meta.rules],
            parts=[
                SplitPart(
                    part=c.part,
                    events=c.events,
                    users=c.users,
                    items=c.items,
                    days=(c.end_ms - c.start_ms) / _DAY_MS,
                )
                for c in splits.counts
            ],
            agreement=list(splits.statements),
        )


class BundleFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was served."""

    id: str
    """First 12 hex digits."""
    files: int
    size_mb: float
    parity: dict[str, float]
    """Largest difference of each exported model from the trained one."""
    ann: str
    ann_recall_at_10: float

    @classmethod
    def of(cls, bundle_id: str, manifest: Manifest) -> BundleFacts:
        """From a bundle's manifest."""
        return cls(
            id=bundle_id[:SHORT],
            files=len(manifest.files),
            size_mb=sum(f.size for f in manifest.files.values()) / 2**20,
            parity={role: p.max_abs_error for role, p in manifest.parity.items()},
            ann=manifest.ann.kind,
            ann_recall_at_10=manifest.ann.recall_at_10,
        )


class QualityCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One quality budget and what became of it; None where a row or metric was not measured."""

    budget: QualityBudget
    measured: float | None
    other: float | None
    held: bool

    @property
    def ratio(self) -> float | None:
        """`measured / other`; None where it cannot be said."""
        if self.measured is None or not self.other:
            return None
        return self.measured / self.other


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of a job's progress: (steps done, value)."""

    stage: str
    figure: str
    unit: str
    points: list[tuple[float, float]]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the rehearsal and how long it took."""

    name: str
    seconds: float
    note: str = ""
    """For example that an earlier run's result was used again."""


class ProcessMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Proportional set size of one serving process, MiB, the largest seen under load."""

    site: str
    role: str
    pss_mb: float


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """All serving processes."""

    processes: list[ProcessMemory]
    total_mb: float
    allowed_mb: float


class Durability(msgspec.Struct, frozen=True, kw_only=True):
    """Acknowledged events looked for in the store afterwards."""

    acknowledged: int
    found: int

    @property
    def lost(self) -> int:
        """Acknowledged and not there."""
        return self.acknowledged - self.found


class LakeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The intake's spool held against the lake, event by event, once everything was down."""

    events: int
    """Events that were compared."""
    difference: str | None = None
    """What of them is missing, extra or doubled; None when nothing is."""


class Crossing(msgspec.Struct, frozen=True, kw_only=True):
    """What crossed the border between home and the cloud."""

    replicated_bytes: int
    """Size of the replica in the data bucket; 0 where an earlier run's bundle was served."""
    replicated_parts: int
    replicated_events: int
    confined: bool
    """Whether training and export were kept from home's files by the kernel (Landlock)."""
    served_after_s: dict[str, float]
    """Seconds from the move of the channel until the site answered from the bundle, by site."""
    new_item_after_s: dict[str, float]
    """Seconds from a file with one new item until the site recommended it, by site."""
    lake: LakeFacts | None


class VpnFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The VPN that was between the sites while they served, and what was seen on its wires."""

    tunnels: int
    up: int
    """How many of them were up at the end."""
    cipher: str
    mtu: int
    """Bytes of the largest inner packet."""
    frames: int
    encrypted: int
    """Frames that were ESP; the others were IKE and ARP."""
    missed: int
    """Frames that could not be looked at."""
    wrong: int
    """Frames that had no business there, an inner address in clear above all."""
    faults: list[str]
    """The first of these, in words."""


class LedgerLine(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the rehearsal: the thing itself, or a stand-in for it."""

    part: str
    real: bool
    what: str


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it ran; enough to compare runs, nothing that says whose machine it was."""

    cores: int
    memory_gb: float
    processor: str
    system: str
    versions: dict[str, str]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """`verdict.json`. `passed` is true exactly when `breaches` is empty."""

    schema_version: int = SCHEMA_VERSION
    passed: bool
    breaches: list[Breach]
    made_at: str
    """UTC, ISO 8601."""
    dataset: DatasetFacts | None
    bundle: BundleFacts | None
    quality: QualityReport | None
    quality_checks: list[QualityCheck]
    load: LoadResult | None
    memory: Memory | None
    durability: Durability | None
    crossing: Crossing | None = None
    vpn: VpnFacts | None = None
    """None where there was none between the sites."""
    steps: list[Step]
    curves: list[Curve]
    ledger: list[LedgerLine]
    machine: Machine
    injected: list[str]
    """Faults planted on purpose, as they were asked for: `ranker-delay=80ms`."""
    notes: list[str]
    reproduce: list[str]
    """Commands that do all of this again."""

    @property
    def exit_code(self) -> ExitCode:
        """Of the command that asked for the verdict."""
        return ExitCode.OK if self.passed else ExitCode.VERDICT_FAILED


def build(
    *,
    dataset: DatasetFacts | None,
    bundle: BundleFacts | None,
    quality: QualityReport | None,
    load: LoadResult | None,
    memory: Sequence[ProcessMemory] = (),
    durability: Durability | None = None,
    crossing: Crossing | None = None,
    vpn: VpnFacts | None = None,
    steps: Sequence[Step] = (),
    curves: Sequence[Curve] = (),
    injected: Sequence[str] = (),
    notes: Sequence[str] = (),
    reproduce: Sequence[str] = (),
    ledger: Sequence[LedgerLine] | None = None,
    now: datetime.datetime | None = None,
) -> Verdict:
    """Hold everything measured to its budget. What was not measured at all breaches, too.

    `ledger` defaults to `local_ledger`. Only `memory` and `durability` may be left out without a breach:
    they need serving processes that this rehearsal started itself.
    """
    checks = check_quality(quality) if quality is not None else []
    kept = _memory(memory) if memory else None
    breaches = [
        *_quality_breaches(quality, checks),
        *_load_breaches(load),
        *_memory_breaches(kept),
        *_durability_breaches(durability),
        *_crossing_breaches(crossing),
        *_vpn_breaches(vpn),
    ]
    return Verdict(
        passed=not breaches,
        breaches=breaches,
        made_at=(now or datetime.datetime.now(datetime.UTC)).isoformat(timespec="seconds"),
        dataset=dataset,
        bundle=bundle,
        quality=quality,
        quality_checks=checks,
        load=load,
        memory=kept,
        durability=durability,
        crossing=crossing,
        vpn=vpn,
        steps=list(steps),
        curves=list(curves),
        ledger=list(ledger)
        if ledger is not None
        else local_ledger(simulated=dataset is None or dataset.simulated, vpn=vpn),
        machine=machine(),
        injected=list(injected),
        notes=[*notes, *_small_run(load), *(load.notes if load is not None else [])],
        reproduce=list(reproduce),
    )


def check_quality(report: QualityReport) -> list[QualityCheck]:
    """The budgets of every data set, then those of this one; a data set's own replaces a general one."""
    own = DATASET_BUDGETS.get(report.dataset, ())
    replaced = {_subject(b) for b in own}
    wanted = [b for b in BUDGETS if _subject(b) not in replaced] + list(own)
    return [_check(budget, report) for budget in wanted]


def curves(lines: Iterable[Line]) -> list[Curve]:
    """The figures of a job's progress lines, one curve per stage and figure that has two points or more."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    units: dict[str, str] = {}
    for line in lines:
        if isinstance(line, ProgressLine):
            units[line.stage] = line.unit
            for figure, value in line.figures.items():
                points[line.stage, figure].append((line.done, value))
    return [
        Curve(stage=stage, figure=figure, unit=units[stage], points=found)
        for (stage, figure), found in points.items()
        if len(found) > 1
    ]


def local_ledger(*, simulated: bool, vpn: VpnFacts | None = None) -> list[LedgerLine]:
    """What is real and what is emulated when both sites run on one machine, with `vpn` between them or nothing."""
    behaviour = (
        (False, "drawn by the seeded simulator; its planted taste is known")
        if simulated
        else (True, "recorded from real people, cleaned by the rules listed here")
    )
    lines = {"Behaviour": behaviour, **_LOCAL}
    if vpn is not None:
        lines[_VPN] = (
            True,
            f"{vpn.tunnels} IKEv2 tunnels of strongSwan with BGP over them, between network namespaces; ESP made by "
            f"strongSwan itself, not the kernel ({vpn.cipher}, packets of at most {vpn.mtu} bytes)",
        )
        lines[_DISTANCE] = (False, "none: the wires under the tunnels delay nothing and lose nothing")
    return [LedgerLine(part=part, real=real, what=what) for part, (real, what) in lines.items()]


def machine() -> Machine:
    """Facts about the machine that a reader needs to compare times."""
    versions = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(
        cores=psutil.cpu_count() or 1,
        memory_gb=psutil.virtual_memory().total / 2**30,
        processor=_processor(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions=versions,
    )


def write(verdict: Verdict, path: Path) -> None:
    """`verdict.json`, whole or not at all."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(verdict), indent=1) + b"\n")


def read(path: Path) -> Verdict:
    """A verdict from its file.

    Raises ValueError for a file that is no verdict or one of another schema version.
    """
    content = path.read_bytes()
    try:
        version = msgspec.json.decode(content, type=_Versioned).schema_version
        if version != SCHEMA_VERSION:
            raise ValueError(f"{path.name}: schema version {version}, and this version reads {SCHEMA_VERSION} only")
        return msgspec.json.decode(content, type=Verdict)
    except msgspec.DecodeError as fault:
        raise ValueError(f"{path.name} is no verdict: {fault}") from None


class _Versioned(msgspec.Struct, frozen=True):
    schema_version: int


def _subject(budget: QualityBudget) -> tuple[str, str, str, str]:
    return budget.protocol, budget.row, budget.other, budget.metric


def _check(budget: QualityBudget, report: QualityReport) -> QualityCheck:
    measured = report.metric(budget.row, budget.protocol, budget.metric)
    other = report.metric(budget.other, budget.protocol, budget.metric)
    held = measured is not None and other is not None and measured >= budget.at_least * other
    return QualityCheck(budget=budget, measured=measured, other=other, held=held)


def _quality_breaches(report: QualityReport | None, checks: Sequence[QualityCheck]) -> Iterable[Breach]:
    if report is None:
        yield Breach(what="quality", sentence="The models' quality was not measured, so nothing is known about it.")
        return
    for check in checks:
        if not check.held:
            budget = check.budget
            subject = f"{budget.metric} of {budget.row} ({budget.protocol})"
            if check.measured is None or check.other is None:
                missing = budget.row if check.measured is None else budget.other
                sentence = f"{subject} cannot be held against {budget.other}: {missing} was not measured."
            else:
                sentence = (
                    f"{subject} is {check.measured:.4f}, and {budget.other} has {check.other:.4f}: "
                    f"{_times(check.ratio)} as good, at least {budget.at_least:g} times is promised."
                )
            yield Breach(what="quality", sentence=sentence, measured=check.ratio, allowed=budget.at_least, unit="times")


def _times(ratio: float | None) -> str:
    return "infinitely" if ratio is None else f"{ratio:.2f} times"


def _load_breaches(load: LoadResult | None) -> Iterable[Breach]:
    if load is None:
        yield Breach(what="no_requests", sentence="No load was run, so nothing is known about time.")
    else:
        yield from load.breaches


def _small_run(load: LoadResult | None) -> Iterable[str]:
    if load is None:
        return
    fewest = min((b.min_samples for b in load.budgets.endpoints), default=P99_SAMPLES)
    if fewest < P99_SAMPLES:
        yield (
            f"This was a small run: its quantiles need only {fewest} samples behind them and no rate was asked for; "
            f"the product's promise needs {P99_SAMPLES} under its full traffic."
        )


def _memory(processes: Sequence[ProcessMemory]) -> Memory:
    return Memory(processes=list(processes), total_mb=sum(p.pss_mb for p in processes), allowed_mb=SERVING_PSS_MAX_MB)


def _memory_breaches(memory: Memory | None) -> Iterable[Breach]:
    if memory is not None and memory.total_mb > memory.allowed_mb:
        largest = max(memory.processes, key=lambda p: p.pss_mb)
        yield Breach(
            what="memory",
            sentence=(
                f"The serving processes hold {memory.total_mb:.0f} MiB together, allowed {memory.allowed_mb:.0f}; "
                f"the largest is {largest.role} at {largest.site} with {largest.pss_mb:.0f}."
            ),
            measured=memory.total_mb,
            allowed=memory.allowed_mb,
            unit="MiB",
        )


def _vpn_breaches(vpn: VpnFacts | None) -> Iterable[Breach]:
    if vpn is None:
        return
    if vpn.wrong:
        yield Breach(
            what="seen_in_clear",
            sentence=f"{vpn.wrong} frames between the sites had no business there; the first: {vpn.faults[0]}.",
            measured=vpn.wrong,
            allowed=0,
            unit="frames",
        )
    if vpn.missed or not vpn.encrypted:
        yield Breach(
            what="unseen_frames",
            sentence=(
                f"{vpn.missed} frames between the sites could not be looked at, and {vpn.encrypted} were seen "
                "encrypted: nobody can say that nothing was in clear."
            ),
            measured=vpn.missed,
            allowed=0,
            unit="frames",
        )


def _durability_breaches(durability: Durability | None) -> Iterable[Breach]:
    if durability is not None and durability.lost:
        yield Breach(
            what="lost_events",
            sentence=(
                f"{durability.lost} of {durability.acknowledged} acknowledged events are not in the store: "
                "an acknowledgement was given for something that was not kept."
            ),
            measured=durability.lost,
            allowed=0,
            unit="events",
            endpoint="/v1/events",
        )


def _crossing_breaches(crossing: Crossing | None) -> Iterable[Breach]:
    if crossing is None:
        return
    promises = (
        ("served_late", "served the bundle", "the channel had moved", crossing.served_after_s, SERVED_AFTER_MAX_S),
        (
            "new_item_late",
            "answered with the new item",
            "its file was there",
            crossing.new_item_after_s,
            NEW_ITEM_MAX_S,
        ),
    )
    for what, did, since, seconds, allowed in promises:
        for site, measured in seconds.items():
            if measured > allowed:
                sentence = f"{site} had not {did} {allowed:.0f} s after {since}: it took {measured:.1f} s at the least."
                yield Breach(what=what, sentence=sentence, measured=measured, allowed=allowed, unit="s")
    if crossing.lake is not None and crossing.lake.difference is not None:
        yield Breach(what="lake", sentence=f"{crossing.lake.difference}.")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
