"""A bucket in S3, by boto3. Endpoint, region and credentials are the standard AWS configuration's and named nowhere.

Retries are botocore's alone (standard mode); what it gives up on is Unavailable. A conditional write that the transport
tried twice may meet its own first try and be told that it lost: `put_new` compares the bytes, and who calls
`replace` reads again. Objects get no metadata; encryption is the bucket's default.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from workloads.objects.named import CONFIGURED, NOT_CONFIGURED, bucket_name
from workloads.objects.store import (
    Conflict,
    Content,
    Damaged,
    Denied,
    Digesting,
    Got,
    Head,
    Listed,
    Locked,
    NotFound,
    Part,
    Put,
    Sink,
    Unavailable,
    check,
    digest_of,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ATTEMPTS: Final = 4
CONNECT_S: Final = 5.0
READ_S: Final = 30.0
CONNECTIONS: Final = 16
CHUNK: Final = 1 << 20
SINGLE_MAX: Final = 64 << 20
"""A larger file is sent in parts."""
PART_BYTES: Final = 16 << 20
RACES: Final = 8
"""How often S3's "somebody is writing this right now" is waited out."""

_MISSING: Final = frozenset({"404", "NoSuchKey", "NotFound", "NoSuchBucket", "NoSuchUpload"})


def s3_client() -> S3Client:
    """A client from the standard AWS configuration (environment, profile, role); may be shared by threads.

    Raises Denied where no region, no credentials or no such profile are configured.
    """
    try:
        return boto3.session.Session().client(
            "s3",
            config=Config(
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                connect_timeout=CONNECT_S,
                read_timeout=READ_S,
                max_pool_connections=CONNECTIONS,
                tcp_keepalive=True,
            ),
        )
    except (*NOT_CONFIGURED, ValueError) as error:
        raise Denied(f"no client for S3: {error}", CONFIGURED) from None


