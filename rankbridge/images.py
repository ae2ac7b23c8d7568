"""`rankbridge images ...`: which images there are, how they are built here, and which digests a stack deploys.

Building is for `rankbridge.engines`, asking a registry for `rankbridge.registries`; a stack names images by digest
only, and only a registry's own word gets there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infra import stackfile
from rankbridge import engines
from rankbridge.bootstrap import Setup
from rankbridge.faults import DeskError, ManyFaults
from rankbridge.layout import Layout
from rankbridge.references import Reference
from workloads.bundle.site import replace_file

if TYPE_CHECKING:
    from rankbridge.registries import Registries

LOCAL: Final = "localhost/rankbridge"
"""What images are called in the store of the machine that builds them."""
KEY: Final = "rankbridge:images"
DEBIAN: Final = "debian"
_SUITE: Final = "bookworm"
"""The Debian whose Python is 3.11, which the locks are for."""
_LEFT_OUT: Final = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/i18n/*")


@dataclasses.dataclass(frozen=True)
class Deployable:
    """One image that is built: a target of images/Dockerfile, with the lock images/requirements/<name>.txt."""

    name: str
    modules: tuple[str, ...]
    """What it is there to run; `python -m` of them, or what else is said in `remark`."""
    remark: str = ""


DEPLOYABLES: Final = (
    Deployable("gateway", ("workloads.gateway",)),
    Deployable("retrieval", ("workloads.retrieval",)),
    Deployable("intake", ("workloads.intake", "workloads.feedback"), "one pod: feedback reads the intake's file"),
    Deployable("agent", ("workloads.agent",)),
    Deployable("operators", ("workloads.operators",)),
    Deployable(
        "training",
        (
            "workloads.training",
            "workloads.export",
            "workloads.data",
            "workloads.lake",
            "workloads.replication",
            "workloads.erasure",
            "workloads.delta",
        ),
        "the one with torch",
    ),
    Deployable("load", ("loadtests",), "locust -f /app/loadtests/mix.py"),
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Container images: what there is, build it, pin it by digest in a stack.",
)

_WIDTH: Final = 120
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)

NamesArgument = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Default: all.")]
TagOption = Annotated[
    str | None, typer.Option("--tag", metavar="TAG", help="Default: the checkout's revision, 12 digits.")
]
EngineOption = Annotated[
    str, typer.Option("--engine", metavar="NAME", help="docker or buildah; default: the one that works.")
]


@dataclasses.dataclass(frozen=True)
class Upstream:
    """images/upstream.yaml: what is taken from others."""

    path: Path
    bases: Mapping[str, Reference]
    taken: Mapping[str, Reference]

    @classmethod
    def read(cls, path: Path) -> Upstream:
        """Read it. Raises DeskError."""
        try:
            held: dict[str, dict[str, str]] = yaml.safe_load(path.read_text())
            bases, taken = held["bases"], held["taken"]
            return cls(
                path,
                {name: Reference.parse(text) for name, text in bases.items()},
                {name: Reference.parse(text) for name, text in taken.items()},
            )
        except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise DeskError(f"cannot read {path}: {error}", "bring it back from the repository") from None


@dataclasses.dataclass(frozen=True)
class Source:
    """The revision that images are made of."""

    revision: str
    """40 hex digits; `-dirty` behind it where files of the images differ from it."""

    @property
    def tag(self) -> str:
        """What its images are tagged with."""
        commit, _, dirty = self.revision.partition("-")
        return commit[:12] + (f"-{dirty}" if dirty else "")

    @classmethod
    def of(cls, root: Path) -> Source:
        """The checkout's. Raises DeskError where there is none."""

        def git(*arguments: str) -> str:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True, text=True)
            return done.stdout.strip()

        try:
            commit = git("rev-parse", "HEAD")
            changed = git("status", "--porcelain", "--", "workloads", "loadtests", "images", "requirements/tools.txt")
        except (OSError, subprocess.CalledProcessError):
            raise DeskError(
                f"{root} is no git checkout: an image would not know what it was made of", "build in a clone"
            ) from None
        return cls(f"{commit}-dirty" if changed else commit)


