"""Every way to tamper with the log is found and named by its line; a crash's torn line is no tampering."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.privacy.audit import (
    LINE_MAX,
    REPAIRED,
    Anchor,
    AuditError,
    AuditLog,
    MemoryAudit,
    entries,
    verify,
)


def _log(folder: Path, lines: int = 6) -> Path:
    path = folder / "audit.jsonl"
    log = AuditLog(path)
    for number in range(lines):
        log.append(action="replica.export", actor="desk", subject=f"set-{number}", detail={"parts": number})
    return path


def _kinds(path: Path, *anchors: str) -> list[tuple[int, str]]:
    return [(fault.line, fault.kind) for fault in verify(path, anchors).faults]


def test_an_untouched_log_is_whole_and_ends_at_the_head_that_the_last_append_returned(tmp_path: Path):
    log = AuditLog(tmp_path / "audit.jsonl")
    heads = [log.append(action="a.b", actor="me", subject=str(number)) for number in range(3)]
    found = verify(log.path, heads)
    assert found.faults == ()
    assert found.head == heads[-1] == log.head()
    assert found.entries == 3
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_an_altered_byte_is_found_in_its_line(tmp_path: Path):
    path = _log(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"set-2"', b'"set-9"'))
    assert _kinds(path) == [(3, "altered")]


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**6), change=st.integers(1, 255))
def test_no_byte_can_change_without_being_found(tmp_path_factory: pytest.TempPathFactory, place: int, change: int):
    path = _log(tmp_path_factory.mktemp("log"), lines=2)
    anchor = verify(path).head
    assert anchor is not None
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= change
    path.write_bytes(data)
    assert verify(path, [anchor]).faults


def test_a_removed_line_is_named_by_what_is_missing(tmp_path: Path):
    path = _log(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[4:]))
    (fault,) = verify(path).faults
    assert (fault.line, fault.kind) == (3, "removed")
    assert "line 3 to 4" in fault.text


def test_a_removed_first_line_is_found(tmp_path: Path):
    path = _log(tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    assert _kinds(path) == [(1, "removed")]


def test_a_line_put_in_twice_is_found(tmp_path: Path):
    path = _log(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[1], *lines[3:]]))
    assert (4, "inserted") in _kinds(path)


def test_a_line_made_to_fit_the_one_before_does_not_fit_the_one_after(tmp_path: Path):
    path = _log(tmp_path, lines=2)
    twin = tmp_path / "twin" / "audit.jsonl"
    twin.parent.mkdir()
    twin.write_bytes(path.read_bytes())
    AuditLog(twin).append(action="bundle.promote", actor="mallory", subject="x")
    forged = twin.read_bytes().splitlines(keepends=True)[2]
    AuditLog(path).append(action="a.b", actor="me", subject="")
    AuditLog(path).append(action="a.c", actor="me", subject="")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], forged, *lines[2:]]))
    assert _kinds(path) == [(4, "inserted")]
    path.write_bytes(b"".join([*lines[:2], forged, *lines[3:]]))
    assert _kinds(path) == [(4, "inserted")]


def test_lines_that_changed_places_are_found(tmp_path: Path):
    path = _log(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
    found = _kinds(path)
    assert found[0] == (2, "reordered")
    assert {kind for _, kind in found} == {"reordered"}


def test_a_cut_tail_is_seen_by_a_head_that_somebody_else_kept(tmp_path: Path):
    path = _log(tmp_path)
    head = AuditLog(path).head()
    assert head is not None
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    assert _kinds(path) == []
    (fault,) = verify(path, [Anchor(head, "channel stable")]).faults
    assert (fault.line, fault.kind) == (5, "truncated")
    assert "channel stable recorded line 6" in fault.text
    path.unlink()
    assert _kinds(path, head) == [(1, "truncated")]


def test_a_history_that_was_written_anew_is_seen_by_a_head_that_somebody_else_kept(tmp_path: Path):
    path = _log(tmp_path)
    head = AuditLog(path).head()
    assert head is not None
    path.unlink()
    for number in range(6):
        AuditLog(path).append(action="replica.export", actor="desk", subject=f"other-{number}")
    assert _kinds(path) == []
    assert _kinds(path, head) == [(6, "altered")]


def test_the_chain_can_be_checked_without_our_code(tmp_path: Path):
    prev = "0" * 64
    for line in _log(tmp_path).read_text().splitlines():
        entry = json.loads(line)
        assert entry["prev"] == prev
        body, _, _ = line.rpartition(',"hash":"')
        prev = hashlib.sha256((body + "}").encode()).hexdigest()
        assert entry["hash"] == prev


def test_a_line_torn_by_a_crash_is_dropped_by_the_next_append_and_said(tmp_path: Path):
    whole = _log(tmp_path).read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in (1, len(last) // 2, len(last) - 1):
        path = tmp_path / f"cut-{cut}.jsonl"
        path.write_bytes(whole[: -len(last) + cut])
        assert _kinds(path) == [(6, "torn")]
        AuditLog(path).append(action="a.b", actor="me", subject="after the crash")
        assert _kinds(path) == []
        repaired = list(entries(path))[5]
        assert (repaired.action, repaired.detail) == (REPAIRED, {"dropped_bytes": cut})


def test_a_whole_last_line_that_is_wrong_is_evidence_and_nothing_is_added(tmp_path: Path):
    path = _log(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"set-5"', b'"set-6"'))
    before = path.read_bytes()
    with pytest.raises(AuditError, match="keep the file as evidence"):
        AuditLog(path).append(action="a.b", actor="me", subject="")
    assert path.read_bytes() == before


@pytest.mark.parametrize("place", ["subject", "actor", "detail"])
def test_a_pseudonym_does_not_get_in(tmp_path: Path, place: str):
    log = AuditLog(tmp_path / "audit.jsonl")
    person = f"p1-{'ab' * 16}"
    line = {"subject": "s", "actor": "me", "detail": {"k": "v"}} | {
        place: {"user": f"was {person}"} if place == "detail" else person
    }
    with pytest.raises(ValueError, match="names no person"):
        log.append(action="person.erased", **line)  # type: ignore[arg-type] - the table above is of several types
    assert not log.path.exists()


def test_what_json_would_not_give_back_is_refused(tmp_path: Path):
    log = AuditLog(tmp_path / "audit.jsonl")
    with pytest.raises(ValueError, match="NaN"):
        log.append(action="a.b", actor="me", subject="", detail={"loss": float("nan")})
    with pytest.raises(ValueError, match="limit"):
        log.append(action="a.b", actor="me", subject="x" * LINE_MAX)
    with pytest.raises(ValueError, match="by whom"):
        log.append(action="a.b", actor="", subject="")


_APPEND_SOME = """
import pathlib, sys
from workloads.privacy.audit import AuditLog
for number in range(25):
    AuditLog(pathlib.Path(sys.argv[1])).append(action="a.b", actor=sys.argv[2], subject=str(number))
"""


def test_processes_that_append_at_once_make_one_chain(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    writers = [
        subprocess.Popen([sys.executable, "-c", _APPEND_SOME, str(path), f"writer-{number}"]) for number in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    found = verify(path)
    assert (found.entries, found.faults) == (75, ())
    assert {entry.actor for entry in entries(path)} == {"writer-0", "writer-1", "writer-2"}


def test_the_fake_chains_as_the_file_does(tmp_path: Path):
    fake, log = MemoryAudit(), AuditLog(tmp_path / "audit.jsonl", clock=lambda: 7)
    for audit in (fake, log):
        audit.append(action="a.b", actor="me", subject="x", detail={"n": 1})
    (real,) = entries(log.path)
    (made,) = fake.entries
    assert (real.action, real.subject, real.detail, real.prev) == (made.action, made.subject, made.detail, made.prev)


def test_a_link_is_not_followed(tmp_path: Path):
    (tmp_path / "audit.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AuditError, match="cannot be opened"):
        AuditLog(tmp_path / "audit.jsonl").append(action="a.b", actor="me", subject="")
    with pytest.raises(AuditError, match="cannot be read"):
        verify(tmp_path / "audit.jsonl")
