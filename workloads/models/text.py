"""Text as hashed token ids, the same for titles in training and queries online.

Words come first, then character n-grams of the words, so that a misspelt or unseen word still
shares most of its ids with the right one (hashed n-grams as in Bojanowski et al., TACL 2017). Hashing
is CRC-32: no vocabulary to ship, and the same id on every machine. It loads no torch.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
import zlib
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from workloads.contract.tensors import PAD, TEXT_TOKENS, TOKEN_BUCKETS

GRAM: Final = 4
"""Characters of an n-gram; `<` and `>` mark where a word begins and ends."""

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Lower-case words of a text, compatibility forms unified (NFKC)."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def token_ids(text: str) -> npt.NDArray[np.int64]:
    """Ids [TEXT_TOKENS] of a text: its distinct words in order, then their n-grams, cut or padded with PAD.

    Ids run from 1 to TOKEN_BUCKETS - 1. A text without words is all PAD.
    """
    found = dict.fromkeys(words(text))
    grams = (
        marked[at : at + GRAM]
        for marked in (f"<{word}>" for word in found)
        for at in range(max(len(marked) - GRAM + 1, 1))
        if len(marked) > GRAM
    )
    tokens = dict.fromkeys(itertools.chain((f"w:{word}" for word in found), (f"g:{gram}" for gram in grams)))
    ids = np.full(TEXT_TOKENS, PAD, dtype=np.int64)
    for place, token in enumerate(itertools.islice(tokens, TEXT_TOKENS)):
        ids[place] = _bucket(token)
    return ids


def token_table(texts: Iterable[str]) -> npt.NDArray[np.int64]:
    """`token_ids` of each text, [n, TEXT_TOKENS]."""
    rows = [token_ids(text) for text in texts]
    return np.stack(rows) if rows else np.empty((0, TEXT_TOKENS), dtype=np.int64)


def item_text(title: str, category: str) -> str:
    """What of an item is read as text."""
    return f"{title} {category}".strip()


def _bucket(token: str) -> int:
    return 1 + zlib.crc32(token.encode()) % (TOKEN_BUCKETS - 1)
