"""`python -m workloads.agent`: what a job says when it did its work, and when it could not."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from workloads.agent.__main__ import main
from workloads.bundle import incoming
from workloads.bundle.signature import make_key
from workloads.bundle.store import verify
from workloads.telemetry.progress import FaultLine, Line, ResultLine, parse


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A job takes the signals of its process; here that is the test run's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _install(bundle: Path, site: Path, *more: str) -> int:
    return main(
        [
            *("install", "--site", "onprem", "--site-class", "cpu"),
            *("--bundle", str(bundle), "--site-dir", str(site), *more),
        ]
    )


def _last(capsys: pytest.CaptureFixture[str]) -> Line | None:
    return parse(capsys.readouterr().out.strip().splitlines()[-1])


def test_install_leaves_a_verified_copy_and_a_repository_and_names_them(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _install(made, tmp_path / "site") == 0
    line = _last(capsys)
    assert isinstance(line, ResultLine)
    assert Path(line.made["bundle"]) == tmp_path / "site/bundles" / made.name
    assert verify(Path(line.made["bundle"]))
    assert (Path(line.made["repository"]) / line.made["models"] / "config.pbtxt").is_file()


def test_install_twice_is_install_once(made: Path, tmp_path: Path) -> None:
    assert _install(made, tmp_path) == _install(made, tmp_path) == 0
    assert len(list((tmp_path / "bundles").iterdir())) == 1


def test_a_tampered_bundle_is_refused_with_its_file_and_installs_nothing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Path(shutil.copytree(made, tmp_path / "store" / made.name))
    (bad / "ranker.onnx").write_bytes(b"other")
    assert _install(bad, tmp_path / "site") == 2
    line = _last(capsys)
    assert isinstance(line, FaultLine)
    assert "ranker.onnx: was cut short" in line.fault
    assert line.remedy
    assert not (tmp_path / "site" / "triton").exists()


def test_an_unknown_injection_is_a_fault(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _install(made, tmp_path, "--inject", "ranker-delay=fast") == 2
    line = _last(capsys)
    assert isinstance(line, FaultLine)
    assert "unknown injection 'ranker-delay=fast'" in line.fault


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_install_that_is_told_to_end_ends_and_leaves_nothing_half_made(
    number: signal.Signals, code: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told_while_syncing(_: Path) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(incoming, "_sync", told_while_syncing)
    assert _install(made, tmp_path) == code
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_site_directory_that_cannot_be_written_is_a_fault(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert _install(made, tmp_path / "file" / "site") == 2
    line = _last(capsys)
    assert isinstance(line, FaultLine)
    assert "cannot write" in line.fault


@pytest.mark.parametrize(
    "command",
    [
        ("fetch",),
        ("run", "--site", "onprem", "--site-class", "cpu", "--triton", "127.0.0.1:9", "--listen", "127.0.0.1:9"),
    ],
)
def test_a_profile_of_aws_that_is_not_there_is_a_fault_and_no_traceback(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_key(tmp_path / "trust" / "publisher.key")
    monkeypatch.setenv("AWS_PROFILE", "misspelt")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr("os.nice", lambda _: 0)  # it would stay with the test run
    options = ("--site-dir", str(tmp_path), "--channel", "stable", "--models-bucket", "models")
    assert main([*command, *options]) == 2
    said = "".join(capsys.readouterr())
    assert "profile (misspelt) could not be found" in said
    assert "check AWS_PROFILE" in said
