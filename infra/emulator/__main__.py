"""`python -m infra.emulator install|start|stop|reset|status|up|down`; exit code 1 and a line when it cannot be done."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from infra.emulator import ENVIRONMENT, PORT, ROOT, STACK, Emulator, EmulatorError, Project, project, pulumi_environment

PYTHON = (3, 13)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked."""
    parser = argparse.ArgumentParser(prog="python -m infra.emulator", description="AWS on this machine (LocalStack)")
    parser.add_argument("action", choices=("install", "start", "stop", "reset", "status", "up", "down"))
    parser.add_argument("--home", type=Path, default=ROOT / ".rankbridge" / "localstack", help="where state is kept")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--uv", default="uv", help="the uv to install with")
    options = parser.parse_args(arguments)
    emulator = Emulator(options.home, options.port)
    try:
        match options.action:
            case "install":
                _install(options.uv)
            case "start":
                emulator.start()
            case "stop":
                emulator.stop()
            case "reset":
                emulator.reset()
            case "up":
                _up(emulator)
            case "down":
                _down(emulator)
            case _:
                pass
    except EmulatorError as error:
        _say(str(error))
        return 1
    except subprocess.CalledProcessError as error:
        _say(f"{error.cmd[0]} {error.cmd[1]} failed with exit code {error.returncode}")
        return 1
    if options.action == "install":
        return 0
    running = emulator.healthy()
    _say(f"LocalStack {'answers at ' + emulator.endpoint if running else 'is not running'}")
    return 0 if running or options.action not in ("status", "start", "reset") else 1


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _interpreter(uv: str) -> str:
    """A Python that really runs and is of the right version; a version manager's stand-in may only look like one."""
    candidates = []
    find = [uv, "python", "find", "--no-python-downloads", ".".join(map(str, PYTHON))]
    candidates += subprocess.run(find, capture_output=True, text=True, check=False).stdout.split()
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += [str(p) for p in sorted(pyenv.glob(f"versions/{PYTHON[0]}.{PYTHON[1]}.*/bin/python"))]
    candidates.append("python3.13")
    for candidate in candidates:
        try:
            asked = subprocess.run(
                [candidate, "-c", "import sys; print(sys.version_info[:2])"],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:
            continue
        if asked.stdout.strip() == str(PYTHON):
            return candidate
    # The last way needs the internet: uv brings one of its own builds.
    subprocess.run([uv, "python", "install", "--quiet", ".".join(map(str, PYTHON))], capture_output=True, check=False)
    if brought := subprocess.run(find, capture_output=True, text=True, check=False).stdout.split():
        return brought[0]
    raise EmulatorError(
        "LocalStack needs Python 3.13: run `uv python install 3.13`, or use infra/emulator/compose.yaml"
    )


def _install(uv: str) -> None:
    """LocalStack in an environment of its own, from its lock, with the plugin."""
    if shutil.which(uv) is None:
        raise EmulatorError(f"{uv} is not there: run make setup")
    plugin, lock = Path(__file__).parent / "plugin", ROOT / "requirements" / "localstack.txt"
    seen = hashlib.sha256(lock.read_bytes())
    for source in sorted(plugin.iterdir()):
        if source.is_file():
            seen.update(source.read_bytes())
    stamp = ENVIRONMENT / ".rankbridge-stamp"
    if stamp.exists() and stamp.read_text() == seen.hexdigest():
        return
    if not (ENVIRONMENT / "bin" / "python").exists():
        subprocess.run([uv, "venv", "-q", "-p", _interpreter(uv), str(ENVIRONMENT)], check=True)
    python = str(ENVIRONMENT / "bin" / "python")
    subprocess.run([uv, "pip", "sync", "-q", "--require-hashes", "-p", python, str(lock)], check=True)
    # Built from a copy, so that building leaves nothing in the checkout.
    copy = ENVIRONMENT / "rankbridge-plugin"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(plugin, copy)
    subprocess.run(
        [uv, "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-p", python, str(copy)], check=True
    )
    stamp.write_text(seen.hexdigest())


def _pulumi(at: Project, *arguments: str) -> None:
    subprocess.run(
        ["pulumi", *arguments, "--non-interactive"], cwd=at.directory, env={**os.environ, **at.environment}, check=True
    )


def _up(emulator: Emulator) -> None:
    """The local foundation on LocalStack, with throw-away secrets and a file backend."""
    emulator.start()
    if shutil.which("pulumi") is None:
        raise EmulatorError(
            f"LocalStack answers at {emulator.endpoint}; for the foundation on it, install the pulumi CLI"
        )
    directory = emulator.home / "project"
    if directory.exists():
        raise EmulatorError(f"{directory} holds the state of an earlier local-up: run make local-down first")
    at = project(directory, emulator.endpoint)
    _pulumi(at, "stack", "init", STACK)
    for key, value in at.secrets.items():
        _pulumi(at, "config", "set", "--stack", STACK, "--secret", key, value)
    _pulumi(at, "up", "--stack", STACK, "--yes", "--skip-preview")


def _down(emulator: Emulator) -> None:
    """Destroy the local foundation, forget its state, and stop LocalStack."""
    directory = emulator.home / "project"
    if directory.exists():
        if shutil.which("pulumi") is not None and emulator.healthy():
            at = Project(directory, pulumi_environment(directory), {})
            _pulumi(at, "destroy", "--stack", STACK, "--yes", "--skip-preview")
        # An emulator without persistence forgets its resources with its process; their state is worthless then.
        shutil.rmtree(directory)
    emulator.stop()


if __name__ == "__main__":
    sys.exit(main())