class S3Objects:
    """One bucket behind `ObjectStore`. Raises Denied where a client cannot be had."""

    def __init__(self, bucket: str, client: S3Client | None = None) -> None:
        self._named = bucket
        self._s3 = client or s3_client()

    @functools.cached_property
    def bucket(self) -> str:
        """Its name, asked for once where SSM knows it (`workloads.objects.named`).

        Not before the first question: an agent starts while the cloud is away. Raises Denied, Unavailable.
        """
        return bucket_name(self._named)

    def get(self, key: str, *, sha256: str | None = None) -> Got:
        """See ObjectStore."""
        with self._asking("read", key):
            answer = self._s3.get_object(Bucket=self.bucket, Key=key)
            with contextlib.closing(answer["Body"]) as body:
                data = body.read()
        return Got(check(key, data, sha256), answer["ETag"])

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See ObjectStore."""
        if length <= 0:
            return b""
        try:
            with self._asking("read", key):
                answer = self._s3.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{start + length - 1}")
                with contextlib.closing(answer["Body"]) as body:
                    return body.read()
        except _BeyondEnd:
            return b""

    def download(self, key: str, file: Sink, *, sha256: str | None = None) -> Head:
        """See ObjectStore."""
        sink = Digesting(file)
        with self._asking("read", key):
            answer = self._s3.get_object(Bucket=self.bucket, Key=key)
            with contextlib.closing(answer["Body"]) as body:
                for chunk in body.iter_chunks(CHUNK):
                    sink.write(chunk)
        sink.check(key, sha256)
        return Head(sink.size, answer["ETag"], _ms(answer["LastModified"]))

    def head(self, key: str) -> Head:
        """See ObjectStore."""
        with self._asking("look at", key):
            answer = self._s3.head_object(Bucket=self.bucket, Key=key)
        return Head(answer["ContentLength"], answer["ETag"], _ms(answer["LastModified"]))

    def put_new(self, key: str, content: Content) -> Put:
        """See ObjectStore."""
        for _ in range(RACES):
            try:
                if isinstance(content, Path) and content.stat().st_size > SINGLE_MAX:
                    return Put(self._put_parts(key, content), existed=False)
                return Put(self._put(key, content, IfNoneMatch="*"), existed=False)
            except _Exists:
                wanted = digest_of(content)
                try:
                    there = self.download(key, _Nowhere(), sha256=wanted)
                except NotFound:
                    continue  # removed again meanwhile
                except Damaged:
                    raise Conflict(key, f"{key} is there already, with other bytes") from None
                return Put(there.etag, existed=True, modified_ms=there.modified_ms)
            except _Racing:
                continue
        raise Unavailable(f"{key}: others kept writing it, {RACES} times")

    def replace(self, key: str, content: Content, etag: str) -> str:
        """See ObjectStore."""
        for _ in range(RACES):
            try:
                return self._put(key, content, IfMatch=etag)
            except _Exists:
                raise Conflict(key) from None
            except _Racing:
                continue
        raise Unavailable(f"{key}: others kept writing it, {RACES} times")

    def list(self, prefix: str) -> Iterator[Listed]:
        """See ObjectStore."""
        with self._asking("list", prefix):
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for one in page.get("Contents", []):
                    yield Listed(one["Key"], one["Size"], one["ETag"], _ms(one["LastModified"]))

    def delete(self, key: str, *, written_before_ms: int | None = None) -> bool:
        """See ObjectStore."""
        with self._asking("remove", key):
            versions, markers = self._versions(key)
            latest = next((one for one in versions if one["IsLatest"]), None)
            if latest is None:
                return False
            if written_before_ms is not None and _ms(latest["LastModified"]) >= written_before_ms:
                return False
            # The newest last: until then the object is there, and a lock on any of them is met before that.
            # A marker is nobody's data; left behind it would hide nothing, and removed last it would show nothing.
            for one in sorted(versions, key=lambda one: bool(one["IsLatest"])):
                self._check_lock(key, one["VersionId"])
            for one in sorted(versions, key=lambda one: bool(one["IsLatest"])):
                self._remove_version(key, one["VersionId"])
            for marker in markers:
                self._remove_version(key, marker["VersionId"])
        return True

    def begin(self, key: str) -> str:
        """See ObjectStore."""
        with self._asking("write", key):
            return self._s3.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]

    def uploads(self, key: str) -> Sequence[str]:
        """See ObjectStore."""
        with self._asking("list uploads of", key):
            pages = self._s3.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=key)
            found = [one for page in pages for one in page.get("Uploads", []) if one["Key"] == key]
        return [one["UploadId"] for one in sorted(found, key=lambda one: one["Initiated"])]

    def parts(self, key: str, upload: str) -> Sequence[Part]:
        """See ObjectStore."""
        with self._asking("list parts of", key):
            pages = self._s3.get_paginator("list_parts").paginate(Bucket=self.bucket, Key=key, UploadId=upload)
            return [
                Part(one["PartNumber"], one["ETag"], one["Size"]) for page in pages for one in page.get("Parts", [])
            ]

    def put_part(self, key: str, upload: str, number: int, data: bytes) -> Part:
        """See ObjectStore."""
        with self._asking("write", key):
            answer = self._s3.upload_part(Bucket=self.bucket, Key=key, UploadId=upload, PartNumber=number, Body=data)
        return Part(number, answer["ETag"], len(data))

    def complete(self, key: str, upload: str, parts: Sequence[Part]) -> str:
        """See ObjectStore."""
        for _ in range(RACES):
            try:
                with self._asking("write", key):
                    return self._s3.complete_multipart_upload(
                        Bucket=self.bucket,
                        Key=key,
                        UploadId=upload,
                        IfNoneMatch="*",
                        MultipartUpload={"Parts": [{"PartNumber": part.number, "ETag": part.etag} for part in parts]},
                    )["ETag"]
            except _Exists:
                raise Conflict(key, f"{key} is there already") from None
            except _Racing:
                continue
        raise Unavailable(f"{key}: others kept writing it, {RACES} times")

    def abort(self, key: str, upload: str) -> None:
        """See ObjectStore."""
        with contextlib.suppress(NotFound), self._asking("give up", key):
            self._s3.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)

    # inside

    def _put(self, key: str, content: Content, **condition: str) -> str:
        with contextlib.ExitStack() as stack, self._asking("write", key):
            body = content if isinstance(content, bytes) else stack.enter_context(content.open("rb"))
            return self._s3.put_object(Bucket=self.bucket, Key=key, Body=body, **condition)["ETag"]  # type: ignore[arg-type]  # one of two str conditions

    def _put_parts(self, key: str, path: Path) -> str:
        with contextlib.suppress(NotFound):
            self.head(key)
            raise _Exists  # before gigabytes travel for nothing
        upload = self.begin(key)
        try:
            with path.open("rb") as file:
                parts = [
                    self.put_part(key, upload, number, data)
                    for number, data in enumerate(iter(lambda: file.read(PART_BYTES), b""), start=1)
                ]
            return self.complete(key, upload, parts)
        except Conflict:
            raise _Exists from None
        finally:
            self.abort(key, upload)

    def _versions(self, key: str) -> tuple[Sequence[Any], Sequence[Any]]:
        """Every version of exactly this key, and every delete marker."""
        versions, markers = [], []
        for page in self._s3.get_paginator("list_object_versions").paginate(Bucket=self.bucket, Prefix=key):
            versions += [one for one in page.get("Versions", []) if one["Key"] == key]
            markers += [one for one in page.get("DeleteMarkers", []) if one["Key"] == key]
        return versions, markers

    def _check_lock(self, key: str, version: str) -> None:
        """Raises Locked. Where the bucket has no Object Lock, or we may not ask, the removal itself tells."""
        with contextlib.suppress(ClientError):
            answer = self._s3.get_object_retention(Bucket=self.bucket, Key=key, VersionId=version)
            until = answer.get("Retention", {}).get("RetainUntilDate")
            if until is not None and until > datetime.datetime.now(datetime.UTC):
                raise Locked(key, until.astimezone(datetime.UTC))
        with contextlib.suppress(ClientError):
            hold = self._s3.get_object_legal_hold(Bucket=self.bucket, Key=key, VersionId=version)
            if hold.get("LegalHold", {}).get("Status") == "ON":
                raise Locked(key, None)

    def _remove_version(self, key: str, version: str) -> None:
        self._s3.delete_object(Bucket=self.bucket, Key=key, VersionId=version)

    @contextlib.contextmanager
    def _asking(self, verb: str, key: str) -> Iterator[None]:
        """Botocore's errors as ours, naming bucket and key."""
        where = f"s3://{self.bucket}/{key}"
        try:
            yield
        except ClientError as error:
            self._explain(verb, key, error)
        except NOT_CONFIGURED as error:
            raise Denied(f"cannot {verb} {where}: {error}", CONFIGURED) from None
        except (BotoCoreError, OSError) as error:
            raise Unavailable(f"cannot {verb} {where}: {error}") from None

    def _explain(self, verb: str, key: str, error: ClientError) -> NoReturn:
        where = f"s3://{self.bucket}/{key}"
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in {"PreconditionFailed", "412"} or status == 412:
            raise _Exists from None
        if code in {"ConditionalRequestConflict", "OperationAborted"} or status == 409:
            raise _Racing from None
        if code in {"InvalidRange", "416"}:
            raise _BeyondEnd from None
        if code == "NoSuchBucket":
            raise NotFound(self.bucket, "this account", "name the right bucket, or bring up the foundation") from None
        if code in _MISSING or status == 404:
            raise NotFound(key, f"the bucket {self.bucket}") from None
        message = f"cannot {verb} {where}: {code or status}"
        if status in {401, 403}:
            raise Denied(message) from None
        raise Unavailable(message) from None


class _Exists(Exception):  # noqa: N818 - a signal between two methods of this module
    """A condition did not hold (412)."""


class _Racing(Exception):  # noqa: N818 - as above
    """Somebody else is writing the key at this moment (409)."""


class _BeyondEnd(Exception):  # noqa: N818 - as above
    """A range begins behind the object's end (416)."""


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: bytes, /) -> None:
        """Forget it."""


def _ms(when: datetime.datetime) -> int:
    return int(when.timestamp() * 1000)