@app.command()
def build(
    names: NamesArgument = None,
    *,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE",
            help=f"Debian with Python 3.11: by digest, localhost/..., or `{DEBIAN}` to make one with mmdebstrap; "
            "default: the one in images/upstream.yaml.",
        ),
    ] = None,
    tag: TagOption = None,
    engine: EngineOption = "",
) -> None:
    """Build images from this checkout, with whichever of Docker and buildah works.

    The same revision on the same base makes the same image. A base is named by digest, so that it is.

    Example: `rankbridge images build gateway --base debian`
    """
    layout = _layout()
    log = layout.log("images")
    chosen = [one for one in DEPLOYABLES if one.name in _known(names, [one.name for one in DEPLOYABLES])]
    given = None if base == DEBIAN else _base(layout, base)
    source = Source.of(layout.root)
    found = engines.find(engines.candidates(), log, engine)
    _out.print(f"building with {found.name}; what it says is in {layout.shown(log)}", soft_wrap=True)
    on = given or debian(found, log)
    with index_secrets(layout.root) as secrets:
        for one in chosen:
            reference = f"{LOCAL}/{one.name}:{tag or source.tag}"
            order = dockerfile_order(layout.root, one.name, reference, base=on, source=source, secrets=secrets)
            made = engines.build(found, order, log)
            _out.print(
                f"{made.reference}  {made.identity}  {made.size_bytes / 1e6:.0f} MB in {made.seconds:.0f} s",
                soft_wrap=True,
            )
    _out.print("next: `rankbridge images push --registry ...`, then `rankbridge images pin ...`", soft_wrap=True)


@app.command()
def push(
    names: NamesArgument = None,
    *,
    registry: Annotated[str, typer.Option(metavar="HOST/PATH", help="They become HOST/PATH/gateway:TAG and so on.")],
    tag: TagOption = None,
    engine: EngineOption = "",
) -> None:
    """Copy images that were built here to a registry, with the tool that built them and its login.

    Example: `rankbridge images push --registry 111122223333.dkr.ecr.eu-central-1.amazonaws.com/rankbridge-prod`
    """
    layout = _layout()
    log = layout.log("images")
    chosen = _known(names, [one.name for one in DEPLOYABLES])
    chosen_tag = tag or Source.of(layout.root).tag
    found = engines.find(engines.candidates(), log, engine)
    pairs = [(f"{LOCAL}/{name}:{chosen_tag}", Reference.parse(f"{registry}/{name}:{chosen_tag}")) for name in chosen]
    if faults := [_not_here(here) for here, _ in pairs if found.inspect(here) is None]:
        raise ManyFaults(faults)
    for here, there in pairs:
        for command in found.push(here, there):
            engines.run(command, log, f"pushing {there}", found.environment())
        _out.print(f"pushed: {there}", soft_wrap=True)


