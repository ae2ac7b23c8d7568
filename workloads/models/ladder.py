"""The quality ladder, measured: every rung on the same test requests and candidate lists, against rung 1.

Training writes the lists down as they were ranked (`ladder.safetensors`); whoever has models scores them again, so
that the loss in a bundle is that of the very files in it. Rung 3 is the order of the lists, rung 4 has lists of its
own and brings only what they were worth. Knows no model: scores come in as numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from workloads.bundle.tables import open_tables
from workloads.contract.quality import Protocol, RungQuality
from workloads.contract.slo import STUDENT_LOSS_MAX, Rung
from workloads.contract.tensors import RANKER_DENSE, RANKER_SPARSE
from workloads.models import metrics

Floats = npt.NDArray[np.float32]

LADDER_FILE: Final = "ladder.safetensors"
K: Final = 10
PROTOCOLS: Final[tuple[Protocol, ...]] = ("novel", "repeats")
"""Where there is a rung 1: a search is answered without the ranker."""
ASKED: Final[Mapping[Protocol, str]] = {
    "novel": "items the person had not bought",
    "repeats": "all items, repeats included",
}
CERTAIN: Final = 2.0
"""Standard errors that chance is held to explain."""
_ITEM: Final = RANKER_SPARSE.index("item")
_FUSED: Final = RANKER_DENSE.index("fused_score")


@dataclasses.dataclass(frozen=True)
class RankedLists:
    """L candidate lists with C rows in all; list l has the rows `offsets[l]` to `offsets[l + 1]`, in fused order."""

    protocol: npt.NDArray[np.int8]
    """Place in `PROTOCOLS`, [L]."""
    offsets: npt.NDArray[np.int64]
    sparse: npt.NDArray[np.int32]
    """[C, F_s]; items in column `item`."""
    dense: Floats
    """[C, F_d], not standardised."""
    wanted: npt.NDArray[np.int32]
    """Items that were wanted, list after list, whether they are candidates or not."""
    wanted_offsets: npt.NDArray[np.int64]
    traditional: Floats
    """NDCG@10 of rung 4's own list for the same request, [L]."""

    def __len__(self) -> int:
        return len(self.protocol)

    def rows(self, place: int) -> slice:
        """Rows of one list."""
        return slice(int(self.offsets[place]), int(self.offsets[place + 1]))

    def wanted_of(self, place: int) -> npt.NDArray[np.int32]:
        """What one list's request wanted."""
        return self.wanted[self.wanted_offsets[place] : self.wanted_offsets[place + 1]]

    def save(self, path: Path) -> None:
        """Write them down."""
        save_file({name: np.ascontiguousarray(value) for name, value in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> RankedLists:
        """Mapped from a file. Raises OSError or ValueError when it is not what `save` writes."""
        tables = open_tables(path)
        names = {field.name for field in dataclasses.fields(cls)}
        if set(tables) != names:
            raise ValueError(f"{path}: it holds {sorted(tables)}, and ranked lists are {sorted(names)}; train again")
        made = cls(**tables)
        lists, ends = len(made), (len(made.sparse), len(made.wanted))
        if not (
            len(made.offsets) == len(made.wanted_offsets) == lists + 1 == len(made.traditional) + 1
            and (int(made.offsets[-1]), int(made.wanted_offsets[-1])) == ends
            and len(made.dense) == len(made.sparse)
        ):
            raise ValueError(f"{path}: its tables do not fit each other; train again")
        return made


def measure(lists: RankedLists, scores: Mapping[int, Floats]) -> list[RungQuality]:
    """A row per protocol and rung; `scores` [C] by rung are those of models, rung 1's among them.

    A protocol without requests, or in which rung 1 finds nothing wanted in its first 10 places, has no row: there
    is nothing to lose, and `statements` says so.
    """
    order_of = dict(scores) | {Rung.RETRIEVAL_SCORE: lists.dense[:, _FUSED]}
    found: list[RungQuality] = []
    for number, protocol in enumerate(PROTOCOLS):
        asked = np.flatnonzero(lists.protocol == number)
        gains = {rung: _gains(lists, asked, own) for rung, own in order_of.items()}
        gains[Rung.TRADITIONAL] = lists.traditional[asked].astype(np.float64)
        first = gains[Rung.FULL_RANKER]
        if not first.sum():
            continue
        label = _labels(lists, asked)
        rows = _rows(lists, asked)
        for rung, own in sorted(gains.items()):
            judged = metrics.auc(label, order_of[rung][rows]) if rung in order_of else float("nan")
            found.append(
                RungQuality(
                    rung=int(rung),
                    protocol=protocol,
                    ndcg_at_10=float(own.mean()),
                    auc=judged if judged == judged else None,  # noqa: PLR0124 - NaN: one kind of label only
                    loss=float(1.0 - own.mean() / first.mean()),
                    loss_error=_error(first, own),
                    requests=len(asked),
                )
            )
    return found


def allowed(row: RungQuality) -> float:
    """What rung 2 may lose on these requests: its budget, where they can tell it from nothing.

    Where they are so few that the budget is within chance, it is stretched to what chance does not explain.
    """
    chance = CERTAIN * row.loss_error
    return STUDENT_LOSS_MAX if chance <= STUDENT_LOSS_MAX else STUDENT_LOSS_MAX + chance


def student_fault(rungs: Sequence[RungQuality]) -> str | None:
    """Why the student may not be served, or None: it loses more than it may."""
    for row in rungs:
        if row.rung == Rung.DISTILLED_RANKER and row.loss > allowed(row):
            return (
                f"rung 2 may lose {STUDENT_LOSS_MAX:.1%} of rung 1's NDCG@{K}, and the student loses {row.loss:.1%} "
                f"(standard error {row.loss_error:.1%}) on {row.requests} requests for {ASKED[row.protocol]}"
            )
    return None


def statements(rungs: Sequence[RungQuality]) -> list[str]:
    """The ladder in plain words: what rung 2 loses, and where the requests are too few to say."""
    said = []
    for protocol in PROTOCOLS:
        row = next((r for r in rungs if (r.protocol, r.rung) == (protocol, Rung.DISTILLED_RANKER)), None)
        if row is None:
            said.append(
                f"Asked for {ASKED[protocol]}, the ladder was not measured: rung 1 found nothing that was wanted."
            )
            continue
        verb = "loses" if row.loss >= 0 else "gains"
        said.append(
            f"Asked for {ASKED[protocol]}, the INT8 student {verb} {abs(row.loss):.1%} of rung 1's NDCG@{K} "
            f"(standard error {row.loss_error:.1%}, {row.requests} requests); it may lose {allowed(row):.1%}."
        )
        if allowed(row) > STUDENT_LOSS_MAX:
            said.append(
                f"{row.requests} requests are too few to hold the student to its budget of {STUDENT_LOSS_MAX:.1%}: "
                "only a loss beyond chance would have been refused."
            )
    return said


def _gains(lists: RankedLists, asked: npt.NDArray[Any], scores: Floats) -> npt.NDArray[np.float64]:
    """NDCG@10 of each of these lists in the order of the scores; ties keep the fused order."""
    gains = np.zeros(len(asked))
    for at, place in enumerate(asked):
        rows = lists.rows(place)
        order = np.argsort(-scores[rows], kind="stable")[:K]
        gains[at] = metrics.ndcg_at(lists.sparse[rows, _ITEM][order], lists.wanted_of(place), K)
    return gains


def _rows(lists: RankedLists, asked: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    parts = [np.arange(lists.offsets[place], lists.offsets[place + 1]) for place in asked]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _labels(lists: RankedLists, asked: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    parts = [np.isin(lists.sparse[lists.rows(place), _ITEM], lists.wanted_of(place)) for place in asked]
    return np.concatenate(parts).astype(np.int8) if parts else np.empty(0, dtype=np.int8)


def _error(first: npt.NDArray[np.float64], own: npt.NDArray[np.float64]) -> float:
    """Standard error of 1 - mean(own) / mean(first), requests being drawn together (a ratio's, by the delta method)."""
    ratio = own.mean() / first.mean()
    return float((own - ratio * first).std() / first.mean() / np.sqrt(len(first)))
