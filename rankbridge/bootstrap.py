"""Set-up of a fresh clone: checks the machine, then makes `.tools/` and `.venv/` from the hash locks.

Run by `make` with the system's python3, before anything is installed. So it uses the standard library
alone, and syntax that Python 3.6 can read: an old Python must get one clear line, not a SyntaxError. It
knows nothing of the project's own code.

Every environment has a stamp: the digest of what it was made from. A second run only compares stamps. An
environment is built beside its place and renamed into it, so an interrupted set-up leaves no half of one;
what was downloaded stays in uv's cache and is not downloaded again.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

PYTHON_MIN = (3, 11)
PYTHON_MAX = (3, 13)  # the tritonserver wheel holds Python backend stubs up to 3.13
GLIBC_MIN = (2, 35)  # its tag is manylinux_2_35
MACHINES = ("x86_64", "aarch64")

GB = 1000**3
DISK_FRESH_GB = 15  # torch with its CUDA libraries: 3 GB to download, 6 GB unpacked, and room to rehearse
DISK_AGAIN_GB = 3
DISK_CACHE_GB = 8

STAMP = ".rankbridge-stamp"
LAYOUT = "1"  # raise to have every environment made again
AGAIN = "run the same command again: set-up goes on where it was"


class Fault(Exception):  # noqa: N818 - the project's word for what a user can mend
    """Something the user can mend: what is wrong, and the remedy."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.remedy = remedy


def say(text: str) -> None:
    """One line of progress, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def version_text(version: "tuple[int, ...]") -> str:
    """`(3, 11)` as `3.11`."""
    return ".".join(str(part) for part in version)


def python_faults(version: "tuple[int, ...]", *, has_venv: bool, has_libpython: bool) -> "list[Fault]":
    """Whether this Python can carry the project; `version` is at least (major, minor).

    `has_libpython` is whether its shared library is installed: Triton's Python stub links to it.
    """
    minor = version_text(version[:2])
    if not PYTHON_MIN <= tuple(version[:2]) <= PYTHON_MAX:
        return [
            Fault(
                f"python3 is {minor}; rankbridge needs {version_text(PYTHON_MIN)} to {version_text(PYTHON_MAX)}",
                "install one (Debian, Ubuntu: `apt install python3.11 python3.11-venv libpython3.11`) "
                "and name it: `make PYTHON=python3.11 ...`",
            )
        ]
    faults = []
    if not has_venv:
        faults.append(
            Fault(
                "this python3 cannot make virtual environments (its module ensurepip is missing)",
                f"install it (Debian, Ubuntu: `apt install python{minor}-venv`)",
            )
        )
    if not has_libpython:
        faults.append(
            Fault(
                f"the shared library libpython{minor}.so.1.0 is missing; tritonserver's Python backend links to it",
                f"install it (Debian, Ubuntu: `apt install libpython{minor}`)",
            )
        )
    return faults


def machine_faults(system: str, machine: str, libc: "tuple[str, str]") -> "list[Fault]":
    """Whether the wheels exist for this machine; `libc` is what `platform.libc_ver()` gives."""
    if system != "Linux" or machine not in MACHINES:
        return [
            Fault(
                f"this machine is {system} {machine}; tritonserver comes for Linux on {' and '.join(MACHINES)}",
                "use such a machine, or a container or virtual machine of that kind",
            )
        ]
    name, number = libc
    parts = tuple(int(part) for part in number.split(".")[:2] if part.isdigit())
    if name != "glibc" or parts < GLIBC_MIN:
        found = f"{name} {number}" if name else "not glibc"
        return [
            Fault(
                f"the C library is {found}; tritonserver needs glibc {version_text(GLIBC_MIN)} or newer",
                "use Debian 12, Ubuntu 22.04 or newer",
            )
        ]
    return []


def nearest(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return path


def disk_faults(root: Path, cache: Path, *, fresh: bool) -> "list[Fault]":
    """Whether there is room in the checkout and, where that is another disk, in uv's cache."""
    faults = []
    needed = DISK_FRESH_GB if fresh else DISK_AGAIN_GB
    free = shutil.disk_usage(str(root)).free / GB
    if free < needed:
        faults.append(
            Fault(
                f"{free:.1f} GB of disk are free in {root}; set-up and a rehearsal need {needed} GB",
                "make room there, or clone to a larger disk",
            )
        )
    cache = nearest(cache)
    if fresh and cache.stat().st_dev != root.stat().st_dev:
        free = shutil.disk_usage(str(cache)).free / GB
        if free < DISK_CACHE_GB:
            faults.append(
                Fault(
                    f"{free:.1f} GB of disk are free for uv's cache in {cache}; downloads need {DISK_CACHE_GB} GB",
                    "make room there, or set UV_CACHE_DIR to a folder on a larger disk",
                )
            )
    return faults


