"""A site of real processes on 127.0.0.1, a registry of real objects, and steady load through the site's gateway."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankbridge.triton import locate, remove_shared_memory
from workloads.agent.memory import read_hold
from workloads.bundle.registry import Registry
from workloads.bundle.signature import Key, Trust, make_key, sign, signature_path
from workloads.bundle.site import SiteDirectory, read_editions
from workloads.bundle.store import verify
from workloads.contract.sites import ONPREM, AddressBook, Listener
from workloads.contract.storage import Release
from workloads.objects.s3 import S3Objects
from workloads.telemetry.metrics import pss_bytes

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 60.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, below those that the kernel lends to connections of other tests."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


def eventually(question: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> float:
    """Wait until it is so; the seconds that it took."""
    begun = time.monotonic()
    while not question():
        assert time.monotonic() - begun < patience_s, f"waited {patience_s} s for: {what}"
        time.sleep(0.02)
    return time.monotonic() - begun


class RealSite:
    """tritonserver, retrieval, gateway and agent of one site, each a process; `environment` reaches the registry."""

    def __init__(self, root: Path, bucket: str, environment: Mapping[str, str]) -> None:
        self.root = root
        self.directory = SiteDirectory(root / "site")
        self.directory.triton.mkdir(parents=True)
        self.bucket = bucket
        self.environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
        self.gateway, self.retrieval, self.agent, self.intake, *triton = free_ports(7)
        listeners = (Listener.TRITON_HTTP, Listener.TRITON_GRPC, Listener.TRITON_METRICS)
        self.book = AddressBook(dict(zip(listeners, triton, strict=True)))
        self.site = dataclasses.replace(ONPREM, address="127.0.0.1")
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.key: Key = make_key(root / "signing" / "publisher.key")
        trust = self.directory.root / "trust"
        trust.mkdir()
        (trust / "publisher.pub").write_bytes(self.key.public.read_bytes())
        self.registry = Registry(S3Objects(bucket), Trust.read(trust))

    def publish(self, bundle: Path) -> None:
        """Sign a bundle and publish it."""
        if not signature_path(bundle).exists():
            sign(bundle, self.key.private)
        self.registry.publish(bundle, signature_path(bundle), actor="test")

    def promote(self, bundle: Path) -> None:
        """Point the channel to a published bundle."""
        self.registry.promote("stable", Release(bundle=bundle.name), "test")

    def start(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        """Start a process of this site; returns at once."""
        environment = dict(self.environment)
        triton_at = self.book.host_port(self.site, Listener.TRITON_HTTP)
        if name == "triton":
            found = locate(ROOT)
            environment = found.environment(environment)
            command = found.command(
                self.site, self.book, repository=self.directory.triton, scratch=self.root / "scratch"
            )
        else:
            port = {"gateway": self.gateway, "retrieval": self.retrieval, "agent": self.agent}[name]
            # A cloud site's gateway: it wants no key and no profiles, which no flip touches.
            listen = ("--site", "aws", "--listen", f"127.0.0.1:{port}")
            editions = ("--editions", str(self.directory.editions))
            options = {
                "retrieval": (*listen, *editions),
                "gateway": (
                    *(*listen, *editions, "--triton", triton_at),
                    *("--retrieval", f"http://127.0.0.1:{self.retrieval}"),
                    *("--intake", f"http://127.0.0.1:{self.intake}"),
                ),
                "agent": (
                    *("run", *listen, "--site-class", "cpu", "--site-dir", str(self.directory.root)),
                    *("--channel", "stable", "--models-bucket", self.bucket, "--triton", triton_at),
                    *("--retrieval", f"http://127.0.0.1:{self.retrieval}"),
                    *("--gateway", f"http://127.0.0.1:{self.gateway}"),
                ),
            }[name]
            command = [sys.executable, "-m", f"workloads.{name}", *options, *more]
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.running[name] = process
        return process

    def log(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)

    def down(self) -> None:
        for name in list(self.running):
            self.kill(name)
        remove_shared_memory(self.site, self.book)

    def ask(self, port: int, path: str, message: object = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON body; (0, {}) when nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            body = None if message is None else json.dumps(message)
            connection.request(
                "POST" if body else "GET", path, body, {"content-type": "application/json"} if body else {}
            )
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        return 0, {}

    def serves(self) -> str:
        """The first 12 hex digits of the bundle that the gateway answers from; empty when it does not."""
        return str(self.ask(self.gateway, "/readyz")[1].get("bundle", ""))

    def settled_on(self, bundle: Path) -> bool:
        """Whether the flip to a bundle is over: the gateway is on it, and nothing else is loaded."""
        editions = read_editions(self.directory.editions)
        return (
            editions is not None
            and [edition.bundle for edition in editions.load] == [bundle.name]
            and self.serves() == bundle.name[:12]
            and self.ask(self.retrieval, "/readyz")[0] == 200
        )

    def whole(self) -> None:
        """What the site's file says to serve is on disk, every byte of it."""
        editions = read_editions(self.directory.editions)
        if editions is not None:
            assert verify(self.directory.bundle(editions.serve.bundle))
            assert read_hold(self.directory.root) is None

    def metrics(self) -> str:
        """The gateway's."""
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()

    def pss_mb(self) -> dict[str, float]:
        return {name: (pss_bytes(process.pid) or 0) / 2**20 for name, process in self.running.items()}


@dataclasses.dataclass(frozen=True)
class Answered:
    """One request of the load."""

    at_s: float
    ms: float
    status: int
    bundle: str
    rung: int
    reason: str | None
    path: str
    items: tuple[str, ...]


class Load:
    """Requests at a steady rate, each due at its moment whatever became of the others, from a few threads."""

    PATHS = (
        ("/v1/recommend", {"k": 10}),
        ("/v1/recommend", {"k": 10, "history": ["made-00003", "other-00003"]}),
        ("/v1/search", {"query": "red lantern", "k": 10}),
        ("/v1/similar", {"item": "made-00001", "k": 10}),
    )

    def __init__(self, port: int, rate: float = 60.0, threads: int = 4) -> None:
        self._port = port
        self._every_s = threads / rate
        self._stop = threading.Event()
        self.answers: list[Answered] = []
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(15)

    def _run(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        due = time.monotonic() + number * self._every_s / len(self._threads)
        count = number
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            path, message = self.PATHS[count % len(self.PATHS)]
            status, body = 0, {}
            try:
                connection.request("POST", path, json.dumps(message), {"content-type": "application/json"})
                answer = connection.getresponse()
                status, body = answer.status, json.loads(answer.read())
            except (OSError, ValueError, http.client.HTTPException):
                connection.close()
            now = time.monotonic()
            served = body.get("served", {})
            self.answers.append(
                Answered(
                    at_s=now,
                    ms=(now - due) * 1000,
                    status=status,
                    bundle=served.get("bundle", ""),
                    rung=served.get("rung", 0),
                    reason=served.get("reason"),
                    path=path,
                    items=tuple(item["item"] for item in body.get("items", [])),
                )
            )
            due += self._every_s
            count += 1
        connection.close()


def quantile(values: list[float], share: float) -> float:
    """By nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
