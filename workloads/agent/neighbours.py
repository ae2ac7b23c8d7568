"""The agent's one door to those who serve what it brings: the site's retrieval and gateways, by their `/readyz`.

Nothing is told to them; they read the editions file. The door asks how far they are. Knows no flip.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol, TypeVar

import aiohttp
import msgspec

from workloads.contract.editions import Edition, RetrievalReadiness, SiteEditions
from workloads.contract.http import PATH_READY, Readiness

ASK_WITHIN_S: Final = 2.0


class Silence(enum.Enum):
    """Why there is no answer."""

    ABSENT = "nobody listens"
    """It does not run, and serves nothing; when it starts, it reads the file."""
    MUTE = "gives no answer"
    """It may serve; what, is not known."""


class Neighbours(Protocol):
    """How far those who serve are."""

    watched: bool
    """Whether gateways are asked at all; where not, what they are on is not known."""

    async def retrieval(self) -> RetrievalReadiness | Silence | None:
        """What retrieval holds; None when none is to be asked."""
        ...

    async def gateways(self) -> Sequence[tuple[str, Readiness | Silence]]:
        """Name and state of every gateway that is to be asked."""
        ...


_T = TypeVar("_T")


class HttpNeighbours:
    """Retrieval and gateways at their base URLs."""

    def __init__(self, session: aiohttp.ClientSession, retrieval: str | None, gateways: Sequence[str]) -> None:
        self._session = session
        self._retrieval = retrieval
        self._gateways = list(gateways)
        self.watched = bool(gateways)
        self._decode_retrieval = msgspec.json.Decoder(RetrievalReadiness)
        self._decode_gateway = msgspec.json.Decoder(Readiness)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, retrieval: str | None, gateways: Sequence[str]) -> AsyncIterator[HttpNeighbours]:
        """A door that is closed at the end."""
        timeout = aiohttp.ClientTimeout(total=ASK_WITHIN_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            yield cls(session, retrieval, gateways)

    async def retrieval(self) -> RetrievalReadiness | Silence | None:
        """See `Neighbours`."""
        if self._retrieval is None:
            return None
        found = await self._ask(self._retrieval, self._decode_retrieval)
        return found  # noqa: RET504 - named, so that its type is not taken from what this returns

    async def gateways(self) -> Sequence[tuple[str, Readiness | Silence]]:
        """See `Neighbours`."""
        answers = await asyncio.gather(*(self._gateway(url) for url in self._gateways))
        return list(zip(self._gateways, answers, strict=True))

    async def _gateway(self, url: str) -> Readiness | Silence:
        found = await self._ask(url, self._decode_gateway)
        return found  # noqa: RET504 - as above

    async def _ask(self, url: str, decoder: msgspec.json.Decoder[_T]) -> _T | Silence:
        try:
            async with self._session.get(url.rstrip("/") + PATH_READY) as response:
                return decoder.decode(await response.read())  # 503 says as much as 200
        except aiohttp.ClientConnectorError:
            return Silence.ABSENT
        except (TimeoutError, aiohttp.ClientError, msgspec.DecodeError, UnicodeDecodeError):
            return Silence.MUTE


class FakeNeighbours:
    """A retrieval and gateways that do at once what the editions file says, unless told otherwise. For tests."""

    def __init__(self, gateways: int = 1) -> None:
        self.watched = gateways > 0
        self.wanted: SiteEditions | None = None
        """What the file says. Set by the test's loop."""
        self.retrieval_fault: tuple[Edition, str] | None = None
        self.gateway_fault: tuple[Edition, str] | None = None
        self.retrieval_silence: Silence | None = None
        self.gateway_silence: Silence | None = None
        self.draining = 0
        self.serves: list[Edition | None] = [None] * gateways
        self.holds: list[Edition] = []

    def follow(self, wanted: SiteEditions) -> None:
        """The file says this now."""
        self.wanted, serve = wanted, wanted.serve
        self.holds = [edition for edition in wanted.load if not self._fails(self.retrieval_fault, edition)]
        self.serves = [held if self._fails(self.gateway_fault, serve) else serve for held in self.serves]

    async def retrieval(self) -> RetrievalReadiness | Silence | None:
        """See `Neighbours`."""
        if self.retrieval_silence is not None:
            return self.retrieval_silence
        loads = self.wanted.load if self.wanted else []
        faults = {str(one): self.retrieval_fault[1] for one in loads if self.retrieval_fault and one not in self.holds}
        return RetrievalReadiness(
            ready=True,
            missing={},
            revision=self._revision,
            editions=[str(edition) for edition in self.holds],
            faults=faults,
        )

    async def gateways(self) -> Sequence[tuple[str, Readiness | Silence]]:
        """See `Neighbours`."""
        wanted = self.wanted.serve if self.wanted else None
        answers: list[tuple[str, Readiness | Silence]] = []
        for number, serves in enumerate(self.serves):
            failing = self.gateway_fault is not None and wanted is not None and self._fails(self.gateway_fault, wanted)
            faults = {str(wanted): self.gateway_fault[1]} if failing and self.gateway_fault else {}
            answer = Readiness(
                ready=serves is not None,
                site="onprem",
                bundle="" if serves is None else serves.bundle[:12],
                delta=0 if serves is None else serves.delta,
                draining=self.draining,
                revision=self._revision,
                faults=faults,
                backends={},
                missing=[],
            )
            answers.append((f"gateway {number}", self.gateway_silence or answer))
        return answers

    @property
    def _revision(self) -> int:
        return 0 if self.wanted is None else self.wanted.revision

    @staticmethod
    def _fails(fault: tuple[Edition, str] | None, edition: Edition) -> bool:
        return fault is not None and fault[0] == edition
