"""The agent against a real tritonserver: load, infer, lose it, get it back, stop."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import numpy as np
import onnxruntime as ort
import pytest

from rankbridge.triton import locate, remove_shared_memory
from workloads.agent.door import HttpTriton, TritonError
from workloads.agent.injection import Injection
from workloads.agent.installation import Installation, install
from workloads.agent.keeper import Keeper
from workloads.agent.probing import Recorded
from workloads.agent.repository import render_repository
from workloads.bundle.probes import open_probes
from workloads.contract.sites import ONPREM, AddressBook, Listener, SiteClass
from workloads.contract.tensors import RANKER, RANKER_DENSE, RANKER_SPARSE

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.real_parts
PATIENCE_S = 30


def _free_port() -> int:
    """A port that nobody listens at, below those that the kernel lends to connections of other tests."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """A tritonserver that a test starts, kills and starts again."""

    def __init__(self, directory: Path) -> None:
        self.repository = directory / "triton"
        self.repository.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        ports = [_free_port() for _ in range(3)]
        listeners = (Listener.TRITON_HTTP, Listener.TRITON_GRPC, Listener.TRITON_METRICS)
        self.book = AddressBook(dict(zip(listeners, ports, strict=True)))
        self.site = dataclasses.replace(ONPREM, address="127.0.0.1")
        self.address = self.book.host_port(self.site, Listener.TRITON_HTTP)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers."""
        found = locate(ROOT)
        command = found.command(self.site, self.book, repository=self.repository, scratch=self.directory / "run")
        with (self.directory / "triton.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=found.environment(os.environ), stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://{self.address}/v2/health/live", timeout=1),
            ):
                return
            time.sleep(0.02)
        pytest.fail(f"tritonserver did not come up: {(self.directory / 'triton.log').read_text()[-2000:]}")

    def end(self, number: int = signal.SIGKILL) -> int:
        """Signal it and wait; the exit code. A kill takes its model processes, too."""
        assert self.process is not None
        if number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A running tritonserver with nothing loaded; its model repository is `<tmp_path>/triton`."""
    server = Server(tmp_path)
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.end()
        remove_shared_memory(server.site, server.book)


def kept(installed: Installation) -> dict[str, Recorded]:
    """What a keeper keeps of it, over its own recorded requests."""
    recorded = Recorded.of(open_probes(installed.bundle / "probes.safetensors"), SiteClass.CPU)
    return dict.fromkeys(installed.models, recorded)


def _batch(rows: int) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(rows)
    return {
        "sparse": numbers.integers(0, 60, (rows, len(RANKER_SPARSE))),
        "dense": numbers.normal(size=(rows, len(RANKER_DENSE))).astype(np.float32),
    }


async def test_triton_answers_what_onnxruntime_answers(made: Path, server: Server) -> None:
    installed = install(made, server.directory, SiteClass.CPU, Injection())
    (model,) = installed.models
    session = ort.InferenceSession(installed.bundle / "ranker.onnx")
    async with HttpTriton.open(server.address) as door:
        keeper = Keeper(door, kept(installed))
        await keeper.step()
        assert keeper.missing == {}
        assert await door.loaded() == [model]
        for rows in (1, 200, RANKER.max_batch):
            batch = _batch(rows)
            answer = (await door.infer(model, batch))["probability"]
            assert answer.shape == (rows, 1)
            np.testing.assert_allclose(answer, session.run(None, batch)[0], rtol=1e-5)


async def test_a_bad_request_is_an_error_in_tritons_words_and_the_model_serves_on(made: Path, server: Server) -> None:
    installed = install(made, server.directory, SiteClass.CPU, Injection())
    (model,) = installed.models
    async with HttpTriton.open(server.address) as door:
        await Keeper(door, kept(installed)).step()
        nan, outside, too_many = _batch(4), _batch(4), _batch(RANKER.max_batch + 1)
        nan["dense"][1, 1] = np.nan
        outside["sparse"][0, 0] = 10**6
        with pytest.raises(TritonError, match="dense holds NaN or infinity"):
            await door.infer(model, nan)
        with pytest.raises(TritonError, match="indices"):
            await door.infer(model, outside)
        with pytest.raises(TritonError, match="batch-size must be <= 1024"):
            await door.infer(model, too_many)
        with pytest.raises(TritonError, match="unknown model"):
            await door.infer("ranker-000000000000", nan)
        assert np.isfinite((await door.infer(model, _batch(4)))["probability"]).all()


async def test_another_bundles_model_is_unloaded_when_its_time_is_over(made: Path, server: Server) -> None:
    installed = install(made, server.directory, SiteClass.CPU, Injection())
    (model,) = installed.models
    old = "ranker-000000000000"
    shutil.copytree(server.repository / model, server.repository / old)
    config = server.repository / old / "config.pbtxt"
    config.write_text(config.read_text().replace(model, old))
    async with HttpTriton.open(server.address) as door:
        await door.load(old)
        keeper = Keeper(door, kept(installed), retire_after_s=0)
        await keeper.step()
        assert not await door.is_ready(old)
        assert await door.is_ready(model)


async def test_an_injected_delay_is_a_lower_bound_on_every_answer(made: Path, server: Server) -> None:
    installed = install(made, server.directory, SiteClass.CPU, Injection(ranker_delay_ms=80))
    (model,) = installed.models
    async with HttpTriton.open(server.address) as door:
        await Keeper(door, kept(installed)).step()
        for _ in range(3):
            begun = time.monotonic()
            await door.infer(model, _batch(1))
            assert time.monotonic() - begun >= 0.08


async def test_the_configuration_of_a_gpu_site_is_one_that_triton_reads(made: Path, server: Server) -> None:
    """This build has no onnxruntime backend and no GPU: that, and nothing in the text, is what it refuses."""
    (model,) = render_repository(made, server.repository, SiteClass.GPU)
    async with HttpTriton.open(server.address) as door:
        with pytest.raises(TritonError, match=r"unable to find backend library|instance group .* requires|no GPU"):
            await door.load(model)


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own server's address
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def _eventually(question: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not question():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for: {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def _agent(bundle: Path, server: Server, listen: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        *(sys.executable, "-m", "workloads.agent", "run", "--site", "onprem", "--site-class", "cpu"),
        *("--bundle", str(bundle), "--site-dir", str(server.directory)),
        *("--triton", server.address, "--listen", listen),
    ]
    with (server.directory / "agent.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_tritonserver_has_its_model_again_after_a_restart(made: Path, server: Server) -> None:
    listen = f"127.0.0.1:{_free_port()}"
    ready = f"http://{listen}/readyz"
    with _agent(made, server, listen) as agent:
        _eventually(lambda: _status(ready) == 200, "the agent is ready")
        server.end(signal.SIGKILL)
        _eventually(lambda: _status(ready) == 503, "the agent notices that tritonserver is gone")
        assert _status(f"http://{listen}/healthz") == 200
        server.start()
        _eventually(lambda: _status(ready) == 200, "the agent has loaded the model again")
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(5) == 0


def test_a_tritonserver_that_is_told_to_stop_stops_long_before_its_own_default(made: Path, server: Server) -> None:
    listen = f"127.0.0.1:{_free_port()}"
    with _agent(made, server, listen):
        _eventually(lambda: _status(f"http://{listen}/readyz") == 200, "the agent is ready")
    begun = time.monotonic()
    server.end(signal.SIGTERM)
    assert time.monotonic() - begun < 15  # its own default waits 30 s


def test_a_site_has_one_agent(made: Path, server: Server) -> None:
    listen = f"127.0.0.1:{_free_port()}"
    with _agent(made, server, listen):
        _eventually(lambda: _status(f"http://{listen}/readyz") == 200, "the agent is ready")
        with _agent(made, server, f"127.0.0.1:{_free_port()}") as second:
            assert second.wait(PATIENCE_S) == 2
    assert "another agent runs at" in (server.directory / "agent.log").read_text()


def test_an_agent_with_a_bad_bundle_does_not_start(tmp_path: Path, server: Server) -> None:
    with _agent(tmp_path / "nothing", server, f"127.0.0.1:{_free_port()}") as agent:
        assert agent.wait(PATIENCE_S) == 2
    assert "there is no such directory" in (server.directory / "agent.log").read_text()


async def test_a_door_to_nobody_says_no_and_raises_with_the_address() -> None:
    address = f"127.0.0.1:{_free_port()}"
    async with HttpTriton.open(address) as door:
        assert not await door.is_live()
        assert not await door.is_ready("ranker-x")
        with pytest.raises(TritonError, match=address):
            await door.load("ranker-x")


async def test_a_closed_door_leaves_no_connection_open(server: Server) -> None:
    async with HttpTriton.open(server.address) as door:
        assert await door.is_live()
        session: aiohttp.ClientSession = door._session
    assert session.closed
