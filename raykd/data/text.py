"""Text as rows of tokens: documents, or prompts and their completions, tokenised and laid into rows
of `window` steps.

A training row holds as many documents as fit, and a model reads each as if it stood alone; a
document longer than a row goes on in the next, without what came before. A row of the other splits
holds one document or a part of it, so that rows of different documents are independent.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.data.rows import SPLITS, Dataset, Rows
from raykd.errors import DataError, RecipeError
from raykd.recipe.recipe import DataRef
from raykd.recipe.validation import suggestion
from raykd.targets import UNLABELLED

PARTS = ("prompt", "completion")


@dataclass(frozen=True)
class Document:
    """The tokens of a document and the end after them; those from `told` on are to be told, each
    from all before.
    """

    tokens: NDArray[np.int32]
    told: int = 1
    group: int = 0


@dataclass(frozen=True)
class Piece:
    """Where a part of a document lies:

    `count` steps from `at` on in a row, whose first token is its `first`.
    """

    document: int
    first: int
    count: int
    row: int
    at: int


def load(records: Iterable[dict[str, Any]], name: str, ref: DataRef) -> Dataset:
    """The Dataset of records {split, group, text} or {split, group, prompt, completion}, under
    `data.tokenizer`.

    DataError names the records that can not be rows: without a completion, or with a prompt that
    fills the window.
    """
    rows = list(records)
    split = np.array([str(row["split"]) for row in rows])
    if unknown := sorted(set(split.tolist()) - set(SPLITS)):
        raise DataError(
            f"{name}: column {ref.columns.split!r} holds {unknown[:5]}; write train, val or test"
        )
    has_prompts = bool(rows) and "prompt" in rows[0]
    for key in PARTS if has_prompts else ("text",):
        strange = [i for i, row in enumerate(rows) if not isinstance(row[key], str)]
        if strange:
            raise DataError(
                f"{name}: {key} of row {strange[0]} is {rows[strange[0]][key]!r}, not text; mend or drop it"
            )
    tokenizer = read_tokenizer(ref)
    end = tokenizer.token_to_id(ref.end)
    if end is None:
        known = [token for token in tokenizer.get_vocab() if token.startswith("<")]
        raise RecipeError(
            f"data.end: the tokeniser has no token {ref.end!r}.{suggestion(ref.end, known)}"
        )
    documents = (
        _of_prompts(rows, tokenizer, end, name, ref)
        if has_prompts
        else _of_text(rows, tokenizer, end)
    )
    count, splits = 0, {}
    for part in SPLITS:
        own = [documents[i] for i in np.flatnonzero(split == part)]
        splits[part] = laid_out(
            own, ref.window, shared=part == "train", whole=has_prompts, first_id=count
        )
        count += len(splits[part])
    cut = sum(len(document.tokens) - 1 > ref.window for document in documents) if has_prompts else 0
    return Dataset(f"{name}, {cut} completions cut" if cut else name, tokens_of(tokenizer), splits)


def read_tokenizer(ref: DataRef) -> Any:
    """The tokeniser of `data.tokenizer`. RecipeError if it is none, or the library is missing."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise RecipeError(
            "data.tokenizer needs the tokenizers library: pip install 'raykd[lm]'"
        ) from None
    try:
        found = Tokenizer.from_file(str(ref.tokenizer))
    except Exception as error:  # the library raises nothing more special
        raise RecipeError(
            f"data.tokenizer {ref.tokenizer}: not a tokenizer.json: {error}"
        ) from None
    found.encode_special_tokens = True  # a text that spells one holds its letters
    found.no_truncation()  # what some files ask for; rows are cut and filled here
    found.no_padding()
    return found


def tokens_of(tokenizer: Any) -> tuple[str, ...]:
    """The tokens by id; an id without one has an empty name."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    return tuple(names.get(i, "") for i in range(max(names) + 1))


def laid_out(
    documents: Sequence[Document], steps: int, *, shared: bool, whole: bool, first_id: int
) -> Rows:
    """Rows of documents in their order.

    `shared` rows hold several, `whole` documents are not cut but shortened.
    """
    pieces, count = _pieces(documents, steps, shared, whole)
    inputs = np.zeros((count, steps, 2), np.int32)
    label = np.full((count, steps), UNLABELLED, np.int64)
    mask, group = np.zeros((count, steps), bool), np.zeros(count, np.int64)
    for piece in pieces:
        found, at = documents[piece.document], slice(piece.at, piece.at + piece.count)
        inputs[piece.row, at, 0] = found.tokens[piece.first : piece.first + piece.count]
        inputs[piece.row, at, 1] = np.arange(piece.count)
        skipped = min(max(found.told - 1 - piece.first, 0), piece.count)
        told = slice(piece.at + skipped, piece.at + piece.count)
        label[piece.row, told] = found.tokens[
            piece.first + skipped + 1 : piece.first + piece.count + 1
        ]
        mask[piece.row, told] = True
        group[piece.row] = found.group
    return Rows(np.arange(first_id, first_id + count), inputs, mask, label, group)


def _pieces(
    documents: Sequence[Document], steps: int, shared: bool, whole: bool
) -> tuple[list[Piece], int]:
    found: list[Piece] = []
    row, at = 0, 0
    for number, document in enumerate(documents):
        first, left = 0, len(document.tokens) - 1  # the last token is told, and read by nobody
        if whole:
            left = min(left, steps)
        if at and (not shared or (whole and at + left > steps)):
            row, at = row + 1, 0
        while left > 0:
            count = min(left, steps - at)
            found.append(Piece(number, first, count, row, at))
            first, left, at = first + count, left - count, at + count
            if at == steps:
                row, at = row + 1, 0
    return found, row + (at > 0)


def _of_text(rows: list[dict[str, Any]], tokenizer: Any, end: int) -> list[Document]:
    encoded = tokenizer.encode_batch_fast([row["text"] for row in rows], add_special_tokens=False)
    return [
        Document(np.array([*found.ids, end], np.int32), group=group)
        for found, group in zip(encoded, _numbered(rows), strict=True)
    ]


def _of_prompts(
    rows: list[dict[str, Any]], tokenizer: Any, end: int, name: str, ref: DataRef
) -> list[Document]:
    parts = [
        tokenizer.encode_batch_fast([row[key] for row in rows], add_special_tokens=False)
        for key in PARTS
    ]
    found = []
    for number, (prompt, completion, group) in enumerate(zip(*parts, _numbered(rows), strict=True)):
        if not completion.ids:
            raise DataError(
                f"{name}: row {number} has an empty completion, which teaches nothing; drop it"
            )
        if not prompt.ids:
            raise DataError(
                f"{name}: row {number} has an empty prompt; name the column as data.columns.text instead"
            )
        if len(prompt.ids) > ref.window:
            raise DataError(
                f"{name}: the prompt of row {number} has {len(prompt.ids)} tokens, and a row {ref.window}: "
                "raise data.window, or shorten it"
            )
        tokens = np.array([*prompt.ids, *completion.ids, end], np.int32)
        found.append(Document(tokens, told=len(prompt.ids), group=group))
    return found


def _numbered(rows: list[dict[str, Any]]) -> list[int]:
    """A number for each group; records without one are groups of their own."""
    known: dict[Any, int] = {}
    groups = [
        ("row", i) if row.get("group") is None else row["group"] for i, row in enumerate(rows)
    ]
    return [known.setdefault(group, len(known)) for group in groups]
