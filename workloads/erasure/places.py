"""The places that hold something of a person, each behind one door: what to remove, and what was removed.

A place takes pseudonyms and removes everything under them, durably, so that calling it again finds nothing. The order
in which places are asked matters (`places_of`): what could flow on is emptied before what it flows into. Who is to be
forgotten and when it is over is `workloads.erasure.job`'s.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import io
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from workloads.contract.http import PATH_ERASE, ErasureAnswer, ErasureRequest
from workloads.contract.storage import replica_object_key
from workloads.data import replica
from workloads.data.profiles import ProfilesDownError, ProfileStore
from workloads.data.removal import remove_from_home, remove_people, thin_sample
from workloads.lake.faults import LakeError
from workloads.lake.lake import Lake
from workloads.objects.store import NotFound, ObjectsError, ObjectStore

_AT_ONCE: Final = 1000
"""Pseudonyms in one request to the intake, `contract.http.ErasureRequest`."""
_INTAKE_TIMEOUT_S: Final = 60.0


class PlaceError(Exception):
    """A place that cannot be emptied now; names fault and remedy, and no person."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault
        self.remedy = remedy


class Place(Protocol):
    """The door to one place."""

    name: str

    def remove(self, people: Collection[str]) -> int:
        """Remove everything of these pseudonyms; how much there was (events, profiles, files). Raises PlaceError."""
        ...


class MemoryPlace:
    """The fake: a dict of what is known of whom; `fault` makes the next call fail."""

    def __init__(self, name: str, holds: dict[str, int] | None = None) -> None:
        self.name = name
        self.holds = dict(holds or {})
        self.fault: Exception | None = None

    def remove(self, people: Collection[str]) -> int:
        """See `Place`."""
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        return sum(self.holds.pop(who, 0) for who in people)


class Spool:
    """Acknowledged events, by way of the intake: nobody else writes its file. `None` for a home without an intake."""

    name = "spool"

    def __init__(self, url: str | None, file: Path) -> None:
        self._url = url
        self._file = file

    def remove(self, people: Collection[str]) -> int:
        """See `Place`."""
        if self._url is None:
            if self._file.exists():
                raise PlaceError(
                    f"{self._file}: only a running intake may change it", "start it, and give --intake URL"
                )
            return 0
        ordered = sorted(people)
        gone = 0
        for start in range(0, len(ordered), _AT_ONCE):
            answer = self._ask(ErasureRequest(pseudonyms=ordered[start : start + _AT_ONCE]))
            gone += answer.events + answer.dead_letters
        return gone

    def _ask(self, request: ErasureRequest) -> ErasureAnswer:
        parts = urlsplit(self._url or "")
        remedy = "start the intake, and run this again"
        if parts.scheme != "http" or not parts.hostname:
            raise PlaceError(f"{self._url!r} is no intake's address", "write http://HOST:PORT")
        connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=_INTAKE_TIMEOUT_S)
        try:
            headers = {"content-type": "application/msgpack"}
            connection.request("POST", PATH_ERASE, msgspec.msgpack.encode(request), headers)
            reply = connection.getresponse()
            body = reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise PlaceError(f"the intake at {parts.netloc} does not answer ({type(error).__name__})", remedy) from None
        finally:
            connection.close()
        if reply.status != http.HTTPStatus.OK:
            raise PlaceError(f"the intake at {parts.netloc} answers {reply.status}", "see its log, and run this again")
        try:
            return msgspec.msgpack.decode(body, type=ErasureAnswer)
        except msgspec.DecodeError:
            raise PlaceError(f"what answers at {parts.netloc} is no intake of this release", remedy) from None


class LakeFiles:
    """Parquet files, snapshots and catalogue of the lake."""

    name = "lake"

    def __init__(self, path: Path) -> None:
        self._path = path

    def remove(self, people: Collection[str]) -> int:
        """See `Place`."""
        if not self._path.is_dir():
            return 0
        try:
            with Lake.open(self._path) as lake:
                return lake.erase(people).events
        except LakeError as error:
            raise PlaceError(error.fault, error.remedy) from None
        except OSError as error:
            raise PlaceError(f"{self._path}: {error.strerror}", "see the disk, and run this again") from None


class PeopleStore(Protocol):
    """What becomes of people in a store of profiles (`data.profiles.ProfileStore`). Raises ProfilesDownError."""

    def delete(self, pseudonyms: Sequence[str]) -> int:
        """Forget these people; the number that were known."""
        ...

    def copy(self, names: Mapping[str, str]) -> int:
        """Give people a second pseudonym; the number made."""
        ...


class EveryStore:
    """The store that gateways share and the home's own file, from which it is filled: the same becomes of both."""

    def __init__(self, stores: Sequence[ProfileStore]) -> None:
        self._stores = stores

    def delete(self, pseudonyms: Sequence[str]) -> int:
        """See `PeopleStore`."""
        return sum(store.delete(pseudonyms) for store in self._stores)

    def copy(self, names: Mapping[str, str]) -> int:
        """See `PeopleStore`."""
        return sum(store.copy(names) for store in self._stores)


class Profiles:
    """The online store of profiles."""

    name = "profiles"

    def __init__(self, store: PeopleStore) -> None:
        self._store = store

    def remove(self, people: Collection[str]) -> int:
        """See `Place`."""
        try:
            return self._store.delete(sorted(people))
        except ProfilesDownError as error:
            raise PlaceError(
                f"profiles cannot be deleted ({error})", "bring the store back, and run this again"
            ) from None


