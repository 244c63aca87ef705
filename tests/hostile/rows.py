"""Rows that are none: Parquet of odd types and sizes, and functions that misbehave."""

import json
import math
import os
import random
import struct
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hostile.harness import MIB, Asked, Done, Home, add, hostile
from hostile.stores import lean

COUNT = 24
SPLIT = [("train", "val", "test")[i % 3] for i in range(COUNT)]
LABEL = ["ab"[i % 2] for i in range(COUNT)]
STEPS = [[[math.sin(i + t), math.cos(i * t)] for t in range(8)] for i in range(COUNT)]


def columns(**changed: Any) -> dict[str, Any]:
    return {"inputs": STEPS, "label": LABEL, "split": SPLIT} | changed


def put(home: Home, table: pa.Table, name: str = "rows/part.parquet", **options: Any) -> None:
    path = home.here / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)


def of_columns(changed: Any, code: Any, words: Any, home: Home) -> Asked:
    changed = changed() if callable(changed) else changed
    put(home, pa.table(columns(**changed)))
    return home.asked("check", "own.toml", code=code, words=words, check=lean)


def first(value: Any) -> list[Any]:
    """The inputs with the first step of row 5 exchanged."""
    return [*STEPS[:5], [value, *STEPS[5][1:]], *STEPS[6:]]


ODD: dict[str, tuple[Any, Any, Any]] = {  # columns, code, what is named
    "structs": ({"inputs": [[{"x": 1.0}]] * COUNT}, 3, "inputs"),
    "texts": ({"inputs": ["1 2 3"] * COUNT}, 3, "inputs"),
    "bytes": ({"inputs": [bytes(16)] * COUNT}, 3, "inputs"),
    "a flat list": ({"inputs": [[1.0, 2.0]] * COUNT}, 3, "inputs"),
    "nothing but null": ({"inputs": pa.nulls(COUNT)}, 3, "inputs"),
    "a null row": ({"inputs": [*STEPS[:5], None, *STEPS[6:]]}, 3, "row 5"),
    "a null value": ({"inputs": first([None, 1.0])}, 3, "5"),
    "a row without steps": ({"inputs": [*STEPS[:5], [], *STEPS[6:]]}, 3, "5"),
    "steps without channels": ({"inputs": [[[]] * 8] * COUNT}, 3, "inputs"),
    "a step of three channels": ({"inputs": first([1.0, 2.0, 3.0])}, 3, "5"),
    "not a number": ({"inputs": first([math.nan, 1.0])}, 3, "rows 5"),
    "infinity": ({"inputs": first([math.inf, 1.0])}, 3, "rows 5"),
    "labels of lists": ({"label": [["a"]] * COUNT}, 3, "label"),
    "labels that are not a number": (
        {"label": [math.nan if i == 5 else float(i % 2) for i in range(COUNT)]},
        (0, 3),
        "",
    ),
    "labels of bytes": ({"label": [b"ab"[i % 2 : i % 2 + 1] for i in range(COUNT)]}, (0, 3), ""),
    "labels of a million letters": ({"label": [x * MIB for x in LABEL]}, (0, 3), ""),
    "no label at all": ({"label": pa.nulls(COUNT)}, 3, ""),
    "a split of another name": ({"split": ["Train"] * COUNT}, 3, "'split'"),
    "a split with escape sequences": ({"split": ["\x1b[2J"] * COUNT}, 3, "'split'"),
    "one split": ({"split": ["train"] * COUNT}, 3, "val"),
}
for _name, (_changed, _code, _words) in ODD.items():
    add("rows", _name, partial(of_columns, _changed, _code, _words))


@hostile("rows")
def a_column_twice(home: Home) -> Asked:
    table = pa.table(columns())
    put(home, table.append_column("label", table.column("label")))
    return home.asked("check", "own.toml", code=3, words="rows")


@hostile("rows")
def columns_with_escape_sequences(home: Home) -> Asked:
    put(home, pa.table({"\x1b[2J": STEPS, "label": LABEL, "split": SPLIT}))
    return home.asked("check", "own.toml", code=3, words="inputs")


