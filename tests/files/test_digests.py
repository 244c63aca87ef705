"""Laws of a file's digest that is computed on all cores: the pieces of the file are told apart, and
the number of cores is not.
"""

import hashlib

import pytest

from raykd.files import digests
from raykd.files.digests import file_blake2b

SIZES = (0, 1, 9, 10, 11, 20, 35)
PIECE = 10


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cores", [1, 3])
def test_it_is_the_digest_of_its_pieces_digests(tmp_path, monkeypatch, size, cores):
    monkeypatch.setattr(digests.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(digests, "READ", 4)
    data = bytes(range(size))
    path = tmp_path / "file"
    path.write_bytes(data)
    pieces = [data[first : first + PIECE] for first in range(0, max(size, 1), PIECE)]
    told = b"".join(hashlib.blake2b(piece, digest_size=32).digest() for piece in pieces)
    assert file_blake2b(path, PIECE) == hashlib.blake2b(told, digest_size=32).hexdigest()


def test_a_byte_that_differs_anywhere_is_seen(tmp_path):
    path = tmp_path / "file"
    found = set()
    for changed in range(-1, 35):
        data = bytearray(35)
        if changed >= 0:
            data[changed] = 1
        path.write_bytes(data)
        found.add(file_blake2b(path, PIECE))
    assert len(found) == 36