@app.command()
def pin(
    names: NamesArgument = None,
    *,
    registry: Annotated[
        str | None, typer.Option(metavar="HOST/PATH", help="Where our images are: HOST/PATH/gateway and so on.")
    ] = None,
    stack: Annotated[str | None, typer.Option(metavar="NAME", help="Stack to write to, apps-prod.")] = None,
    tag: TagOption = None,
    mirrored: Annotated[
        bool,
        typer.Option(
            "--mirrored", help="Images of others are copied to the registry, too: HOST/PATH/triton:26.07-py3."
        ),
    ] = False,
    bases: Annotated[
        bool, typer.Option("--bases", help="Pin what images are built on, in images/upstream.yaml, instead.")
    ] = False,
) -> None:
    """Ask registries which digests tags have now, and write those into a stack file. All of them, or nothing.

    Logins are those of `docker login` and `buildah login`. Only a registry's answer is ever written.

    Example: `rankbridge images pin --registry 111122223333.dkr.ecr.eu-central-1.amazonaws.com/rankbridge-prod
    --stack apps-prod`
    """
    from rankbridge import registries  # noqa: PLC0415 - an HTTP client that no other command wants

    layout = _layout()
    upstream = _upstream(layout)
    if bases == (stack is not None):
        raise DeskError("it is not said what to pin", "give either --stack apps-prod or --bases")
    with registries.client() as client:
        held = registries.logins(registries.login_files(os.environ, Path.home()))
        asked = registries.Registries(client, held)
        if stack is None:
            pin_bases(asked, upstream)
            return
        path = _stack_file(stack)
        ours = {one.name for one in DEPLOYABLES}
        wanted = _known(names, [*(one.name for one in DEPLOYABLES), *upstream.taken])
        if registry is None and (mirrored or ours & set(wanted)):
            raise DeskError("no registry is named", "give the one that images were pushed to: --registry HOST/PATH")
        chosen_tag = tag or (Source.of(layout.root).tag if ours & set(wanted) else "")
        there = {one.name: chosen_tag for one in DEPLOYABLES}
        if mirrored:
            there |= {name: reference.tag for name, reference in upstream.taken.items()}
        references = {
            name: Reference.parse(f"{registry}/{name}:{there[name]}") if name in there else upstream.taken[name]
            for name in wanted
        }
        digests = _digests(asked, references)
    pins = {name: references[name].pinned(digest) for name, digest in digests.items()}
    write_pins(path, pins)
    for name, reference in pins.items():
        _out.print(f"{name}: {reference}", soft_wrap=True)
    _out.print(f"written to {layout.shown(path)}; look at it with `git diff`, then preview the stack", soft_wrap=True)


@app.command(name="list")
def list_command(
    stack: Annotated[str | None, typer.Option(metavar="NAME", help="Show what this stack deploys.")] = None,
) -> None:
    """Say which images there are: what each runs or where it is from, and what a stack has pinned.

    Example: `rankbridge images list --stack apps-prod`
    """
    upstream = _upstream(_layout())
    pinned = {} if stack is None else _pinned(_stack_file(stack))
    table = Table()
    for column in ("image", "made of", *(() if stack is None else (stack,))):
        table.add_column(column, overflow="fold")
    rows = {one.name: ", ".join(one.modules) + (f" ({one.remark})" if one.remark else "") for one in DEPLOYABLES}
    rows |= {name: str(reference) for name, reference in upstream.taken.items()}
    for name, made_of in rows.items():
        table.add_row(name, escape(made_of), *(() if stack is None else (_shown(pinned.get(name)),)))
    _out.print(table)


def dockerfile_order(
    root: Path, name: str, reference: str, *, base: str, source: Source, secrets: Mapping[str, Path]
) -> engines.Order:
    """What an engine is asked for to make one of our images."""
    return engines.Order(
        context=root,
        dockerfile=root / "images" / "Dockerfile",
        reference=reference,
        target=name,
        arguments={"BASE": base},
        labels={"org.opencontainers.image.revision": source.revision},
        secrets=secrets,
    )


