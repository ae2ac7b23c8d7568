"""Where the unpacked tritonserver is, and the exact command and environment that start one for a site.

The server comes from the nvidia-pytriton wheel, unpacked and never imported (`make setup`): it holds
the CPU build of tritonserver with the Python backend, and a stub for each Python from 3.8 to 3.13. It
starts nothing itself and knows no model: what is served is the site's agent's business.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rankbridge.faults import DeskError
from workloads.contract.sites import AddressBook, Listener, Site

SETUP: Final = "run `make setup`"
EXIT_TIMEOUT_S: Final = 3
"""How long a server that was told to stop waits for what is in flight; Triton's own default is 30."""
HTTP_THREADS: Final = 4
"""Event loops for HTTP: each takes a share of the connections; more than this only costs memory on two cores."""
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where the Python backend puts its regions, not a scratch file


class TritonFault(DeskError):  # noqa: N818 - a DeskError by another name
    """Why no tritonserver can be started here, and the remedy."""


@dataclasses.dataclass(frozen=True)
class Triton:
    """An unpacked tritonserver and the Python that its models run in; made by `locate`."""

    server: Path
    libraries: Path
    backend_files: tuple[Path, ...]
    """The Python backend's library, its Python module, and the stub for our Python."""
    python: Path
    """The virtual environment with numpy 1 and onnxruntime."""
    python_libraries: Path | None
    """Where the shared library of exactly that Python is; None leaves it to the system's loader."""

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """What the server runs with: `base` with our libraries first and the models' Python on PATH.

        The stub embeds Python and finds its modules by the first `python3` on PATH; variables that
        would send it elsewhere are dropped. Numeric libraries get one thread: instances are the
        parallelism here.
        """
        dropped = {"PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV"}
        result = {name: value for name, value in base.items() if name not in dropped}
        libraries = [self.libraries, *([self.python_libraries] if self.python_libraries else [])]
        result["LD_LIBRARY_PATH"] = ":".join([*map(str, libraries), *filter(None, [base.get("LD_LIBRARY_PATH")])])
        result["PATH"] = f"{self.python / 'bin'}:{base.get('PATH', os.defpath)}"
        result["OMP_NUM_THREADS"] = "1"
        result["ORT_DISABLE_TELEMETRY"] = "1"
        return result

    def command(self, site: Site, addresses: AddressBook, *, repository: Path, scratch: Path) -> list[str]:
        """The server of a site: explicit model control, nothing loaded, every port on the site's address.

        `scratch` is a writable directory of ours; the backend directory is put together in it.
        """
        return [
            str(self.server),
            f"--id={site.name.value}",
            f"--model-repository={repository}",
            "--model-control-mode=explicit",
            "--disable-auto-complete-config",
            f"--backend-directory={self._assemble(scratch / 'triton-backends')}",
            f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix(site, addresses)}",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            f"--http-address={addresses.host(site)}",
            f"--http-port={addresses.port(Listener.TRITON_HTTP)}",
            f"--http-thread-count={HTTP_THREADS}",
            f"--grpc-address={addresses.host(site)}",
            f"--grpc-port={addresses.port(Listener.TRITON_GRPC)}",
            f"--metrics-address={addresses.host(site)}",
            f"--metrics-port={addresses.port(Listener.TRITON_METRICS)}",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            "--log-format=ISO8601",
        ]

    def _assemble(self, backends: Path) -> Path:
        """A backend directory whose `python/` holds the library, the module and the stub, as links."""
        folder = backends / "python"
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.backend_files:
            link = folder / file.name
            if not link.is_symlink() or link.readlink() != file:
                fresh = folder / f".{file.name}.{os.getpid()}"
                fresh.unlink(missing_ok=True)
                fresh.symlink_to(file)
                fresh.replace(link)
        return backends


