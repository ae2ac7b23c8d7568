"""Files into the bucket under their digests: in parts, several at a time, again from where a cut left off.

A key names its content, so whatever is found under it (an object, parts of an upload that another process began) is
either what is to be there, or is found out when the object is read back and digested, which happens to every one.
Knows nothing of what the files hold.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from workloads.objects.store import Conflict, Damaged, NotFound, ObjectsError, ObjectStore, Part, Unavailable
from workloads.replication.bandwidth import Bandwidth
from workloads.replication.journal import Begun, Closed, Journal, Sent
from workloads.telemetry.progress import Progress

CHUNK_MIN: Final = 5 << 20
"""S3 takes no smaller part, but for the last."""
CHUNK: Final = 8 << 20
PARALLEL: Final = 4


@dataclass(frozen=True)
class Outgoing:
    """A file and the key that it goes under."""

    key: str
    path: Path
    sha256: str
    size: int


@dataclass
class Sums:
    """What a transfer did, in bytes."""

    sent: int = 0
    """Given to the store in this run."""
    found: int = 0
    """There already: whole objects, and parts of uploads that were cut off."""
    verified: int = 0
    """Read back and digested."""


@dataclass
class _Upload:
    """One file on its way, chunk by chunk."""

    file: Outgoing
    upload: str
    arrived: dict[int, Part] = field(default_factory=dict)


class Transfer:
    """Sends files; made for one run.

    At most `parallel` parts of at most `chunk` bytes are on their way at any time, which is what a cut can cost. `rate`
    is in bytes per second, out and, while what was sent is read back, in.
    """

    def __init__(
        self,
        store: ObjectStore,
        journal: Journal,
        rate: int | None,
        progress: Progress,
        *,
        chunk: int = CHUNK,
        parallel: int = PARALLEL,
        verify: bool = True,
    ) -> None:
        if chunk < 1 or parallel < 1:
            raise ValueError("a transfer needs a chunk of bytes and somebody to send it")
        self.sums = Sums()
        self._store = store
        self._journal = journal
        self._bandwidth = Bandwidth(rate)
        self._back = Bandwidth(rate)
        self._progress = progress
        self._chunk = chunk
        self._parallel = parallel
        self._verify = verify
        self._mutex = threading.Lock()
        self._total = 0

    def send(self, files: Sequence[Outgoing]) -> Sums:
        """Bring every file into the bucket and verify it there.

        Raises ObjectsError; Damaged when what arrived twice was not what was sent. Uploads stay open then, and are gone
        on with. Uploads in the journal that are none of these files' are given up.
        """
        self._total = sum(file.size for file in files)
        keys = {file.key for file in files}
        for begun in self._journal.open_uploads:
            if begun.key not in keys or begun.chunk != self._chunk:
                self._give_up(begun.key, begun.upload)
        with ThreadPoolExecutor(self._parallel, thread_name_prefix="send") as pool:
            try:
                self._run(pool, files)
            except BaseException:
                self._bandwidth.stop()
                self._back.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self.sums

    def _run(self, pool: ThreadPoolExecutor, files: Sequence[Outgoing]) -> None:
        """Parts of the next file are already sent while the last ones of this file are on their way."""
        # As many are ready as are running, and no more, so that a fault is met early.
        places = threading.Semaphore(2 * self._parallel)
        begun: list[Future[None]] = []

        def submit(act: Callable[..., None], *given: object) -> Future[None]:
            while not places.acquire(timeout=0.2):
                _raise_first(begun)
            _raise_first(begun)
            future = pool.submit(act, *given)
            future.add_done_callback(lambda _: places.release())
            begun.append(future)
            return future

        for file in files:
            if self._is_there(file):
                submit(self._read_back, file)
            elif file.size <= self._chunk:
                submit(self._whole, file)
            else:
                upload = self._open_upload(file)
                numbers = range(1, -(-file.size // self._chunk) + 1)
                parts = [submit(self._part, upload, n) for n in numbers if n not in upload.arrived]
                # It waits for parts that were given to the pool before it, so they have all begun by then.
                submit(self._finish, upload, parts)
        wait(begun, return_when=FIRST_EXCEPTION)
        _raise_first(begun)

    def _whole(self, file: Outgoing) -> None:
        self._bandwidth.turn(file.size)
        put = self._store.put_new(file.key, file.path.read_bytes())
        self._count(**{"found" if put.existed else "sent": file.size})
        self._read_back(file)

    def _open_upload(self, file: Outgoing) -> _Upload:
        """The upload that was begun for this file, with the parts that the store has of it; or a new one."""
        noted = [begun.upload for begun in self._journal.open_uploads if begun.key == file.key]
        # Without notes, what another process began is as good: same key, same bytes.
        for name in noted or self._store.uploads(file.key):
            try:
                arrived = {part.number: part for part in self._store.parts(file.key, name)}
            except NotFound:
                self._note(Closed(upload=name))
                continue
            etags = self._journal.etags(name)
            kept = {
                number: part
                for number, part in arrived.items()
                if part.size == self._size(file, number) and etags.get(number, part.etag) == part.etag
            }
            if name not in noted:
                self._note(Begun(key=file.key, upload=name, chunk=self._chunk))
            self._count(found=sum(part.size for part in kept.values()))
            return _Upload(file, name, kept)
        name = self._store.begin(file.key)
        self._note(Begun(key=file.key, upload=name, chunk=self._chunk))
        return _Upload(file, name)

    def _size(self, file: Outgoing, number: int) -> int:
        """Bytes of a part; 0 for a number that the file does not have."""
        return max(0, min(self._chunk, file.size - (number - 1) * self._chunk))

    def _part(self, upload: _Upload, number: int) -> None:
        file = upload.file
        with file.path.open("rb") as opened:
            opened.seek((number - 1) * self._chunk)
            data = opened.read(self._size(file, number))
        self._bandwidth.turn(len(data))
        part = self._store.put_part(file.key, upload.upload, number, data)
        with self._mutex:
            self._journal.write(Sent(upload=upload.upload, number=number, etag=part.etag))
            upload.arrived[number] = part
        self._count(sent=len(data))

    def _finish(self, upload: _Upload, parts: Sequence[Future[None]]) -> None:
        for part in parts:
            part.result()
        file = upload.file
        try:
            self._store.complete(file.key, upload.upload, [upload.arrived[n] for n in sorted(upload.arrived)])
        except (Conflict, NotFound) as error:
            lost: ObjectsError | None = error  # it may be our own first try that won, its answer lost on the way
        else:
            lost = None
        if self._store.head(file.key).size != file.size:
            self._store.delete(file.key)
            raise lost or Unavailable(f"{file.key}: the store made less of its parts than was sent", "push again")
        self._note(Closed(upload=upload.upload))
        for other in self._store.uploads(file.key):  # begun by a run that lost its notes
            self._store.abort(file.key, other)
        self._read_back(file)

    def _is_there(self, file: Outgoing) -> bool:
        """Whether the object is there in its full length. One of another length is no such object: it is removed."""
        try:
            size = self._store.head(file.key).size
        except NotFound:
            return False
        if size != file.size:
            self._progress.note("upload", f"{file.key} has {size} bytes instead of {file.size}: it is sent again")
            self._store.delete(file.key)
            return False
        self._count(found=file.size)
        return True

    def _read_back(self, file: Outgoing) -> None:
        """What the store says of checksums is not relied on: read it, digest it."""
        if not self._verify:
            return
        sha256 = hashlib.sha256()
        for start in range(0, file.size, self._chunk):
            length = min(self._chunk, file.size - start)
            self._back.turn(length)
            sha256.update(self._store.get_range(file.key, start, length))
            with self._mutex:
                self.sums.verified += length
                self._progress.step("verify", self.sums.verified, self._total, "bytes")
        if sha256.hexdigest() != file.sha256:
            self._store.delete(file.key)  # its name says that it is nothing that anybody could miss
            damaged = Damaged(file.key, sha256.hexdigest(), file.sha256)
            damaged.remedy = "it was removed: push again"
            raise damaged

    def _give_up(self, key: str, upload: str) -> None:
        self._store.abort(key, upload)
        self._note(Closed(upload=upload))

    def _note(self, line: Begun | Closed) -> None:
        with self._mutex:
            self._journal.write(line)

    def _count(self, *, sent: int = 0, found: int = 0) -> None:
        with self._mutex:
            self.sums.sent += sent
            self.sums.found += found
            done = self.sums.sent + self.sums.found
            self._progress.step("upload", done, self._total, "bytes", sent=float(self.sums.sent))


def _raise_first(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        if future.done() and not future.cancelled() and (error := future.exception()) is not None:
            raise error
