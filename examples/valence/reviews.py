"""Rows of human valence: a review is a sequence of sentences, each rated by twenty people."""

import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raykd.errors import DataError

FILE = Path(__file__).parent / "data" / "sentences.parquet"
WORD = re.compile(r"[a-z']+|[!?]+|[:;=][-']?[()dp/]")
# of a sentence's features, so that one word is about as large as a channel that has variance 1
LENGTH = 10.0
PARTS = ("train", "test", "train", "val", "train", "test", "train", "test")
Row = dict[str, Any]
Sentence = dict[str, Any]  # source, document, step, valence in [-1, 1], text


def rows(
    *,
    channels: int = 2048,
    window: int = 16,
    stride: int = 8,
    with_lessons: bool = True,
    turn: int = 0,
    file: str = str(FILE),
) -> Iterator[Row]:
    """Windows of reviews in their splits; for training also lessons, rows of single sentences.
    DataError if no file.

    The label tells whether a whole review, wherever in it the window lies, is rated above the
    median one of training. `turn` = 1 tests just on reviews that `turn` = 0 trains on.
    """
    if not Path(file).is_file():
        raise DataError(
            f"{file}: no such file; write it with: python examples/valence/make_data.py"
        )
    sentences = pq.read_table(file).to_pylist()
    reviews = documents(sentences)
    median = float(
        np.median(
            [
                rating(review)
                for number, review in reviews.items()
                if split(number + turn) == "train"
            ]
        )
    )
    for number, review in reviews.items():
        for first in range(0, max(1, len(review) - window + stride), stride):
            label = "above" if rating(review) > median else "below"
            yield row(
                review[first : first + window],
                channels,
                label,
                split(number + turn),
                f"review {number}",
            )
    for number, lesson in enumerate(lessons(sentences, window) if with_lessons else ()):
        label = "above" if rating(lesson) > median else "below"
        yield row(lesson, channels, label, "train", f"lesson {number}")


def documents(sentences: Iterable[Sentence]) -> dict[int, list[Sentence]]:
    """Each review's sentences in their order, by its number."""
    reviews = sorted(
        (s for s in sentences if s["source"] == "reviews"), key=lambda s: (s["document"], s["step"])
    )
    return {
        number: list(review) for number, review in groupby(reviews, key=lambda s: s["document"])
    }


def lessons(sentences: Iterable[Sentence], size: int) -> Iterator[list[Sentence]]:
    """Rated sentences that belong to no document, `size` at a time with those that are rated nearly
    alike.

    So what follows a sentence in its row is rated as it is, and its future valence is about its
    own.
    """
    for source in ("movies", "tweets"):
        alike = sorted((s for s in sentences if s["source"] == source), key=lambda s: s["valence"])
        for first in range(0, len(alike), size):
            yield alike[first : first + size]


def row(part: list[Sentence], channels: int, label: str, split: str, group: str) -> Row:
    """One row: what is read at each step, and how people rated it."""
    inputs = np.stack([features(s["text"], channels) for s in part])
    valence = np.array([s["valence"] for s in part], np.float32)
    return {"inputs": inputs, "label": label, "split": split, "group": group, "valence": valence}


def rating(sentences: list[Sentence]) -> float:
    """The mean human rating of a document."""
    return sum(s["valence"] for s in sentences) / len(sentences)


def split(review: int) -> str:
    """The split of a review, all of it.

    Reviews of one product have near numbers, so each split has every product.
    """
    return PARTS[review % len(PARTS)]


def features(text: str, channels: int) -> NDArray[np.float32]:
    """(channels,): a bag of words, each added with its sign at its place; both are the word's
    crc32.

    Python's own hash() would differ from process to process. No vocabulary is learned, so none is
    shipped.
    """
    bag = np.zeros(channels, np.float32)
    for word in WORD.findall(text.lower()):
        code = zlib.crc32(word.encode())
        bag[(code & 0x7FFFFFFF) % channels] += 1 if code >> 31 else -1
    return bag * np.float32(LENGTH / max(float(np.linalg.norm(bag)), 1e-6))