@hostile("rows")
def a_valence_beyond_its_bounds(home: Home) -> Asked:
    put(home, pa.table(columns(v=[[2.0] * 8] * COUNT)))
    return home.asked("check", "own.toml", 'data.columns.valence="v"', code=3, words="valence")


def of_bytes(content: bytes, home: Home) -> Asked:
    home.write("rows/part.parquet", content)
    return home.asked("check", "own.toml", code=3, words="part.parquet", check=lean)


FILES = {
    "an empty file": b"",
    "a footer longer than the file": b"PAR1" + bytes(64) + struct.pack("<I", 2**31 - 1) + b"PAR1",
    "a file of noise": b"PAR1"
    + random.Random(0).randbytes(4096)
    + struct.pack("<I", 2048)
    + b"PAR1",
    "a pickle": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
}
for _name, _content in FILES.items():
    add("rows", _name, partial(of_bytes, _content))


@hostile("rows")
def a_flipped_bit_under_a_checksum(home: Home) -> Asked:
    put(
        home,
        pa.table(columns()),
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    path = home.here / "rows" / "part.parquet"
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<d", STEPS[9][3][0]))
    data[at] ^= 1
    path.write_bytes(data)
    return home.asked("check", "own.toml", code=3, words="part.parquet")


def zeros(rows: int, steps: int) -> pa.Table:
    """Rows of zeros, a row group each: a small file."""
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * steps)), 1)
    offsets = np.arange(0, rows * steps + 1, steps, dtype=np.int32)
    inputs = pa.ListArray.from_arrays(offsets, values.cast(pa.list_(pa.float64())))
    return pa.table(
        {
            "inputs": inputs,
            "label": ["ab"[i % 2] for i in range(rows)],
            "split": [SPLIT[i % 3] for i in range(rows)],
        }
    )


@hostile("rows")
def a_row_of_two_million_steps(home: Home) -> Asked:
    long = zeros(1, 2_000_000)
    short = zeros(3000, 8)
    put(home, pa.concat_tables([short, long]))
    return home.asked("check", "own.toml", code=3, words="3000", check=lean)


@hostile("rows")
def a_billion_rows_of_null(home: Home) -> Asked:
    """Null columns take no bytes in the file."""
    table = pa.table({name: pa.nulls(20 * MIB) for name in ("inputs", "label", "split")})
    put(home, table, compression="zstd")
    return home.asked("check", "own.toml", code=3, check=lean)


@hostile("rows")
def a_fifo(home: Home) -> Asked:
    os.mkfifo(home.here / "rows" / "a.parquet")
    return home.asked("check", "own.toml", code=(0, 3))


@hostile("rows")
def a_link_to_nowhere(home: Home) -> Asked:
    (home.here / "rows" / "a.parquet").symlink_to("nowhere")
    return home.asked("check", "own.toml", code=3, words="a.parquet")


@hostile("rows")
def a_loop_of_folders(home: Home) -> Asked:
    (home.here / "rows" / "again").symlink_to(".")
    return home.asked("check", "own.toml", code=0)


@hostile("rows")
def a_folder_called_as_a_file(home: Home) -> Asked:
    (home.here / "rows" / "x.parquet").mkdir()
    return home.asked("check", "own.toml", code=0)


def doubled(name: str, home: Home) -> Asked:
    """A copy that tools leave behind is not read a second time."""
    put(home, pa.table(columns()), name)

    def check(_home: Home, done: Done) -> list[str]:
        rows = json.loads(done.out)["rows"] if done.code == 0 else {}
        return [f"{rows} of {COUNT} rows"] if sum(rows.values()) != COUNT else []

    return home.asked("check", "own.toml", code=0, options=("--json",), check=check)


for _name in (
    ".ipynb_checkpoints/part.parquet",
    "_temporary/0/part.parquet",
    "_metadata.parquet",
    ".part.parquet",
):
    add("rows", f"a copy in {_name}", partial(doubled, f"rows/{_name}"))


@hostile("rows")
def a_shadow_of_a_file(home: Home) -> Asked:
    home.write("rows/._part.parquet", b"\x00\x05\x16\x07")
    return home.asked("check", "own.toml", code=0)


