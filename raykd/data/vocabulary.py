"""Whether two tokenisers mean the same by a number: a teacher's classes are the student's only if
they do.

Tables of equal size may be permuted, and nothing but their content tells. A table that is a prefix
of another is sound: the columns beyond it are padding, or tokens that only one side knows, and stay
outside the softmax.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice

from raykd.errors import DataError

Table = Mapping[str, int] | Sequence[str]


def tokens_by_id(table: Table) -> list[str | None]:
    """The token of each id from 0; None where an id has none.

    DataError where two tokens have one id.
    """
    if not isinstance(table, Mapping):
        return list(table)
    out: list[str | None] = [None] * (max(table.values(), default=-1) + 1)
    for token, number in table.items():
        if number < 0 or out[number] is not None:
            raise DataError(
                f"token id {number} stands for {token!r} and for {out[number]!r}: not a tokeniser's table"
            )
        out[number] = token
    return out


def table_digest(table: Table, size: int | None = None) -> str:
    """sha256 of the first `size` (default: all) tokens in the order of their ids."""
    tokens = tokens_by_id(table)
    return hashlib.sha256(json.dumps(tokens[:size]).encode()).hexdigest()


def shared_tokens(teacher: Table, student: Table) -> int:
    """How many ids, from 0, mean the same on both sides: the smaller table's number. DataError
    names those that differ.

    It is the `vocab` of the losses: columns beyond it are padding on at least one side.
    """
    ours, theirs = tokens_by_id(teacher), tokens_by_id(student)
    size = min(len(ours), len(theirs))
    differ = (i for i in range(size) if ours[i] != theirs[i])
    first = [
        f"id {i} is {ours[i]!r} to the teacher and {theirs[i]!r} to the student"
        for i in islice(differ, 3)
    ]
    if first:
        raise DataError(
            f"teacher ({len(ours)} tokens) and student ({len(theirs)}) have different tokenisers: {'; '.join(first)}. "
            "Give the student the teacher's tokeniser"
        )
    return size


def check_digest(digest: str, size: int, student: Table) -> int:
    """The same against a stored teacher's table of which only its digest and size are known:

    `size`, or DataError.
    """
    tokens = tokens_by_id(student)
    if len(tokens) < size:
        raise DataError(
            f"the stored teacher's tokeniser has {size} tokens, the student's {len(tokens)}: whether they agree can "
            "not be told from a digest; give the student the teacher's tokeniser"
        )
    if table_digest(tokens[:size]) != digest:  # type: ignore[arg-type]
        raise DataError(
            f"the first {size} tokens of the student's tokeniser are not those of the stored teacher's: equal in "
            "number, different in meaning; give the student the teacher's tokeniser"
        )
    return size
