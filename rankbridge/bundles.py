"""`rankbridge bundle ...` and `rankbridge audit ...`: the registry of models and the audit log, at the desk.

What is done is in `workloads.bundle.registry` and `workloads.privacy.audit`; here is how it is asked for and shown.
Bucket and password come from options or the environment, AWS from its standard configuration; a password is never an
argument.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rankbridge import asked, jobs
from rankbridge.cloud import MODELS_BUCKET
from rankbridge.faults import DeskError, ExitCode
from rankbridge.layout import Layout
from workloads.contract.sites import HOME, SITES
from workloads.contract.storage import ChannelPointer, Release

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from workloads.bundle.registry import Registry
    from workloads.bundle.signature import Key, Trust

PASSWORD: Final = "RANKBRIDGE_SIGNING_PASSWORD"  # noqa: S105 - a variable's name
"""Environment variable with the password of the publisher's key, or `secretsmanager:NAME` where AWS keeps it."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Bundles: build, sign, publish, promote, roll back, compare, clean up.",
)
audit = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="The log of what left and what moved.")

_WIDTH = 120
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)

BucketOption = Annotated[
    str | None,
    typer.Option(
        "--models-bucket",
        metavar="NAME",
        envvar=MODELS_BUCKET,
        help="Bucket of published models, or ssm:PARAMETER#ENTRY.",
    ),
]
TrustOption = Annotated[
    Path | None, typer.Option("--trust", metavar="DIR", help="Public keys that count; default: home's.")
]
KeyOption = Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Private key; default: the publisher's.")]
ExpectOption = Annotated[
    int | None,
    typer.Option("--expect", min=0, metavar="SEQUENCE", help="Only if the channel still stands at this sequence."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
BundleArgument = Annotated[
    str | None, typer.Argument(metavar="[ID]", help="Begin of a bundle's id; default: the newest.")
]


@app.command()
def build(
    dataset: Annotated[Path | None, typer.Option(metavar="DIR", help="Prepared data set; default: the newest.")] = None,
    training: Annotated[Path | None, typer.Option(metavar="DIR", help="Training run; default: the newest.")] = None,
    key: KeyOption = None,
) -> None:
    """Make a bundle of a training run and sign it.

    Example: `rankbridge bundle build`
    """
    layout = _layout()
    run, source = training or asked.newest_training(layout), dataset or asked.newest_dataset(layout)
    with jobs.viewing(_out) as view:
        made = jobs.run(
            "workloads.export",
            asked.export_arguments(layout, run, source),
            log=layout.log("export"),
            view=view,
            root=layout.root,
        ).made
    bundle = Path(made["bundle"])
    sign(layout, bundle, key)
    _say(f"bundle: {bundle.name}", f"signed: {layout.shown(bundle)}.sig")


@app.command()
def key(
    path: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Default: the publisher's place.")] = None,
) -> None:
    """Make the key that bundles are signed with, and let both sites trust it. One that is there is kept.

    Encrypted when RANKBRIDGE_SIGNING_PASSWORD is set, to a password or to secretsmanager:NAME.

    Example: `rankbridge bundle key`
    """
    layout = _layout()
    with told():
        made = trusted_key(layout, path)
    _say(
        f"private key: {layout.shown(made.private)} (keep it there, mode 0600)",
        f"public key:  {layout.shown(made.public)}",
    )
    _say(f"fingerprint: {made.fingerprint}")


@app.command()
def verify(
    bundle: BundleArgument = None,
    *,
    folder: Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="A bundle anywhere.")] = None,
    trust: TrustOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a bundle on disk, its content, and whose signature it has.

    Example: `rankbridge bundle verify 3fa9`
    """
    from workloads.bundle import store  # noqa: PLC0415 - numpy and Arrow, which other commands need not wait for
    from workloads.bundle.signature import signature_path, verify_signature  # noqa: PLC0415 - as above

    layout = _layout()
    with told():
        path = folder.resolve() if folder else _local(layout, bundle)
        manifest = store.verify(path)
        signer = verify_signature(path, signature_path(path), _trust(layout, trust))
    facts = {
        "id": path.name,
        "signer": signer.name,
        "fingerprint": signer.fingerprint,
        "files": len(manifest.files),
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "dataset": manifest.dataset,
    }
    if as_json:
        _json(facts)
    else:
        _say(f"{path.name}: {facts['files']} files, {facts['bytes']} bytes, whole and signed by {signer.name}")


@app.command()
def publish(
    bundle: BundleArgument = None,
    *,
    key: KeyOption = None,
    trust: TrustOption = None,
    models_bucket: BucketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a bundle into the registry, signed; again is harmless. No channel moves.

    Example: `rankbridge bundle publish --models-bucket rankbridge-models`
    """
    from workloads.bundle.signature import signature_path  # noqa: PLC0415 - as in `verify`

    layout = _layout()
    with told():
        models = registry(layout, models_bucket, trust)
        path = _local(layout, bundle)
        if not signature_path(path).exists():
            sign(layout, path, key)
        done = models.publish(path, signature_path(path), actor=_actor())
    if as_json:
        _json(done)
    else:
        _say(
            f"{done.id} is published: {done.files} files, {done.bytes} bytes, of which {done.sent} were sent",
            f"serve it: `rankbridge bundle promote {done.id[:12]}`",
        )


@app.command()
def promote(
    bundle: Annotated[str, typer.Argument(metavar="ID", help="Begin of a published bundle's id.")],
    channel: Annotated[str, typer.Argument(help="stable, canary or another name.")] = "stable",
    *,
    delta: Annotated[
        list[str] | None, typer.Option("--delta", metavar="ID", help="A delta on top, whole id; repeat it in order.")
    ] = None,
    expect: ExpectOption = None,
    trust: TrustOption = None,
    models_bucket: BucketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a channel point to a published bundle: the sites that watch it go there.

    Example: `rankbridge bundle promote 3fa9 canary`
    """
    with told():
        models = registry(_layout(), models_bucket, trust)
        release = Release(bundle=models.resolve(bundle), deltas=delta or [])
        _moved(models.promote(channel, release, _actor(), expect=expect), as_json=as_json)


@app.command()
def rollback(
    channel: Annotated[str, typer.Argument(help="stable, canary or another name.")] = "stable",
    *,
    expect: ExpectOption = None,
    trust: TrustOption = None,
    models_bucket: BucketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a channel point to what it pointed to before. Again: nothing more happens.

    Example: `rankbridge bundle rollback stable`
    """
    with told():
        models = registry(_layout(), models_bucket, trust)
        _moved(models.rollback(channel, _actor(), expect=expect), as_json=as_json)


@app.command(name="list")
def list_command(*, trust: TrustOption = None, models_bucket: BucketOption = None, as_json: JsonOption = False) -> None:
    """Published bundles, the newest first, and the channels that point to them.

    Example: `rankbridge bundle list --json`
    """
    with told():
        models = registry(_layout(), models_bucket, trust)
        found, pointers = models.list(), [*models.channels.all()]
    if as_json:
        _json({"bundles": found, "channels": pointers})
        return
    table = Table(title=f"{len(found)} bundles")
    for column in ("bundle", "published", "data set", "items", "MB", "deltas", "signer", "channels"):
        table.add_column(column, justify="right" if column in {"items", "MB", "deltas"} else "left")
    for one in found:
        table.add_row(
            one.id[:12],
            _when(one.published_ms),
            escape(one.dataset),
            str(one.items),
            f"{one.bytes / 1e6:.1f}",
            str(one.deltas),
            escape(one.signer or "not trusted"),
            escape(", ".join(one.channels)),
        )
    _out.print(table)
    for pointer in pointers:
        _say(_pointer(pointer))


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="ID", help="Begin of a published bundle's id.")],
    after: Annotated[str, typer.Argument(metavar="ID", help="Begin of another's.")],
    *,
    trust: TrustOption = None,
    models_bucket: BucketOption = None,
    as_json: JsonOption = False,
) -> None:
    """What changed from one bundle to another: files, metrics, feature schema.

    Example: `rankbridge bundle diff 3fa9 77c0`
    """
    with told():
        models = registry(_layout(), models_bucket, trust)
        found = models.diff(models.resolve(before), models.resolve(after))
    if as_json:
        _json(found)
        return
    table = Table(title=f"{found.before[:12]} to {found.after[:12]}; {found.same_bytes / 1e6:.1f} MB are the same")
    for column in ("", "what", "before", "after"):
        table.add_column(column, justify="right" if column in {"before", "after"} else "left")
    for word, changes in (("made", found.facts), ("metric", found.metrics), ("feature", found.features)):
        for change in changes:
            table.add_row(word, escape(change.name), _value(change.before), _value(change.after))
    for file in found.files:
        table.add_row("bytes", escape(file.name), _value(file.before), _value(file.after))
    _out.print(table)


