"""A comb's classes and counts in the fewest bytes: numbered by frequency, those drawn once apart
from the others.

For each place the classes drawn several times, then those drawn once; each of the two runs rises in
a numbering where the shard's frequent classes come first, the most frequent as 0, and all others
follow in their own order. A run is kept as gaps of one byte, larger ones with one byte or two more.
Five streams:

    counts                 per place the counts above 1, then a 1; what is left of `points` was
    drawn once many, once             the gaps' first bytes many_more, once_more   their further
    bytes

The name of this layout carries the frequent classes, because a shard's rows are read in any slices.
The order within a place is lost, and decoding sorts it back: the result is that of any other
layout, to the bit.
"""

import base64
import binascii
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raykd.errors import StoreError
from raykd.store.codecs.layout import Bytes, Ints, Layout, Stream, check_sizes, id_bytes, sums

STREAMS = ["counts", "many", "many_more", "once", "once_more"]
PREFIX = "ranked:"
FREQUENT, MOST = 48, 4096  # occurrences in a shard that pay for naming a class; classes named
ONE, TWO = 192, 224  # the first bytes from which on one more byte, or two, follow
LONG = ONE + (TWO - ONE << 8)  # the smallest gap that takes two
LARGEST = LONG + (256 - TWO << 16)  # classes that gaps can tell apart
BASE = np.concatenate(
    [np.arange(ONE), ONE + (np.arange(TWO - ONE) << 8), LONG + (np.arange(256 - TWO) << 16)],
    dtype=np.int32,
)  # of each first byte: its smallest gap
WIDTH = (np.arange(256) >= ONE).astype(np.uint8) + (np.arange(256) >= TWO)


class Entries(NamedTuple):
    """A column's classes and counts (M,), where places start (P + 1,), and how many entries rows
    have (R,).
    """

    ids: Ints
    counts: Bytes
    start: Ints
    entries: Ints


def put(found: Entries, steps: Ints, vocab: int) -> tuple[dict[str, Stream], Layout]:
    """The streams of a shard's entries, and the name of their layout.

    `vocab` is LARGEST at most.
    """
    ids, counts, start, _ = found
    seen = np.bincount(ids, minlength=vocab)
    common = np.argsort(-seen, kind="stable")[:MOST]
    common = common[seen[common] >= FREQUENT]
    rank = np.empty(vocab, np.int64)
    rank[_numbering(common, vocab)] = np.arange(vocab) << 8
    key = rank.take(ids)
    key |= np.repeat(np.arange(len(start) - 1) << 32, np.diff(start))
    key |= counts
    key.sort()
    count = key.astype(np.uint8)
    several = sums(counts > 1, np.diff(start))
    streams = {"counts": Stream(_ended(count[count > 1], several), sums(several + 1, steps))}
    for name, here, size in (
        ("many", count > 1, several),
        ("once", count == 1, np.diff(start) - several),
    ):
        first, more = _gaps(key[here] >> 8 & 0xFFFFFF, size)
        entries = sums(size, steps)
        streams[name] = Stream(first, entries)
        streams[f"{name}_more"] = Stream(more, sums(WIDTH[first], entries))
    width = id_bytes(vocab)
    named = np.ascontiguousarray(common.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width])
    return streams, PREFIX + base64.b85encode(named.tobytes()).decode()


def take(
    streams: dict[str, Stream], steps: Ints, vocab: int, points: int, laid_out: Layout
) -> Entries:
    """The inverse of `put`. StoreError for damaged bytes."""
    counts, length = streams["counts"]
    last = np.flatnonzero(counts == 1)
    if len(steps) != len(length) or not np.array_equal(_within(last, length), steps):
        raise StoreError("a comb's counts do not end once a step: the column is damaged")
    several = np.diff(last, prepend=-1) - 1
    single = points + 1 - np.diff(np.cumsum(counts, dtype=np.int64)[last], prepend=0)
    if (len(last) and last[-1] + 1 != len(counts)) or (counts == 0).any() or (single < 0).any():
        raise StoreError(f"a comb's counts exceed {points} a step: the column is damaged")
    check_sizes(streams, {"many": sums(several, steps), "once": sums(single, steps)})
    number = np.concatenate([_numbers(streams, "many", several), _numbers(streams, "once", single)])
    if len(number) and not 0 <= number.min() <= number.max() < vocab:
        raise StoreError(f"stored class ids leave 0 to {vocab - 1}: the column is damaged")
    key = (_numbering(_named(laid_out, vocab), vocab) << 8).take(number)
    place = np.arange(len(several)) << 32
    key |= np.repeat(np.concatenate([place, place]), np.concatenate([several, single]))
    above = counts[counts > 1]
    key[: len(above)] |= above
    key[len(above) :] |= 1
    return _sorted(key, several + single, steps)


