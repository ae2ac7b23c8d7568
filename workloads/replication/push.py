"""A prepared data set into the bucket: packed, sent, verified, told in the audit log, and named by a manifest, last.

Everything a killed run has done is used by the next: packed parts, uploads and their parts, objects. What it keeps for
that lies below `<home>/onprem/replication/`, is of mode 0700 and goes when the replica is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from workloads.contract.storage import replica_manifest_key, replica_object_key
from workloads.data import replica
from workloads.data.dataset import read_meta
from workloads.data.replica import Packed, ReplicaError, ReplicaManifest
from workloads.objects.store import Conflict, NotFound, ObjectStore
from workloads.privacy.audit import Audit
from workloads.privacy.columns import DEFAULT, Policy
from workloads.privacy.pseudonym import read_key
from workloads.replication.journal import Journal
from workloads.replication.transfer import CHUNK, PARALLEL, Outgoing, Sums, Transfer
from workloads.telemetry.progress import Progress

ACTOR: Final = "replication"
_PACKED: Final = "packed.json"


class BusyError(ReplicaError):
    """Another process is pushing the same data set."""


@dataclass(frozen=True)
class Settings:
    """How to send; none of it changes what arrives, but for `part_bytes` and the policy."""

    policy: Path = DEFAULT
    rate: int | None = None
    """Bytes per second."""
    part_bytes: int = replica.PART_BYTES
    """Of a packed Parquet part: an object."""
    chunk: int = CHUNK
    """Of a request: a part of a multipart upload."""
    parallel: int = PARALLEL
    verify: bool = True


@dataclass(frozen=True)
class Pushed:
    """What is in the bucket now."""

    manifest: ReplicaManifest
    sums: Sums
    """Of this run."""


def push(
    dataset: Path,
    home: Path,
    store: ObjectStore,
    bucket: str,
    progress: Progress,
    *,
    audit: Audit,
    settings: Settings | None = None,
) -> Pushed:
    """Replicate a data set into `store`, whose name is `bucket`.

    Raises DatasetError, PolicyError, KeyFileError, ReplicaError (BusyError), ObjectsError and AuditError; then the
    bucket has no manifest, or the one that it had, and the next run goes on.
    """
    settings = settings or Settings()
    name = replica.checked_name(dataset.name)
    with _alone(home / "onprem" / "replication", name) as room:
        meta = read_meta(dataset)
        policy = Policy.read(settings.policy)
        policy_digest = hashlib.sha256(settings.policy.read_bytes()).hexdigest()
        if (there := _whole_already(store, name, meta.digest, policy_digest)) is not None:
            progress.note("push", f"{name} is in the bucket already, whole")
            return Pushed(there, Sums(found=sum(part.bytes for part in there.parts)))
        key = read_key(home / "onprem" / "key" / f"pseudonym-{meta.key_epoch}.key")
        digest = replica.packing_digest(meta, policy_digest, key.fingerprint, settings.part_bytes)
        folder = room / f"{name}-{digest[:12]}"
        _clear_others(store, room, name, folder, bucket)
        folder.mkdir(exist_ok=True, mode=0o700)
        packed = _read_packed(folder)
        if packed is None:
            tables = {table: replica.batches(dataset / file) for table, file in replica.TABLES.items()}
            packed = replica.pack(
                dataset,
                folder,
                progress,
                policy=policy,
                policy_digest=policy_digest,
                context=policy.context(key, tables),
                part_bytes=settings.part_bytes,
            )
            _write(folder / _PACKED, replica.encode(packed.manifest))
        files = [
            Outgoing(replica_object_key(part.sha256), packed.path(part), part.sha256, part.bytes)
            for part in packed.manifest.parts
        ]
        journal = Journal(folder / f"uploads-{bucket}.jsonl")
        try:
            sums = Transfer(
                store,
                journal,
                settings.rate,
                progress,
                chunk=settings.chunk,
                parallel=settings.parallel,
                verify=settings.verify,
            ).send(files)
        finally:
            journal.close()
        manifest = _publish(store, packed, folder / f"manifest-{bucket}.json", bucket, audit)
        shutil.rmtree(folder)
        return Pushed(manifest, sums)


def _whole_already(store: ObjectStore, name: str, digest: str, policy_digest: str) -> ReplicaManifest | None:
    """The replica that is in the bucket, if it is of this very data set and policy and nothing of it is missing."""
    try:
        store.head(replica_manifest_key(name))
    except NotFound:
        return None
    there = replica.read_manifest(store, name)
    _must_agree(there.digest == digest and there.policy_digest == policy_digest, there)
    try:
        sizes = [store.head(replica_object_key(part.sha256)).size for part in there.parts]
    except NotFound:
        return None
    return there if sizes == [part.bytes for part in there.parts] else None


def _must_agree(agrees: bool, there: ReplicaManifest) -> None:  # noqa: FBT001 - the one question
    if not agrees:
        raise ReplicaError(
            f"the bucket has another replica of {there.dataset}: of content {there.digest[:12]} under the policy "
            f"{there.policy} ({there.policy_digest[:12]})",
            f"remove it first: `python -m workloads.replication remove --dataset {there.dataset}`",
        )


def _publish(store: ObjectStore, packed: Packed, draft: Path, bucket: str, audit: Audit) -> ReplicaManifest:
    """Tell the audit log, then write the manifest that has the log's head. A rerun writes the same bytes."""
    if draft.is_file():
        data = draft.read_bytes()
        manifest = msgspec.json.decode(data, type=ReplicaManifest)
    else:
        facts = packed.manifest
        head = audit.append(
            action="replica.export",
            actor=ACTOR,
            subject=facts.dataset,
            detail={
                "bucket": bucket,
                "content": facts.digest,
                "policy": facts.policy,
                "policy_sha256": facts.policy_digest,
                "manifest_sha256": hashlib.sha256(replica.encode(facts)).hexdigest(),
                "parts": len(facts.parts),
                "bytes": sum(part.bytes for part in facts.parts),
                **{f"{name}_rows": table.rows for name, table in facts.tables.items()},
            },
        )
        manifest = msgspec.structs.replace(facts, audit_head=head)
        data = replica.encode(manifest)
        _write(draft, data)
    try:
        store.put_new(replica_manifest_key(manifest.dataset), data)
    except Conflict:
        there = replica.read_manifest(store, manifest.dataset)
        replace = msgspec.structs.replace
        _must_agree(replace(there, audit_head=None) == replace(manifest, audit_head=None), there)
        return there
    return manifest


