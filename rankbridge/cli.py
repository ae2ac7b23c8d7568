"""The command line: `rankbridge COMMAND`. Turns faults into one line with a remedy, and never into a traceback.

Exit codes: 0 done; 1 measured, and a budget did not hold; 2 something to mend first; 3 (`status`) not all
ready; 130 interrupted, 143 terminated. What a command does is in the other modules; here is how it is asked for.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rankbridge import asked, bundles, images, interrupts, jobs, load, people
from rankbridge.asked import DataSource, Request
from rankbridge.cloud import CloudForm, stop_localstack
from rankbridge.faults import DeskError, ExitCode, ManyFaults
from rankbridge.layout import Layout
from rankbridge.roles import Role
from rankbridge.serving import Serving, Status
from rankbridge.supervisor import Condition, Owner
from rankbridge.tables import load_table
from workloads.contract.sites import HOME, SITES, Listener, SiteName
from workloads.gateway.simulator import Condition as SimulatedCondition

app = typer.Typer(
    name="rankbridge",
    help="Data to verdict: trains recommenders, serves them at two sites, loads them, and judges the result.\n\n"
    "Everything at once: `rankbridge rehearse`. The single steps: data, train, export, up, load, down.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(bundles.app, name="bundle")
app.add_typer(bundles.audit, name="audit")
app.add_typer(images.app, name="images")
app.add_typer(people.app)

_LOG_WIDTH = 120
"""Columns of what goes into a file; a terminal has its own."""
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)
_err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _LOG_WIDTH)

DataOption = Annotated[
    str,
    typer.Option("--data", metavar="KIND[=PATH]", help="simulator, online-retail=PATH, sequences=PATH or events=PATH."),
]
UsersOption = Annotated[int | None, typer.Option("--users", min=1, help="Simulator: number of people.")]
ItemsOption = Annotated[int | None, typer.Option("--items", min=1, help="Simulator: size of the catalogue.")]
EventsOption = Annotated[int | None, typer.Option("--events", min=1, help="Simulator: number of events.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="What all chance comes from.")]
PortOption = Annotated[
    list[str] | None,
    typer.Option("--port", metavar="NAME=NUMBER", help="Another port for a listener, at both sites; may be repeated."),
]
InjectOption = Annotated[
    list[str] | None,
    typer.Option("--inject", metavar="FAULT", help="Plant a fault: ranker-delay=80ms; may be repeated."),
]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the results.")]
RateOption = Annotated[float, typer.Option("--rate", min=0.1, help="Requests a second, over both sites.")]
SecondsOption = Annotated[
    float | None,
    typer.Option(
        "--load-seconds", min=1, help="Judged seconds of load; default: until 1,000 samples are behind each p99."
    ),
]
MinSamplesOption = Annotated[
    int | None,
    typer.Option("--min-samples", min=1, help="For a small run: so many samples per endpoint are enough."),
]


@app.command()
def rehearse(
    *,
    data: DataOption = "simulator",
    out: OutOption = Path("out"),
    sites: Annotated[asked.SitesForm, typer.Option(help="How the two sites are laid out.")] = asked.SitesForm.LOOPBACK,
    users: UsersOption = None,
    items: ItemsOption = None,
    events: EventsOption = None,
    seed: SeedOption = None,
    rate: RateOption = load.MIX_PER_S,
    load_seconds: SecondsOption = None,
    min_samples: MinSamplesOption = None,
    inject: InjectOption = None,
    port: PortOption = None,
    aws: Annotated[CloudForm, typer.Option(help="Where the cloud's buckets are.")] = CloudForm.LOCALSTACK,
    reuse_bundle: Annotated[
        bool, typer.Option("--reuse-bundle", help="Serve the newest bundle instead of training one.")
    ] = False,
    keep_up: Annotated[bool, typer.Option("--keep-up", help="Leave both sites running at the end.")] = False,
) -> None:
    """Data to verdict in one go: prepare, replicate, train, export, publish, serve at two sites, load, judge.

    Writes verdict.json and report.html to --out. Ends with 0 only when every budget holds. An interrupted run is
    continued by the same command.

    Example: `rankbridge rehearse --data online-retail=online_retail.csv.gz --out out`
    """
    request = Request(
        data=DataSource.parse(data),
        out=out,
        users=users,
        items=items,
        events=events,
        seed=seed,
        rate=rate,
        load_seconds=load_seconds,
        min_samples=min_samples,
        aws=aws,
        injections=tuple(inject or ()),
        ports=tuple(port or ()),
        reuse_bundle=reuse_bundle,
        keep_up=keep_up,
        sites=sites,
    )
    from rankbridge.rehearsal import Rehearsal  # noqa: PLC0415 - plots and frames: a second that `status` need not wait

    passed = Rehearsal(_layout(), request, console=_out).run()
    raise typer.Exit(ExitCode.OK if passed else ExitCode.VERDICT_FAILED)


@app.command()
def data(
    data: DataOption = "simulator",
    users: UsersOption = None,
    items: ItemsOption = None,
    events: EventsOption = None,
    seed: SeedOption = None,
) -> None:
    """Clean, pseudonymise and split behaviour data; the first step.

    Bad rows are reported row by row and the good ones kept; too many stop the step.

    Example: `rankbridge data --data events=log.parquet`
    """
    source = DataSource.parse(data)
    source.check()
    _job("data", asked.data_arguments(_layout(), source, users=users, items=items, events=events, seed=seed))


@app.command()
def train(
    dataset: Annotated[Path | None, typer.Option(metavar="DIR", help="Prepared data set; default: the newest.")] = None,
    seed: SeedOption = None,
) -> None:
    """Train retrieval and ranker on a prepared data set and measure them against popularity and kNN.

    Goes on from its last checkpoint when it was interrupted.

    Example: `rankbridge train`
    """
    layout = _layout()
    _job("training", asked.training_arguments(layout, dataset or asked.newest_dataset(layout), seed=seed))


@app.command()
def export(
    dataset: Annotated[Path | None, typer.Option(metavar="DIR", help="Prepared data set; default: the newest.")] = None,
    training: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Training's folder; default: the newest.")
    ] = None,
) -> None:
    """Make a bundle: ONNX models checked against torch, the ANN index, tables and manifest.

    A bundle whose models do not agree with the trained ones is not written.

    Example: `rankbridge export`
    """
    layout = _layout()
    folder, source = training or asked.newest_training(layout), dataset or asked.newest_dataset(layout)
    _job("export", asked.export_arguments(layout, folder, source))


@app.command()
def up(
    bundle: Annotated[
        str | None, typer.Option(metavar="ID", help="Begin of a bundle's id; default: the newest.")
    ] = None,
    port: PortOption = None,
    inject: InjectOption = None,
) -> None:
    """Serve a bundle at both sites and leave them running. Again: starts what is missing.

    Example: `rankbridge up --port gateway=9080`
    """
    serving = _serving()
    running = serving.running_plan() if serving.supervisor.alive() else None
    if running is not None and bundle is None and not port and not inject:
        plan, facts = running
    else:
        plan, facts = serving.plan(serving.bundle(bundle), port or (), inject or ())
    if plan.bundle is not None and (mismatch := serving.mismatch(plan.bundle)):
        _out.print(f"note: {escape(mismatch)}; people are answered as strangers", soft_wrap=True)
    with jobs.viewing(_out) as view:
        serving.up(plan, facts, owner=Owner.UP, view=view)
    what = f"bundle {plan.bundle.name[:12]}" if plan.bundle is not None else f"channel {facts.channel}"
    _out.print(f"both sites serve {what}:")
    for site in SITES.values():
        _out.print(f"{site.name.value:8} {plan.addresses.url(site, Listener.GATEWAY)}/docs")


@app.command()
def down() -> None:
    """Stop every process of both sites.

    Example: `rankbridge down`
    """
    ended = _serving().down()
    if stop_localstack(_layout()):
        ended.append("LocalStack")
    _out.print(f"stopped: {', '.join(ended)}" if ended else "nothing was up", soft_wrap=True)


@app.command()
def restart(
    process: Annotated[str, typer.Argument(metavar="ROLE@SITE", help="For example tritonserver@onprem.")],
) -> None:
    """Stop one process and start it again as it was.

    Example: `rankbridge restart tritonserver@onprem`
    """
    role, _, site = process.partition("@")
    if role not in set(Role) or site not in set(SiteName):
        roles, sites = ", ".join(Role), " or ".join(SiteName)
        raise DeskError(f"{process!r} is no process", f"write ROLE@SITE: {roles} at {sites}")
    _serving().restart(Role(role), SiteName(site))


@app.command()
def status(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: everything, with the gateways' URLs.")] = False,
) -> None:
    """Say how each process of both sites is. Ends with 0 when all are ready, else with 3.

    Example: `rankbridge status --json`
    """
    found = _serving().status()
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")
    else:
        _print_status(found)
    raise typer.Exit(ExitCode.OK if found.ready else ExitCode.NOT_READY)


@app.command(name="load")
def load_command(
    *,
    host: Annotated[str | None, typer.Option(help="A gateway's URL; default: both running sites, 75 and 25 %.")] = None,
    also_host: Annotated[str | None, typer.Option(help="A second gateway for a share of the requests.")] = None,
    also_share: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of the second gateway.")
    ] = asked.AWS_SHARE,
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(load.SUITES)}.")] = "mix",
    out: OutOption = Path("out/load"),
    rate: RateOption = load.MIX_PER_S,
    load_seconds: SecondsOption = None,
    min_samples: MinSamplesOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of arrivals and of what is asked for.")] = 1,
) -> None:
    """Send open-loop load to running gateways and judge it by the budgets. Ends with 1 when one is breached.

    The suites also run by themselves: `locust -f loadtests/mix.py --host URL`.

    Example: `rankbridge load --load-seconds 30 --min-samples 200`
    """
    if suite not in load.SUITES:
        raise DeskError(f"no suite is called {suite!r}", f"one of {', '.join(load.SUITES)}")
    layout = _layout()
    if host is None:
        urls = _serving().status().gateways
        host, also_host = urls[SiteName.ONPREM], urls[SiteName.AWS]
    plan = load.LoadPlan(
        host=host,
        also_host=also_host,
        also_share=also_share,
        suite=suite,
        rate=rate,
        seconds=load_seconds,
        min_samples=min_samples,
        seed=seed,
    )
    files = load.LoadFiles(out.absolute())
    with jobs.viewing(_out) as view:
        judged = load.run(plan, files, root=layout.root, view=view)
    _out.print(load_table(judged))
    for breach in judged.breaches:
        _out.print(f"breach: {escape(breach.sentence)}", soft_wrap=True)
    _out.print(f"{'passed' if judged.passed else 'failed'}; samples and the gate's result are in {out}")
    raise typer.Exit(ExitCode.OK if judged.passed else ExitCode.VERDICT_FAILED)


@app.command(name="faults")
def faults_command(
    *,
    faults: Annotated[
        str, typer.Option("--faults", metavar="F1,F8", help="Which, by number or id; default: all.")
    ] = "",
    cut_seconds: Annotated[float, typer.Option(min=5, help="How long both tunnels are cut (F2).")] = 20.0,
    real_tunnels: Annotated[
        bool, typer.Option("--real-tunnels", help="Sites in network namespaces, two real tunnels between them (root).")
    ] = False,
    out: OutOption = Path("out"),
    port: PortOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of requests and of moments of chance.")] = 1,
    counts_only: Annotated[
        bool, typer.Option("--counts-only", help="Show times and judge only what was counted: for a busy machine.")
    ] = False,
) -> None:
    """Plant faults under constant load, one after another, and judge each: nothing lost, nothing wrong, in time.

    Serves the newest bundle at both sites for as long as it takes. Ends with 1 when an expectation did not hold.

    Example: `rankbridge faults --faults F2,F8`
    """
    from rankbridge.drills import command  # noqa: PLC0415 - as in `rehearse`

    names = [name for name in faults.split(",") if name]
    passed = command.run(
        _layout(),
        names=names,
        out=out,
        cut_s=cut_seconds,
        real_tunnels=real_tunnels,
        ports=port or (),
        seed=seed,
        counts_only=counts_only,
        console=_out,
    )
    raise typer.Exit(ExitCode.OK if passed else ExitCode.VERDICT_FAILED)


@app.command(name="report")
def report_command(out: OutOption = Path("out")) -> None:
    """Make report.html anew from an earlier run's verdict.json in --out.

    Example: `rankbridge report --out out`
    """
    from rankbridge import report, verdict  # noqa: PLC0415 - as in `rehearse`

    source = out / "verdict.json"
    try:
        found = verdict.read(source)
    except OSError as error:
        raise DeskError(
            f"cannot read {source}: {error.strerror}", "name the folder of an earlier `rankbridge rehearse`"
        ) from error
    except ValueError as error:
        raise DeskError(str(error), "rehearse again with this version") from error
    report.write(found, out / "report.html")
    _out.print(str(out / "report.html"))


@app.command(name="bench")
def bench_command(
    *,
    requests: Annotated[int | None, typer.Option(min=1, help="Recorded requests.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds over all of them.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="What the requests are drawn from.")] = 1,
    replay: Annotated[Path | None, typer.Option(metavar="FILE", help="Requests of an earlier bench.")] = None,
    out: OutOption = Path("out"),
) -> None:
    """Compare the gateway with the bare parts it is made of, for the same requests, by turns.

    Uses the running sites; when nothing is up, it serves the newest bundle for as long as it takes.

    Example: `rankbridge bench --rounds 9`
    """
    from rankbridge import bench  # noqa: PLC0415 - as in `rehearse`

    serving = _serving()
    running = serving.running_plan() if serving.supervisor.alive() else None
    plan, facts = running or serving.plan(serving.bundle(None), (), ())
    options = bench.Options(
        gateway=plan.addresses.url(HOME, Listener.GATEWAY),
        triton=plan.addresses.host_port(HOME, Listener.TRITON_HTTP),
        retrieval=plan.addresses.url(HOME, Listener.RETRIEVAL),
        vault=_layout().vault,
        profiles=str(_layout().profiles),
        bundles=_layout().bundles,
        requests=requests or bench.REQUESTS,
        rounds=rounds or bench.ROUNDS,
        seed=seed,
        replay=replay,
        out=out,
    )
    if running is not None:
        bench.run(options, _out)
        return
    with jobs.viewing(_out) as view:
        serving.up(plan, facts, owner=Owner.REHEARSAL, view=view)
    try:
        bench.run(options, _out)
    finally:
        with interrupts.shield():
            serving.down()


@app.command(name="simulate")
def simulate_command(
    *,
    recorded: Annotated[
        Path | None, typer.Option(metavar="FILE", help="service-times.json of a bench; default: drawn times.")
    ] = None,
    loads: Annotated[
        str | None, typer.Option(metavar="SHARE,...", help="Loads, as shares of what the home ranker can do.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=5, help="Simulated seconds of each load.")] = 30.0,
    cloud_price: Annotated[float, typer.Option(min=0, help="Of a call to aws, when one at home costs 1.")] = 5.0,
    way_ms: Annotated[float, typer.Option("--way-ms", min=0, help="To aws and back.")] = 10.0,
    fault: Annotated[
        SimulatedCondition | None, typer.Option(help="What the home ranker suffers in the middle third.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="What all chance comes from.")] = 1,
    out: OutOption = Path("out"),
) -> None:
    """Play the router's policy against round-robin, least-request, power of two and the least cost. Starts nothing.

    Writes simulation.json and simulation.svg to --out.

    Example: `rankbridge simulate --recorded out/service-times.json`
    """
    from rankbridge import simulate  # noqa: PLC0415 - as in `rehearse`

    try:
        shares = tuple(float(load) for load in loads.split(",")) if loads else simulate.LOADS
    except ValueError:
        raise DeskError(f"{loads!r} are no loads", "write shares with commas between: 0.3,0.9") from None
    if not all(0.0 < share <= 10.0 for share in shares):
        raise DeskError(f"{loads!r}: a load is above 0 and at most 10", "1 is what the home ranker can do")
    options = simulate.Options(
        recorded=recorded,
        loads=shares,
        seconds=seconds,
        cloud_price=cloud_price,
        way_ms=way_ms,
        fault=fault,
        seed=seed,
        out=out,
    )
    simulate.run(options, _out)


@app.command(name="bench-intake")
def bench_intake_command(
    *,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of the store against a plain SQLite loop.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Seconds of single posts at 500 a second.")] = None,
    out: OutOption = Path("out"),
) -> None:
    """Measure what an acknowledged event costs: the intake's store, single posts, and the disk's fsync.

    Starts an intake of its own, on the disk of the home.

    Example: `rankbridge bench-intake`
    """
    from rankbridge import bench_intake as bench  # noqa: PLC0415 - as in `rehearse`

    options = bench.Options(
        folder=_layout().work, out=out, rounds=rounds or bench.ROUNDS, seconds=seconds or bench.SECONDS
    )
    bench.run(options, _out)


@app.command(name="doctor")
def doctor_command(
    *,
    stack: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Foundation whose plan is held against the path.")
    ] = None,
    here: Annotated[SiteName, typer.Option("--site", help="The site that this machine is at.")] = HOME.name,
    peer: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The other site's serving address; with --stack.")
    ] = None,
    echo: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS:PORT", help="Where `rankbridge doctor --answer` runs at the other site."),
    ] = None,
    answer: Annotated[
        str | None, typer.Option(metavar="ADDRESS:PORT", help="Examine nothing: be the echo end until Ctrl-C.")
    ] = None,
    router: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COMMAND", help="Words before swanctl and vtysh, such as `ssh gw`; '' is here. Repeatable."
        ),
    ] = None,
    name: Annotated[list[str] | None, typer.Option(metavar="HOST", help="A name to resolve. Repeatable.")] = None,
    certificate: Annotated[
        list[str] | None, typer.Option(metavar="FILE|HOST:PORT", help="A certificate to look at. Repeatable.")
    ] = None,
    clock: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A server whose Date tells its clock. Repeatable.")
    ] = None,
    port: PortOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Examine the way between the sites: sizes, tunnels, routes, large calls, clocks, names, what expires.

    Ends with 0 when nothing is at fault, 1 when something is, 2 when it cannot be examined. Without --stack both
    sites are those of this machine, and what needs a tunnel is skipped.

    Example: `rankbridge doctor --stack foundation-prod --peer 10.20.0.10 --echo 10.20.0.10:8085 --router ""`
    """
    from rankbridge.doctor import asked as wanted  # noqa: PLC0415 - as in `rehearse`
    from rankbridge.doctor import examination, findings  # noqa: PLC0415 - as in `rehearse`

    if answer is not None:
        wanted.answer(answer, say=lambda text: _out.print(escape(text), soft_wrap=True))
        return
    given = wanted.Asked(
        stack=stack,
        here=here,
        peer=peer,
        echo=echo,
        routers=tuple(router or ()),
        names=tuple(name or ()),
        certificates=tuple(certificate or ()),
        clocks=tuple(clock or ()),
        ports=tuple(port or ()),
    )
    found = examination.examine(wanted.options(_serving(), given))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")
    else:
        _out.print(findings.table(found))
    raise typer.Exit(found.exit_code)