def _sorted(key: Ints, each: Ints, steps: Ints) -> Entries:
    """The entries of keys place << 32 | id << 8 | count in any order, `each` (P,) of a place."""
    key.sort()
    count = key.astype(np.uint8)
    key >>= 8
    if (key[1:] == key[:-1]).any():
        raise StoreError("a stored class comes twice in one place: the column is damaged")
    key &= 0xFFFFFF
    return Entries(key, count, np.concatenate([[0], np.cumsum(each)]), sums(each, steps))


def _ended(count: Bytes, several: Ints) -> Bytes:
    """Each place's `several` (P,) counts, and a 1 after them."""
    data = np.ones(len(count) + len(several), np.uint8)
    inner = np.ones(len(data), bool)
    inner[np.cumsum(several + 1) - 1] = False
    data[inner] = count
    return data


def _gaps(number: Ints, size: Ints) -> tuple[Bytes, Bytes]:
    """First bytes (M,) and further bytes of numbers (M,) that rise in runs of `size` (P,)."""
    begins = (np.cumsum(size) - size)[size > 0]
    gap = np.diff(number, prepend=-1) - 1
    gap[begins] = number[begins]
    long, longer = np.flatnonzero(gap >= ONE), np.flatnonzero(gap >= LONG)
    first = gap.astype(np.uint8)
    first[long] = ONE + (gap[long] - ONE >> 8)
    first[longer] = TWO + (gap[longer] - LONG >> 16)
    more = (gap[long] - BASE[first[long]]).astype("<u2").view(np.uint8).reshape(-1, 2)
    return first, more[WIDTH[first[long]][:, None] > np.arange(2)]


def _numbers(streams: dict[str, Stream], name: str, size: Ints) -> NDArray[np.int32]:
    """(M,): the numbers of one stream's runs of `size` (P,), modulo 2^32."""
    (first, length), more = streams[name], streams[f"{name}_more"]
    long, longer = np.flatnonzero(first >= ONE), np.flatnonzero(first >= TWO)
    check_sizes(
        {f"{name}_more": more}, {f"{name}_more": _within(long, length) + _within(longer, length)}
    )
    total = np.concatenate([[-1], first], dtype=np.int32)
    at = np.arange(len(long)) + np.searchsorted(longer, long)
    total[long + 1] = BASE[first[long]] + more.data[at]
    if len(longer):
        total[longer + 1] += more.data[at[np.searchsorted(long, longer)] + 1].astype(np.int32) << 8
    total[1:] += 1
    np.cumsum(
        total, dtype=np.int32, out=total
    )  # it may pass 2^31: no run does, and runs are differences
    number = total[1:]
    number -= np.repeat(total[np.cumsum(size) - size] + np.int32(1), size)
    return number


def _within(at: Ints, length: Ints) -> Ints:
    """(R,): how many of the rising places `at` lie in each row of `length` (R,)."""
    return np.diff(np.searchsorted(at, np.cumsum(length)), prepend=0)


def _numbering(common: NDArray[np.integer], vocab: int) -> Ints:
    """(V,): the class of each number."""
    others = np.ones(vocab, bool)
    others[common] = False
    return np.concatenate([common, np.flatnonzero(others)], dtype=np.int64)


def _named(laid_out: Layout, vocab: int) -> Ints:
    """The classes that a layout's name carries."""
    width = id_bytes(vocab)
    try:
        data = np.frombuffer(base64.b85decode(laid_out.removeprefix(PREFIX)), np.uint8).reshape(
            -1, width
        )
    except (ValueError, binascii.Error):
        raise StoreError("the frequent classes of a shard's layout are not readable") from None
    ids = (data.astype(np.int64) << 8 * np.arange(width)).sum(1)
    if len(ids) and (ids.max() >= vocab or len(np.unique(ids)) < len(ids)):
        raise StoreError(
            f"the frequent classes of a shard's layout are not distinct ones of {vocab}"
        )
    return ids
