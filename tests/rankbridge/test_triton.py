"""tritonserver is found whole or refused with a remedy, and its command line is the one we mean."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from rankbridge import triton
from rankbridge.triton import TritonFault, locate
from workloads.contract.sites import AWS, ONPREM, AddressBook, Listener

ROOT = Path(__file__).resolve().parents[2]


def _script(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What set-up makes, with scripts for binaries."""
    parts = tmp_path / ".tools/triton/pytriton/tritonserver"
    _script(parts / "bin/tritonserver")
    for version in ("3.8", "3.10", "3.11", "3.12"):
        _script(parts / f"python_backend_stubs/{version}/triton_python_backend_stub")
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        _script(parts / "backends/python" / name)
    (tmp_path / ".tools/triton/nvidia_pytriton.libs").mkdir()
    _script(tmp_path / ".tools/triton-python/bin/python3")
    _python_is(tmp_path, "version_info = 3.11.7")
    return tmp_path


def _python_is(root: Path, line: str) -> None:
    (root / ".tools/triton-python/pyvenv.cfg").write_text(f"home = /usr/bin\nimplementation = CPython\n{line}\n")


def test_the_stub_of_the_models_python_is_taken(root: Path) -> None:
    assert locate(root).backend_files[2].parent.name == "3.11"
    _python_is(root, "version = 3.12.3")  # as the standard library's venv writes it
    assert locate(root).backend_files[2].parent.name == "3.12"


@pytest.mark.parametrize(
    ("gone", "fault"),
    [
        (".tools/triton/pytriton/tritonserver/bin/tritonserver", "tritonserver is not unpacked"),
        (".tools/triton-python/pyvenv.cfg", "the Python that Triton's models run in is missing"),
        (".tools/triton-python/bin/python3", "the Python that Triton's models run in is missing"),
        (".tools/triton/pytriton/tritonserver/backends/python/libtriton_python.so", "tritonserver is not whole"),
    ],
)
def test_what_is_not_unpacked_is_named_and_make_setup_is_the_remedy(root: Path, gone: str, fault: str) -> None:
    (root / gone).unlink()
    with pytest.raises(TritonFault, match=fault) as caught:
        locate(root)
    assert "make setup" in caught.value.remedy


@pytest.mark.parametrize("line", ["version_info = 3.14.0", "version = 3.7.9", "version_info = 3.9.1.final.0"])
def test_a_python_without_a_stub_is_refused_with_those_that_have_one(root: Path, line: str) -> None:
    _python_is(root, line)
    with pytest.raises(TritonFault, match=r"runs models in Python 3\.8, 3\.10, 3\.11, 3\.12, and .* is 3\.") as caught:
        locate(root)
    assert "PYTHON=" in caught.value.remedy


def test_an_environment_that_hides_its_version_is_refused(root: Path) -> None:
    _python_is(root, "")
    with pytest.raises(TritonFault, match="does not say which Python it is"):
        locate(root)


@pytest.mark.parametrize(
    ("loader_says", "fault", "remedy"),
    [
        ("\tlibpython3.11.so.1.0 => not found\n", r"lacks libpython3\.11\.so\.1\.0", "apt install libpython3.11"),
        ("x: /lib/libc.so.6: version `GLIBC_2.38' not found (required by x)\n", "lacks GLIBC_2.38", "Ubuntu 22.04"),
        (
            "\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n\tlibrtmp.so.1 => not found\n",
            r"lacks librtmp\.so\.1$",
            "package manager",
        ),
    ],
)
def test_a_library_that_the_loader_would_not_find_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, loader_says: str, fault: str, remedy: str
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, stdout=loader_says, stderr="")
    )
    with pytest.raises(TritonFault, match=fault) as caught:
        locate(root)
    assert remedy in caught.value.remedy


def _value(command: list[str], flag: str) -> str:
    (found,) = [word.partition("=")[2] for word in command if word.startswith(f"--{flag}=")]
    return found


def test_a_server_listens_on_its_sites_address_only_and_loads_nothing_by_itself(root: Path, tmp_path: Path) -> None:
    book = AddressBook({Listener.TRITON_HTTP: 9100})
    command = locate(root).command(AWS, book, repository=tmp_path / "repository", scratch=tmp_path / "run")
    assert {_value(command, f"{kind}-address") for kind in ("http", "grpc", "metrics")} == {AWS.address}
    assert [_value(command, f"{kind}-port") for kind in ("http", "grpc", "metrics")] == ["9100", "8001", "8002"]
    assert _value(command, "model-control-mode") == "explicit"
    assert not [word for word in command if word.startswith("--load-model")]
    assert int(_value(command, "exit-timeout-secs")) <= 3


def test_two_sites_never_share_a_shared_memory_region(root: Path, tmp_path: Path) -> None:
    found = locate(root)
    prefixes = {
        _value(found.command(site, AddressBook(), repository=tmp_path, scratch=tmp_path), "backend-config")
        for site in (ONPREM, AWS)
    }
    assert len(prefixes) == 2


def test_the_backend_directory_is_put_together_once_and_follows_a_new_set_up(root: Path, tmp_path: Path) -> None:
    def assembled() -> dict[str, Path]:
        command = locate(root).command(ONPREM, AddressBook(), repository=tmp_path, scratch=tmp_path / "run")
        folder = Path(_value(command, "backend-directory")) / "python"
        return {link.name: link.resolve() for link in folder.iterdir()}

    first = assembled()
    assert set(first) == {"libtriton_python.so", "triton_python_backend_utils.py", "triton_python_backend_stub"}
    assert assembled() == first
    _python_is(root, "version_info = 3.12.1")
    assert assembled()["triton_python_backend_stub"].parent.name == "3.12"


def test_the_environment_leads_to_our_libraries_and_python_and_to_no_other(root: Path) -> None:
    base = {"PATH": "/usr/bin", "PYTHONPATH": "/elsewhere", "VIRTUAL_ENV": "/venv", "LD_LIBRARY_PATH": "/opt", "A": "b"}
    environment = locate(root).environment(base)
    assert environment["PATH"].split(":") == [str(root / ".tools/triton-python/bin"), "/usr/bin"]
    assert environment["LD_LIBRARY_PATH"].split(":")[0].endswith("nvidia_pytriton.libs")
    assert environment["LD_LIBRARY_PATH"].endswith(":/opt")
    assert environment["A"] == "b"
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & set(environment)


def test_the_interpreters_own_libpython_comes_before_the_systems(root: Path, tmp_path: Path) -> None:
    real = tmp_path / "python"
    _script(real / "bin/python3")
    (real / "lib").mkdir()
    (real / "lib/libpython3.11.so.1.0").touch()
    link = root / ".tools/triton-python/bin/python3"
    link.unlink()
    link.symlink_to(real / "bin/python3")
    assert str(real / "lib") in locate(root).environment({})["LD_LIBRARY_PATH"].split(":")


def test_only_a_sites_own_regions_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "SHARED_MEMORY", tmp_path)
    book = AddressBook()
    mine = tmp_path / f"{triton.shared_memory_prefix(ONPREM, book)}1234"
    other = tmp_path / f"{triton.shared_memory_prefix(AWS, book)}1234"
    mine.touch()
    other.touch()
    assert triton.remove_shared_memory(ONPREM, book) == 1
    assert [path.name for path in tmp_path.iterdir()] == [other.name]


@pytest.mark.real_parts
def test_the_unpacked_tritonserver_is_whole_on_this_machine() -> None:
    found = locate(ROOT)
    assert os.access(found.server, os.X_OK)
    assert found.libraries.is_dir()