def uv_cache() -> Path:
    """Where uv keeps downloads: UV_CACHE_DIR, else under XDG_CACHE_HOME, else ~/.cache."""
    named = os.environ.get("UV_CACHE_DIR")
    if named:
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "uv"


def has_venv() -> bool:
    """Whether `python -m venv` works here; Debian ships it apart from python3."""
    try:
        import ensurepip  # noqa: F401, PLC0415 - its presence is the question
        import venv  # noqa: F401, PLC0415 - as above
    except ImportError:
        return False
    return True


def has_libpython(version: "tuple[int, ...]") -> bool:
    """Whether the loader, or this Python's own folder, has libpython of this version.

    The wheel brings the one of its newest stub itself.
    """
    if tuple(version[:2]) == PYTHON_MAX:
        return True
    name = f"libpython{version_text(version[:2])}.so.1.0"
    if (Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib") / name).exists():
        return True
    for ldconfig in ("/sbin/ldconfig", "/usr/sbin/ldconfig"):
        if Path(ldconfig).exists():
            listed = subprocess.run([ldconfig, "-p"], stdout=subprocess.PIPE, check=False)
            return name.encode() in listed.stdout
    return False


class Environment:
    """One folder that set-up makes: where, and from which files."""

    def __init__(self, root: Path, place: str, sources: "list[str]", title: str) -> None:
        self.root = root
        self.place = root / place
        self.sources = sources
        self.title = title
        self.partial = self.place.parent / (".partial-" + self.place.name.lstrip("."))

    def digest(self) -> str:
        """What a stamp holds: the sources' bytes, the Python, and the place, since a venv cannot move."""
        seen = hashlib.sha256()
        for part in (LAYOUT, sys.version, str(Path(sys.executable).resolve()), str(self.place)):
            seen.update(part.encode() + b"\0")
        for source in self.sources:
            seen.update((self.root / source).read_bytes() + b"\0")
        return seen.hexdigest()

    def is_current(self) -> bool:
        """Whether it stands and was made from just these sources, here."""
        try:
            return (self.place / STAMP).read_text() == self.digest()
        except OSError:
            return False

    def begin(self) -> None:
        """Clear what an interrupted set-up left."""
        remove(self.partial)

    def finish(self) -> None:
        """Stamp what was built and put it in its place; the old one goes away only now."""
        (self.partial / STAMP).write_text(self.digest())
        old = self.partial.with_name(self.partial.name + "-old")
        remove(old)
        if self.place.exists():
            self.place.rename(old)
        self.partial.rename(self.place)
        remove(old)


def remove(folder: Path) -> None:
    """Remove a folder if it is there."""
    if folder.is_dir():
        shutil.rmtree(str(folder))


def call(command: "list[str]", what: str, environment: "dict[str, str] | None" = None) -> None:
    """Run one command to its end. Raises Fault when it fails."""
    # On a terminal the command draws its own progress; a log gets its lines but for the list of all packages.
    piped = not sys.stderr.isatty()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE if piped else None, env=environment
    ) as process:
        try:
            for line in process.stderr or ():
                if not line.startswith(b" + "):
                    sys.stderr.write(line.decode(errors="replace"))
            code = process.wait()
        except KeyboardInterrupt:
            # A terminal sent the signal to the child, too; SIGTERM to us alone did not. Let it tidy up.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            raise
    if code:
        raise Fault(
            f"{what} failed (exit code {code}); the lines above say why",
            "mend it (often the network or the package index) and " + AGAIN,
        )


