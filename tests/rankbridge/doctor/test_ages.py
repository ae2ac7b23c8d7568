"""Clocks, certificates, credentials and names: what holds, what ends soon, what has ended."""

from __future__ import annotations

import datetime
import socket
import threading
from pathlib import Path

import pytest
from botocore.exceptions import CredentialRetrievalError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rankbridge.doctor import ages
from rankbridge.doctor.findings import Verdict

NOW = datetime.datetime(2026, 7, 1, 12, tzinfo=datetime.UTC)
DAY, MINUTE = datetime.timedelta(days=1), datetime.timedelta(minutes=1)


@pytest.mark.parametrize(
    ("offset", "verdict"),
    [(0.0, "ok"), (-0.9, "ok"), (1.1, "ok"), (2.0, "warn"), (-59.0, "warn"), (3600.0, "fault"), (-3600.0, "fault")],
)
def test_a_clock_is_judged_by_what_is_beyond_the_measurements_own_precision(offset: float, verdict: str):
    assert ages.clock("clock", offset, 0.2).verdict == verdict


def _written(path: Path, begins: datetime.datetime, ends: datetime.datetime) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gw")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begins)
        .not_valid_after(ends)
        .sign(key, hashes.SHA256())
    )
    with path.open("ab") as file:
        file.write(made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.mark.parametrize(
    ("begins", "ends", "verdict"),
    [(-DAY, 90 * DAY, "ok"), (-DAY, 20 * DAY, "warn"), (-90 * DAY, -DAY, "fault"), (DAY, 90 * DAY, "fault")],
)
def test_a_certificate_is_judged_by_its_age(
    tmp_path: Path, begins: datetime.timedelta, ends: datetime.timedelta, verdict: str
):
    (found,) = ages.certificate(str(_written(tmp_path / "a.pem", NOW + begins, NOW + ends)), NOW)
    assert found.verdict == verdict


def test_every_certificate_of_a_file_is_looked_at(tmp_path: Path):
    file = _written(tmp_path / "chain.pem", NOW - DAY, NOW + 90 * DAY)
    _written(file, NOW - 90 * DAY, NOW - DAY)
    assert [one.verdict for one in ages.certificate(str(file), NOW)] == [Verdict.OK, Verdict.FAULT]


@pytest.mark.parametrize("where", ["nowhere.pem", "127.0.0.1:1", "host:port", ":", ""])
def test_a_certificate_that_cannot_be_read_is_a_fault(where: str):
    (found,) = ages.certificate(where, NOW)
    assert found.verdict is Verdict.FAULT
    assert "HOST:PORT" in found.remedy


@pytest.mark.parametrize(
    ("left", "verdict"), [(60 * MINUTE, "ok"), (10 * MINUTE, "warn"), (-MINUTE, "fault"), (None, "ok")]
)
def test_credentials_are_judged_by_what_is_left_of_them(left: datetime.timedelta | None, verdict: str):
    assert ages.credentials(NOW, lambda: ("process", None if left is None else NOW + left)).verdict == verdict


def test_no_credentials_are_no_fault_and_a_process_that_fails_is():
    def fails() -> None:
        raise CredentialRetrievalError(provider="custom-process", error_msg="exit 1")

    assert ages.credentials(NOW, lambda: None).verdict is Verdict.SKIPPED
    assert ages.credentials(NOW, fails).verdict is Verdict.FAULT


def test_names_that_resolve_that_do_not_and_that_never_answer_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ages, "RESOLVE_WITHIN_S", 0.05)
    ended = threading.Event()

    def resolver(name: str) -> list[str]:
        if name == "slow":
            ended.wait(5)
        if name == "unknown":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ["10.0.0.1"]

    try:
        found = {one.name: one for one in ages.names(["good", "unknown", "slow"], resolver)}
    finally:
        ended.set()
    assert (found["DNS good"].verdict, found["DNS good"].measured) == (Verdict.OK, "10.0.0.1")
    assert (found["DNS unknown"].verdict, found["DNS unknown"].measured) == (Verdict.FAULT, "Name or service not known")
    assert found["DNS slow"].verdict is Verdict.FAULT
    assert "no answer" in found["DNS slow"].measured


def test_without_names_there_is_nothing_to_resolve():
    assert [one.verdict for one in ages.names([])] == [Verdict.SKIPPED]
