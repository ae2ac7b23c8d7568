"""A confined process really tries to get at the lake, the spool and the key: the kernel says no, each time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from landlock import LandlockError

from workloads.privacy import confinement
from workloads.privacy.confinement import ConfinementError, UnsupportedError, confine, within
from workloads.telemetry.progress import Progress

try:
    ABI = confinement.landlock_abi_version()
except LandlockError:
    ABI = 0
landlocked = pytest.mark.skipif(ABI == 0, reason="this kernel has no Landlock")

PROBE = """
import errno, json, os, pathlib, socket, subprocess, sys, threading
from workloads.privacy.confinement import confine
home, private, tries = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
held = os.open(private / "events.sqlite", os.O_RDONLY)
os.chdir(private.parent)
said = confine(home)
{early}
def outcome(act):
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
found = {{}}
{body}
print(json.dumps(found))
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    private = tmp_path / "onprem"
    for name in ("lake/day=1/events.parquet", "events.sqlite", "key/pseudonym-1.key", "vault.sqlite", "audit.jsonl"):
        file = private / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"private")
    made = tmp_path / "aws" / "training"
    made.mkdir(parents=True)
    (made / "way.parquet").symlink_to(private / "lake" / "day=1" / "events.parquet")
    (made / "own.txt").write_text("ours")
    return made