def uv_environment(environ: "dict[str, str]", pip_settings: "dict[str, str]") -> "dict[str, str]":
    """What uv runs with: the caller's environment, and pip's index and certificates where uv has none of its own.

    Behind a company mirror pip is usually the one that was configured; uv does not read pip's settings.
    """
    result = dict(environ)
    index = environ.get("PIP_INDEX_URL") or pip_settings.get("global.index-url")
    if index and not any(name in environ for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_CONFIG_FILE")):
        result["UV_DEFAULT_INDEX"] = index
    certificates = environ.get("PIP_CERT") or pip_settings.get("global.cert")
    if certificates:
        result.setdefault("SSL_CERT_FILE", certificates)
    result.setdefault("UV_HTTP_TIMEOUT", "300")  # torch's wheels are large; uv's 30 s suit small ones
    result.pop("VIRTUAL_ENV", None)
    return result


class Setup:
    """The four environments and how each is made, in an order where each needs only earlier ones."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.locks = root / "requirements"
        self.tools = Environment(root, ".tools/uv", ["requirements/tools.txt"], "uv, the installer")
        self.triton = Environment(root, ".tools/triton", ["requirements/tritonserver.txt"], "tritonserver (60 MB)")
        self.triton_python = Environment(
            root, ".tools/triton-python", ["requirements/triton-python.txt"], "Python for Triton's models (40 MB)"
        )
        self.project = Environment(
            root,
            ".venv",
            ["requirements/project.txt", "pyproject.toml"],
            "the project's environment (the first time on a machine: 3 GB to download)",
        )

    def pending(self) -> "list[Environment]":
        """Environments that are missing or stale."""
        every = (self.tools, self.triton, self.triton_python, self.project)
        return [environment for environment in every if not environment.is_current()]

    def make(self, environment: Environment) -> None:
        """Build one environment beside its place, then put it there."""
        environment.begin()
        partial = str(environment.partial)
        if environment is self.tools:
            # The one thing that pip installs; uv installs all else.
            call([sys.executable, "-m", "venv", partial], "python3 -m venv")
            self.pip(partial, "install", "--quiet", "--require-hashes", "--no-deps", "-r", "tools.txt")
        elif environment is self.triton:
            # Unpacked and never imported: it holds the tritonserver binary and its libraries.
            self.uv(
                "install",
                sys.executable,
                "--no-deps",
                "--target",
                partial,
                "--require-hashes",
                "-r",
                "tritonserver.txt",
            )
        elif environment is self.triton_python:
            self.venv(partial)
            self.uv("install", partial, "--require-hashes", "-r", "triton-python.txt")
        else:
            self.venv(partial)
            self.uv("install", partial, "--require-hashes", "-r", "project.txt")
            self.uv("install", partial, "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(self.root))
        environment.finish()

    def pip(self, folder: str, *arguments: str) -> None:
        """Run the pip of a venv; a lock is named as it is called in `requirements/`."""
        python = str(Path(folder) / "bin" / "python")
        call([python, "-m", "pip", "--disable-pip-version-check", *self.in_locks(arguments)], "pip install")

    def venv(self, folder: str) -> None:
        """An empty venv that may be renamed."""
        command = [self.uv_path(), "venv", "--quiet", "--relocatable", "--prompt", "rankbridge"]
        call([*command, "--python", sys.executable, folder], "uv venv", self.environment())

    def uv(self, verb: str, python: str, *arguments: str) -> None:
        """Run `uv pip VERB` for a Python or venv; a lock is named as it is called in `requirements/`."""
        command = [self.uv_path(), "pip", verb, "--python", python, *self.in_locks(arguments)]
        call(command, "uv pip " + verb, self.environment())

    def uv_path(self) -> str:
        """The uv that set-up made."""
        return str(self.tools.place / "bin" / "uv")

    def in_locks(self, arguments: "tuple[str, ...]") -> "list[str]":
        """The arguments, with bare lock names made paths."""
        return [str(self.locks / word) if word.endswith(".txt") and "/" not in word else word for word in arguments]

    def environment(self) -> "dict[str, str]":
        """See `uv_environment`; pip's own settings are asked of pip."""
        python = str(self.tools.place / "bin" / "python")
        listed = subprocess.run([python, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, check=False)
        settings = {}
        for line in listed.stdout.decode(errors="replace").splitlines():
            name, equals, value = line.partition("=")
            if equals:
                settings[name] = value.strip("'\"")
        return uv_environment(dict(os.environ), settings)

    def run(self) -> None:
        """Make what is missing. Raises Fault."""
        pending = self.pending()
        for number, environment in enumerate(pending, 1):
            say(f"set-up {number}/{len(pending)}: {environment.title}")
            began = time.time()
            self.make(environment)
            say(f"set-up {number}/{len(pending)}: done in {time.time() - began:.0f} s")


def machine_checks(root: Path) -> "list[Fault]":
    """Every reason why set-up cannot work here, all at once."""
    version = tuple(sys.version_info[:3])
    faults = python_faults(version, has_venv=has_venv(), has_libpython=has_libpython(version))
    faults += machine_faults(platform.system(), platform.machine(), platform.libc_ver())
    faults += disk_faults(root, uv_cache(), fresh=not (root / ".venv").exists())
    return faults


def attempt(root: Path) -> "list[Fault]":
    """Check and set up; the faults that kept it from being done."""
    # A Python too old is told first and alone: nothing else here was ever tried on it.
    faults = python_faults(tuple(sys.version_info[:3]), has_venv=True, has_libpython=True)
    setup = Setup(root)
    if faults or not setup.pending():
        return faults
    faults = machine_checks(root)
    if faults:
        return faults
    (root / ".tools").mkdir(exist_ok=True)
    try:
        with (root / ".tools" / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once: the second waits, then finds all done
            setup.run()
    except Fault as fault:
        return [fault]
    return []


def main(root: Path) -> int:
    """Set up the checkout at `root`; the exit code: 0 done, 2 a fault, 130 interrupted."""
    try:
        faults = attempt(root)
    except KeyboardInterrupt:
        say("set-up was interrupted; " + AGAIN)
        return 130
    for fault in faults:
        sys.stderr.write(f"error: {fault.fault}\n  remedy: {fault.remedy}\n")
    return 2 if faults else 0


def _interrupt(_number: int, _frame: object) -> None:
    """SIGTERM ends set-up the way Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main(Path(__file__).resolve().parent.parent))
