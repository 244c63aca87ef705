"""A comb's classes and counts in the fewest bytes: classes are numbered by frequency.

Each place has two runs: the classes drawn several times, then those drawn once. Each run rises in
a numbering where the shard's frequent classes come first, the most frequent as 0, and all others
follow in the order of their ids. A run is stored as gaps: one byte each, larger gaps with one or
two bytes more. There are five streams:

    counts                  of each place the counts above 1, then a 1
    many, once              the first bytes of the gaps of each run
    many_more, once_more    their further bytes

The points that the counts leave of `points` were drawn once. The name of this layout carries the
frequent classes, because a shard's rows are read in any slices. Decoding sorts each place by id:
the result is that of any other layout, to the bit.
"""

import base64
import binascii
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raykd.errors import StoreError
from raykd.store.codecs.layout import Bytes, ByteStream, Ints, Layout, check_sizes, id_bytes, sums

STREAMS = ["counts", "many", "many_more", "once", "once_more"]
PREFIX = "ranked:"
FREQUENT = 48  # occurrences in a shard that pay for naming a class
MOST = 4096  # classes that are named
ONE = 192  # from this first byte on, one more byte follows
TWO = 224  # from this first byte on, two more bytes follow
LONG = ONE + (TWO - ONE << 8)  # the smallest gap that takes two
LARGEST = LONG + (256 - TWO << 16)  # classes that gaps can tell apart
BASE = np.concatenate(
    [np.arange(ONE), ONE + (np.arange(TWO - ONE) << 8), LONG + (np.arange(256 - TWO) << 16)],
    dtype=np.int32,
)  # of each first byte: its smallest gap
WIDTH = (np.arange(256) >= ONE).astype(np.uint8) + (np.arange(256) >= TWO)


class Entries(NamedTuple):
    """A column's entries: a class and its count each, in places, in rows."""

    ids: Ints  # (M,)
    counts: Bytes  # (M,)
    start: Ints  # (P + 1,) where places start
    entries: Ints  # (R,) how many entries each row has


def put(column: Entries, steps: Ints, vocab: int) -> tuple[dict[str, ByteStream], Layout]:
    """(the streams of a shard's entries, the name of their layout); `vocab` is at most LARGEST."""
    ids, counts, start, _ = column
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
    streams = {"counts": ByteStream(_ended(count[count > 1], several), sums(several + 1, steps))}
    runs = {
        "many": (count > 1, several),
        "once": (count == 1, np.diff(start) - several),
    }
    for name, (in_run, size) in runs.items():
        first, more = _gaps(key[in_run] >> 8 & 0xFFFFFF, size)
        entries = sums(size, steps)
        streams[name] = ByteStream(first, entries)
        streams[f"{name}_more"] = ByteStream(more, sums(WIDTH[first], entries))
    width = id_bytes(vocab)
    named = np.ascontiguousarray(common.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width])
    return streams, PREFIX + base64.b85encode(named.tobytes()).decode()


def take(
    streams: dict[str, ByteStream], steps: Ints, vocab: int, points: int, laid_out: Layout
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


def _sorted(key: Ints, size: Ints, steps: Ints) -> Entries:
    """The entries of keys place << 32 | id << 8 | count in any order, `size` (P,) of each place."""
    key.sort()
    count = key.astype(np.uint8)
    key >>= 8
    if (key[1:] == key[:-1]).any():
        raise StoreError("a stored class comes twice in one place: the column is damaged")
    key &= 0xFFFFFF
    start = np.concatenate([[0], np.cumsum(size)])
    return Entries(ids=key, counts=count, start=start, entries=sums(size, steps))


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
    long = np.flatnonzero(gap >= ONE)
    longer = np.flatnonzero(gap >= LONG)
    first = gap.astype(np.uint8)
    first[long] = ONE + (gap[long] - ONE >> 8)
    first[longer] = TWO + (gap[longer] - LONG >> 16)
    more = (gap[long] - BASE[first[long]]).astype("<u2").view(np.uint8).reshape(-1, 2)
    return first, more[WIDTH[first[long]][:, None] > np.arange(2)]


def _numbers(streams: dict[str, ByteStream], name: str, size: Ints) -> NDArray[np.int32]:
    """(M,): the numbers of one stream's runs of `size` (P,), modulo 2^32."""
    first, length = streams[name]
    more = streams[f"{name}_more"]
    long = np.flatnonzero(first >= ONE)
    longer = np.flatnonzero(first >= TWO)
    wanted = _within(long, length) + _within(longer, length)
    check_sizes({f"{name}_more": more}, {f"{name}_more": wanted})
    total = np.concatenate([[-1], first], dtype=np.int32)
    at = np.arange(len(long)) + np.searchsorted(longer, long)
    total[long + 1] = BASE[first[long]] + more.data[at]
    if len(longer):
        total[longer + 1] += more.data[at[np.searchsorted(long, longer)] + 1].astype(np.int32) << 8
    total[1:] += 1
    # the sum may pass 2^31; no run does, and runs are differences
    np.cumsum(total, dtype=np.int32, out=total)
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
        named = base64.b85decode(laid_out.removeprefix(PREFIX))
        data = np.frombuffer(named, np.uint8).reshape(-1, width)
    except (ValueError, binascii.Error):
        raise StoreError("the frequent classes of a shard's layout are not readable") from None
    ids = (data.astype(np.int64) << 8 * np.arange(width)).sum(1)
    if len(ids) and (ids.max() >= vocab or len(np.unique(ids)) < len(ids)):
        raise StoreError(
            f"the frequent classes of a shard's layout are not distinct ones of {vocab}"
        )
    return ids
