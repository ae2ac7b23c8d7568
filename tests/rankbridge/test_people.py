"""A person is forgotten at the desk without their id in a command line, a message or a log."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from rankbridge import cli, interrupts
from rankbridge.layout import HOME_VARIABLE
from workloads.privacy.audit import entries
from workloads.privacy.vault import SqliteVault

USER = "ada.lovelace@example.org"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.delenv("RANKBRIDGE_DATA_BUCKET", raising=False)
    monkeypatch.setattr(interrupts, "listen", lambda: None)  # pytest keeps its own handlers
    SqliteVault(tmp_path / "home" / "onprem" / "vault.sqlite", create=True).close()
    return tmp_path / "home"


def say(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_a_person_is_forgotten_and_gets_a_ticket(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    vault = SqliteVault(home / "onprem" / "vault.sqlite")
    name = vault.admit([USER])[USER]
    say(USER + "\n", monkeypatch)
    assert cli.main(["forget"]) == 0
    (erasure,) = vault.queue()
    assert erasure.pseudonyms == [name]
    shown = capsys.readouterr()
    assert erasure.ticket in shown.out
    log = (home / "onprem" / "audit.jsonl").read_text()
    assert [(entry.action, entry.subject) for entry in entries(home / "onprem" / "audit.jsonl")] == [
        ("person.forgotten", erasure.ticket)
    ]
    for text in (shown.out, shown.err, log):
        assert USER not in text
        assert name not in text
    vault.close()


@pytest.mark.parametrize(("said", "fault"), [("nobody\n", "home does not know this user"), ("\n", "no user is named")])
@pytest.mark.usefixtures("home")
def test_somebody_unknown_and_nobody_are_faults(
    said: str, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    say(said, monkeypatch)
    assert cli.main(["forget"]) == 2
    shown = capsys.readouterr()
    assert fault in shown.err + shown.out
    assert "nobody" not in shown.err + shown.out


@pytest.mark.usefixtures("home")
def test_an_id_is_never_an_argument(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    say("", monkeypatch)
    assert cli.main(["forget", USER]) == 2
    capsys.readouterr()


@pytest.mark.usefixtures("home")
def test_an_erasure_without_a_word_on_replicas_is_refused(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["erase"]) == 2
    assert "no bucket of replicas is named" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["forget", "erase"])
def test_help_says_what_a_command_does_with_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([command, "--help"]) == 0
    assert "Example:" in capsys.readouterr().out
