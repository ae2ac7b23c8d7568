"""The loop with real processes: what people do is in their profile and their recommendations within seconds, once."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import uuid_utils

from workloads.bundle.fake import build_fake_bundle
from workloads.data.profiles import SqliteProfiles, write_profiles
from workloads.data.redis_profiles import RedisProfiles
from workloads.lake.lake import Lake
from workloads.privacy.vault import SqliteVault

pytestmark = pytest.mark.real_parts

LONG = os.environ.get("RANKBRIDGE_LONG") == "1"
KILLS = 25 if LONG else 3
PATIENCE_S = 60.0
USER = "raw-user-alice@example.org"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def eventually(question: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> float:
    """Wait until it is so; the seconds that it took."""
    begun = time.monotonic()
    while not question():
        assert time.monotonic() - begun < patience_s, f"waited {patience_s} s for: {what}"
        time.sleep(0.02)
    return time.monotonic() - begun


class Home:
    """Files, ports and processes of home on 127.0.0.1."""

    def __init__(self, directory: Path, bundle: Path) -> None:
        self.directory, self.bundle = directory, bundle
        names = ("intake", "feedback", "retrieval", "gateway", "triton", "redis")
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in names]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            self.ports = {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}
        self.profiles = str(directory / "profiles.sqlite")
        self.lake = directory / "lake"
        self.vault = SqliteVault(directory / "vault.sqlite", create=True)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        write_profiles(directory / "profiles.sqlite", [], {"dataset": "none"})

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def options(self, name: str) -> list[str]:
        spool = str(self.directory / "events.sqlite")
        return {
            "intake": ["--store", spool],
            "feedback": [
                *("--spool", spool, "--profiles", self.profiles, "--lake", str(self.lake)),
                *("--lake-every-s", "0.5", "--trim", self.url("intake"), "--keep-hours", "0"),
            ],
            "retrieval": ["--site", "onprem", "--bundle", str(self.bundle)],
            "gateway": [
                *("--site", "onprem", "--bundle", str(self.bundle)),
                *("--retrieval", self.url("retrieval"), "--intake", self.url("intake")),
                *("--triton", f"127.0.0.1:{self.ports['triton']}", "--profiles", self.profiles),
                *("--vault", str(self.directory / "vault.sqlite")),
            ],
        }[name]

    def start(self, *names: str) -> None:
        """Start them, and return when all are ready."""
        for name in names:
            run = ["run"] if name == "feedback" else []
            listen = ["--listen", f"127.0.0.1:{self.ports[name]}"]
            self.spawn(name, [sys.executable, "-m", f"workloads.{name}", *run, *listen, *self.options(name)])
        for name in names:
            eventually(lambda name=name: self.is_ready(name), f"{name} is ready")  # type: ignore[misc]  # bound at once

    def spawn(self, name: str, command: list[str]) -> None:
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def is_ready(self, name: str) -> bool:
        assert self.running[name].poll() is None, self.log(name).read_text()[-3000:]
        try:
            return self.ask(name, "GET", "/readyz")[0] == 200
        except OSError:
            return False

    def end(self, name: str, number: signal.Signals) -> int:
        process = self.running.pop(name)
        process.send_signal(number)
        return process.wait(20)

    def ask(self, name: str, method: str, path: str, message: object = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[name], timeout=10)
        with contextlib.closing(connection):
            body = None if message is None else json.dumps(message)
            connection.request(method, path, body, {"content-type": "application/json"} if body else {})
            answer = connection.getresponse()
            text = answer.read().decode()
        return answer.status, json.loads(text) if text.startswith("{") else text

    def profile(self, user: str) -> dict[str, Any]:
        return self._in_time("GET", f"/v1/users/{quote(user, safe='')}/profile")

    def recommend(self, k: int) -> dict[str, Any]:
        return self._in_time("POST", "/v1/recommend", {"user": USER, "k": k})

    def _in_time(self, method: str, path: str, message: object = None) -> dict[str, Any]:
        """An answer that knew the profiles.

        Redis has milliseconds to give one, and a busy machine takes them now and then: then, and only then, it is asked
        again, as a client would. A file is never late.
        """
        deadline = time.monotonic() + 20
        while True:
            status, answer = self.ask("gateway", method, path, message)
            late = status == 503 or (status == 200 and answer.get("served", {}).get("reason") == "profiles_down")
            if not late or not self.profiles.startswith("redis") or time.monotonic() > deadline:
                assert status == 200, answer
                return answer
            time.sleep(0.05)


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=200)


@pytest.fixture
def home(tmp_path: Path, small_bundle: Path) -> Iterator[Home]:
    made = Home(tmp_path, small_bundle)
    try:
        yield made
    finally:
        for name in list(made.running):
            made.end(name, signal.SIGKILL)
        made.vault.close()


def event(kind: str, item: str, user: str | None = USER) -> dict[str, object]:
    sent = {"event_id": str(uuid_utils.uuid7()), "type": kind, "timestamp_ms": now_ms(), "item": item}
    return sent if user is None else {**sent, "user": user}


def the_loop_closes(home: Home) -> None:
    home.start("intake", "feedback", "retrieval", "gateway")
    assert home.profile(USER)["cold_start"]
    stranger = home.recommend(10)
    did = [event("view", "item-00007"), event("cart", "item-00007"), event("purchase", "item-00009")]
    status, told = home.ask("gateway", "POST", "/v1/events", {"events": did})
    assert (status, told["accepted"]) == (200, 3)

    eventually(lambda: home.profile(USER)["touches"] == 2, "the profile has what was done", 20)
    known = home.profile(USER)
    assert known["interests"] == ["item-00009", "item-00007"]
    assert (known["cold_start"], known["as_of_ms"] >= did[0]["timestamp_ms"]) == (False, True)
    answer = home.recommend(100)
    assert answer["served"]["reason"] != "profiles_down"
    assert [item["item"] for item in answer["items"][:10]] != [item["item"] for item in stranger["items"]]
    assert "item-00009" not in [item["item"] for item in answer["items"]]  # bought
    text = home.ask("feedback", "GET", "/metrics")[1]
    assert 'rankbridge_freshness_seconds_count{since="received"} 3.0' in text

    assert home.ask("gateway", "DELETE", f"/v1/users/{quote(USER, safe='')}/profile")[0] == 204
    assert home.profile(USER)["cold_start"]
    forgotten = home.recommend(10)
    assert forgotten["items"] == stranger["items"]
    logs = "".join(home.log(name).read_text() for name in ("gateway", "feedback", "intake"))
    assert USER not in logs
    assert quote(USER, safe="") not in logs


def test_what_people_do_is_in_their_profile_and_recommendations_within_seconds(home: Home):
    the_loop_closes(home)


def test_the_loop_closes_over_redis_and_a_dead_redis_costs_no_answer(home: Home):
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    port = str(home.ports["redis"])
    redis = ["redis-server", "--bind", "127.0.0.1", "--port", port, "--dir", str(home.directory), "--save", ""]
    home.spawn("redis", redis)
    store = RedisProfiles("127.0.0.1", home.ports["redis"])
    home.profiles = f"redis://127.0.0.1:{port}/0"

    def filled() -> bool:
        command = [sys.executable, "-m", "workloads.feedback", "fill", "--profiles", home.profiles]
        command += ["--from", str(home.directory / "profiles.sqlite")]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    eventually(filled, "redis is filled")
    the_loop_closes(home)
    home.end("redis", signal.SIGKILL)
    status, answer = home.ask("gateway", "POST", "/v1/recommend", {"user": USER, "k": 10})
    assert (status, len(answer["items"])) == (200, 10)
    # forgotten above, the user is nobody: somebody known must miss the profile
    home.vault.admit(["somebody-known"])
    status, answer = home.ask("gateway", "POST", "/v1/recommend", {"user": "somebody-known", "k": 10})
    assert (status, len(answer["items"])) == (200, 10)
    assert "profiles" in home.ask("gateway", "GET", "/readyz")[1]["missing"]
    status, told = home.ask(
        "gateway", "POST", "/v1/events", {"events": [event("view", "item-00011", "somebody-known")]}
    )
    assert (status, told["accepted"]) == (200, 1)
    eventually(lambda: home.ask("feedback", "GET", "/readyz")[0] == 503, "feedback says what it waits for")
    home.spawn("redis", redis)  # empty: the lake and the spool bring back what was done
    eventually(lambda: home.ask("feedback", "GET", "/readyz")[0] == 200, "feedback goes on")
    name = home.vault.admit(["somebody-known"])["somebody-known"]
    eventually(lambda: (found := store.get(name)) is not None and len(found.touches) == 1, "the event is applied")
    store.close()


def test_kills_at_any_moment_lose_nothing_and_double_nothing(home: Home):
    home.start("intake")
    pseudonym = home.vault.admit([USER])[USER]
    sent = 0
    for _ in range(KILLS):
        home.start("feedback")
        until = time.monotonic() + random.uniform(0.2, 1.2)
        while time.monotonic() < until:
            did = [event("view", f"item-{random.randint(1, 150):05d}", pseudonym) for _ in range(20)]
            assert home.ask("intake", "POST", "/internal/events", {"events": did})[0] == 200
            sent += len(did)
        assert home.end("feedback", signal.SIGKILL) == -signal.SIGKILL
    home.start("feedback")
    with SqliteProfiles(home.directory / "profiles.sqlite") as store:

        def applied() -> int:
            profile = store.get(pseudonym)
            return 0 if profile is None else sum(touch.count for touch in profile.touches)

        eventually(lambda: store.watermark().seq >= sent, "all is applied")
        assert applied() == sent
        eventually(
            lambda: home.ask("feedback", "GET", "/metrics")[1].count(f"rankbridge_lake_seq {float(sent)}") == 1, "lake"
        )
        # a store that is filled anew gets everything again, from the lake, for the spool was trimmed
        eventually(lambda: _rows(home) == 0, "the spool is trimmed")
        write_profiles(home.directory / "profiles.sqlite", [], {"dataset": "another"})
        eventually(lambda: applied() == sent, "all is applied again")
    assert home.end("feedback", signal.SIGTERM) == 0
    with Lake.open(home.lake, create=False) as lake:
        (found,) = lake.query("SELECT count(*), count(DISTINCT event_id) FROM events").fetchall()
    assert found == (sent, sent)


def _rows(home: Home) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{home.directory / 'events.sqlite'}?mode=ro", uri=True)) as spool:
        return int(spool.execute("SELECT count(*) FROM events").fetchone()[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--profiles", "nowhere.sqlite"], "no such profile store"),
        (["--profiles", "redis://:secret@127.0.0.1:6379/0"], "command line"),
        (["--trim", "nowhere", "--lake", "lake"], "no address of an intake"),
        (["--trim", "http://127.0.0.1:8082"], "give --lake as well"),
    ],
)
def test_a_start_that_cannot_be_says_why(home: Home, options: list[str], said: str):
    base = ["run", "--listen", "127.0.0.1:0", "--spool", str(home.directory / "events.sqlite")]
    base += [] if "--profiles" in options else ["--profiles", home.profiles]
    ended = subprocess.run(
        [sys.executable, "-m", "workloads.feedback", *base, *options],
        capture_output=True,
        check=False,
        cwd=home.directory,
    )
    told = ended.stderr.decode()
    assert (ended.returncode, "Traceback" in told) == (2, False), told
    assert said in told
    assert "secret" not in told


def test_a_fill_that_cannot_be_is_a_fault_line(home: Home):
    for profiles, said in ((home.profiles, "redis://host:port/0"), ("redis://127.0.0.1:9/0", "redis at 127.0.0.1:9")):
        command = [sys.executable, "-m", "workloads.feedback", "fill", "--profiles", profiles]
        ended = subprocess.run(
            [*command, "--from", str(home.directory / "profiles.sqlite")], capture_output=True, check=False
        )
        assert ended.returncode == 2
        (line,) = ended.stdout.decode().splitlines()
        assert re.search(said, json.loads(line)["fault"]), line
