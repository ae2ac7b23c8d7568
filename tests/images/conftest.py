"""A registry on loopback that follows the OCI distribution API as far as pushing and asking go."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Handler = http.server.BaseHTTPRequestHandler


class FakeRegistry:
    """What a registry holds, and how it behaves: `auth` is "", "basic" or "bearer"; `digest` makes the header."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}
        self.uploads: dict[str, bytes] = {}
        self.auth = ""
        self.login = ("deploy", "secret-word")
        self.digest: Callable[[bytes], str | None] = lambda body: f"sha256:{hashlib.sha256(body).hexdigest()}"
        self.asked: list[str] = []
        self.host = ""

    def hold(self, name: str, tag: str) -> str:
        """Put an image there; its digest."""
        body = json.dumps({"schemaVersion": 2, "name": name, "tag": tag}).encode()
        self.manifests[name, tag] = (body, "application/vnd.oci.image.manifest.v1+json")
        return f"sha256:{hashlib.sha256(body).hexdigest()}"

    def allows(self, authorization: str) -> bool:
        if self.auth == "bearer":
            return authorization == "Bearer a-token"
        return not self.auth or authorization == self.basic

    @property
    def basic(self) -> str:
        return "Basic " + base64.b64encode(":".join(self.login).encode()).decode()


def _handler(registry: FakeRegistry) -> type[Handler]:
    class Answers(Handler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, body: bytes = b"", **headers: str | None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if value is not None:
                    self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def answer(self) -> None:
            path, _, query = self.path.partition("?")
            registry.asked.append(f"{self.command} {path}")
            given = self.headers.get("Authorization", "")
            if path == "/token":
                if given not in {"", registry.basic} or (registry.login[0] and given != registry.basic):
                    self.reply(401)
                else:
                    self.reply(200, b'{"token": "a-token"}')
            elif not registry.allows(given):
                realm = f'realm="http://{registry.host}/token",service="here",scope="repository:x:pull"'
                self.body()
                self.reply(401, www_authenticate=f"Bearer {realm}" if registry.auth == "bearer" else 'Basic realm="x"')
            elif path == "/v2/":
                self.reply(200)
            elif "/manifests/" in path:
                self.manifest(*path.removeprefix("/v2/").split("/manifests/"))
            else:
                self.blob(path, query)

        def manifest(self, name: str, tag: str) -> None:
            if self.command == "PUT":
                held = (self.body(), self.headers["Content-Type"])
                digest = registry.digest(held[0])
                registry.manifests |= {(name, tag): held, (name, str(digest)): held}
                self.reply(201, docker_content_digest=digest)
            elif (name, tag) not in registry.manifests:
                self.reply(404, b'{"errors": []}')
            else:
                body, kind = registry.manifests[name, tag]
                self.reply(200, body, content_type=kind, docker_content_digest=registry.digest(body))

        def blob(self, path: str, query: str) -> None:
            place = path.rpartition("/")[2]
            if self.command == "POST":
                self.body()
                upload = uuid.uuid4().hex
                registry.uploads[upload] = b""
                self.reply(202, location=f"{path.rstrip('/')}/{upload}")
            elif self.command == "PATCH":
                registry.uploads[place] += self.body()
                self.reply(202, location=path)
            elif self.command == "PUT":
                digest = query.partition("digest=")[2].replace("%3A", ":")
                registry.blobs[digest] = registry.uploads.pop(place) + self.body()
                self.reply(201)
            else:
                found = registry.blobs.get(place)
                self.reply(404) if found is None else self.reply(200, found, docker_content_digest=place)

    for verb in ("GET", "HEAD", "POST", "PATCH", "PUT"):
        setattr(Answers, f"do_{verb}", Answers.answer)
    return Answers


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    held = FakeRegistry()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(held)) as server:
        host, port = server.server_address[:2]
        held.host = f"{host!s}:{port}"
        serving: Any = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        serving.start()
        yield held
        server.shutdown()
        serving.join()
