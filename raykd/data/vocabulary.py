"""Whether two tokenisers give each token the same id, as a teacher and its student must.

Tables of equal size may be permuted, so their content is compared. A table that is a prefix of
another is sound: the columns beyond it are padding, or tokens that only one side knows, and stay
outside the softmax.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice

from raykd.errors import DataError

Table = Mapping[str, int] | Sequence[str]


def tokens_by_id(table: Table) -> list[str | None]:
    """The token of each id from 0; None where an id has no token.

    DataError where two tokens have one id.
    """
    if not isinstance(table, Mapping):
        return list(table)
    tokens: list[str | None] = [None] * (max(table.values(), default=-1) + 1)
    for token, number in table.items():
        if number < 0 or tokens[number] is not None:
            raise DataError(
                f"token id {number} stands for {token!r} and for {tokens[number]!r}: "
                "not a tokeniser's table"
            )
        tokens[number] = token
    return tokens


def table_digest(table: Table, size: int | None = None) -> str:
    """sha256 of the first `size` (default: all) tokens in the order of their ids."""
    tokens = tokens_by_id(table)
    return hashlib.sha256(json.dumps(tokens[:size]).encode()).hexdigest()


def shared_tokens(teacher: Table, student: Table) -> int:
    """The size of the smaller table, whose ids must mean the same tokens on both sides.

    It is the `vocab` of the losses: columns beyond it are padding on at least one side. DataError
    names the first ids that differ.
    """
    ours = tokens_by_id(teacher)
    theirs = tokens_by_id(student)
    size = min(len(ours), len(theirs))
    differ = (i for i in range(size) if ours[i] != theirs[i])
    first = [
        f"id {i} is {ours[i]!r} to the teacher and {theirs[i]!r} to the student"
        for i in islice(differ, 3)
    ]
    if first:
        raise DataError(
            f"teacher ({len(ours)} tokens) and student ({len(theirs)}) have different tokenisers: "
            f"{'; '.join(first)}. Give the student the teacher's tokeniser"
        )
    return size


def check_digest(digest: str, size: int, student: Table) -> int:
    """`size`, if the student's first `size` tokens have the digest of a stored teacher's table.

    DataError otherwise: of a stored teacher only the digest and the size are known.
    """
    tokens = tokens_by_id(student)
    if len(tokens) < size:
        raise DataError(
            f"the stored teacher's tokeniser has {size} tokens, the student's {len(tokens)}: a "
            "digest does not show whether they agree; give the student the teacher's tokeniser"
        )
    if table_digest(tokens[:size]) != digest:  # type: ignore[arg-type]
        raise DataError(
            f"the first {size} tokens of the student's tokeniser are not those of the stored "
            "teacher's: equal in number, different in meaning; give the student the teacher's "
            "tokeniser"
        )
    return size
