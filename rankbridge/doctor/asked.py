"""What `rankbridge doctor` was asked, as what is examined; and the echo end that it is at the other site."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import shlex
import socket
from collections.abc import Callable

from rankbridge.doctor.echo import PORT, EchoEnd
from rankbridge.doctor.examination import Options, Place
from rankbridge.doctor.expected import Expected
from rankbridge.doctor.routers import CommandRouter
from rankbridge.faults import DeskError
from rankbridge.roles import Plan, Process, parse_ports
from rankbridge.serving import Serving
from rankbridge.supervisor import Facts
from workloads.contract.sites import SITES, AddressBook, Listener, SiteName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """The command's options as they were typed."""

    stack: str | None = None
    here: SiteName = SiteName.ONPREM
    peer: str | None = None
    echo: str | None = None
    routers: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()
    clocks: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()


def options(serving: Serving, asked: Asked) -> Options:
    """What is examined. Raises DeskError for what cannot be."""
    if asked.stack is None and (asked.peer is not None or asked.echo is not None):
        raise DeskError("--peer and --echo are of a real path", "name its plan: --stack foundation-prod")
    if asked.stack is not None and asked.peer is None:
        raise DeskError("the other site's address is not known", "give it: --peer ADDRESS")
    there = next(site for site in SiteName if site is not asked.here)
    running = serving.running_plan()
    if running is not None:
        book = running[0].addresses
    else:
        book, faults = parse_ports(asked.ports)
        if faults:
            raise faults[0]
    places = (
        [_place(name, site.address, book, needed=running is not None) for name, site in SITES.items()]
        if asked.peer is None
        else [_place(there, _ip(asked.peer, "--peer"), book, needed=True)]
    )
    return Options(
        layout=serving.layout,
        here=asked.here.value,
        there=there.value,
        plan=None if asked.stack is None else Expected.of_stack(asked.stack),
        places=places,
        echo=None if asked.echo is None else _address(asked.echo, "--echo"),
        routers=[CommandRouter(_words(text)) for text in asked.routers],
        names=asked.names,
        certificates=asked.certificates,
        clocks=asked.clocks,
        to_start=_to_start(serving, running, book) if asked.stack is None else (),
    )


def answer(where: str, say: Callable[[str], None]) -> None:
    """Be the echo end until interrupted. Raises DeskError when the address cannot be had."""
    address = _address(where, "--answer")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        try:
            bound.bind(address)
        except OSError as error:
            raise DeskError(f"cannot listen at {where}: {error.strerror}", "give an address of this machine") from None
        say(f"answering at {address[0]}:{bound.getsockname()[1]}/udp until Ctrl-C")
        EchoEnd(bound).serve()


def _place(site: SiteName, address: str, book: AddressBook, *, needed: bool) -> Place:
    return Place(site.value, (address, book.port(Listener.GATEWAY)), (address, book.port(Listener.TRITON_GRPC)), needed)


def _to_start(serving: Serving, running: tuple[Plan, Facts] | None, book: AddressBook) -> list[Process]:
    """What is not up; none where nothing could be started anyway, which the check of tools says."""
    plan = running[0] if running else Plan(serving.layout, book, serving.layout.bundles / "none")
    up = {one.name for one in serving.supervisor.alive()}
    with contextlib.suppress(DeskError):
        return [process for process in serving.processes(plan) if process.name not in up]
    return []


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise DeskError(f"--router {text}: {error}", 'write it as --router "ssh gw"') from None


def _ip(text: str, option: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise DeskError(f"{option} {text}: no IPv4 address", f"write it as {option} 10.20.0.10") from None


def _address(text: str, option: str) -> tuple[str, int]:
    host, colon, port = text.partition(":")
    number = port if colon else str(PORT)
    if not number.isdecimal() or not 0 <= int(number) <= 65_535:
        raise DeskError(f"{option} {text}: no port", f"write it as {option} 10.20.0.10:{PORT}")
    return _ip(host, option), int(number)