class DataSets:
    """Prepared data sets at home, and the sample of users."""

    name = "data sets"

    def __init__(self, home: Path, knows: Callable[[str], bool]) -> None:
        self._home = home
        self._knows = knows

    def remove(self, people: Collection[str]) -> int:
        """See `Place`."""
        with _disk():
            return remove_from_home(self._home, people).events + thin_sample(self._home, self._knows)


class FetchedDataSets:
    """Copies of replicas, where a training fetched them."""

    name = "fetched replicas"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def remove(self, people: Collection[str]) -> int:
        """See `Place`."""
        with _disk():
            for draft in self._folder.glob(".fetch-*"):
                if any(_holds(file.read_bytes(), people) for file in draft.glob("*.parquet")):
                    shutil.rmtree(draft)
            return remove_people(self._folder, people, lambda _old, _new: None).events


class Replicas:
    """What of the data sets is in the bucket, or on its way there.

    A replica whose data set is still at home is as free of the person as that is, since its name is the content's
    digest; what has no data set at home any more, or no manifest, is looked into. What holds the person goes, every
    version of it; the data set's successor is replicated by the next push.
    """

    name = "replicas"

    def __init__(self, home: Path, store: ObjectStore, clock: Callable[[], int] | None = None) -> None:
        self._datasets = home / "onprem" / "datasets"
        self._room = home / "onprem" / "replication"
        self._store = store
        self._clock = clock if clock is not None else lambda: time.time_ns() // 1_000_000

    def remove(self, people: Collection[str]) -> int:
        """See `Place`."""
        try:
            with _disk():
                return self._packings(people) + self._replicas(people) + self._unclaimed(people)
        except (ObjectsError, replica.ReplicaError) as error:
            raise PlaceError(error.fault, error.remedy) from None

    def _packings(self, people: Collection[str]) -> int:
        """Parts that are packed and perhaps begun to be sent."""
        gone = 0
        for folder in sorted(self._room.glob("*-*")) if self._room.is_dir() else ():
            files = list(folder.glob("*.parquet")) + list(folder.glob("*.draft"))
            if not any(_holds(file.read_bytes(), people) for file in files):
                continue
            with self._no_push(folder.name.rpartition("-")[0]):
                for file in files:
                    key = replica_object_key(file.stem)
                    for upload in self._store.uploads(key):
                        self._store.abort(key, upload)
                shutil.rmtree(folder)
            gone += 1
        return gone

    @contextlib.contextmanager
    def _no_push(self, dataset: str) -> Iterator[None]:
        """Hold the lock that a push of the data set holds (`workloads.replication.push`)."""
        descriptor = os.open(self._room / f"{dataset}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PlaceError(f"{dataset} is being replicated", "wait for the push, or end it") from None
            yield
        finally:
            os.close(descriptor)

    def _replicas(self, people: Collection[str]) -> int:
        gone = 0
        for name in replica.replicas(self._store):
            if (self._datasets / name).is_dir():
                continue
            parts = replica.read_manifest(self._store, name).tables["events"].parts
            if any(self._in_bucket(replica_object_key(part.sha256), people) for part in parts):
                replica.remove(self._store, name, now_ms=self._clock())
                gone += 1
        return gone

    def _unclaimed(self, people: Collection[str]) -> int:
        claimed = {
            replica_object_key(part.sha256)
            for name in replica.replicas(self._store)
            for part in replica.read_manifest(self._store, name).parts
        }
        gone = 0
        for each in list(self._store.list(replica_object_key(""))):
            if each.key not in claimed and self._in_bucket(each.key, people):
                gone += self._store.delete(each.key)
        return gone

    def _in_bucket(self, key: str, people: Collection[str]) -> bool:
        try:
            return _holds(self._store.get(key).data, people)
        except NotFound:
            return False


def places_of(
    home: Path,
    *,
    intake: str | None,
    profiles: PeopleStore | None,
    bucket: ObjectStore | None,
    knows: Callable[[str], bool],
) -> Sequence[Place]:
    """Every place of a home, in the order in which they must be emptied, under `data.custody`."""
    # A data set may be loaded into the lake meanwhile; nothing is prepared of the lake (`data.custody`).
    places: list[Place] = [Spool(intake, home / "onprem" / "events.sqlite"), DataSets(home, knows)]
    places.append(LakeFiles(home / "onprem" / "lake"))
    if profiles is not None:
        places.append(Profiles(profiles))
    if bucket is not None:
        places.append(Replicas(home, bucket))
    places.append(FetchedDataSets(home / "aws" / "training" / "replica"))
    return places


def _holds(data: bytes, people: Collection[str]) -> bool:
    """Whether a Parquet file names one of these people; one that cannot be read may."""
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        columns = [name for name in ("user", "session") if name in file.schema_arrow.names]
        table = file.read(columns=columns)
    except (pa.ArrowException, OSError):
        return True
    wanted = pa.array(sorted(people), pa.string())
    return any(
        pc.any(pc.is_in(pc.cast(table[name], pa.string()), value_set=wanted)).as_py() or False for name in columns
    )


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PlaceError(
            f"{error.filename or 'a file'}: {error.strerror}", "check the path, its rights and the disk"
        ) from None
