"""Asks an image registry which digest a tag has now, over the OCI distribution API, and takes nothing on trust.

Nothing is ever made up: an answer without a digest, or with one that only fills a place, is a fault. Credentials come
from where `docker login` and `buildah login` put them, and go only to the registry that they are for.
Source: https://github.com/opencontainers/distribution-spec/blob/main/spec.md; tokens:
https://distribution.github.io/distribution/spec/auth/token/
"""

from __future__ import annotations

import base64
import binascii
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import httpx
import msgspec

from rankbridge.faults import DeskError
from rankbridge.references import Reference, is_loopback, is_placeholder

TIMEOUT_S: Final = 20.0

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_ACCEPT: Final = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_CHALLENGE: Final = re.compile(r'([a-z]+)="([^"]*)"')
_HUB: Final = "docker.io"
_HUB_API: Final = "registry-1.docker.io"
_HUB_LOGIN: Final = "https://index.docker.io/v1/"

Credentials = Callable[[str], tuple[str, str] | None]
"""User and password for a registry's host; None where nobody logged in."""


def client() -> httpx.Client:
    """The client to ask with; close it."""
    return httpx.Client(timeout=TIMEOUT_S, follow_redirects=True)


class Registries:
    """Registries, asked over one client."""

    def __init__(self, client: httpx.Client, credentials: Credentials) -> None:
        self._client = client
        self._credentials = credentials

    def digest(self, reference: Reference) -> str:
        """The digest that a tag has now, `sha256:<64 hex>`. Raises DeskError."""
        if reference.is_placeholder:
            raise DeskError(f"{reference} is a placeholder and in no registry", "name a real registry with --registry")
        url = f"{_base(reference)}/v2/{_path(reference)}/manifests/{reference.tag or 'latest'}"
        try:
            answer = self._asked(url, reference)
        except httpx.HTTPError as error:
            raise DeskError(
                f"cannot ask {reference.host} for {reference}: {str(error) or type(error).__name__}",
                "run it where the registry can be reached, and check the name",
            ) from None
        if answer.status_code != httpx.codes.OK:
            raise _refusal(reference, answer.status_code)
        digest = str(answer.headers.get("docker-content-digest", ""))
        if not _DIGEST.fullmatch(digest) or is_placeholder(digest):
            raise DeskError(
                f"{reference.host} gives no digest for {reference}: {digest or 'the header is missing'}",
                "ask a registry that follows the OCI distribution API; nothing is pinned without its word",
            )
        return digest

    def _asked(self, url: str, reference: Reference) -> httpx.Response:
        """The manifest's head, with a token or a password where the registry wants one."""
        headers = {"accept": _ACCEPT}
        answer = self._client.head(url, headers=headers)
        if answer.status_code != httpx.codes.UNAUTHORIZED:
            return answer
        scheme, _, rest = str(answer.headers.get("www-authenticate", "")).partition(" ")
        login = self._credentials(reference.host)
        basic = None if login is None else httpx.BasicAuth(*login)
        if scheme.lower() == "bearer":
            token = self._token(dict(_CHALLENGE.findall(rest)), reference, basic)
            return self._client.head(url, headers={**headers, "authorization": f"Bearer {token}"})
        return answer if basic is None else self._client.head(url, headers=headers, auth=basic)

    def _token(self, challenge: Mapping[str, str], reference: Reference, basic: httpx.BasicAuth | None) -> str:
        realm = httpx.URL(challenge.get("realm", ""))
        if realm.scheme != "https" and not is_loopback(realm.host):
            raise DeskError(
                f"{reference.host} wants its password sent in clear to {str(realm) or 'nowhere'}",
                "use a registry that speaks HTTPS",
            )
        scope = challenge.get("scope") or f"repository:{_path(reference)}:pull"
        asked = {"scope": scope} | ({"service": challenge["service"]} if "service" in challenge else {})
        answer = (
            self._client.get(realm, params=asked)
            if basic is None
            else self._client.get(realm, params=asked, auth=basic)
        )
        if answer.status_code != httpx.codes.OK:
            raise _refusal(reference, answer.status_code)
        try:
            given = msgspec.json.decode(answer.content, type=_Token)
        except msgspec.MsgspecError:
            given = _Token()
        if not (given.token or given.access_token):
            raise DeskError(f"{realm.host} gives no token for {reference}", f"log in: `docker login {reference.host}`")
        return given.token or given.access_token


