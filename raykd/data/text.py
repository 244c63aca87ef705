"""Text as rows of tokens: documents, or prompts and their completions, in rows of `window` steps.

A training row holds as many documents as fit, and a model reads each as if it were alone. A
document longer than a row continues in the next one, without what came before. A row of the other
splits holds one document or a part of one, so rows of different documents are independent.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.data import labels
from raykd.data.blocks import check_unfit
from raykd.data.column_names import PROMPTS
from raykd.data.rows import SPLITS, Dataset, Rows, Unfit
from raykd.errors import DataError, RecipeError
from raykd.files.reading import MOST_JSON, json_of, read_bounded
from raykd.recipe.tables import DataRef
from raykd.recipe.validation import suggestion
from raykd.targets import UNLABELLED

MOST_TOKENS = 10_000_000


@dataclass(frozen=True)
class Document:
    """The tokens of a document, with the end-of-text token last.

    Tokens from `first_label` on are labels, each predicted from all tokens before it.
    """

    tokens: NDArray[np.int32]
    first_label: int = 1
    group: int = 0


@dataclass(frozen=True)
class Piece:
    """Where a part of a document lies: `count` steps of `row` from step `at` on.

    The first of these steps reads the document's token number `first`.
    """

    document: int
    first: int
    count: int
    row: int
    at: int


def load(records: Iterable[dict[str, Any]], name: str, ref: DataRef) -> Dataset:
    """The data set of records {split, group, text} or {split, group, prompt, completion}.

    `data.tokenizer` turns them into tokens. A record without a completion, or with a prompt that
    fills the window, is unfit, of which DataError names the first where there are too many.
    """
    rows = list(records)
    split = np.array(split_names([row["split"] for row in rows], name, ref))
    check_texts(rows, name)
    tokenizer = read_tokenizer(ref)
    found = documents(rows, _numbered(rows), tokenizer, ref)
    unfit = [document for document in found if isinstance(document, Unfit)]
    check_unfit(unfit, len(rows), ref.max_unfit, name)
    fitting = [document for document in found if isinstance(document, Document)]
    has_prompts = _have_prompts(rows)
    cut = sum(len(document.tokens) - 1 > ref.window for document in fitting)
    name = cut_name(name, cut if has_prompts else 0)
    split = split[np.array([isinstance(document, Document) for document in found], bool)]
    splits = {}
    count = 0
    for part in SPLITS:
        of_split = [fitting[number] for number in np.flatnonzero(split == part)]
        splits[part] = laid_out(
            of_split, ref.window, shared=part == "train", whole=has_prompts, first_id=count
        )
        count += len(splits[part])
    return Dataset(name, tokens_of(tokenizer), splits, unfit=tuple(unfit))


def documents(
    rows: Sequence[dict[str, Any]],
    groups: Sequence[int],
    tokenizer: Any,
    ref: DataRef,
    first: int = 0,
) -> list[Document | Unfit]:
    """A document of each record of texts, in the group given, or why it teaches nothing.

    The first record has the number `first`.
    """
    end = _end_of_text(tokenizer, ref)
    if _have_prompts(rows):
        return _of_prompts(rows, groups, tokenizer, end, ref.window, first)
    return list(_of_text(rows, groups, tokenizer, end))


def check_texts(rows: Sequence[dict[str, Any]], name: str, first: int = 0) -> None:
    """DataError names a record that holds no text; the first has the number `first`."""
    for key in PROMPTS if _have_prompts(rows) else ("text",):
        for number, row in enumerate(rows, first):
            check_text(row[key], f"{name}: {key} of row {number}")


def _have_prompts(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether records are prompts and completions."""
    return bool(rows) and "prompt" in rows[0]


def cut_name(name: str, cut: int) -> str:
    """The name of a data set of which so many completions were cut to the window."""
    return f"{name}, {cut} completions cut" if cut else name


def split_names(values: Sequence[Any], name: str, ref: DataRef) -> list[str]:
    """The split of each value. DataError if one is none."""
    split = [
        value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        for value in values
    ]
    if unknown := sorted(set(split) - set(SPLITS)):
        raise DataError(
            f"{name}: column {ref.columns.split!r} holds {unknown[:5]}; write train, val or test"
        )
    return split


def group_keys(values: Iterable[Any]) -> list[tuple[str, str] | None]:
    """What tells each group from others: its text and its type; None for null and NaN."""
    return [
        None if value is None or value != value else (str(value), type(value).__name__)
        for value in values
    ]


def check_text(value: Any, what: str) -> None:
    """DataError unless a value is text that can be written."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {value!r}, not text; mend or drop it")
    if not labels.is_unicode(value):
        raise DataError(f"{what} holds half of a surrogate pair, which is no text; mend or drop it")


def _end_of_text(tokenizer: Any, ref: DataRef) -> int:
    end = tokenizer.token_to_id(ref.end)
    if end is None:
        known = [token for token in tokenizer.get_vocab() if token.startswith("<")]
        raise RecipeError(
            f"data.end: the tokeniser has no token {ref.end!r}.{suggestion(ref.end, known)}"
        )
    return end


def read_tokenizer(ref: DataRef) -> Any:
    """The tokeniser of `data.tokenizer`. RecipeError if the file or the library is missing."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise RecipeError(
            "data.tokenizer needs the tokenizers library: pip install 'raykd[lm]'"
        ) from None
    try:
        content = read_bounded(Path(str(ref.tokenizer)), MOST_JSON)
        json_of(content)
        tokenizer = Tokenizer.from_buffer(content)
        _check_ids(tokenizer)
    except BaseException as error:  # the library raises nothing more specific, or panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise RecipeError(
            f"data.tokenizer {ref.tokenizer}: not a tokenizer.json: {error}"
        ) from None
    tokenizer.encode_special_tokens = True  # a text that spells one is read as its letters
    tokenizer.no_truncation()  # some files ask for both; rows are cut and padded here
    tokenizer.no_padding()
    return tokenizer