def _read_packed(folder: Path) -> Packed | None:
    """What an earlier run has packed, if all of it is there."""
    try:
        packed = Packed(msgspec.json.decode((folder / _PACKED).read_bytes(), type=ReplicaManifest), folder)
        whole = all(packed.path(part).stat().st_size == part.bytes for part in packed.manifest.parts)
    except (OSError, msgspec.DecodeError):
        return None
    return packed if whole else None


def _clear_others(store: ObjectStore, room: Path, name: str, folder: Path, bucket: str) -> None:
    """Give up what earlier runs began of this data set under another policy or in other sizes."""
    for other in room.glob(f"{name}-*"):
        if other == folder or not other.is_dir():
            continue
        notes = other / f"uploads-{bucket}.jsonl"
        if notes.is_file():
            journal = Journal(notes)
            for begun in journal.open_uploads:
                store.abort(begun.key, begun.upload)
            journal.close()
        shutil.rmtree(other)


@contextlib.contextmanager
def _alone(room: Path, name: str) -> Iterator[Path]:
    """The folder for replication, with the data set's lock held. Raises BusyError."""
    room.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(room / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"another process is pushing {name}", "wait for it, or end it and start again: it goes on"
            ) from None
        yield room
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    """A file, whole or not at all."""
    draft = path.with_name(f".{path.name}")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
