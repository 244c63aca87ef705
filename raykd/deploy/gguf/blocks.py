"""Codes and scales as llama.cpp's blocks of weights: the same codes, their scales as float16.

TQ2_0   256 ternary codes, four a byte, then the scale: 66 bytes
TQ1_0   256 ternary codes, five a byte (the last 16 four a byte), then the scale: 54 bytes
Q4_0    the scale, then 32 codes of -8..7, code i beside code i + 16: 18 bytes
Q8_0    the scale, then 32 codes of -127..127: 34 bytes
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.errors import RecipeError

SIZES = {"TQ2_0": 256, "TQ1_0": 256, "Q4_0": 32, "Q8_0": 32}
LEAST = 2.0**-14  # from here down float16 has fewer digits

Bytes = NDArray[np.uint8]


def blocks(kind: str, codes: NDArray[np.int8], scales: NDArray[np.float32], name: str) -> Bytes:
    """(N, bytes of a row): codes (N, K) under scales (N, G), each of K / G neighbours.

    RecipeError if K or K / G is no multiple of the type's block, or a scale is outside float16;
    `name` is the layer's.
    """
    size = SIZES[kind]
    rows, width = codes.shape
    group = width // scales.shape[1]
    check(kind, width, group, name)
    of_blocks = codes.reshape(rows, width // size, size)
    scale = np.repeat(scales, group // size, 1)[..., None]
    used = scale[(of_blocks != 0).any(-1)]
    if used.size and not (used.min() >= LEAST and used.max() <= np.finfo(np.float16).max):
        raise RecipeError(
            f"{name}: scales from {used.min():.3g} to {used.max():.3g}, and GGUF's float16 holds "
            f"{LEAST:.3g} to 65504; train weights of a common size: other settings of optim, "
            "or of the model's first weights"
        )
    tail = scale.astype(np.float16).view(np.uint8)
    packed = PACKED[kind](of_blocks)
    order = [packed, tail] if kind in ("TQ2_0", "TQ1_0") else [tail, packed]
    return np.concatenate(order, -1).reshape(rows, -1)


def check(kind: str, width: int, group: int, name: str) -> None:
    """RecipeError if a type cannot hold rows of this width with a scale for `group` neighbours.

    `name` is the layer's.
    """
    size = SIZES[kind]
    if width % size:
        raise RecipeError(
            f"{name}: {kind} takes rows of a multiple of {size}, found {width}; "
            f"build the student with width and inner that {size} divides"
        )
    if group % size:
        raise RecipeError(
            f"{name}: quant.group: {kind} has a scale for {size} neighbours, found {group}; "
            f'write per = "channel" or "tensor"{f", or group = {size}" if size == 32 else ""}'
        )


def _two_bits(codes: NDArray[np.int8]) -> Bytes:
    """(..., 64): of 128 codes, byte i holds i, i + 32, i + 64, i + 96, from the lowest bits up."""
    trits = (codes + 1).astype(np.uint8).reshape(*codes.shape[:-1], 2, 4, 32)
    shifted = trits << np.array([[0], [2], [4], [6]], np.uint8)
    return np.bitwise_or.reduce(shifted, axis=-2).reshape(*codes.shape[:-1], -1)


def _trits(codes: NDArray[np.int8]) -> Bytes:
    """(..., 52): trits (t0, t1, ...) as the fraction t0 / 3 + t1 / 9 + ... of 256, rounded up.

    Of 160 codes byte i holds i, i + 32, ...; of the next 80 i, i + 16, ...; of the last 16 i, i +
    4, i + 8, i + 12.
    """
    trits = (codes + 1).astype(np.uint16)
    sums = []
    for first, last, apart in ((0, 160, 32), (160, 240, 16), (240, 256, 4)):
        digits = trits[..., first:last].reshape(*codes.shape[:-1], -1, apart)
        power = 3 ** np.arange(4, 4 - digits.shape[-2], -1, dtype=np.uint16)[:, None]
        sums.append((digits * power).sum(-2, dtype=np.uint16))
    return ((np.concatenate(sums, -1) * 256 + 242) // 243).astype(np.uint8)


def _nibbles(codes: NDArray[np.int8]) -> Bytes:
    shifted = (codes + 8).astype(np.uint8)
    return shifted[..., :16] | shifted[..., 16:] << np.uint8(4)


def _bytes(codes: NDArray[np.int8]) -> Bytes:
    return codes.view(np.uint8)


PACKED: dict[str, Any] = {"TQ2_0": _two_bits, "TQ1_0": _trits, "Q4_0": _nibbles, "Q8_0": _bytes}
