"""Words of a query against words of the catalogue: BM25 in memory, English stems, typing errors forgiven.

The index is tantivy's (https://github.com/quickwit-oss/tantivy-py), built from the bundle's catalogue when
the service starts; nothing of it is on disk. Queries are taken as words: no operator of a query language
has a meaning. It knows no vector and no popularity beyond the order of ties.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import tantivy

from workloads.data.fusion import Proposals

FIELDS: Final = {"title": 2.0, "category": 1.0, "description": 1.0}
"""Searched fields and how much a word found there counts."""
OTHER_FIELDS: Final = 0.1
"""Share of a word's score in the fields that are not its best."""
WORDS_MAX: Final = 24
"""Distinct words of a query that are searched; a longer text is a pasted one."""
FEW: Final = 3
"""With fewer items than this, words that are known are taken for typing errors, too."""
NEAR_LIMIT: Final = 20
"""Items that such words may add: some more to look at, not a list of their own."""
FUZZY_WORD_MIN: Final = 4
FUZZY_WORDS_MAX: Final = 6
"""Words of a query that are looked up as typing errors; each walks three dictionaries."""
FUZZY_BOOST: Final = 3.0
"""A near word's score: about the BM25 of one that a hundredth of the catalogue has."""

_TOKENIZER: Final = "english_stems"
_WRITER_BYTES: Final = 15_000_000
"""The least tantivy takes; given back once the index is built."""


class LexicalIndex:
    """BM25 over a catalogue whose texts are listed by item index, position 0 being nobody.

    `preference` [N+1] orders items of equal score. Raises ValueError when the lists differ in length.
    """

    def __init__(
        self,
        titles: Sequence[str],
        categories: Sequence[str],
        descriptions: Sequence[str],
        preference: npt.NDArray[np.float32],
    ) -> None:
        if not len(titles) == len(categories) == len(descriptions) == len(preference):
            raise ValueError("the catalogue's texts differ in length")
        builder = tantivy.SchemaBuilder()
        for field in FIELDS:
            builder.add_text_field(field, tokenizer_name=_TOKENIZER, index_option="freq")
        builder.add_integer_field("index", fast=True)
        self._schema = builder.build()
        self._analyzer = _analyzer()
        index = tantivy.Index(self._schema)
        index.register_tokenizer(_TOKENIZER, self._analyzer)
        writer = index.writer(heap_size=_WRITER_BYTES, num_threads=1)
        for place, (title, category, description) in enumerate(zip(titles, categories, descriptions, strict=True)):
            if place:
                writer.add_document(
                    tantivy.Document(title=title, category=category, description=description, index=place)
                )
        writer.commit()
        writer.wait_merging_threads()
        index.reload()
        self._searcher = index.searcher()
        self._preference = preference

    def search(self, text: str, limit: int) -> Proposals:
        """Items that share words with `text` and their BM25 scores, best first, at most `limit`.

        A word that no item has stands for the words it may be a misspelling of. Where few items are found,
        those that share a word but for a letter or two follow them.
        """
        words = list(dict.fromkeys(itertools.islice(self._analyzer.analyze(text), WORDS_MAX * 4)))[:WORDS_MAX]
        known = [word for word in words if self._is_known(word)]
        unknown = [word for word in words if word not in known]
        items, scores = self._hits([self._exact(word) for word in known] + self._near(unknown), limit)
        if len(items) < FEW and (near := self._near(known)):
            more, more_scores = self._hits(near, NEAR_LIMIT)
            new = ~np.isin(more, items)
            ceiling = scores[-1] if len(scores) else np.inf
            items = np.concatenate([items, more[new]])[:limit]
            scores = np.concatenate([scores, np.minimum(more_scores[new], ceiling)])[:limit]
        return items, scores

    def _is_known(self, word: str) -> bool:
        return any(self._searcher.doc_freq(field, word) for field in FIELDS)

    def _hits(self, clauses: Sequence[tantivy.Query], limit: int) -> Proposals:
        if not clauses:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        query = tantivy.Query.boolean_query([(tantivy.Occur.Should, clause) for clause in clauses])
        hits = self._searcher.search(query, limit, count=False).hits
        addresses = [address for _, address in hits]
        items = np.array(self._searcher.fast_field_values("index", addresses), dtype=np.int32)
        scores = np.array([score for score, _ in hits], dtype=np.float32)
        order = np.lexsort((items, -self._preference[items], -scores))
        return items[order], scores[order]

    def _exact(self, word: str) -> tantivy.Query:
        return self._best_field(
            {field: tantivy.Query.term_query(self._schema, field, word, index_option="freq") for field in FIELDS}
        )

    def _near(self, words: Sequence[str]) -> list[tantivy.Query]:
        """One clause for each word that is long enough to be misspelt; its score is the same for all matches."""
        long = [word for word in words if len(word) >= FUZZY_WORD_MIN][:FUZZY_WORDS_MAX]
        return [
            tantivy.Query.boost_query(
                self._best_field(
                    {
                        field: tantivy.Query.fuzzy_term_query(
                            self._schema, field, word, distance=1 if len(word) < 2 * FUZZY_WORD_MIN else 2
                        )
                        for field in FIELDS
                    }
                ),
                FUZZY_BOOST,
            )
            for word in long
        ]

    @staticmethod
    def _best_field(found: dict[str, tantivy.Query]) -> tantivy.Query:
        """A word counts where it counts most: two words of the query beat one word found in two fields."""
        return tantivy.Query.disjunction_max_query(
            [tantivy.Query.boost_query(query, FIELDS[field]) for field, query in found.items()],
            tie_breaker=OTHER_FIELDS,
        )


def _analyzer() -> tantivy.TextAnalyzer:
    """Words, lower-cased, without accents, as English stems."""
    return (
        tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
        .filter(tantivy.Filter.remove_long(40))
        .filter(tantivy.Filter.lowercase())
        .filter(tantivy.Filter.ascii_fold())
        .filter(tantivy.Filter.stemmer("english"))
        .build()
    )
