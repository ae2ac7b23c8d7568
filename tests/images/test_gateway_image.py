"""The gateway's image, built for real on a Debian made here, started as Kubernetes would, pushed, and pinned.

Without a container runtime: a mount namespace and a chroot, with the user, the read-only root and the environment that
the image's configuration and the pods' declaration give. Needs root, buildah and mmdebstrap; it takes minutes, so it is
asked for with RANKBRIDGE_IMAGES=1 (`make test-images`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import pytest

from infra import stackfile
from rankbridge import cli, engines, images
from rankbridge.engines import Buildah
from rankbridge.images import Source
from rankbridge.layout import Layout
from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.site import SiteDirectory, write_editions
from workloads.contract.editions import Edition, SiteEditions
from workloads.contract.http import ItemsAnswer

ROOT = Layout.of({}).root
TAG = "tried"
USER = 65532
NEEDED = ("buildah", "mmdebstrap", "unshare", "setpriv")
MISSING = [name for name in NEEDED if shutil.which(name) is None] + (["root"] if os.geteuid() else [])

pytestmark = [
    pytest.mark.real_parts,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        os.environ.get("RANKBRIDGE_IMAGES") != "1", reason="takes minutes: `make test-images`, or RANKBRIDGE_IMAGES=1"
    ),
    pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}; `make image-tools`, as root"),
]

# Mounts of the pod, then the root turned read-only, then away with every right; what follows is the image's own.
ENTER = """
set -eu
root=$1 site=$2
shift 2
mount --bind "$root" "$root"
mount -t tmpfs -o mode=1777,size=64m tmpfs "$root/tmp"
mount -t tmpfs -o mode=755,size=1m tmpfs "$root/var/lib"
mkdir -p "$root/var/lib/rankbridge/site"
mount --bind "$site" "$root/var/lib/rankbridge/site"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -o remount,ro,bind "$root"
exec setpriv --no-new-privs unshare --root "$root" --wd /app --setgid 65532 --setuid 65532 /usr/bin/env -i "$@"
"""


@dataclasses.dataclass(frozen=True)
class Image:
    """What was built: its configuration, and its files."""

    reference: str
    config: dict[str, object]
    root: Path
    built: engines.Built
    source: Source


@pytest.fixture(scope="module")
def store() -> Iterator[None]:
    """A store of images of its own below .tools, where the base stays for the next time."""
    folder = ROOT / ".tools" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    conf = folder / "storage.conf"
    graph, run = folder / "store", folder / "run"
    conf.write_text(f'[storage]\ndriver = "{driver()}"\ngraphroot = "{graph}"\nrunroot = "{run}"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_STORAGE_CONF", str(conf))
        patch.setenv("BUILDAH_ISOLATION", "chroot")
        yield


def driver() -> str:
    return os.environ.get("STORAGE_DRIVER", "overlay")


def buildah(*arguments: str) -> str:
    done = subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The last commit in a clone, where nobody edits while images are built."""
    clone = tmp_path_factory.mktemp("clone") / "checkout"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(clone)], check=True)
    (clone / ".tools").symlink_to(ROOT / ".tools")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_layout", lambda: Layout(clone, clone / ".rankbridge"))
        yield clone


