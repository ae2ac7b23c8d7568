"""`rankbridge forget` and `rankbridge erase`: what a person may ask of a home, at the desk.

A user's id comes from the prompt or from standard input, never as an argument: every process on the machine can read
command lines, and the shell keeps them. What is done is in `workloads.privacy.vault` and `workloads.erasure`.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import sys
from typing import Annotated, Final

import typer
from rich.console import Console

from rankbridge import jobs
from rankbridge.cloud import DATA_BUCKET
from rankbridge.faults import DeskError
from rankbridge.layout import Layout
from workloads.contract.sites import HOME, AddressBook, Listener
from workloads.privacy.audit import AuditError, AuditLog
from workloads.privacy.pseudonym import KeyFileError
from workloads.privacy.vault import SqliteVault, VaultError

app = typer.Typer(pretty_exceptions_enable=False)

_WIDTH: Final = 120
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


@app.command()
def forget() -> None:
    """Forget a person: from now on nobody can make their pseudonym, and the erasure is queued.

    Asks for the user's id, or reads it from standard input; it is never an argument. `rankbridge erase` then removes
    what is kept under the old pseudonym, everywhere.

    Example: `rankbridge forget < user-id.txt`
    """
    layout = Layout.of(os.environ)
    user = _user()
    try:
        with contextlib.closing(SqliteVault(layout.vault)) as vault:
            erasure = vault.forget(user)
        if erasure is None:
            raise DeskError(
                "home does not know this user", "check the id; who never did anything here needs no forgetting"
            )
        AuditLog(layout.audit).append(
            action="person.forgotten", actor=f"{getpass.getuser()}@{socket.gethostname()}", subject=erasure.ticket
        )
    except (VaultError, KeyFileError, AuditError) as error:
        raise DeskError(error.fault, error.remedy) from None
    _out.print(f"forgotten; the erasure's ticket is {erasure.ticket}")
    _out.print("remove what is kept under the old pseudonym: `rankbridge erase`")


@app.command()
def erase(
    data_bucket: Annotated[
        str | None, typer.Option("--data-bucket", metavar="NAME", envvar=DATA_BUCKET, help="Bucket with replicas.")
    ] = None,
    *,
    no_replicas: Annotated[
        bool, typer.Option("--no-replicas", help="Say that nothing of this home was ever replicated.")
    ] = False,
    intake: Annotated[
        str | None, typer.Option("--intake", metavar="URL", help="Home's intake; default: where `up` starts it.")
    ] = None,
    profiles: Annotated[
        str | None, typer.Option("--profiles", metavar="URL", help="A Redis that gateways read profiles from.")
    ] = None,
) -> None:
    """Remove everybody who was forgotten from spool, lake, profiles, data sets and replicas.

    Waits a minute for requests that may still be on their way. Goes on where it was when it is run again.

    Example: `rankbridge erase --data-bucket rankbridge-data`
    """
    layout = Layout.of(os.environ)
    if not data_bucket and not no_replicas:
        raise DeskError(
            "no bucket of replicas is named", f"give --data-bucket NAME, set {DATA_BUCKET}, or --no-replicas"
        )
    arguments = ["run", "--home", str(layout.home)]
    arguments += ["--no-replicas"] if no_replicas else ["--data-bucket", str(data_bucket)]
    if layout.events.exists():
        arguments += ["--intake", intake or AddressBook().url(HOME, Listener.INTAKE)]
    arguments += [] if profiles is None else ["--profiles", profiles]
    with jobs.viewing(_out) as view:
        done = jobs.run("workloads.erasure", arguments, log=layout.log("erasure"), view=view, root=layout.root)
    _out.print(f"{done.figures.get('erased', 0):.0f} erased")


def _user() -> str:
    """The id, without the line's end."""
    said = getpass.getpass("user's id (not shown): ") if sys.stdin.isatty() else sys.stdin.readline()
    user = said.rstrip("\r\n")
    if not user:
        raise DeskError("no user is named", "give the user's id on standard input, or at the prompt")
    return user
