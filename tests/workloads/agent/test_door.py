"""What the agent's door makes of a server that speaks something else than KServe."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from workloads.agent.door import HttpTriton, TritonError

ANSWERS = [b"", b"hello", b"[1]", b'{"outputs": 1}', b'{"outputs": [{}]}']


@pytest.fixture(params=ANSWERS, ids=["empty", "words", "a list", "no outputs", "an output without a name"])
async def address(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    async def say(_: web.Request) -> web.Response:
        return web.Response(body=request.param)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", say)
    async with TestServer(app, host="127.0.0.1") as server:
        yield f"127.0.0.1:{server.port}"


async def test_an_answer_of_another_protocol_is_an_error_of_the_server(address: str) -> None:
    async with HttpTriton.open(address) as door:
        with pytest.raises(TritonError, match="not of the KServe protocol"):
            await door.infer("ranker", {"dense": np.zeros((1, 2), dtype=np.float32)})


async def test_an_index_of_another_protocol_is_an_error_of_the_server(address: str) -> None:
    async with HttpTriton.open(address) as door:
        with pytest.raises(TritonError, match="not of the KServe protocol"):
            await door.loaded()