@app.command()
def gc(
    *,
    keep: Annotated[int, typer.Option(min=0, help="So many of the newest bundles stay in any case.")] = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and let it stay.")] = False,
    trust: TrustOption = None,
    models_bucket: BucketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove published bundles that no channel needs, and files that no bundle names.

    What was written in the last 24 hours stays, and so does what Object Lock holds: it says until when.

    Example: `rankbridge bundle gc --keep 3 --dry-run`
    """
    with told():
        done = registry(_layout(), models_bucket, trust).gc(keep, actor=_actor(), dry_run=dry_run)
    if as_json:
        _json(done)
        return
    word = "would go" if dry_run else "are gone"
    size = f"{done.bytes / 1e6:.1f} MB"
    _say(
        f"{len(done.bundles)} bundles, {len(done.deltas)} deltas and {done.objects} files ({size}) {word}",
        *(f"kept: {one.reason}" for one in done.kept),
    )


@app.command(name="add-items")
def add_items(
    items: Annotated[
        Path, typer.Argument(metavar="FILE", help="New items: .csv, .jsonl or .parquet with item and title at least.")
    ],
    channel: Annotated[str, typer.Argument(help="stable, canary or another name.")] = "stable",
    *,
    key: KeyOption = None,
    trust: TrustOption = None,
    models_bucket: BucketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the sites of a channel recommend new items within a minute, without training.

    Columns: item, title, description, category, price, image (16 numbers), in_stock. They go on top of what the
    channel serves as a signed delta; a row that breaks a rule is named, and then nothing is published.
    Example: `rankbridge bundle add-items new.csv`
    """
    layout = _layout()
    if not models_bucket:
        raise DeskError("no bucket of models is named", f"give --models-bucket NAME, or set {MODELS_BUCKET}")
    paths = {
        "--items": items,
        "--work": layout.training_home,
        "--key": key or layout.publisher_key,
        "--trust": trust or layout.trust(HOME.name),
        "--audit": layout.audit,
    }
    names = {"--channel": channel, "--models-bucket": models_bucket, "--actor": _actor()}
    with jobs.viewing(Console(stderr=True, highlight=False) if as_json else _out) as view:
        made = jobs.run(
            "workloads.delta",
            [
                "add",
                *(word for name, path in paths.items() for word in (name, str(path.absolute()))),
                *(word for option in names.items() for word in option),
            ],
            log=layout.log("delta"),
            view=view,
            root=layout.root,
        ).made
    if as_json:
        _json(made)
    else:
        _say(
            f"{made['channel']}: {made['bundle'][:12]} with {made['deltas']} deltas (sequence {made['sequence']})",
            f"take the last one back: `rankbridge bundle rollback {made['channel']}`",
        )


@audit.command(name="verify")
def audit_verify(
    *,
    log: Annotated[Path | None, typer.Option("--log", metavar="FILE", help="Default: home's audit log.")] = None,
    models_bucket: BucketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold the audit log against itself and, with a bucket, against the heads that its channels keep.

    Ends with 0 when it is whole, with 1 when it was tampered with or cut. Example: `rankbridge audit verify`
    """
    from workloads.privacy.audit import Anchor  # noqa: PLC0415 - as in `verify`
    from workloads.privacy.audit import verify as verify_log  # noqa: PLC0415

    layout = _layout()
    path = log or layout.audit
    anchors = []
    with told():
        if models_bucket:
            from workloads.bundle.channels import Channels  # noqa: PLC0415 - as in `verify`
            from workloads.objects.s3 import S3Objects  # noqa: PLC0415

            anchors = [
                Anchor(pointer.audit_head, f"channel {pointer.channel}")
                for pointer in Channels(S3Objects(models_bucket)).all()
                if pointer.audit_head is not None
            ]
        found = verify_log(path, anchors)
    if as_json:
        faults = [fault._asdict() for fault in found.faults]
        _json(
            {"log": str(path), "entries": found.entries, "head": found.head, "anchors": len(anchors), "faults": faults}
        )
    else:
        _say(*(f"{layout.shown(path)}: {fault}" for fault in found.faults))
        state = "is whole" if not found.faults else f"has {len(found.faults)} faults"
        _say(f"{layout.shown(path)} {state}: {found.entries} lines, held against {len(anchors)} heads kept elsewhere")
    raise typer.Exit(ExitCode.OK if not found.faults else ExitCode.VERDICT_FAILED)


def trusted_key(layout: Layout, path: Path | None = None) -> Key:
    """The publisher's key, made where there is none, and trusted by both sites.

    Raises SignatureFault, OSError, and ObjectsError for a password that AWS does not give.
    """
    from workloads.bundle.signature import make_key  # noqa: PLC0415 - as in `verify`

    made = make_key(path or layout.publisher_key, password=_password())
    for site in SITES:
        folder = layout.trust(site)
        folder.mkdir(parents=True, exist_ok=True)
        there = folder / made.public.name
        if not there.exists() or there.read_bytes() != made.public.read_bytes():
            fresh = folder / f".{made.public.name}.{os.getpid()}"
            shutil.copyfile(made.public, fresh)
            fresh.replace(there)
    return made


def sign(layout: Layout, bundle: Path, key: Path | None = None) -> Path:
    """Sign a bundle with the publisher's key; the signature's path, beside it. Raises DeskError."""
    from workloads.bundle.signature import sign  # noqa: PLC0415 - as in `verify`

    with told():
        return sign(bundle, key or layout.publisher_key, password=_password())


def _password() -> str | None:
    """Raises ObjectsError."""
    given = os.environ.get(PASSWORD)
    if given is None:
        return None
    from workloads.objects.named import password  # noqa: PLC0415 - boto, which an unencrypted key needs not wait for

    return password(given)


def registry(
    layout: Layout, bucket: str | None, trust: Path | None = None, *, client: S3Client | None = None
) -> Registry:
    """The registry in a bucket, audited at home; `client` in place of the standard AWS configuration's.

    Raises DeskError without a bucket, SignatureFault without a key that is trusted.
    """
    from workloads.bundle.registry import Registry  # noqa: PLC0415 - as in `verify`
    from workloads.objects.s3 import S3Objects  # noqa: PLC0415
    from workloads.privacy.audit import AuditLog  # noqa: PLC0415

    if not bucket:
        raise DeskError("no bucket of models is named", f"give --models-bucket NAME, or set {MODELS_BUCKET}")
    return Registry(S3Objects(bucket, client), _trust(layout, trust), audit=AuditLog(layout.audit).append)


def _trust(layout: Layout, folder: Path | None) -> Trust:
    from workloads.bundle.signature import Trust  # noqa: PLC0415 - as in `verify`

    return Trust.read(folder or layout.trust(HOME.name))


def _local(layout: Layout, prefix: str | None) -> Path:
    from workloads.bundle import store  # noqa: PLC0415 - as in `verify`

    if prefix is None:
        newest = store.newest(layout.bundles)
        if newest is None:
            raise DeskError(
                f"there is no bundle under {layout.shown(layout.bundles)}", "make one: `rankbridge bundle build`"
            )
        return newest
    try:
        return store.find(layout.bundles, prefix)
    except LookupError as error:
        known = ", ".join(sorted(path.name[:12] for path in layout.bundles.glob("[0-9a-f]*[0-9a-f]"))) or "none"
        raise DeskError(str(error), f"bundles here: {known}") from error


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What the registry, its store, a signature or the log says as the desk says it."""
    from workloads.bundle.channels import RegistryFault  # noqa: PLC0415 - as in `verify`
    from workloads.bundle.signature import SignatureFault  # noqa: PLC0415
    from workloads.bundle.verification import BundleFault  # noqa: PLC0415
    from workloads.objects.store import ObjectsError  # noqa: PLC0415
    from workloads.privacy.audit import AuditError  # noqa: PLC0415

    try:
        yield
    except (RegistryFault, ObjectsError, AuditError) as error:
        raise DeskError(error.fault, error.remedy) from error
    except (BundleFault, SignatureFault) as error:
        raise DeskError(str(error), error.remedy) from error
    except ValueError as error:  # a channel's name that none may have
        raise DeskError(str(error), "give another one") from error
    except OSError as error:
        raise DeskError(
            f"{error.filename}: {error.strerror}", "see who owns it, and whether the disk is full"
        ) from error


def _actor() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def _moved(pointer: ChannelPointer, *, as_json: bool) -> None:
    if as_json:
        _json(pointer)
    else:
        _say(_pointer(pointer))


def _pointer(pointer: ChannelPointer) -> str:
    def name(release: Release) -> str:
        return release.bundle[:12] + (f"+{len(release.deltas)}" if release.deltas else "")

    before = f", before that {name(pointer.previous)}" if pointer.previous else ""
    left = f", rolled back from {name(pointer.left)}" if pointer.left else ""
    return (
        f"{pointer.channel}: {name(pointer.current)} since {_when(pointer.moved_ms)} by {pointer.actor} "
        f"(sequence {pointer.sequence}{before}{left})"
    )


def _when(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(ms / 1000))


def _value(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else escape(str(value))


def _json(value: object) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def _say(*lines: str) -> None:
    for line in lines:
        _out.print(escape(line), soft_wrap=True)


def _layout() -> Layout:
    return Layout.of(os.environ)