@app.command()
def version() -> None:
    """Print the version.

    Example: `rankbridge version`
    """
    from importlib.metadata import version as installed  # noqa: PLC0415 - half of the start-up time, for one command

    _out.print(f"rankbridge {installed('rankbridge')}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code; the console script ends with it."""
    interrupts.listen()
    try:
        app(args=list(arguments) if arguments is not None else None)
    except SystemExit as ending:  # the way every command ends, and a usage error with its own explanation
        return ending.code if isinstance(ending.code, int) else int(bool(ending.code))
    except DeskError as error:
        _explain(error)
        return int(error.code)
    except interrupts.Interrupted as interrupted:
        _err.print("\ninterrupted: everything that was started is stopped; the same command goes on from here")
        return interrupted.exit_code
    except Exception:
        return _bug()
    return 0


def _explain(error: DeskError) -> None:
    """The fault and its remedy, a line each; the end of a log before them where there is one."""
    for line in error.detail:
        _err.print(f"  | {escape(line)}", style="dim", soft_wrap=True)
    several = error.faults if isinstance(error, ManyFaults) else (error,)
    for remedy, faults in itertools.groupby(several, key=lambda one: one.remedy):
        for one in faults:
            _err.print(f"[bold red]error:[/] {escape(one.fault)}", soft_wrap=True)
        _err.print(f"  remedy: {escape(remedy)}", soft_wrap=True)


def _bug() -> int:
    layout = _layout()
    log = layout.log("desk-bug")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(traceback.format_exc())
    last = traceback.format_exc().strip().splitlines()[-1]
    _err.print(f"[bold red]error:[/] rankbridge has a bug: {escape(last)}", soft_wrap=True)
    _err.print(f"  remedy: report it with {layout.shown(log)}", soft_wrap=True)
    return 70  # EX_SOFTWARE of sysexits.h


def _layout() -> Layout:
    return Layout.of(os.environ)


def _serving() -> Serving:
    return Serving.of(_layout(), say=lambda text: _out.print(escape(text), soft_wrap=True))


def _job(module: str, arguments: list[str]) -> None:
    layout = _layout()
    with jobs.viewing(_out) as view:
        log = layout.log(module)
        made = jobs.run(f"workloads.{module}", arguments, log=log, view=view, root=layout.root).made
    for name, path in made.items():
        _out.print(f"{name}: {layout.shown(Path(path)) if path.startswith('/') else path}", soft_wrap=True)


def _print_status(found: Status) -> None:
    table = Table(title=f"bundle {found.bundle[:12]}" if found.bundle else "nothing is up")
    for column in ("site", "process", "state", "pid", "since", "memory", "address"):
        table.add_column(column, justify="right" if column in {"pid", "memory"} else "left")
    colours = {Condition.READY: "green", Condition.RUNNING: "yellow", Condition.EXITED: "red", Condition.DOWN: "dim"}
    for one in sorted(found.processes, key=lambda one: (list(SITES).index(one.site), list(Role).index(one.role))):
        state = one.state.value + (f" ({one.detail})" if one.detail else "")
        table.add_row(
            one.site.value,
            one.role.value,
            f"[{colours[one.state]}]{escape(state)}[/]",
            str(one.pid or ""),
            time.strftime("%H:%M:%S", time.localtime(one.since)) if one.since else "",
            f"{one.pss_bytes / 2**20:.0f} MB" if one.pss_bytes else "",
            one.url,
        )
    _out.print(table)
    for site, gateway in found.sites.items():
        if gateway.best_rung is not None:
            lost = [f"{name} {text}" for name, text in gateway.backends.items() if text != "up"]
            _out.print(
                f"{site}: answers at rung {gateway.best_rung}" + (f"; {escape('; '.join(lost))}" if lost else "")
            )
    if found.pss_bytes:
        _out.print(f"memory of all processes (PSS): {found.pss_bytes / 2**20:.0f} MB")
    for name in found.injections:
        _out.print(f"planted fault: {name}", style="yellow")


if __name__ == "__main__":
    sys.exit(main())
