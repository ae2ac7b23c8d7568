"""Load users for Locust whose arrivals do not wait for answers (open loop).

Each Locust user is one independent arrival process, Poisson or constant, of `--rate-per-user`
requests a second. Every request runs in a greenlet of its own and is timed from the moment it was
due, so that a server which stalls for a second shows that second in all the requests that would
have come meanwhile; a closed loop would have sent none of them (Tene's "coordinated omission"). The
price of an open loop is that requests pile up: past `--max-outstanding` an arrival is recorded as
the error `generator_overrun`, and how late the generator itself was is recorded with every sample.

This module is the only one here that knows Locust. It draws from `draws`, reads answers with
`answers`, keeps them with `recorder`, and lets `gate` set Locust's exit code.
"""

from __future__ import annotations

# Locust replaces blocking calls by gevent's when it is imported, so nothing may come before it.
from locust import FastHttpUser, events, task  # isort: skip

import logging
import random
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol
from urllib.parse import urlsplit

import gevent
import msgspec
from gevent.pool import Group
from geventhttpclient.client import HTTPClientPool
from geventhttpclient.useragent import RetriesExceeded
from locust.contrib.fasthttp import LocustBadStatusCode

from loadtests import answers, budgets, draws, gate
from loadtests.budgets import Budgets
from loadtests.draws import Shopper
from loadtests.recorder import Recorder
from loadtests.samples import Run, RunHeader, Sample, Target, write_whole
from workloads.contract.http import PATH_READY, PATH_SAMPLE, CatalogueSample, Readiness
from workloads.contract.sites import SITES
from workloads.contract.slo import Endpoint

log = logging.getLogger("rankbridge.load")

GENERATOR_OVERRUN = "generator_overrun"
UNANSWERED = "unanswered at the end of the run"
LAST_ONES_S = 1.0
"""After the end, requests get their timeout and this much more, so that each can say itself what became of it."""
_JSON = {"Content-Type": "application/json", "Accept": "application/json"}


class RunError(Exception):
    """A run cannot be started as asked; the text says why and what to do."""


class Entry(NamedTuple):
    """A gateway that requests are sent to."""

    url: str
    site: str
    share: float
    catalogue: CatalogueSample


class Ask(NamedTuple):
    """One request, ready to be sent. `size` is what `answers` needs: items asked for, or events sent."""

    body: bytes
    size: int
    event_ids: tuple[str, ...] = ()


class Options(Protocol):
    """What the command line says; Locust's own names and ours."""

    host: str | None
    headless: bool
    samples: str
    gate_out: str
    acknowledged: str
    rate_per_user: float
    arrivals: str
    seed: int
    warmup: float
    timeout: float
    max_outstanding: int
    also_host: str
    also_share: float
    min_samples: int
    budgets: str


def _add_arguments(parser: Any) -> None:  # noqa: ANN401 - Locust's parser has no types
    ours = parser.add_argument_group("rankbridge", "Open-loop arrivals, records and the gate")
    ours.add_argument("--rate-per-user", type=float, default=1.0, help="requests a second of each user (default 1.0)")
    ours.add_argument("--arrivals", choices=["poisson", "constant"], default="poisson", help="spacing of arrivals")
    ours.add_argument("--seed", type=int, default=1, help="seed of arrivals and of what is asked for")
    ours.add_argument("--warmup", type=float, default=5.0, help="seconds at the start that nobody judges")
    ours.add_argument("--timeout", type=float, default=10.0, help="seconds after which a request is given up")
    ours.add_argument("--max-outstanding", type=int, default=2000, help="requests in flight at once, at the most")
    ours.add_argument("--also-host", default="", help="a second site's gateway, for traffic that enters there")
    ours.add_argument("--also-share", type=float, default=0.25, help="share of requests sent to --also-host")
    ours.add_argument("--samples", default="", help="write every sample to this file (JSON lines)")
    ours.add_argument("--acknowledged", default="", help="write the ids of acknowledged events to this file")
    ours.add_argument("--gate-out", default="", help="write the gate's result to this file (JSON)")
    ours.add_argument("--min-samples", type=int, default=0, help="judge a small run: so many samples are enough")
    ours.add_argument("--budgets", default="", help="JSON file of budgets, in the form that --gate-out writes them")