def debian(engine: engines.Engine, log: Path) -> str:
    """A base made here of Debian's packages, where no registry can be reached; made once. Raises DeskError."""
    reference = f"{LOCAL}/base:{DEBIAN}-{_SUITE}"
    if engine.inspect(reference) is not None:
        return reference
    _out.print(f"making the base from Debian {_SUITE} with mmdebstrap, once", soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        options = [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
        include = "--include=python3-venv,libstdc++6,ca-certificates"
        command = ["mmdebstrap", "--variant=essential", include, *options, _SUITE, str(context / "root.tar")]
        order = engines.Order(context, context / "Dockerfile", reference)
        order.dockerfile.write_text("FROM scratch\nADD root.tar /\n")
        engines.run(command, log, "making a base with mmdebstrap", {"SOURCE_DATE_EPOCH": str(order.epoch)})
        engines.build(engine, order, log)
    return reference


def write_pins(path: Path, pins: Mapping[str, str]) -> None:
    """Set images in a stack file and change nothing else there. Raises DeskError; the file is then as it was."""
    try:
        before = path.read_text()
        after = stackfile.with_images(before, pins, KEY)
        expected = yaml.safe_load(before)
        expected["config"][KEY] = {**(expected["config"].get(KEY) or {}), **pins}
        if yaml.safe_load(after) != expected:
            raise ValueError("its form is not understood")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DeskError(
            f"cannot pin images in {path}: {error}", f"give it a plain mapping `{KEY}` under config"
        ) from None
    replace_file(path, after.encode())


def pin_bases(asked: Registries, upstream: Upstream) -> None:
    """Write the digests of what images are built on beside their tags. Raises DeskError."""
    text = upstream.path.read_text()
    for name, digest in _digests(asked, upstream.bases).items():
        reference = upstream.bases[name]
        text = text.replace(f"{name}: {reference}\n", f"{name}: {dataclasses.replace(reference, digest=digest)}\n")
        _out.print(f"{name}: {dataclasses.replace(reference, digest=digest)}", soft_wrap=True)
    replace_file(upstream.path, text.encode())


def _digests(asked: Registries, references: Mapping[str, Reference]) -> dict[str, str]:
    """Every digest, or every fault in one DeskError."""
    found, faults = {}, []
    for name, reference in references.items():
        try:
            found[name] = asked.digest(reference)
        except DeskError as error:
            faults.append(error)
    if faults:
        raise ManyFaults(faults)
    return found


def _not_here(reference: str) -> DeskError:
    return DeskError(f"{reference} is not built on this machine", "build it: `rankbridge images build`, same --tag")


def _known(names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The names asked for, all when none is; in the order of `known`. Raises DeskError for a strange one."""
    if strange := [name for name in names or () if name not in known]:
        raise DeskError(f"no image is called {', '.join(strange)}", f"one of {', '.join(known)}")
    return [name for name in known if not names or name in names]


def _base(layout: Layout, given: str | None) -> str:
    reference = _upstream(layout).bases["python"] if given is None else Reference.parse(given)
    if reference.is_placeholder or not (reference.digest or reference.is_local):
        raise DeskError(
            f"the base {reference} is not pinned by digest: the next build might be another image",
            "pin it with `rankbridge images pin --bases` where there is internet, or make one: `--base debian`",
        )
    return str(reference)


def _upstream(layout: Layout) -> Upstream:
    return Upstream.read(layout.root / "images" / "upstream.yaml")


def _stack_file(stack: str) -> Path:
    path = stackfile.STACKS / f"Pulumi.{stack}.yaml"
    if not stack.startswith("apps-") or not path.exists():
        known = ", ".join(sorted(p.stem.removeprefix("Pulumi.") for p in stackfile.STACKS.glob("Pulumi.apps-*.yaml")))
        raise DeskError(f"{stack} is no stack of deployments", f"one of {known}")
    return path


def _pinned(path: Path) -> dict[str, str]:
    try:
        held: Any = yaml.safe_load(path.read_text())
        return dict(held["config"].get(KEY) or {})
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DeskError(f"cannot read {path}: {error}", "bring it back from the repository") from None


def _shown(text: str | None) -> str:
    if text is None:
        return "[red]not pinned[/]"
    return "[yellow]placeholder[/]" if Reference.parse(text).is_placeholder else escape(text)


@contextlib.contextmanager
def index_secrets(root: Path) -> Iterator[dict[str, Path]]:
    """How the package index is reached from here, for the build alone: its certificates and its address."""
    environment = Setup(root).environment()
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        if certificates := environment.get("SSL_CERT_FILE"):
            found["certificates"] = Path(certificates)
        if index := environment.get("UV_DEFAULT_INDEX"):
            found["index"] = Path(folder) / "index"
            found["index"].write_text(index)
        yield found


def _layout() -> Layout:
    return Layout.of(os.environ)
