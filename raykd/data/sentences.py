"""Sentences: texts with one label each, a row each, as tokens with what their tokeniser adds."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from raykd.data.blocks import Ragged
from raykd.data.rows import Dataset, Unfit
from raykd.data.text import check_text, read_tokenizer, tokens_of
from raykd.errors import RecipeError
from raykd.recipe.tables import DataRef


class Texts:
    """The texts of a source as rows of tokens of `data.tokenizer`, at most `data.window` each.

    A longer text is cut at its end; the tokens that the tokeniser puts around a text stay. They are
    counted, and told as a note of the data set.
    """

    def __init__(self, ref: DataRef, name: str):
        self.name = name
        self.window = ref.window
        self.tokenizer = read_tokenizer(ref)
        self.tokens = tokens_of(self.tokenizer)
        added = self.tokenizer.num_special_tokens_to_add(False)
        if added >= ref.window:
            raise RecipeError(
                f"data.window: {ref.window}, but the tokeniser puts {added} tokens around every "
                "text; raise it"
            )
        self.tokenizer.enable_truncation(ref.window)
        self.seen = 0
        self.cut = 0

    def inputs(self, texts: Sequence[Any], first: int) -> tuple[Ragged, tuple[Unfit, ...]]:
        """(the tokens of every text, (S, 1), the texts that say nothing).

        The first text has the number `first`. DataError names one that is no text.
        """
        for number, one in enumerate(texts, first):
            check_text(one, f"{self.name}: text of row {number}")
        found = self.tokenizer.encode_batch(list(texts))
        self.seen += len(found)
        self.cut += sum(bool(one.overflowing) for one in found)
        unfit = [
            Unfit(number, "has an empty text")
            for number, (text, one) in enumerate(zip(texts, found, strict=True), first)
            if not text.strip() or not one.ids
        ]
        length = np.array([len(one.ids) for one in found], np.int64)
        ids = np.fromiter(chain.from_iterable(one.ids for one in found), np.int32)
        return Ragged(ids[:, None], length), tuple(unfit)

    def told(self, dataset: Dataset) -> Dataset:
        """The data set with its tokens, and what a reader must know of texts that were cut."""
        notes = dataset.notes
        if self.cut:
            cut = f"{self.cut:,} of {self.seen:,} texts cut to data.window = {self.window} tokens"
            notes = (*notes, cut)
        return replace(dataset, tokens=self.tokens, notes=notes)
