"""AWS on this machine: LocalStack started, waited for, emptied and stopped, and the foundation brought up on it.

Host mode: an environment of its own under `.tools/localstack` (Python 3.13), a process on a loopback port, no
persistence. `compose.yaml` beside this file is the same version for machines with a container engine. Nothing here
talks to a cloud: the process gets no credentials and no environment but what is named here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import yaml

from infra import config, stackfile
from infra.plan import FaultsError

ROOT: Final = Path(__file__).resolve().parents[2]
ENVIRONMENT: Final = ROOT / ".tools" / "localstack"
STACK: Final = "foundation-local"
PORT: Final = 4566
READY_SECONDS: Final = 90
STOP_SECONDS: Final = 20
PASSPHRASE: Final = "throw-away"  # noqa: S105 -- of a state that holds throw-away secrets only


class EmulatorError(RuntimeError):
    """Something outside the program is missing or did not answer; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Emulator:
    """One LocalStack process and its directory (`pid`, `log`, its own temporary files)."""

    home: Path
    port: int = PORT
    environment: Path = ENVIRONMENT
    host: str = "127.0.0.1"
    entry: tuple[str, ...] = ()
    """What its command line begins with to run in a network of its own, which `host` is in."""

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    @property
    def _pid_file(self) -> Path:
        return self.home / "pid"

    def pid(self) -> int | None:
        """The running process that we started, or None. A number that another process has by now is not ours."""
        try:
            pid = int(self._pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if b"localstack.runtime.main" in command else None

    def healthy(self) -> bool:
        """Whether it answers, with the services that the foundation needs."""
        try:
            with urllib.request.urlopen(f"{self.endpoint}/_localstack/health", timeout=5) as answer:  # noqa: S310 -- ours
                services = json.load(answer)["services"]
        except (OSError, ValueError, KeyError, urllib.error.URLError):
            return False
        return {"ec2", "s3", "autoscaling", "ecr", "elbv2"} <= set(services)

    def start(self) -> None:
        """Start it, unless it runs, and wait until it is healthy. Raises EmulatorError."""
        if self.pid() is not None and self.healthy():
            return
        python = self.environment / "bin" / "python"
        if not python.exists():
            raise EmulatorError(f"LocalStack is not installed in {self.environment}: run make localstack-install")
        if self.pid() is None and self.healthy():
            raise EmulatorError(f"another process already answers as LocalStack on port {self.port}: stop it first")
        self.home.mkdir(parents=True, exist_ok=True)
        # Spawned, not a Popen: it outlives the object, and this process too when it is a command line.
        log = os.open(self.home / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            pid = os.posix_spawnp(
                [*self.entry, str(python)][0],
                [*self.entry, str(python), "-m", "localstack.runtime.main"],
                self._environment(),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    (os.POSIX_SPAWN_DUP2, log, 2),
                ],
                setsid=True,
            )
        finally:
            os.close(log)
        self._pid_file.write_text(f"{pid}\n")
        deadline = time.monotonic() + READY_SECONDS
        while not self.healthy():
            if _reaped(pid) or time.monotonic() > deadline:
                self.stop()
                tail = (self.home / "log").read_text()[-400:]
                raise EmulatorError(f"LocalStack did not become healthy; the end of {self.home / 'log'}:\n{tail}")
            time.sleep(0.2)

    def _environment(self) -> dict[str, str]:
        directories = {name: str(self.home / name) for name in ("cache", "tmp")}
        for directory in directories.values():
            Path(directory).mkdir(parents=True, exist_ok=True)
        return {
            "PATH": f"{self.environment / 'bin'}:{os.environ.get('PATH', os.defpath)}",
            "HOME": str(self.home),
            "TMPDIR": directories["tmp"],
            "GATEWAY_LISTEN": f"{self.host}:{self.port}",
            "SKIP_SSL_CERT_DOWNLOAD": "1",
            "DISABLE_EVENTS": "1",
            "DNS_ADDRESS": "0",
        }

    def stop(self) -> None:
        """End it and wait until it is gone; nothing happens when it does not run."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while self.pid() is not None and not _reaped(pid):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    _reaped(pid)
                    break
                time.sleep(0.1)
        self._pid_file.unlink(missing_ok=True)

    def reset(self) -> None:
        """Forget everything: without persistence a restart is an empty AWS."""
        self.stop()
        self.start()


def _reaped(pid: int) -> bool:
    """Whether our own child has ended; False for a process that is not our child."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False


@dataclasses.dataclass(frozen=True)
class Project:
    """A copy of the Pulumi project outside the checkout, so that no stack file of the checkout is written to."""

    directory: Path
    environment: Mapping[str, str]
    """What the Pulumi CLI needs beside the caller's environment: file backend, passphrase of throw-away secrets."""
    secrets: Mapping[str, str]
    """`namespace:key` -> throw-away value."""


def project(directory: Path, endpoint: str, *, virtualenv: Path = ROOT / ".venv") -> Project:
    """Copy the project into an empty `directory`, with the foundation-local stack pointed at `endpoint`."""
    (directory / "stacks").mkdir(parents=True)
    (directory / "state").mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "stacks", "emulator")
    shutil.copytree(ROOT / "infra", directory / "infra", ignore=ignored)
    settings = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())
    settings["stackConfigDir"] = "stacks"
    settings["runtime"]["options"]["virtualenv"] = str(virtualenv)
    (directory / "Pulumi.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    name = f"Pulumi.{STACK}.yaml"
    document = yaml.safe_load((stackfile.STACKS / name).read_text())
    document["config"]["rankbridge:emulator"]["endpoint"] = endpoint
    (directory / "stacks" / name).write_text(yaml.safe_dump(document, sort_keys=False))
    return Project(
        directory,
        pulumi_environment(directory),
        throw_away_secrets(directory / "stacks"),
    )


def pulumi_environment(directory: Path) -> dict[str, str]:
    """What the CLI needs for a project copied to `directory`."""
    return {
        "PULUMI_BACKEND_URL": f"file://{directory / 'state'}",
        "PULUMI_CONFIG_PASSPHRASE": PASSPHRASE,
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        # No credentials of the operator's ever reach the emulator.
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }


def throw_away_secrets(directory: Path = stackfile.STACKS) -> dict[str, str]:
    """The local stack's secrets by full key: made from their names, worth nothing, the same each time."""
    values = stackfile.values(STACK, directory)
    secrets: dict[str, str] = {}
    try:
        config.read(STACK, values)
    except FaultsError as error:
        missing = [f.key for f in error.faults if f.value == "nothing"]
        secrets = {f"rankbridge:{k}": v for k, v in stackfile.sample_secrets(missing).items()}
    config.read(STACK, values | secrets, frozenset(secrets))
    return secrets
