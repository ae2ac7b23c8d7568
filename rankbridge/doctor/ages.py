"""What goes wrong by itself with time: clocks, certificates, credentials, and names that no longer resolve.

Pure but for its doors: a resolver, a certificate's source, the holder of AWS's credentials.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import socket
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path

import botocore.session
from botocore.exceptions import BotoCoreError
from cryptography import x509

from rankbridge.doctor.findings import Finding, fault, ok, skipped, warn

SKEW_WARN_S, SKEW_FAULT_S = 1.0, 60.0
"""AWS refuses signatures that are five minutes off; a clock that is one minute off is not kept by anybody."""
CERTIFICATE_WARN = datetime.timedelta(days=21)
CREDENTIALS_WARN = datetime.timedelta(minutes=15)
RESOLVE_WITHIN_S = 3.0

Resolver = Callable[[str], list[str]]


def clock(name: str, offset_s: float, precision_s: float) -> Finding:
    """How far another clock is ahead of ours."""
    measured = f"{offset_s:+.3f} s, give or take {precision_s:.3f} s"
    wanted, remedy = f"within {SKEW_WARN_S:g} s", "start a time service (chrony, systemd-timesyncd) at both sites"
    beyond = abs(offset_s) - precision_s
    if beyond > SKEW_FAULT_S:
        return fault(name, measured, wanted, f"{remedy}: AWS refuses signatures, and events get wrong times")
    return warn(name, measured, wanted, remedy) if beyond > SKEW_WARN_S else ok(name, measured, wanted)


def resolve(name: str) -> list[str]:
    """The system's resolver. Raises OSError."""
    return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})


def names(configured: Iterable[str], resolver: Resolver = resolve) -> list[Finding]:
    """Each configured name, within a time in which a service would still wait for it."""
    wanted = list(configured)
    if not wanted:
        return [skipped("DNS", "everything is configured by address")]
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=len(wanted))
    asked = {name: pool.submit(resolver, name) for name in wanted}
    findings = []
    for name, answer in asked.items():
        remedy = "see /etc/resolv.conf, and whether the resolver is reached over a tunnel that is down"
        try:
            findings.append(ok(f"DNS {name}", ", ".join(answer.result(RESOLVE_WITHIN_S)[:3]), "an address"))
        except (OSError, concurrent.futures.TimeoutError) as error:
            late = isinstance(error, concurrent.futures.TimeoutError) and not isinstance(error, socket.gaierror)
            why = f"no answer in {RESOLVE_WITHIN_S:g} s" if late else str(getattr(error, "strerror", None) or error)
            findings.append(fault(f"DNS {name}", why, "an address", remedy))
    pool.shutdown(wait=False, cancel_futures=True)
    return findings


def certificate(where: str, now: datetime.datetime) -> list[Finding]:
    """Every certificate of a PEM file, or the one that `host:port` shows; whether anybody trusts it is not asked."""
    name = f"certificate {where}"
    try:
        if Path(where).exists():
            found = x509.load_pem_x509_certificates(Path(where).read_bytes())
        else:
            host, colon, port = where.rpartition(":")
            if not colon or not port.isdecimal():
                raise ValueError("no such file, and no HOST:PORT")
            found = [x509.load_pem_x509_certificate(ssl.get_server_certificate((host, int(port)), timeout=5).encode())]
    except (OSError, ValueError) as error:
        return [fault(name, f"cannot be read: {error}", "a certificate", "give the path of a PEM file, or HOST:PORT")]
    return [_age(name, one.not_valid_before_utc, one.not_valid_after_utc, now, CERTIFICATE_WARN) for one in found]


def aws_expiry() -> tuple[str, datetime.datetime | None] | None:
    """Where AWS's credentials come from and when they end; None without any. Raises BotoCoreError."""
    session = botocore.session.get_session()
    session.set_config_variable("metadata_service_num_attempts", 1)
    found = session.get_credentials()
    if found is None:
        return None
    found.get_frozen_credentials()
    ends = getattr(found, "_expiry_time", None)  # no public name; those that do not end have none
    return str(found.method), ends if isinstance(ends, datetime.datetime) else None


def credentials(
    now: datetime.datetime, expiry: Callable[[], tuple[str, datetime.datetime | None] | None] = aws_expiry
) -> Finding:
    """How long AWS's credentials still hold."""
    name = "AWS credentials"
    try:
        found = expiry()
    except BotoCoreError as error:
        return fault(name, f"cannot be had: {error}", "credentials that hold", "see the credential process or profile")
    if found is None:
        return skipped(name, "there are none here")
    source, ends = found
    if ends is None:
        return ok(name, f"from {source}, without an end")
    return _age(name, None, ends, now, CREDENTIALS_WARN)


def _age(
    name: str,
    begins: datetime.datetime | None,
    ends: datetime.datetime,
    now: datetime.datetime,
    early: datetime.timedelta,
) -> Finding:
    wanted = f"valid for {early} more"
    if begins is not None and now < begins:
        return fault(name, f"valid only from {begins:%Y-%m-%d %H:%M} on", wanted, "set the clock, or issue it again")
    left = ends - now
    if left <= datetime.timedelta():
        return fault(name, f"expired on {ends:%Y-%m-%d %H:%M} UTC", wanted, "renew it; what uses it reads it anew")
    measured = f"until {ends:%Y-%m-%d %H:%M} UTC"
    return warn(name, measured, wanted, "renew it now") if left < early else ok(name, measured, wanted)