@pytest.fixture(scope="module")
def image(store: None, checkout: Path) -> Iterator[Image]:  # noqa: ARG001 - the store is the environment's
    source = Source.of(checkout)
    begun = time.monotonic()
    assert cli.main(["images", "build", "gateway", "--base", "debian", "--tag", TAG, "--engine", "buildah"]) == 0
    seconds = time.monotonic() - begun
    reference = f"{images.LOCAL}/gateway:{TAG}"
    found = Buildah().inspect(reference)
    assert found is not None
    config = json.loads(buildah("inspect", "--type", "image", "--format", "{{.Config}}", reference))["config"]
    container = buildah("from", reference)
    try:
        root = Path(buildah("mount", container))
        sys.stdout.write(f"gateway's image: {found[1] / 1e6:.0f} MB, built in {seconds:.0f} s\n")
        yield Image(reference, config, root, engines.Built(reference, *found, seconds), source)
    finally:
        buildah("rm", container)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site's directory as an agent leaves it; pytest's own folders are closed to other users."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    directory = SiteDirectory(tmp_path / "site")
    edition = Edition(bundle=build_fake_bundle(directory.bundles).name)
    write_editions(directory.editions, SiteEditions(revision=1, load=[edition], serve=edition))
    for path in (directory.root, *directory.root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return directory.root


@contextlib.contextmanager
def started(image: Image, site: Path, *arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The image's entry point with these arguments, as the image's user, on a root that nobody can write to."""
    entry, env = image.config["Entrypoint"], image.config["Env"]
    assert isinstance(entry, list)
    assert isinstance(env, list)
    enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ENTER, "enter", str(image.root), str(site)]
    with log.open("wb") as output:
        process = subprocess.Popen([*enter, *env, *entry, *arguments], stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, object]]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> float:
    """Seconds until /readyz says 200."""
    begun = time.monotonic()
    while time.monotonic() - begun < 60:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            if ask(port, "GET", "/readyz")[0] == 200:
                return time.monotonic() - begun
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def test_the_gateway_answers_from_its_image_without_root_on_a_read_only_root(
    image: Image, site: Path, tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "log"
    arguments = ["workloads.gateway", "--site", "aws", "--listen", f"127.0.0.1:{port}"]
    arguments += ["--editions", "/var/lib/rankbridge/site/editions.json", "--retrieval", "http://127.0.0.1:9"]
    arguments += ["--triton", "127.0.0.1:9", "--intake", "http://127.0.0.1:9"]
    with started(image, site, *arguments, log=log) as process:
        seconds = until_ready(port, process, log)
        sys.stdout.write(f"ready {seconds:.2f} s after the start\n")
        assert ask(port, "GET", "/healthz") == (200, {"alive": True})
        status, answer = ask(port, "POST", "/v1/recommend", b'{"k": 5}')
        assert status == 200
        told = msgspec.convert(answer, ItemsAnswer)
        assert told.served.rung == 4
        assert told.served.reason is not None
        assert len(told.items) == 5
        facts = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert facts["Uid"].split() == [str(USER)] * 4
        assert facts["Gid"].split() == [str(USER)] * 4
        assert int(facts["CapEff"], 16) == int(facts["CapPrm"], 16) == 0
        mounts = Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines()
        root = next(line.split() for line in mounts if line.split()[4] == "/")
        assert "ro" in root[5].split(",")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


def test_the_gateways_image_says_what_it_is_and_keeps_no_secret_of_its_build(image: Image) -> None:
    config = image.config
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["python", "-m"]
    assert config["StopSignal"] == "SIGTERM"
    assert "Healthcheck" not in config
    labels = config["Labels"]
    assert isinstance(labels, dict)
    assert labels["org.opencontainers.image.revision"] == image.source.revision
    assert labels["org.opencontainers.image.title"] == "rankbridge gateway"
    assert [place for place in ("run/secrets", "build", "var/cache/uv") if (image.root / place).exists()] == []


def test_the_gateways_image_holds_no_torch_no_faiss_and_no_installer_and_its_bytecode_is_made(image: Image) -> None:
    packages = next((image.root / "opt" / "rankbridge" / "lib").glob("python3.*")) / "site-packages"
    names = {path.name for path in packages.iterdir()}
    assert "msgspec" in names
    assert names & {"torch", "faiss", "boto3", "polars", "pip", "pulumi"} == set()
    code = image.root / "app" / "workloads" / "gateway"
    compiled = {path.name.partition(".")[0] for path in (code / "__pycache__").iterdir()}
    assert compiled == {path.stem for path in code.glob("*.py")}
    writable = [
        path for path in (image.root / "app").rglob("*") if path.stat().st_uid != 0 or path.stat().st_mode & 0o022
    ]
    assert writable == []


def test_the_same_source_makes_the_same_image(image: Image, checkout: Path, tmp_path: Path) -> None:
    with images.index_secrets(checkout) as secrets:
        order = images.dockerfile_order(
            checkout,
            "gateway",
            f"{images.LOCAL}/gateway:again",
            base=f"{images.LOCAL}/base:debian-bookworm",
            source=image.source,
            secrets=secrets,
        )
        made = engines.build(_WithoutCache(), order, tmp_path / "log")
    assert made.identity == image.built.identity


class _WithoutCache(Buildah):
    def command(self, order: engines.Order) -> list[str]:
        first, second, *rest = super().command(order)
        return [first, second, "--no-cache", *rest]


class Held(Protocol):
    """The registry of conftest.py, as far as this test knows it."""

    host: str
    manifests: dict[tuple[str, str], tuple[bytes, str]]


def test_what_was_built_is_pushed_and_pinned_by_the_registrys_digest(
    image: Image, registry: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stackfile, "STACKS", tmp_path)
    stack = tmp_path / "Pulumi.apps-prod.yaml"
    stack.write_text("config:\n  rankbridge:channel: production\n")
    place = ["gateway", "--registry", f"{registry.host}/team", "--tag", TAG]
    assert cli.main(["images", "push", *place, "--engine", "buildah"]) == 0
    assert cli.main(["images", "pin", *place, "--stack", "apps-prod"]) == 0
    manifest = json.loads(registry.manifests["team/gateway", TAG][0])
    assert manifest["config"]["digest"] == image.built.identity
    pinned = stack.read_text().partition("gateway: ")[2].strip()
    assert pinned.startswith(f"{registry.host}/team/gateway@sha256:")
    pulled = buildah("pull", "--tls-verify=false", f"docker://{pinned}")
    assert f"sha256:{pulled.splitlines()[-1]}" == image.built.identity
