"""What is S3's alone: where its settings come from, how its faults are told, what goes into metadata."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Callable, Iterator

import boto3
import pytest
from botocore.config import Config

from workloads.objects.s3 import ATTEMPTS, S3Objects, s3_client
from workloads.objects.store import Denied, NotFound, Unavailable

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]
Script = Callable[[Answer], tuple[S3Objects, list[str]]]


class _Scripted(http.server.BaseHTTPRequestHandler):
    """An S3 that answers as told and counts."""

    protocol_version = "HTTP/1.1"
    answer: Answer
    seen: list[str]

    def _do(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append(f"{self.command} {self.path}")
        type(self).answer(self)

    do_GET = do_PUT = do_HEAD = do_DELETE = _do  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        """Be quiet."""


def _code(status: int, code: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        body = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def _cut(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.send_header("ETag", '"1"')
    handler.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
    handler.end_headers()
    handler.wfile.write(b"half of it")
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(answer: Answer) -> tuple[S3Objects, list[str]]:
        seen: list[str] = []
        handler = type("Handler", (_Scripted,), {"answer": staticmethod(answer), "seen": seen})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
        return S3Objects("models"), seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_store_that_keeps_failing_is_tried_by_one_layer_and_then_unavailable(scripted: Script):
    objects, seen = scripted(_code(503, "SlowDown"))
    with pytest.raises(Unavailable, match="cannot read s3://models/k: SlowDown") as caught:
        objects.get("k")
    assert len(seen) == ATTEMPTS
    assert "secret-of-the-test" not in str(caught.value)


def test_a_refusal_is_told_at_once_with_where_to_look(scripted: Script):
    objects, seen = scripted(_code(403, "AccessDenied"))
    with pytest.raises(Denied, match="cannot write s3://models/k: AccessDenied") as caught:
        objects.put_new("k", b"1")
    assert len(seen) == 1
    assert "role" in caught.value.remedy


def test_a_missing_bucket_is_told_from_a_missing_object(scripted: Script):
    objects, _ = scripted(_code(404, "NoSuchBucket"))
    with pytest.raises(NotFound, match="models is not in this account"):
        objects.get("k")


def test_a_body_that_is_cut_short_is_unavailable_and_not_half_an_object(scripted: Script):
    objects, _ = scripted(_cut)
    with pytest.raises(Unavailable):
        objects.get("k")


def test_a_write_that_races_with_another_is_waited_out_and_then_given_up(scripted: Script):
    objects, seen = scripted(_code(409, "ConditionalRequestConflict"))
    with pytest.raises(Unavailable, match="others kept writing it"):
        objects.replace("k", b"1", '"etag"')
    assert 1 < len(seen) < 20


def test_nobody_at_the_endpoint_is_unavailable_with_the_endpoint_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="eu-central-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",  # noqa: S106 - nobody's
        config=Config(retries={"total_max_attempts": 1}),
    )
    with pytest.raises(Unavailable, match=endpoint):
        S3Objects("models", client).head("k")


def test_without_credentials_the_remedy_is_the_configuration(monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    with pytest.raises(Denied, match="credentials") as caught:
        S3Objects("models").get("k")
    assert "AWS_PROFILE" in caught.value.remedy


@pytest.mark.real_parts
@pytest.mark.usefixtures("aws")
def test_no_object_carries_metadata_of_ours():
    client = s3_client()
    client.create_bucket(Bucket="metadata", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    objects = S3Objects("metadata")
    objects.put_new("k", b"1")
    upload = objects.begin("m")
    objects.complete("m", upload, [objects.put_part("m", upload, 1, b"1")])
    for key in ("k", "m"):
        answer = client.head_object(Bucket="metadata", Key=key)
        assert answer["Metadata"] == {}
        assert not client.get_object_tagging(Bucket="metadata", Key=key)["TagSet"]
