"""Fetch the rated sentences of Hutto and Gilbert (ICWSM 2014) from the source package of
vaderSentiment 0.5.

    python examples/valence/make_data.py                             # pip fetches 2.4 MB from the
    index it is set to python examples/valence/make_data.py vaderSentiment-0.5.zip      # or name
    the package, fetched elsewhere

The texts are excerpts of other people's reviews, editorials and tweets. They stay on this machine:
the folder that is written here is ignored by git.
"""

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

VERSION = "vaderSentiment==0.5"
SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
MEMBER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
SOURCES = {
    "reviews": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
}
RATED = 4.0  # ratings go from -4 to 4
FILE = "sentences.parquet"
OUT = Path(__file__).parent / "data"
OPTIONS = ["--no-deps", "--no-binary", ":all:"]
Sentence = tuple[str, int, int, float, str]  # source, document, step, valence in [-1, 1], text


def main() -> None:
    """Read the arguments, write the file, say what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "package", type=Path, nargs="?", help="vaderSentiment-0.5.zip (default: pip fetches it)"
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, help="the folder to write (default: %(default)s)"
    )
    args = parser.parse_args()
    sentences = list(read(args.package.read_bytes() if args.package else fetch()))
    path = write(sentences, args.out)
    for source in SOURCES:
        own = [s for s in sentences if s[0] == source]
        print(f"{source:<11}{len(own)} sentences in {len({s[1] for s in own})} documents")
    print(f"sha256     {hashlib.sha256(path.read_bytes()).hexdigest()}  {path}")


def fetch() -> bytes:
    """The source package, from the index that pip is set to.

    SystemExit says what to do where it can not be had.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.txt")
        # pip runs a source package's own setup.py even to download it: with a hash, only these
        # exact bytes
        wanted.write_text(f"{VERSION} --hash=sha256:{SHA256}\n")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            *OPTIONS,
            "--dest",
            folder,
            "-r",
            str(wanted),
        ]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        found = list(Path(folder).glob("*.zip"))
        if done.returncode or not found:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise SystemExit(
                f"{VERSION} could not be downloaded ({last}). Where there is a network, type\n"
                f"    pip download {' '.join(OPTIONS)} {VERSION}\n"
                f"and here: python examples/valence/make_data.py PATH/vaderSentiment-0.5.zip"
            )
        return found[0].read_bytes()


def read(package: bytes, sha256: str = SHA256) -> Iterator[Sentence]:
    """Every rated sentence of the package, a document's in their order; refuses any other file."""
    if hashlib.sha256(package).hexdigest() != sha256:
        raise SystemExit(f"this is not the source package of {VERSION} (sha256 {sha256})")
    with zipfile.ZipFile(io.BytesIO(package)) as outer:
        inner = io.BytesIO(outer.read(MEMBER))
    with tarfile.open(fileobj=inner) as archive:
        for source, name in SOURCES.items():
            file = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert file is not None
            yield from sorted(parse(source, file.read()), key=lambda s: s[1:3])


def parse(source: str, text: bytes) -> Iterator[Sentence]:
    """The sentences of one file: lines of `ID<TAB>mean rating<TAB>text`, an ID being
    `document_step` or a number.
    """
    for line in text.decode("utf-8-sig").splitlines():
        if line.strip():
            name, rating, words = line.split("\t", 2)
            document, _, step = name.partition("_")
            yield source, int(document), int(step or 1), float(rating) / RATED, words.strip()


def write(sentences: list[Sentence], folder: Path) -> Path:
    """The sentences as one Parquet file in `folder`."""
    names = ("source", "document", "step", "valence", "text")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{FILE}.tmp"
    path = folder / FILE
    pq.write_table(pa.table(dict(zip(names, zip(*sentences, strict=True), strict=True))), part)
    return part.replace(path)


if __name__ == "__main__":
    main()
