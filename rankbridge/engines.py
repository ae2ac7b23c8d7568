"""Whatever builds images on this machine: Docker or buildah, whichever is found to work by building with it.

A client without its engine, or a store that cannot be written, is no engine: so each is tried on an empty image before
it is used. It knows Dockerfiles and command lines, and neither our images nor registries.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec

from rankbridge.faults import DeskError
from rankbridge.references import Reference

_TAIL: Final = 12
"""Lines of a log that go into a fault."""


@dataclasses.dataclass(frozen=True)
class Order:
    """One image to build: a target of a Dockerfile."""

    context: Path
    dockerfile: Path
    reference: str
    """What it is called here, `localhost/name:tag`."""
    target: str = ""
    """Stage to build; the last one when empty."""
    arguments: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    """Files that the build may read and no layer holds, by id."""
    epoch: int = 315_532_800
    """Date of every file and of the image, in seconds since 1970, so that the same source makes the same bytes. The
    first day of 1980, and not the revision's: packages that did not change stay one layer, which nobody pulls again."""


@dataclasses.dataclass(frozen=True)
class Built:
    """An image as the engine holds it."""

    reference: str
    identity: str
    """`sha256:` of its configuration, which names every layer: the same for the same content on any machine."""
    size_bytes: int
    """Of all layers, unpacked."""
    seconds: float


class Engine(Protocol):
    """Door to what builds images."""

    @property
    def name(self) -> str:
        """As a person calls it."""

    def command(self, order: Order) -> list[str]:
        """The command line that builds an order."""

    def environment(self) -> Mapping[str, str]:
        """Variables on top of the desk's own."""

    def inspect(self, reference: str) -> tuple[str, int] | None:
        """Identity and size of an image that is here; None when it is not."""

    def forget(self, reference: str) -> list[str]:
        """The command line that removes an image."""

    def push(self, here: str, there: Reference) -> list[list[str]]:
        """The command lines that copy an image to a registry."""


