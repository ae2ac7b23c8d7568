"""Calls as the sites make them: 64 kB to a gateway, a large answer from it, and as much to a Triton by gRPC.

TCP finds out by itself how much fits one packet, where routers tell; where they do not, small calls pass and large ones
hang. It knows addresses and no plan.
"""

from __future__ import annotations

import http.client
import socket
import time
from email.utils import parsedate_to_datetime

import grpc

from rankbridge.doctor.findings import Finding, fault, ok, skipped, warn
from workloads.contract.http import PATH_HEALTH, PATH_OPENAPI
from workloads.contract.slo import Endpoint

LARGE = 64 * 1024
WAIT_S = 10.0
_READY = "/inference.GRPCInferenceService/ServerLive"
_REMEDY = "see the mtu checks: packets that are too large vanish on the way; clamp MSS on both routers"


def gateway(site: str, address: tuple[str, int], *, mss: int | None, needed: bool) -> list[Finding]:
    """A small call, a large one, a large answer and the size of TCP's segments; `mss` is the largest planned.

    Where no gateway answers that is a fault if one is `needed`, else the checks are skipped.
    """
    small, post, answer, segment = (
        f"{what} {site}" for what in ("gateway", "64 kB POST to", "large answer from", "MSS to")
    )
    url = f"{address[0]}:{address[1]}"
    try:
        took, size, found_mss = _ask(address, "GET", PATH_HEALTH, b"")
    except (OSError, http.client.HTTPException) as error:
        if not needed:
            return [skipped(small, f"no gateway answers at {url}; `rankbridge up` starts both sites")]
        remedy = "see the BGP sessions and `rankbridge status` at that site"
        return [fault(small, f"no answer at {url}: {_words(error)}", f"an answer within {WAIT_S:g} s", remedy)]
    findings = [ok(small, f"answers in {took * 1000:.1f} ms")]
    if mss is None:
        findings.append(skipped(segment, "there is no tunnel"))
    elif found_mss <= mss:
        findings.append(ok(segment, f"{found_mss} bytes", f"at most {mss}"))
    else:
        remedy = f"clamp MSS to {mss} on both routers (the file rankbridge-vpn.nft does), or set the MTU of hosts"
        findings.append(warn(segment, f"{found_mss} bytes", f"at most {mss}", remedy))
    # Larger than any field may be: it must arrive whole to be refused.
    body = b'{"query":"' + b"q" * (LARGE - 12) + b'"}'
    for name, method, path, sent in (
        (post, "POST", Endpoint.SEARCH.value, body),
        (answer, "GET", PATH_OPENAPI, b""),
    ):
        try:
            took, size, _ = _ask(address, method, path, sent)
            findings.append(ok(name, f"{len(sent) or size} bytes in {took * 1000:.1f} ms", f"within {WAIT_S:g} s"))
        except (OSError, http.client.HTTPException) as error:
            why = f"{_words(error)}, while small calls are answered"
            findings.append(fault(name, why, f"an answer within {WAIT_S:g} s", _REMEDY))
    return findings


def triton(site: str, address: tuple[str, int]) -> Finding:
    """A gRPC call of 64 kB: a question whether the server lives, with a field that it does not know and skips."""
    name, url = f"64 kB gRPC to {site}", f"{address[0]}:{address[1]}"
    try:
        socket.create_connection(address, WAIT_S / 3).close()
    except OSError as error:
        return skipped(name, f"no Triton listens at {url}: {_words(error)}")
    length = LARGE
    varint = bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14])
    begun = time.monotonic()
    with grpc.insecure_channel(url, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(_READY)(b"\x7a" + varint + bytes(length), timeout=WAIT_S)
        except grpc.RpcError as error:
            return fault(name, f"{error.code().name} after {WAIT_S:g} s", "an answer", _REMEDY)
    return ok(name, f"{length} bytes in {(time.monotonic() - begun) * 1000:.1f} ms", f"within {WAIT_S:g} s")


def date(url: str) -> float:
    """Seconds that a server is ahead, give or take half of one. Raises OSError, HTTPException, ValueError."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if scheme not in kinds:
        raise ValueError(f"{url} is no http:// or https:// address")
    connection = kinds[scheme](host, timeout=WAIT_S)
    try:
        before = time.time()
        connection.request("HEAD", f"/{path}")
        said = connection.getresponse().getheader("date")
        after = time.time()
    finally:
        connection.close()
    if said is None:
        raise ValueError(f"{url} says no date")
    # The header has whole seconds, cut off.
    return parsedate_to_datetime(said).timestamp() + 0.5 - (before + after) / 2


def _ask(address: tuple[str, int], method: str, path: str, body: bytes) -> tuple[float, int, int]:
    """Seconds, bytes of the answer, and the connection's MSS. Raises OSError, HTTPException."""
    connection = http.client.HTTPConnection(*address, timeout=WAIT_S)
    begun = time.monotonic()
    try:
        connection.connect()
        mss = connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        connection.request(method, path, body or None, {"content-type": "application/json"} if body else {})
        answer = connection.getresponse()
        size = len(answer.read())
    finally:
        connection.close()
    return time.monotonic() - begun, size, mss


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer in {WAIT_S:g} s"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