def _attach(environment: Any, runner: Any, **_rest: Any) -> None:  # noqa: ANN401 - Locust's hooks have no types
    if type(runner).__name__ != "LocalRunner":
        log.error(
            "The gate judges all samples of a run together, so it runs in one process; leave out --processes, "
            "--master and --worker. One process offers several hundred requests a second."
        )
        raise SystemExit(gate.EXIT_REFUSED)
    # Locust is about to set the timer of --run-time; by a clock that stood still during imports it would be short
    gevent.get_hub().loop.update_now()
    load = Load(environment)
    environment.rankbridge_load = load
    environment.events.test_start.add_listener(load.start)
    environment.events.test_stopping.add_listener(load.stopping)
    environment.events.test_stop.add_listener(load.finish)
    environment.events.quitting.add_listener(load.quit)


class Load:
    """What the users of one Locust process share: targets, connections, the recorder and the gate.

    Locust calls `start`, `stopping`, `finish` and `quit`; users call the rest.
    """

    def __init__(self, environment: Any) -> None:  # noqa: ANN401 - Locust's environment has no types
        self._environment = environment
        self.options: Options = environment.parsed_options
        self.pool = HTTPClientPool(
            # one more than can be in flight: nothing may queue inside the client, unseen
            concurrency=self.options.max_outstanding + 1,
            network_timeout=self.options.timeout,
            connection_timeout=self.options.timeout,
        )
        self.entries: list[Entry] = []
        self._outstanding = Group()
        self._recorder: Recorder | None = None
        self._budgets: Budgets | None = None
        self._fault: str | None = None
        self._started = 0.0
        self._stopped: float | None = None
        self._users = 0

    # what Locust calls

    def start(self, **_: Any) -> None:  # noqa: ANN401 - Locust's hooks have no types
        """Ask every target for its catalogue sample and open the record; on a fault, stop the run."""
        self._fault, self._stopped, self._users, self._recorder = None, None, 0, None
        try:
            endpoints = {cls.endpoint.value for cls in self._environment.user_classes}
            self._budgets = self._chosen_budgets().only(endpoints)
            self.entries = [self._enter(url, share, endpoints) for url, share in self._targets()]
            self._recorder = Recorder(
                self._header(), samples=_path(self.options.samples), acknowledged=_path(self.options.acknowledged)
            )
        except (RunError, OSError) as fault:
            self._fault = str(fault)
            log.error(self._fault)
            runner = self._environment.runner
            # in a greenlet of its own: stopping the run kills the greenlet that called us
            gevent.spawn(runner.quit if self.options.headless else runner.stop)
        self._started = time.perf_counter()

    def stopping(self, **_: Any) -> None:  # noqa: ANN401 - Locust's hooks have no types
        """No more arrivals are due from here on."""
        self._stopped = time.perf_counter()

    def finish(self, **_: Any) -> None:  # noqa: ANN401 - Locust's hooks have no types
        """Wait for what is in flight, give up what never comes, judge, and set Locust's exit code."""
        self._outstanding.join(timeout=self.options.timeout + LAST_ONES_S)
        self._outstanding.kill()
        stopped = self._stopped if self._stopped is not None else time.perf_counter()
        seconds = max(0.0, stopped - self._started - self.options.warmup)
        if self._recorder is not None:
            run = self._recorder.finish(seconds=seconds, fault=self._fault)
        else:
            run = Run(header=self._header(), samples=[], seconds=0.0, fault=self._fault)
        result = gate.judge(run, self._budgets or budgets.promise())
        self._report(result)
        self._environment.process_exit_code = gate.EXIT_REFUSED if self._fault else result.exit_code
        self._recorder = None

    def quit(self, **_: Any) -> None:  # noqa: ANN401 - Locust's hooks have no types
        """Locust ends: judge a run that is still going on; a process that never ran anything fails."""
        if self._recorder is not None:
            self._environment.runner.quit()
        if self._environment.process_exit_code is None:
            self.finish()

    # what users call

    def shopper(self, name: str) -> tuple[random.Random, dict[str, Shopper]]:
        """The next user's own randomness, and its source of requests per target URL."""
        self._users += 1
        rng = random.Random(f"{self.options.seed}/{name}/{self._users}")  # noqa: S311 - reproducible on purpose
        return rng, {e.url: Shopper(e.catalogue, rng) for e in self.entries}

    def target(self, rng: random.Random) -> Entry:
        """Which gateway the next request is sent to."""
        return rng.choices(self.entries, [e.share for e in self.entries])[0]

    def send(self, user: OpenLoopUser, entry: Entry, ask: Ask, due: float) -> None:
        """Send one request in a greenlet of its own, or record that there is no room for it."""
        if len(self._outstanding) >= self.options.max_outstanding:
            self.record(user, entry, due=due, sent=time.perf_counter(), error=GENERATOR_OVERRUN)
            return
        self._outstanding.spawn(user.request, entry, ask, due)

    def record(
        self,
        user: OpenLoopUser,
        entry: Entry,
        *,
        due: float,
        sent: float,
        status: int = 0,
        reading: answers.Reading | None = None,
        error: str | None = None,
        acknowledged: tuple[str, ...] = (),
    ) -> float:
        """Keep one sample; returns its latency in milliseconds. Times are `time.perf_counter` seconds."""
        done = time.perf_counter()
        latency_ms = (done - due) * 1000
        if self._recorder is None:  # a straggler of a run that was already judged
            return latency_ms
        served = reading.served if reading is not None else None
        at_s = due - self._started
        endpoint = user.endpoint.value
        self._recorder.record(
            Sample(
                endpoint=endpoint,
                site=served.site if served is not None else entry.site,
                at_s=at_s,
                latency_ms=latency_ms,
                lateness_ms=(sent - due) * 1000,
                status=status,
                error=error if error is not None else (reading.error if reading is not None else None),
                rung=served.rung if served is not None else None,
                best_rung=entry.catalogue.best_rung.get(endpoint),
                reason=served.reason if served is not None else None,
                ranked=served.ranked if served is not None else None,
                stages_ms=served.stages_ms if served is not None else {},
                bundle=served.bundle if served is not None else None,
                warmup=at_s < self.options.warmup,
            )
        )
        self._recorder.acknowledge(acknowledged)
        return latency_ms

    def label(self, endpoint: str, entry: Entry) -> str:
        """The name under which Locust's own statistics count a request."""
        return endpoint if len(self.entries) == 1 else f"{endpoint} {entry.site}"

    # private

    def _targets(self) -> list[tuple[str, float]]:
        host = self._environment.host
        if not host:
            raise RunError("No host is given; name a gateway, for example --host http://127.0.10.1:8080.")
        if not self.options.also_host:
            return [(host.rstrip("/"), 1.0)]
        share = self.options.also_share
        if not 0 < share < 1:
            raise RunError(f"--also-share is {share}; it must be above 0 and below 1.")
        return [(host.rstrip("/"), 1.0 - share), (self.options.also_host.rstrip("/"), share)]

    def _enter(self, url: str, share: float, endpoints: set[str]) -> Entry:
        if urlsplit(url).scheme not in {"http", "https"}:
            raise RunError(f"{url} is no address of a gateway; it must begin with http:// or https://.")
        try:
            sample = msgspec.json.decode(self._fetch(url + PATH_SAMPLE), type=CatalogueSample)
        except (OSError, msgspec.DecodeError) as fault:
            raise RunError(
                f"{url}{PATH_SAMPLE} gave no catalogue sample to draw requests from ({fault}); "
                "check that a gateway is running there."
            ) from fault
        wrong = draws.check(sample, endpoints)
        if wrong is not None:
            raise RunError(f"Requests cannot be drawn from the catalogue sample of {url}: {wrong}.")
        return Entry(url, self._site_of(url), share, sample)

    def _site_of(self, url: str) -> str:
        """The site's name for itself; where the gateway does not tell it, the contract's or the host's."""
        try:
            return msgspec.json.decode(self._fetch(url + PATH_READY), type=Readiness).site
        except (OSError, msgspec.DecodeError):
            host = urlsplit(url).hostname or url
            return next((s.name.value for s in SITES.values() if s.address == host), host)

    def _fetch(self, url: str) -> bytes:
        request = urllib.request.Request(url, headers=_JSON)  # noqa: S310 - the scheme was checked above
        with urllib.request.urlopen(request, timeout=self.options.timeout) as answer:  # noqa: S310 - as above
            content: bytes = answer.read()
            return content

    def _chosen_budgets(self) -> Budgets:
        chosen: Budgets = getattr(self._environment.shape_class, "held_to", budgets.promise)()
        if self.options.budgets:
            try:
                chosen = msgspec.json.decode(Path(self.options.budgets).read_bytes(), type=Budgets)
            except msgspec.DecodeError as fault:
                raise RunError(f"{self.options.budgets} does not hold budgets: {fault}.") from fault
        if self.options.min_samples:
            try:
                chosen = chosen.with_min_samples(self.options.min_samples)
            except ValueError as fault:
                raise RunError(f"--min-samples: {fault}.") from fault
        return chosen

    def _header(self) -> RunHeader:
        return RunHeader(
            suite=Path(self._environment.locustfile or "load").stem,
            started_ms=time.time() * 1000,
            warmup_s=self.options.warmup,
            arrivals=self.options.arrivals,
            rate_per_user=self.options.rate_per_user,
            seed=self.options.seed,
            targets=[Target(site=e.site, share=e.share, best_rung=e.catalogue.best_rung) for e in self.entries],
        )

    def _report(self, result: gate.LoadResult) -> None:
        for note in result.notes:
            log.info(note)
        for breach in result.breaches:
            log.error("BREACH  %s", breach.sentence)
        log.info(
            "%s: %d requests judged, %d during warm-up, %d breaches",
            "PASSED" if result.passed else "FAILED",
            result.measures.requests,
            result.measures.warmup_requests,
            len(result.breaches),
        )
        out = _path(self.options.gate_out)
        if out is not None:
            write_whole(out, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


class OpenLoopUser(FastHttpUser):
    """One arrival process at one endpoint; a subclass says which endpoint and what to ask."""

    abstract = True
    endpoint: ClassVar[Endpoint]

    def __init__(self, environment: Any) -> None:  # noqa: ANN401 - Locust's environment has no types
        self.load: Load = environment.rankbridge_load
        self.client_pool = self.load.pool
        super().__init__(environment)
        self._rng, self._shoppers = self.load.shopper(type(self).__name__)
        self._due = 0.0

    def ask(self, shopper: Shopper) -> Ask:
        """The next request."""
        raise NotImplementedError

    def read(self, status: int, body: bytes, ask: Ask) -> answers.Reading:
        """What the answer to `ask` held."""
        return answers.read_items(status, body, k=ask.size)

    def on_start(self) -> None:
        """Begin at a random point of the first gap: users that start together must not arrive together."""
        first = self._rng.random() / self.load.options.rate_per_user
        self._due = time.perf_counter() + (first if self.load.options.arrivals == "constant" else self._gap())
        self.wait()  # type: ignore[no-untyped-call]  # Locust's own, without annotations

    def wait_time(self) -> float:
        """Seconds until the next request is due; 0 when the generator is behind, which makes it catch up."""
        return max(0.0, self._due - time.perf_counter())

    @task
    def arrive(self) -> None:
        """Send what is due now and leave it to itself."""
        while (early := self._due - time.perf_counter()) > 0:  # timers may fire a little early
            gevent.sleep(early)
        entry = self.load.target(self._rng)
        self.load.send(self, entry, self.ask(self._shoppers[entry.url]), self._due)
        self._due += self._gap()

    def request(self, entry: Entry, ask: Ask, due: float) -> None:
        """Send one request, read its answer, tell both Locust and the recorder, timed from `due`."""
        path = self.endpoint.value
        sent = time.perf_counter()
        with self._given_up(entry, due, sent):
            response: Any = self.client.request(
                "POST",
                entry.url + path,
                name=self.load.label(path, entry),
                data=ask.body,  # type: ignore[arg-type]  # FastHttpSession hands bytes on as they are
                headers=_JSON,
                catch_response=True,
            )
        with response:
            fault = response.request_meta["exception"]
            if fault is not None and not isinstance(fault, LocustBadStatusCode):
                reading = answers.Reading(error=_no_answer(fault))
            else:
                reading = self.read(response.status_code, response.content or b"", ask)
            response.request_meta["response_time"] = self.load.record(
                self,
                entry,
                due=due,
                sent=sent,
                status=response.status_code,
                reading=reading,
                acknowledged=ask.event_ids if reading.error is None else (),
            )
            if reading.error is None:
                response.success()
            else:
                response.failure(reading.error)

    @contextmanager
    def _given_up(self, entry: Entry, due: float, sent: float) -> Iterator[None]:
        """Record a request that the end of the run cut off: nobody may get rid of it by being slow."""
        try:
            yield
        except gevent.GreenletExit:
            self.load.record(self, entry, due=due, sent=sent, error=UNANSWERED)
            raise

    def _gap(self) -> float:
        rate = self.load.options.rate_per_user
        return 1 / rate if self.load.options.arrivals == "constant" else self._rng.expovariate(rate)


def _no_answer(fault: BaseException) -> str:
    """A connection's fault in a few words."""
    if isinstance(fault, RetriesExceeded):
        fault = getattr(fault, "original", None) or fault
    if isinstance(fault, TimeoutError):
        return "timeout"
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror.lower()
    return type(fault).__name__


def _path(text: str) -> Path | None:
    return Path(text) if text else None


_hooks: Any = events  # Locust's hooks carry no types
_hooks.init_command_line_parser.add_listener(_add_arguments)
_hooks.init.add_listener(_attach)
