"""Text that every Python brings along: the standard library's own files without tests, as tokens of
a byte-level BPE.

The files differ between Python versions, so the digest of what was read is printed with every
figure.
"""

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from raykd.errors import RecipeError
from raykd.files.atomic import write_bytes

PACKAGES = (
    *(
        "asyncio",
        "collections",
        "concurrent",
        "ctypes",
        "curses",
        "dbm",
        "email",
        "encodings",
        "ensurepip",
        "html",
    ),
    *(
        "http",
        "idlelib",
        "importlib",
        "json",
        "logging",
        "multiprocessing",
        "pydoc_data",
        "re",
        "sqlite3",
        "tkinter",
    ),
    *(
        "tomllib",
        "turtledemo",
        "unittest",
        "urllib",
        "venv",
        "wsgiref",
        "xml",
        "xmlrpc",
        "zoneinfo",
    ),
)  # and every module that is one file
TESTS = {"test", "tests", "idle_test"}
PUBLISHED = ("3.11.7", "e76df2fed108f1f7")  # the version and digest of README's figures
VOCAB = 8192
STEPS = 128
CONTEXT = 2  # tokens before a row that an n-gram sees


@dataclass(frozen=True)
class Corpus:
    """Tokens for the teacher, and rows (R, CONTEXT + STEPS + 1) from other files: to distil on, to
    be judged by.
    """

    described: str
    digest: str
    train: NDArray[np.int64]
    distil: NDArray[np.int64]
    held: NDArray[np.int64]


def load(out: Path, *, rows: int, held: int) -> Corpus:
    """The corpus with `rows` rows to distil on and `held` to judge by, tokenised once into the
    folder `out`.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = {path.relative_to(root).as_posix(): path.read_bytes() for path in _files(root)}
    digest = hashlib.sha256(
        b"".join(name.encode() + b"\0" + text for name, text in texts.items())
    ).hexdigest()
    size = sum(map(len, texts.values()))
    version = platform.python_version()
    same = "the text" if digest.startswith(PUBLISHED[1]) else "not the text"
    described = (
        f"corpus: Python {version} standard library without tests, {len(texts)} files, {size} "
        "bytes, "
        f"sha256 {digest[:16]}, {same} of the published figures (Python {PUBLISHED[0]}'s, "
        f"{PUBLISHED[1]})"
    )
    path = out / f"tokens-{digest[:16]}-{VOCAB}.safetensors"
    if not path.exists():
        write_bytes(path, save(_tokens(texts)))
    tokens = load_file(path)
    parts = [
        tokens["train"].astype(np.int64),
        _rows(tokens["distil"], rows),
        _rows(tokens["held"], held),
    ]
    return Corpus(described, digest[:16], *parts)


def _files(root: Path) -> Iterator[Path]:
    modules = [path for path in root.glob("*.py") if not path.name.startswith("_sysconfigdata")]
    inside = [path for name in PACKAGES for path in (root / name).rglob("*.py")]
    yield from sorted(
        path for path in modules + inside if not TESTS & set(path.relative_to(root).parts)
    )


def _tokens(texts: dict[str, bytes]) -> dict[str, NDArray[np.uint16]]:
    """Every file's tokens; a file belongs whole to one part, told by its name's digest."""
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        raise RecipeError(
            "this bench needs the tokenizers library: pip install 'raykd[lm]'"
        ) from None

    files = {name: text.decode("utf-8", "replace") for name, text in texts.items()}
    parts: dict[str, list[str]] = {"train": [], "distil": [], "held": []}
    for name in files:
        bucket = hashlib.sha256(name.encode()).digest()[0] % 20
        parts["held" if bucket == 0 else "distil" if bucket < 3 else "train"].append(name)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([files[n] for n in parts["train"]], VOCAB, show_progress=False)
    encoded = {k: bpe.encode_batch([files[n] for n in v]) for k, v in parts.items()}
    return {k: np.concatenate([np.array(e.ids, np.uint16) for e in v]) for k, v in encoded.items()}


def _rows(tokens: NDArray[np.uint16], count: int) -> NDArray[np.int64]:
    """(count, CONTEXT + STEPS + 1): windows spread evenly over the tokens."""
    width = CONTEXT + STEPS + 1
    first = np.linspace(0, len(tokens) - width, count).astype(np.int64)
    return tokens[first[:, None] + np.arange(width)].astype(np.int64)