@hostile("rows")
def folders_that_contradict_the_column(home: Home) -> Asked:
    (home.here / "rows" / "part.parquet").unlink()
    put(home, pa.table(columns()), "rows/split=train/part.parquet")
    return home.asked("check", "own.toml", code=3, words="split")


# functions

HEAD = """
import os, sys, threading, time
import numpy as np
SPLIT = ("train", "val", "test")
def sound():
    return [
        {
            "inputs": [[float(i + t), float(i * t)] for t in range(8)],
            "label": "ab"[i % 2],
            "split": SPLIT[i % 3],
        }
        for i in range(24)
    ]
class Rude(Exception):
    def __str__(self):
        raise ValueError("no text")
class Loud(BaseException):
    pass
"""
FUNCTIONS: dict[str, tuple[str, Any, Any]] = {  # the body of rows(), code, what is named
    "gives nothing": ("return None", 3, "rude:rows"),
    "gives a text": ("return 'abc'", 3, "rude:rows"),
    "gives no rows": ("return []", 3, "0 rows"),
    "gives empty rows": ("return [{}]", 3, "rude:rows"),
    "gives a set": ("return {1, 2}", 3, "rude:rows"),
    "gives objects as inputs": ("return [r | {'inputs': object()} for r in sound()]", 3, "inputs"),
    "gives lists in themselves": (
        "x = []\n    x.append(x)\n    return [r | {'inputs': x} for r in sound()]",
        3,
        "inputs",
    ),
    "gives tensors with gradients": (
        "import torch\n    x = torch.ones(8, 2, requires_grad=True)\n"
        "    return [r | {'inputs': x} for r in sound()]",
        (0, 3),
        "",
    ),
    "gives complex numbers": ("return [r | {'inputs': [[1j, 2j]]} for r in sound()]", 3, "inputs"),
    "raises": ("raise ValueError('no luck')", 3, "rude:rows"),
    "raises after ten rows": (
        "yield from sound()[:10]\n    raise ValueError('no luck')",
        3,
        ("rude:rows", "10", "no luck"),
    ),
    "raises what is no Exception": ("raise Loud('x')", 3, "rude:rows"),
    "raises what has no text": ("raise Rude", 3, "rude:rows"),
    "raises a megabyte": ("raise ValueError('x' * 1000000)", 3, "rude:rows"),
    "raises escape sequences": ("raise ValueError('\\x1b[2J\\x07')", 3, "rude:rows"),
    "raises KeyboardInterrupt": ("raise KeyboardInterrupt", (3, 130), ""),
    "raises an OSError": ("open('/nowhere/at/all')", 3, "rude:rows"),
    "exits": ("sys.exit(0)", 3, "rude:rows"),
    "exits at once": ("os._exit(0)", (3, 5), ""),
    "recurses": ("return rows()", 3, "rude:rows"),
    "wants more memory than there is": ("return [0] * 10**13", 3, "rude:rows"),
    "changes the folder": ("os.chdir('../victim')\n    return sound()", 0, ""),
    "prints": (
        "print('noise')\n    sys.__stdout__.write('noise')\n"
        "    os.write(1, b'noise')\n    return sound()",
        0,
        "",
    ),
    "leaves a thread": (
        "threading.Thread(target=time.sleep, args=(3600,)).start()\n    return sound()",
        0,
        "",
    ),
    "closes stdout": ("os.close(1)\n    return sound()", (0, 3, 5), ""),
    "replaces stdout": ("sys.stdout = None\n    return sound()", 0, ""),
    "forks": (
        "pid = os.fork()\n    if not pid:\n        return 1 / 0\n"
        "    os.waitpid(pid, 0)\n    return sound()",
        0,
        "",
    ),
    "empties the path of modules": ("sys.path.clear()\n    return sound()", (0, 3), ""),
}


