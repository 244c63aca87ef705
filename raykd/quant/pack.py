"""Codes as bytes: low bits first, as MatMulNBits reads them, and five trits a byte for storage."""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
TRITS = 5  # 3^5 = 243 values of a byte
POWERS = 3 ** np.arange(TRITS)


def pack(codes: NDArray[np.int8], bits: int) -> Bytes:
    """(..., K bits / 8): codes (..., K) of -2^(bits - 1)..2^(bits - 1) - 1, plus 2^(bits - 1).

    The first code is in the lowest bits of the first byte. K must fill whole bytes.
    """
    count = 8 // bits  # codes of a byte
    shifted = (codes.astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    of_bytes = shifted.reshape(*codes.shape[:-1], -1, count)
    in_place = of_bytes << (bits * np.arange(count, dtype=np.uint8))
    return np.bitwise_or.reduce(in_place, axis=-1).astype(np.uint8)


def unpack(packed: Bytes, bits: int) -> NDArray[np.int8]:
    """The inverse of `pack`."""
    count = 8 // bits
    shifted = packed[..., None] >> (bits * np.arange(count, dtype=np.uint8)) & ((1 << bits) - 1)
    codes = (shifted.astype(np.int16) - (1 << bits - 1)).astype(np.int8)
    return codes.reshape(*packed.shape[:-1], -1)


def pack_trits(codes: NDArray[np.int8]) -> Bytes:
    """(ceil(K / 5),): ternary codes (K,) in base 3, 1.6 bits each, the first the lowest digit."""
    padded = np.zeros(-(-len(codes) // TRITS) * TRITS, np.int64)
    padded[: len(codes)] = codes + 1
    return (padded.reshape(-1, TRITS) * POWERS).sum(1).astype(np.uint8)


def unpack_trits(packed: Bytes, count: int) -> NDArray[np.int8]:
    """(count,): the inverse of `pack_trits`.

    ValueError for too few bytes, and for one that is no five trits.
    """
    if len(packed) != -(-count // TRITS) or (packed >= 3**TRITS).any():
        raise ValueError(f"{len(packed)} bytes do not hold {count} trits")
    return (packed[:, None] // POWERS % 3 - 1).astype(np.int8).reshape(-1)[:count]