class _Token(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""


class _Auth(msgspec.Struct, frozen=True):
    auth: str = ""


class _Logins(msgspec.Struct, frozen=True, rename="camel"):
    """The part of `config.json` or `auth.json` that we read."""

    auths: dict[str, _Auth] = {}
    creds_store: str = ""
    cred_helpers: dict[str, str] = {}


class _Helped(msgspec.Struct, frozen=True, rename="pascal"):
    """What a credential helper prints."""

    username: str
    secret: str


def login_files(environ: Mapping[str, str], home: Path) -> list[Path]:
    """Where `docker login`, `buildah login` and `podman login` leave credentials, the most particular first."""
    places = [environ[name] for name in ("REGISTRY_AUTH_FILE",) if environ.get(name)]
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        places.append(f"{runtime}/containers/auth.json")
    docker = environ.get("DOCKER_CONFIG")
    return [*map(Path, places), Path(docker) / "config.json" if docker else home / ".docker" / "config.json"]


def logins(files: Sequence[Path]) -> Credentials:
    """Credentials as these files have them, or the helper that a file names."""

    def find(host: str) -> tuple[str, str] | None:
        keys = (host, f"https://{host}", *((_HUB_LOGIN,) if host == _HUB else ()))
        for path in files:
            try:
                held = msgspec.json.decode(path.read_bytes(), type=_Logins)
            except FileNotFoundError:
                continue
            except (OSError, msgspec.MsgspecError) as error:
                raise DeskError(f"cannot read the logins in {path}: {error}", "log in anew, or mend the file") from None
            for key in keys:
                if helper := held.cred_helpers.get(key):
                    return _help(helper, key)
                if (entry := held.auths.get(key)) and entry.auth:
                    return _decode(entry.auth, path, key)
                if held.creds_store and key in held.auths:
                    return _help(held.creds_store, key)
        return None

    return find


def _decode(auth: str, path: Path, key: str) -> tuple[str, str]:
    try:
        user, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        colon = ""
    if not colon:
        raise DeskError(f"the login for {key} in {path} cannot be read", f"log in anew: `docker login {key}`")
    return user, password


def _help(helper: str, key: str) -> tuple[str, str]:
    command = f"docker-credential-{helper}"
    try:
        done = subprocess.run([command, "get"], input=key.encode(), capture_output=True, check=False)
    except OSError as error:
        raise DeskError(
            f"the login for {key} is with {command}, which cannot run: {error.strerror}", "install it"
        ) from None
    try:
        found = msgspec.json.decode(done.stdout, type=_Helped)
    except msgspec.MsgspecError:
        raise DeskError(f"{command} has no login for {key}", f"log in: `docker login {key}`") from None
    return found.username, found.secret


def _refusal(reference: Reference, status: int) -> DeskError:
    host, name = reference.host, f"{reference.name}:{reference.tag or 'latest'}"
    if status in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
        return DeskError(f"{host} does not let us see {name} ({status})", f"log in: `docker login {host}`")
    if status == httpx.codes.NOT_FOUND:
        return DeskError(f"{host} has no {name}", "push it, or name another tag with --tag")
    return DeskError(f"{host} answered {status} for {name}", "try again later")


def _base(reference: Reference) -> str:
    """Registries speak HTTPS; only one on this very machine need not."""
    if reference.is_loopback:
        return f"http://{reference.host}"
    return f"https://{_HUB_API if reference.host == _HUB else reference.host}"


def _path(reference: Reference) -> str:
    """Docker Hub keeps its own images under `library/`."""
    return f"library/{reference.name}" if reference.host == _HUB and "/" not in reference.name else reference.name