def function(body: str, code: Any, words: Any, home: Home) -> Asked:
    home.write("rude.py", f"{HEAD}\ndef rows():\n    {body}\n")
    words = () if words == "" else words

    def is_json(_home: Home, done: Done) -> list[str]:
        try:
            return [] if done.code != 0 or json.loads(done.out)["rows"] else ["no rows"]
        except ValueError:
            return [f"stdout is not one JSON value: {done.out[:40]!r}"]

    return home.asked(
        "check",
        "own.toml",
        "data.source=rude:rows",
        code=code,
        words=words,
        options=("--json",),
        check=is_json,
    )


for _name, (_body, _code, _words) in FUNCTIONS.items():
    add("function", _name, partial(function, _body, _code, _words))


@hostile("function")
def never_ends(home: Home) -> Asked:
    home.write("rude.py", f"{HEAD}\ndef rows():\n    while True:\n        yield from sound()\n")
    sets = ("data.source=rude:rows", "data.max_rows=1000")
    words = ("rude:rows", "data.max_rows", "1,000")
    return home.asked("check", "own.toml", *sets, code=3, words=words)


@hostile("function")
def takes_other_settings(home: Home) -> Asked:
    home.write("rude.py", f"{HEAD}\ndef rows(path):\n    return sound()\n")
    return home.asked(
        "check",
        "own.toml",
        "data.source=rude:rows",
        "data.settings.other=1",
        code=(2, 3),
        words="rude:rows",
    )


def dataset(change: str, words: Any, home: Home) -> Asked:
    """A function that gives raykd's own Dataset, with one array exchanged."""
    body = f"""{HEAD}
from raykd.data import Dataset, Rows
def part(first):
    fields = dict(
        row_id=np.arange(first, first + 8), inputs=np.ones((8, 4, 2), np.float32),
        mask=np.ones((8, 4), bool), label=np.arange(8) % 2, group=np.arange(8),
    )
    fields.update({change})
    return Rows(**fields)
def rows():
    return Dataset("rude", ("a", "b"), {{name: part(8 * i) for i, name in enumerate(SPLIT)}})
"""
    home.write("rude.py", body)
    return home.asked("check", "own.toml", "data.source=rude:rows", code=3, words=words)


DATASETS = {
    "inputs of lists": ("inputs=[[[1.0]]]", "inputs"),
    "labels outside": ("label=np.full(8, 9)", "labels outside"),
    "a mask of another shape": ("mask=np.ones((8, 3), bool)", "mask"),
    "padding that is not 0": ("mask=np.arange(4) < np.full((8, 1), 2)", "inputs other than 0"),
    "ids that repeat": ("row_id=np.zeros(8, np.int64)", "row ids"),
    "no ids": ("row_id=None", "row_id"),
}
for _name, (_change, _words) in DATASETS.items():
    add("function", f"gives a Dataset with {_name}", partial(dataset, _change, _words))

# text


def texts(body: str, code: Any, words: Any, home: Home) -> Asked:
    home.text()
    home.write("rude.py", f"import sys\ndef rows():\n    {body}\n")
    columns = 'data.columns={ text = "text" }'
    return home.asked(
        "check", "recipe.toml", "data.source=rude:rows", columns, code=code, words=words
    )


SOUND = (
    "[{'split': s, 'group': i, 'text': 'the cat sat on a mat'}"
    " for s in ('train', 'val', 'test') for i in range(4)]"
)
TEXTS: dict[str, tuple[str, Any, Any]] = {
    "a lone surrogate": (
        f"return {SOUND} + [{{'split': 'train', 'group': 9, 'text': 'a \\ud800 b'}}]",
        3,
        "12",
    ),
    "a number as a text": (
        f"return {SOUND} + [{{'split': 'train', 'group': 9, 'text': 7}}]",
        3,
        "12",
    ),
    "a text of a megabyte of escapes as a number": (
        f"return {SOUND} + [{{'split': 'train', 'group': 9, 'text': ['\\x1b' * 1000000]}}]",
        3,
        "12",
    ),
    "an empty text": (
        f"return {SOUND} + [{{'split': 'train', 'group': 9, 'text': ''}}]",
        (0, 3),
        "",
    ),
}
for _name, (_body, _code, _words) in TEXTS.items():
    add("text", _name, partial(texts, _body, _code, _words))
