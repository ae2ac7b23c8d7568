"""Search by words over a small catalogue."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.retrieval.lexical import LexicalIndex

TITLES = ["", "Red lantern", "Blue lanterns", "Café mug", "Garden lantern stand", "Measuring jug", "Red mug"]
CATEGORIES = ["", "Lighting", "Lighting", "Kitchen", "Garden", "Kitchen", "Kitchen"]
DESCRIPTIONS = ["", "A warm light.", "Two of them.", "For coffee.", "Holds one lantern.", "For measures of water.", ""]
PREFERENCE = np.array([0, 1, 2, 3, 4, 5, 6], dtype=np.float32)


@pytest.fixture(scope="module")
def index() -> LexicalIndex:
    return LexicalIndex(TITLES, CATEGORIES, DESCRIPTIONS, PREFERENCE)


def found(index: LexicalIndex, text: str, limit: int = 10) -> list[int]:
    items, scores = index.search(text, limit)
    assert items.dtype == np.int32
    assert scores.dtype == np.float32
    assert (np.diff(scores) <= 0).all()
    return [int(item) for item in items]


def test_an_item_that_has_all_words_comes_first(index: LexicalIndex):
    assert found(index, "red lantern")[0] == 1


def test_a_word_is_found_in_its_other_forms_and_without_its_accent(index: LexicalIndex):
    assert set(found(index, "LANTERN")) == {1, 2, 4} == set(found(index, "lanterns"))
    assert 3 in found(index, "cafe")
    assert 3 in found(index, "CAFÉ")


def test_category_and_description_are_searched_and_count_less_than_the_title(index: LexicalIndex):
    assert set(found(index, "kitchen")) == {3, 5, 6}
    assert found(index, "garden") == [4]
    assert 5 in found(index, "water")


@pytest.mark.parametrize("typed", ["lanterm", "lantren", "lantrn", "lanternn"])
def test_a_typing_error_is_forgiven(index: LexicalIndex, typed: str):
    assert {1, 2, 4} <= set(found(index, typed))


def test_a_typing_error_beside_a_known_word_narrows_as_the_right_word_would(index: LexicalIndex):
    assert found(index, "red lanterm")[0] == 1


def test_what_has_the_very_word_comes_before_what_nearly_has_it(index: LexicalIndex):
    assert found(index, "coffee")[0] == 3
    assert found(index, "stand")[0] == 4
    near = LexicalIndex(["", "cart", "card", "card", "carp"], [""] * 5, [""] * 5, np.arange(5, dtype=np.float32))
    assert found(near, "cart") == [1, 4, 3, 2]


def test_a_short_unknown_word_finds_nothing(index: LexicalIndex):
    assert found(index, "xyz") == []


def test_items_of_equal_score_come_in_the_order_of_preference():
    index = LexicalIndex(["", "mug", "mug", "mug"], [""] * 4, [""] * 4, np.array([0, 1, 3, 2], dtype=np.float32))
    assert found(index, "mug") == [2, 3, 1]


@pytest.mark.parametrize("text", ["title:red", '"red', "red AND", "+red -mug", "red~2^3 [a TO", "*", "(((", "a/b\\c"])
def test_operators_of_query_languages_have_no_meaning(index: LexicalIndex, text: str):
    found(index, text)


def test_the_limit_holds(index: LexicalIndex):
    assert len(found(index, "lantern", limit=2)) == 2


@settings(max_examples=50)
@given(st.text(max_size=256))
def test_any_text_is_answered(text: str):
    index = _shared()
    assert set(found(index, text)) <= set(range(1, 7))


_made: list[LexicalIndex] = []


def _shared() -> LexicalIndex:
    """One index for all examples of a property."""
    if not _made:
        _made.append(LexicalIndex(TITLES, CATEGORIES, DESCRIPTIONS, PREFERENCE))
    return _made[0]


def test_texts_of_different_length_are_refused():
    with pytest.raises(ValueError, match="length"):
        LexicalIndex(["", "a"], [""], ["", ""], np.zeros(2, dtype=np.float32))
