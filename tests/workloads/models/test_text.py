"""Hashed text: the same everywhere, words first, n-grams that survive a slip of the finger."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workloads.contract.tensors import PAD, TEXT_TOKENS, TOKEN_BUCKETS
from workloads.models.text import item_text, token_ids, token_table, words


def test_ids_are_those_that_trained_weights_were_made_with():
    # Frozen: another hash or order makes every trained token table worthless.
    assert token_ids("Red mug")[:6].tolist() == FROZEN


FROZEN = [6365, 8649, 3969, 955, 15505, 9409]


def test_case_compatibility_forms_and_punctuation_do_not_matter():
    assert np.array_equal(token_ids("WHITE T-LIGHT, holder"), token_ids("white t light holder"))
    assert np.array_equal(token_ids("ﬁne"), token_ids("FINE"))


def test_a_mistyped_word_shares_most_of_its_ids_with_the_right_one():
    right, wrong, other = (set(token_ids(text)) - {PAD} for text in ("lanterns", "lantrens", "notebook"))
    assert len(right & wrong) >= 2
    assert not right & other


def test_words_come_before_the_parts_of_words():
    alone = token_ids("vintage")[0]
    assert alone in token_ids("a vintage lantern for the garden with many more words to follow here")[:12]


def test_a_text_without_words_is_all_padding():
    assert not token_ids(" ... !").any()
    assert token_table([]).shape == (0, TEXT_TOKENS)


def test_a_missing_category_leaves_no_trace():
    assert item_text("mug", "") == "mug"


@given(st.text(max_size=300))
def test_any_text_becomes_ids_in_range(text: str):
    ids = token_ids(text)
    assert ids.shape == (TEXT_TOKENS,)
    assert ids.dtype == np.int64
    assert ((ids >= 0) & (ids < TOKEN_BUCKETS)).all()
    real = np.flatnonzero(ids)
    assert len(real) == 0 or real[-1] == len(real) - 1, "padding comes last"
    assert bool(len(real)) == bool(words(text))


def test_the_module_that_serving_uses_loads_no_torch():
    code = (
        "import sys, workloads.models.text, workloads.data.features; assert not {'torch', 'polars'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