class Docker:
    """A Docker client with an engine behind it, building with BuildKit."""

    name = "docker"

    def command(self, order: Order) -> list[str]:
        """See Engine."""
        epoch = {"SOURCE_DATE_EPOCH": str(order.epoch)}
        return ["docker", "build", *_build_options(order, {**order.arguments, **epoch}), str(order.context)]

    def environment(self) -> Mapping[str, str]:
        """Attestations would hold the time of building."""
        return {"DOCKER_BUILDKIT": "1", "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}

    def inspect(self, reference: str) -> tuple[str, int] | None:
        """See Engine."""
        found = _ask(["docker", "image", "inspect", "--format", "{{.Id}} {{.Size}}", reference], self.environment())
        if found is None:
            return None
        identity, _, size = found.strip().partition(" ")
        return identity, int(size)

    def forget(self, reference: str) -> list[str]:
        """See Engine."""
        return ["docker", "image", "rm", "--force", reference]

    def push(self, here: str, there: Reference) -> list[list[str]]:
        """See Engine."""
        return [["docker", "tag", here, str(there)], ["docker", "push", str(there)]]


@dataclasses.dataclass(frozen=True)
class Buildah:
    """buildah; needs no daemon. `driver` is the storage driver, the store's own when empty."""

    driver: str = ""

    @property
    def name(self) -> str:
        """See Engine."""
        return f"buildah ({self.driver})" if self.driver else "buildah"

    def command(self, order: Order) -> list[str]:
        """See Engine."""
        own = ["--layers", "--format", "oci", "--timestamp", str(order.epoch)]
        ignore = order.context / ".dockerignore"
        if ignore.exists():
            own += ["--ignorefile", str(ignore)]
        return ["buildah", "build", *own, *_build_options(order, order.arguments), str(order.context)]

    def environment(self) -> Mapping[str, str]:
        """What runs in a build is our own installer: a chroot is enough, and works where no runtime does."""
        isolation = {} if "BUILDAH_ISOLATION" in os.environ else {"BUILDAH_ISOLATION": "chroot"}
        return isolation | ({"STORAGE_DRIVER": self.driver} if self.driver else {})

    def inspect(self, reference: str) -> tuple[str, int] | None:
        """See Engine."""
        template = "{{.FromImageID}}\n{{.Manifest}}"
        found = _ask(["buildah", "inspect", "--type", "image", "--format", template, reference], self.environment())
        if found is None:
            return None
        identity, _, manifest = found.partition("\n")
        layers = msgspec.json.decode(manifest, type=_Manifest).layers
        return f"sha256:{identity}", sum(layer.size for layer in layers)

    def forget(self, reference: str) -> list[str]:
        """See Engine."""
        return ["buildah", "rmi", "--force", reference]

    def push(self, here: str, there: Reference) -> list[list[str]]:
        """See Engine."""
        plain = ["--tls-verify=false"] if there.is_loopback else []
        return [["buildah", "push", *plain, here, f"docker://{there}"]]


class _Layer(msgspec.Struct, frozen=True):
    size: int


class _Manifest(msgspec.Struct, frozen=True):
    layers: list[_Layer]


def candidates() -> list[Engine]:
    """What may be found, in the order in which it is preferred."""
    engines: list[Engine] = []
    if shutil.which("docker"):
        engines.append(Docker())
    if shutil.which("buildah"):
        engines.append(Buildah())
        if "STORAGE_DRIVER" not in os.environ:
            engines.append(Buildah("vfs"))  # the one driver that works on every file system
    return engines


def find(engines: Sequence[Engine], log: Path, wanted: str = "") -> Engine:
    """The first engine that can build; `wanted` is the begin of a name. Raises DeskError, with what each one said."""
    said = []
    for engine in engines:
        if not engine.name.startswith(wanted):
            continue
        try:
            _try(engine, log)
        except DeskError as error:
            said.append(f"{engine.name}: {error.detail[-1] if error.detail else error.fault}")
        else:
            return engine
    what = wanted or "docker or buildah"
    raise DeskError(
        f"nothing here can build an image ({what})",
        "install one and see that it works: `apt install buildah`, or Docker with its engine running",
        detail=tuple(said),
    )


def _try(engine: Engine, log: Path) -> None:
    """Build an empty image and remove it. Raises DeskError."""
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        dockerfile = context / "Dockerfile"
        dockerfile.write_text("FROM scratch\nCOPY Dockerfile /\n")
        order = Order(context, dockerfile, f"localhost/rankbridge/try:{os.getpid()}")
        build(engine, order, log)
        _ask(engine.forget(order.reference), engine.environment())


def build(engine: Engine, order: Order, log: Path, *, clock: Callable[[], float] = time.monotonic) -> Built:
    """Carry out an order; what the engine says goes to `log`. Raises DeskError with the log's end."""
    begun = clock()
    run(engine.command(order), log, f"building {order.reference} with {engine.name}", engine.environment())
    found = engine.inspect(order.reference)
    if found is None:
        raise DeskError(f"{engine.name} built {order.reference} and does not have it", f"see {log}")
    identity, size = found
    return Built(order.reference, identity, size, clock() - begun)


def run(command: Sequence[str], log: Path, what: str, environment: Mapping[str, str]) -> None:
    """Run a command to its end with its output in `log`. Raises DeskError with the log's end when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        begin = output.tell()
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                check=False,
            )
        except OSError as error:
            raise DeskError(f"{what} failed: {command[0]}: {error.strerror}", f"install {command[0]}") from error
    if done.returncode:
        with log.open("rb") as output:
            output.seek(begin)
            said = output.read().decode(errors="replace").splitlines()
        raise DeskError(
            f"{what} failed (exit code {done.returncode})",
            f"mend what its last lines say; all of them are in {log}",
            detail=tuple(said[-_TAIL:]),
        )


def _build_options(order: Order, arguments: Mapping[str, str]) -> list[str]:
    options = ["--file", str(order.dockerfile), "--tag", order.reference]
    if order.target:
        options += ["--target", order.target]
    for name, value in sorted(arguments.items()):
        options += ["--build-arg", f"{name}={value}"]
    for name, value in sorted(order.labels.items()):
        options += ["--label", f"{name}={value}"]
    for name, path in sorted(order.secrets.items()):
        options += ["--secret", f"id={name},src={path}"]
    return options


def _ask(command: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """What a command prints; None when it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env={**os.environ, **environment}, check=False
        )
    except OSError:
        return None
    return None if done.returncode else done.stdout.decode()