def locate(root: Path) -> Triton:
    """The tritonserver that set-up unpacked under `root`/.tools. Raises TritonFault with the remedy."""
    unpacked, python = (root / ".tools" / "triton").resolve(), (root / ".tools" / "triton-python").absolute()
    parts = unpacked / "pytriton" / "tritonserver"
    server = parts / "bin" / "tritonserver"
    if not server.is_file():
        raise TritonFault(f"tritonserver is not unpacked: {server} is missing", SETUP)
    settings = python / "pyvenv.cfg"
    if not (python / "bin" / "python3").exists() or not settings.is_file():
        raise TritonFault(f"the Python that Triton's models run in is missing: {python}", SETUP)
    version = _python_version(settings)
    stubs = parts / "python_backend_stubs"
    stub = stubs / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(sorted((path.name for path in stubs.glob("3.*")), key=lambda name: int(name[2:])))
        raise TritonFault(
            f"this tritonserver runs models in Python {known or '(no stub was unpacked)'}, and {python} is {version}",
            "set up with another Python: `make setup PYTHON=python3.12`",
        )
    backend = parts / "backends" / "python"
    found = Triton(
        server=server,
        libraries=unpacked / "nvidia_pytriton.libs",
        backend_files=(backend / "libtriton_python.so", backend / "triton_python_backend_utils.py", stub),
        python=python,
        python_libraries=_python_libraries((python / "bin" / "python3").resolve(), version),
    )
    for file in found.backend_files:
        if not file.is_file():
            raise TritonFault(f"tritonserver is not whole: {file} is missing", f"remove {unpacked} and {SETUP}")
    for binary in (server, stub):
        if missing := _missing_libraries(binary, found.environment({})):
            raise TritonFault(f"{binary.name} lacks {', '.join(missing)}", _library_remedy(missing, version))
    return found


def shared_memory_prefix(site: Site, addresses: AddressBook) -> str:
    """How the Python backend's shared memory regions of a site's server are named."""
    # Memory is one for all network namespaces, in which ports are the same.
    place = f"-{addresses.host(site)}" if site.name in addresses.hosts else ""
    return f"rankbridge-{site.name.value}{place}-{addresses.port(Listener.TRITON_HTTP)}-"


def remove_shared_memory(site: Site, addresses: AddressBook) -> int:
    """Remove the regions that a killed server of this site left; only call while none runs. Returns their number."""
    regions = list(SHARED_MEMORY.glob(f"{shared_memory_prefix(site, addresses)}*"))
    for region in regions:
        region.unlink(missing_ok=True)
    return len(regions)


def _python_version(settings: Path) -> str:
    """`3.11` from a virtual environment's pyvenv.cfg, as venv, virtualenv and uv write it."""
    match = re.search(r"^version(?:_info)?\s*=\s*(3\.\d+)", settings.read_text(), re.MULTILINE)
    if match is None:
        raise TritonFault(f"{settings} does not say which Python it is", f"remove {settings.parent} and {SETUP}")
    return match[1]


def _python_libraries(interpreter: Path, version: str) -> Path | None:
    """The folder of the interpreter's own libpython, so that it never runs with another patch release's."""
    folder = interpreter.parent.parent / "lib"
    return folder if (folder / f"libpython{version}.so.1.0").exists() else None


def _missing_libraries(binary: Path, environment: Mapping[str, str]) -> list[str]:
    """Shared libraries (and versions of them) that the loader would not find; the binary itself does not run."""
    listed = subprocess.run(
        [str(binary)],
        env={**environment, "LD_TRACE_LOADED_OBJECTS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"^\s*(\S+) => not found", listed.stdout, re.MULTILINE)
    found += re.findall(r"version `([^']+)' not found", listed.stdout + listed.stderr)
    return sorted(set(found))


def _library_remedy(missing: list[str], version: str) -> str:
    if any(name.startswith("libpython") for name in missing):
        return (
            f"install it (Debian, Ubuntu: `apt install libpython{version}`), or set up with a Python that brings "
            "its shared library: `make setup PYTHON=...`"
        )
    if any(name.startswith(("GLIBC", "CXXABI")) for name in missing):
        return "use Debian 12, Ubuntu 22.04 or newer"
    return "install them with the system's package manager"