def probe(home: Path, body: str, *, early: str = "") -> dict[str, str]:
    private = home.parents[1] / "onprem"
    command = [sys.executable, "-c", PROBE.format(body=body, early=early), str(home), str(private), "[]"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    answer: dict[str, str] = json.loads(ended.stdout.splitlines()[-1])
    return answer


@landlocked
@pytest.mark.parametrize(
    "name", ["lake/day=1/events.parquet", "events.sqlite", "key/pseudonym-1.key", "vault.sqlite", "audit.jsonl"]
)
def test_what_is_private_cannot_be_opened_from_inside(home: Path, name: str):
    found = probe(
        home,
        f"""
file = private / {name!r}
found["read"] = outcome(lambda: file.read_bytes())
found["write"] = outcome(lambda: file.open("ab"))
found["relative"] = outcome(lambda: open("onprem/" + {name!r}))
found["dots"] = outcome(lambda: (home / ".." / ".." / "onprem" / {name!r}).read_bytes())
found["thread"] = ""
def other(): found["thread"] = outcome(lambda: file.read_bytes())
thread = threading.Thread(target=other); thread.start(); thread.join()
found["own"] = outcome(lambda: (home / "own.txt").read_bytes())
""",
    )
    assert found == {
        "read": "EACCES", "write": "EACCES", "relative": "EACCES", "dots": "EACCES", "thread": "EACCES", "own": "done",
    }  # fmt: skip


@landlocked
def test_links_folders_and_other_processes_are_no_way_round(home: Path):
    """A symlink made before, one made inside, a hard link, a listing, another process's root, a file held open."""
    found = probe(
        home,
        """
lake = private / "lake" / "day=1" / "events.parquet"
found["symlink"] = outcome(lambda: (home / "way.parquet").read_bytes())
os.symlink(lake, home / "mine")
found["own symlink"] = outcome(lambda: (home / "mine").read_bytes())
found["hard link"] = outcome(lambda: os.link(lake, home / "hard"))
found["move"] = outcome(lambda: os.rename(lake, home / "moved"))
found["listing"] = outcome(lambda: os.listdir(private))
found["parent's root"] = outcome(lambda: open(f"/proc/{os.getppid()}/root{lake}"))
found["parent's environment"] = outcome(lambda: open(f"/proc/{os.getppid()}/environ").read())
found["parent's memory map"] = outcome(lambda: open(f"/proc/{os.getppid()}/maps").read())
found["parent's files"] = outcome(lambda: os.listdir(f"/proc/{os.getppid()}/fd"))
found["held"] = outcome(lambda: os.read(held, 1))
found["elsewhere"] = outcome(lambda: open(home.parent / "new", "w"))
""",
    )
    assert found.pop("hard link") in {"EACCES", "EXDEV"}
    assert found.pop("move") in {"EACCES", "EXDEV"}
    assert found.pop("held") == "EBADF"
    assert found == dict.fromkeys(found, "EACCES")


@landlocked
def test_a_child_process_is_confined_as_well(home: Path):
    found = probe(
        home,
        """
read = "import sys; open(sys.argv[1]).read()"
for name in ("events.sqlite", "key/pseudonym-1.key", "lake/day=1/events.parquet"):
    child = subprocess.run([sys.executable, "-c", read, str(private / name)], capture_output=True, text=True)
    found[name] = child.stderr.splitlines()[-1].split(":")[0] if child.returncode else "done"
child = subprocess.run(["/bin/cat", str(private / "events.sqlite")], capture_output=True)
found["cat"] = str(child.returncode)
child = subprocess.run([sys.executable, "-c", read, str(home / "own.txt")], capture_output=True, text=True)
found["own"] = child.stderr or "done"
""",
    )
    assert found.pop("own") == "done"
    assert found.pop("cat") == "1"
    assert set(found.values()) == {"PermissionError"}, found


@pytest.mark.skipif(ABI < 4, reason="this kernel cannot close TCP to a process")
def test_no_connection_is_possible_from_inside(home: Path):
    found = probe(
        home,
        """
found["connect"] = outcome(lambda: socket.create_connection(("127.0.0.1", 9), timeout=1))
found["listen"] = outcome(lambda: socket.create_server(("127.0.0.1", 0)))
""",
    )
    assert set(found.values()) == {"EACCES"}


@landlocked
def test_torch_and_the_frames_load_and_compute_inside(home: Path):
    found = probe(
        home,
        """
import tempfile
import torch, polars, numpy, pyarrow.parquet
torch.set_num_threads(2)
found["torch"] = str(float((torch.ones(300, 300) @ torch.ones(300, 300)).sum()))
polars.DataFrame({"a": [1, 2]}).write_parquet(home / "a.parquet")
found["frame"] = str(polars.read_parquet(home / "a.parquet").height)
found["scratch"] = str(pathlib.Path(tempfile.mkdtemp()).parent == home.resolve() / "scratch")
""",
    )
    assert found == {"torch": "27000000.0", "frame": "2", "scratch": "True"}


@landlocked
def test_without_confinement_the_same_probe_gets_in(home: Path):
    """The probe can fail: what it says is the kernel's doing, not its own."""
    body = 'found["read"] = outcome(lambda: (private / "events.sqlite").read_bytes())'
    script = PROBE.format(body=body, early="").replace("said = confine(home)", "")
    command = [sys.executable, "-c", script, str(home), str(home.parents[1] / "onprem"), "[]"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(ended.stdout) == {"read": "done"}


def test_a_process_with_threads_is_not_half_confined(tmp_path: Path):
    script = (
        "import pathlib, sys, threading, time\n"
        "from workloads.privacy.confinement import confine, ConfinementError\n"
        "threading.Thread(target=time.sleep, args=(1,), daemon=True).start()\n"
        "try: confine(pathlib.Path(sys.argv[1]))\n"
        "except ConfinementError as error: print(error.fault)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.strip() in {"1 threads are running and would stay free", confinement_missing()}


def confinement_missing() -> str:
    return "this kernel has no Landlock, or it is switched off"


def test_a_kernel_without_landlock_is_a_fault_unless_trying_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def missing() -> int:
        raise LandlockError("no such system call")

    monkeypatch.setattr(confinement, "landlock_abi_version", missing)
    with pytest.raises(UnsupportedError, match="--confine=try"):
        confine(tmp_path)
    with pytest.raises(UnsupportedError):
        confinement.confine_as_asked("yes", tmp_path, Progress())
    confinement.confine_as_asked("try", tmp_path, Progress())
    assert "not confined" in capsys.readouterr().out


def test_data_outside_the_home_is_refused_with_the_way_in(tmp_path: Path):
    within(tmp_path, [tmp_path / "replica" / "shop"])
    with pytest.raises(ConfinementError, match="--replica"):
        within(tmp_path / "aws", [tmp_path / "onprem" / "datasets" / "shop"])
    (tmp_path / "aws").mkdir()
    (tmp_path / "aws" / "out").symlink_to(tmp_path)
    with pytest.raises(ConfinementError):
        within(tmp_path / "aws", [tmp_path / "aws" / "out" / "onprem"])