def _check_ids(tokenizer: Any) -> None:
    """ValueError where the ids of a tokeniser need a table beyond all reason."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= highest < MOST_TOKENS:
        raise ValueError(f"its highest id is {highest:,}, and {MOST_TOKENS - 1:,} is the most")


def tokens_of(tokenizer: Any) -> tuple[str, ...]:
    """The tokens by id; an id without a token has an empty name."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    return tuple(names.get(i, "") for i in range(max(names) + 1))


def laid_out(
    documents: Sequence[Document], steps: int, *, shared: bool, whole: bool, first_id: int
) -> Rows:
    """Rows of `steps` steps that hold the documents in their order.

    With `shared`, a row holds several. With `whole`, a document is shortened to one row instead of
    being continued in the next. `first_id` is the first row's id.
    """
    pieces, count = _pieces(documents, steps, shared=shared, whole=whole)
    inputs = np.zeros((count, steps, 2), np.int32)
    label = np.full((count, steps), UNLABELLED, np.int64)
    mask = np.zeros((count, steps), bool)
    group = np.zeros(count, np.int64)
    for piece in pieces:
        document = documents[piece.document]
        end = piece.first + piece.count
        at = slice(piece.at, piece.at + piece.count)
        inputs[piece.row, at, 0] = document.tokens[piece.first : end]
        inputs[piece.row, at, 1] = np.arange(piece.count)
        skipped = min(max(document.first_label - 1 - piece.first, 0), piece.count)
        labelled = slice(piece.at + skipped, piece.at + piece.count)
        label[piece.row, labelled] = document.tokens[piece.first + skipped + 1 : end + 1]
        mask[piece.row, labelled] = True
        group[piece.row] = document.group
    return Rows(
        row_id=np.arange(first_id, first_id + count),
        inputs=inputs,
        mask=mask,
        label=label,
        group=group,
    )


def _pieces(
    documents: Sequence[Document], steps: int, *, shared: bool, whole: bool
) -> tuple[list[Piece], int]:
    """(where every part of the documents lies, how many rows they fill)."""
    pieces: list[Piece] = []
    row = 0
    at = 0
    for number, document in enumerate(documents):
        first = 0
        left = len(document.tokens) - 1  # the last token is a label only; no step reads it
        if whole:
            left = min(left, steps)
        if at and (not shared or (whole and at + left > steps)):
            row += 1
            at = 0
        while left > 0:
            count = min(left, steps - at)
            pieces.append(Piece(document=number, first=first, count=count, row=row, at=at))
            first += count
            left -= count
            at += count
            if at == steps:
                row += 1
                at = 0
    return pieces, row + (at > 0)


def _encoded(rows: Sequence[dict[str, Any]], key: str, tokenizer: Any) -> list[list[int]]:
    """The token ids of one text of each row."""
    texts = [row[key] for row in rows]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _of_text(
    rows: Sequence[dict[str, Any]], groups: Sequence[int], tokenizer: Any, end: int
) -> list[Document]:
    """A document of each row's text."""
    ids = _encoded(rows, "text", tokenizer)
    return [
        Document(np.array([*tokens, end], np.int32), group=group)
        for tokens, group in zip(ids, groups, strict=True)
    ]


def _of_prompts(
    rows: Sequence[dict[str, Any]],
    groups: Sequence[int],
    tokenizer: Any,
    end: int,
    window: int,
    first: int,
) -> list[Document | Unfit]:
    """A document of each row's prompt and completion, whose labels begin with the completion.

    A row that teaches nothing is unfit.
    """
    prompts, completions = (_encoded(rows, key, tokenizer) for key in PROMPTS)
    found: list[Document | Unfit] = []
    for number, group in enumerate(groups):
        prompt = prompts[number]
        completion = completions[number]
        why = ""
        if not completion:
            why = "has an empty completion"
        elif not prompt:
            why = "has an empty prompt (data.columns.text names a column of whole documents)"
        elif len(prompt) > window:
            why = f"has a prompt of {len(prompt)} tokens (raise data.window, which is {window})"
        if why:
            found.append(Unfit(first + number, why))
            continue
        tokens = np.array([*prompt, *completion, end], np.int32)
        found.append(Document(tokens, first_label=len(prompt), group=group))
    return found


def _numbered(rows: list[dict[str, Any]]) -> list[int]:
    """A number for each group by first appearance; a record without a group is its own."""
    numbers: dict[Any, int] = {}
    keys = group_keys(row.get("group") for row in rows)
    return [
        numbers.setdefault(i if key is None else key, len(numbers)) for i, key in enumerate(keys)
    ]
