"""The agent's one door to a Triton server, and the fake that stands in for one in tests.

The protocol is KServe v2 over HTTP with Triton's extensions for the model repository and for binary
tensors (docs: triton-inference-server/server, protocol/). It knows calls, and not when to make them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Final, Protocol

import aiohttp
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

QUICK_S: Final = 2.0
"""For questions that a living server answers at once."""
LOAD_S: Final = 120.0
"""For loading and unloading, which read files and start processes."""

_DATA_TYPES: Final[Mapping[str, str]] = {"int64": "INT64", "float32": "FP32"}
_LENGTH: Final = "Inference-Header-Content-Length"


class TritonError(Exception):
    """Triton does not answer, or answered that it cannot; the text is its own."""


class TritonDoor(Protocol):
    """What the agent asks of Triton. Every call raises TritonError, but for the two questions."""

    async def is_live(self) -> bool:
        """Whether a server answers."""

    async def is_ready(self, model: str) -> bool:
        """Whether this model can be asked now."""

    async def loaded(self) -> list[str]:
        """Names of the models that are loaded or being loaded."""

    async def load(self, model: str) -> None:
        """Load the newest files of a model and return when it is ready; if this fails, what was loaded serves on."""

    async def unload(self, model: str) -> None:
        """Unload a model."""

    async def infer(self, model: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a batch; arrays are int64 or float32 with the batch first."""


class HttpTriton:
    """A Triton server behind its HTTP address, `host:port`."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self._session = session
        self._url = f"http://{address}/v2"

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, address: str) -> AsyncIterator[HttpTriton]:
        """A door that is closed at the end."""
        # A connection for each call: the model processes of a killed server hold its old connections open
        # for a second, and a question on one of those would wait for its timeout.
        connector = aiohttp.TCPConnector(force_close=True)
        timeout = aiohttp.ClientTimeout(total=QUICK_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            yield cls(session, address)

    async def is_live(self) -> bool:
        """Whether a server answers."""
        return await self._says_yes("/health/live")

    async def is_ready(self, model: str) -> bool:
        """Whether this model can be asked now."""
        return await self._says_yes(f"/models/{model}/ready")

    async def loaded(self) -> list[str]:
        """Names of the models that are loaded or being loaded."""
        answer = await self._post("/repository/index")
        with _understood(self._url):
            return [entry["name"] for entry in json.loads(answer) if entry.get("state") in {"READY", "LOADING"}]

    async def load(self, model: str) -> None:
        """Load a model and return when it is ready."""
        await self._post(f"/repository/models/{model}/load", timeout_s=LOAD_S)

    async def unload(self, model: str) -> None:
        """Unload a model."""
        await self._post(f"/repository/models/{model}/unload", timeout_s=LOAD_S)

    async def infer(self, model: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a batch with binary tensors both ways."""
        tensors = [
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": _DATA_TYPES[array.dtype.name],
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, array in inputs.items()
        ]
        header = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
        body = b"".join([header, *(np.ascontiguousarray(array).tobytes() for array in inputs.values())])
        url = f"{self._url}/models/{model}/infer"
        try:
            async with self._session.post(url, data=body, headers={_LENGTH: str(len(header))}) as response:
                answer = await response.read()
                if response.status != 200:
                    raise TritonError(_text(response.status, answer))
                with _understood(url):
                    return _tensors(answer, int(response.headers[_LENGTH]))
        except (TimeoutError, aiohttp.ClientError) as error:
            raise TritonError(f"{url}: {str(error) or 'no answer in time'}") from error

    async def _says_yes(self, path: str) -> bool:
        try:
            async with self._session.get(self._url + path) as response:
                return response.status == 200
        except (TimeoutError, aiohttp.ClientError):
            return False

    async def _post(self, path: str, *, timeout_s: float = QUICK_S) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.post(self._url + path, data=b"{}", timeout=timeout) as response:
                answer = await response.read()
                if response.status != 200:
                    raise TritonError(_text(response.status, answer))
                return answer
        except (TimeoutError, aiohttp.ClientError) as error:
            raise TritonError(f"{self._url}{path}: {str(error) or 'no answer in time'}") from error


@contextlib.contextmanager
def _understood(url: str) -> Iterator[None]:
    """An answer that is not of the protocol is a fault of the server like any other."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TritonError(f"{url}: the answer is not of the KServe protocol ({error!r})") from error


def _text(status: int, answer: bytes) -> str:
    """Triton's own words, or the status where it has none."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(answer)["error"])
    return f"status {status}: {answer[:200].decode(errors='replace')}"


def _tensors(answer: bytes, header_length: int) -> dict[str, Array]:
    names = {theirs: ours for ours, theirs in _DATA_TYPES.items()}
    result, at = {}, header_length
    for output in json.loads(answer[:header_length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        array = np.frombuffer(answer[at : at + size], names[output["datatype"]])
        result[output["name"]] = array.reshape(output["shape"])
        at += size
    return result


class FakeTriton:
    """A Triton in memory: models are functions, files are not looked at. For tests."""

    def __init__(self, outputs: Mapping[str, tuple[int, ...]], *models: str) -> None:
        """`outputs`: name and shape (without the batch) of what each model answers; `models`: what could be loaded."""
        self.live = True
        self.models = set(models)
        self.ready: list[str] = []
        self.calls: list[tuple[str, str]] = []
        """(`load`, `unload` or `infer:<batch>`, model), in order."""
        self.fault: str | None = None
        """What every load and inference fails with, if anything."""
        self.value = 0.5
        """What every output holds."""
        self.answers: dict[str, Callable[[Mapping[str, Array]], dict[str, Array]]] = {}
        """By model: what is answered instead."""
        self._outputs = dict(outputs)

    def restart(self) -> None:
        """Forget what was loaded, as a server that was killed and started again."""
        self.ready.clear()

    async def is_live(self) -> bool:
        """`live`."""
        return self.live

    async def is_ready(self, model: str) -> bool:
        """Whether the model was loaded since the last restart."""
        return self.live and model in self.ready

    async def loaded(self) -> list[str]:
        """What was loaded since the last restart."""
        self._check()
        return list(self.ready)

    async def load(self, model: str) -> None:
        """Load a model of `models`."""
        self.calls.append(("load", model))
        self._check()
        if self.fault or model not in self.models:
            raise TritonError(self.fault or f"failed to load '{model}', no such model")
        if model not in self.ready:
            self.ready.append(model)

    async def unload(self, model: str) -> None:
        """Unload a model."""
        self.calls.append(("unload", model))
        self._check()
        self.ready.remove(model)

    async def infer(self, model: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """`value` in every output, as many rows as came in."""
        rows = len(next(iter(inputs.values())))
        self.calls.append((f"infer:{rows}", model))
        self._check()
        if self.fault or model not in self.ready:
            raise TritonError(self.fault or f"Request for unknown model: '{model}' is not found")
        if model in self.answers:
            return self.answers[model](inputs)
        return {name: np.full((rows, *shape), self.value, np.float32) for name, shape in self._outputs.items()}

    def _check(self) -> None:
        if not self.live:
            raise TritonError("connection refused")
