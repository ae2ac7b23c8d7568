"""What load users draw from: items by the catalogue's own popularity, queries from its titles, users at home.

The same bundle and size give the same sample. Raw user ids come from a file that only home has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from workloads.bundle.store import Bundle
from workloads.contract.events import QUERY_MAX
from workloads.contract.http import CatalogueSample

QUERY_WORDS: Final = (1, 2, 2, 3)
"""Lengths that queries are cut from titles with, in words; two is the most common length of a shop query."""

_WORD: Final = re.compile(r"[^\W_]{2,}")


class UsersFileError(ValueError):
    """A users sample that cannot be read; the message names the remedy."""


def read_users(path: Path) -> list[str]:
    """The raw user ids of `users-sample.json`: a JSON list of strings. Raises UsersFileError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[str])
    except (OSError, msgspec.DecodeError) as error:
        raise UsersFileError(f"{path}: no list of user ids ({error}); prepare the data set again") from None


class Sampler:
    """Draws samples of one bundle's catalogue."""

    def __init__(self, bundle: Bundle, users: Sequence[str], best_rung: Mapping[str, int]) -> None:
        self._bundle = bundle
        self._users = users
        self._best_rung = dict(best_rung)
        popularity = np.asarray(bundle.tables["popularity"], dtype=np.float64).copy()
        popularity[0] = 0.0
        if popularity.sum() <= 0:  # a catalogue that nobody bought from yet
            popularity[1:] = 1.0
        self._share = popularity / popularity.sum()

    def sample(self, size: int) -> CatalogueSample:
        """Items drawn `size` times by popularity, each item once with its share of the draws; as many queries.

        Users are the first `size` of the file.
        """
        random = np.random.default_rng(int(self._bundle.short, 16))
        drawn = random.choice(len(self._share), size=size, p=self._share)
        items, times = np.unique(drawn, return_counts=True)
        lengths = random.choice(QUERY_WORDS, size=size)
        starts = random.random(size)
        queries = [
            query
            for item, length, start in zip(drawn.tolist(), lengths.tolist(), starts.tolist(), strict=True)
            if (query := self._query(item, length, start))
        ]
        return CatalogueSample(
            items=[self._bundle.item_ids[item] for item in items.tolist()],
            item_weights=(times / size).tolist(),
            queries=queries,
            users=list(self._users[:size]),
            best_rung=self._best_rung,
        )

    def _query(self, item: int, length: int, start: float) -> str:
        """`length` words in a row of the item's title, beginning at the share `start` of where they can."""
        words = _WORD.findall(self._bundle.titles[item].lower())
        at = int(start * max(1, len(words) - length + 1))
        return " ".join(words[at : at + length])[:QUERY_MAX]
