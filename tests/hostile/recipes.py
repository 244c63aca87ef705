"""Recipes that are none, or too much of one: depth, size, numbers, letters, what is no file."""

import os
from functools import partial
from typing import Any

from hostile.harness import MIB, Asked, Done, Home, add, hostile

LONG = "ab" * 500_000
ESCAPE = "\x1b[31m\x1b]0;owned\x07"


def of_text(content: str | bytes, words: Any, home: Home) -> Asked:
    if isinstance(content, str) and "technique" not in content:
        content = f'technique = "none"\n{content}'
    return home.asked("check", home.write("recipe.toml", content), code=2, words=words)


def of_sets(sets: tuple[str, ...], code: Any, words: Any, home: Home) -> Asked:
    return home.asked("check", "own.toml", *sets, code=code, words=words)


def nested(opening: str, closing: str, depth: int) -> str:
    return opening * depth + closing * depth


KEYS = ".".join(["a"] * 10_000)
TEXTS: dict[str, tuple[str | bytes, Any]] = {
    "100,000 lists in each other": (f"x = {nested('[', ']', 100_000)}", "recipe.toml"),
    "100,000 tables in each other": (
        f"x = {nested('{a = ', '}', 100_000)[:-100_000]}1",
        "recipe.toml",
    ),
    "a key of 10,000 parts": (f"{KEYS} = 1", "recipe.toml"),
    "300 lists as a setting": (f"[student.settings]\nx = {nested('[', ']', 300)}", "recipe.toml"),
    "300 tables as a setting of the data": (
        f"[data]\nsource = './rows'\n[data.settings{'.a' * 300}]\nx = 1",
        "recipe.toml",
    ),
    "a number of 5,000 digits": (f"[optim]\nsteps = {'9' * 5000}", "recipe.toml"),
    "a number of 4,000 digits": (f"[optim]\nsteps = {'9' * 4000}", "optim.steps"),
    "not UTF-8": (b"name = '\xff\xfe\xfa'", "recipe.toml"),
    "zero bytes": (bytes(4096), "recipe.toml"),
    "a lone surrogate": (r'name = "\ud800"', "recipe.toml"),
    "64 MiB of comments": (b'technique = "none"\n# ' + b"x" * (64 * MIB), "recipe.toml"),
    "20,000 unknown keys": ("\n".join(f"key{i} = {i}" for i in range(20_000)), "key0"),
    "an unknown key of a million letters": (f"{LONG} = 1", "unknown key"),
    "an escape sequence as a key": (r'"\u001b[2J\u001b]0;x\u0007" = 1', "unknown key"),
    "letters that turn the line": (r'"\u202Eevil\u2066" = 1', "unknown key"),
    "an escape sequence as a technique": (r'technique = "\u001b[2Jx"', "technique"),
    "an escape sequence as a data source": ('[data]\nsource = "./\\u001b[2Jx"', "data.source"),
    "infinity": ("[optim]\nlearning_rate = 1e999", "optim.learning_rate"),
    "not a number": ("[optim]\nlearning_rate = nan", "optim.learning_rate"),
    "a name that climbs": ('name = "../../victim"', "name"),
    "a name of a million letters": (f'name = "{LONG}"', "name"),
    "a model of a million letters": (
        f'technique = "none"\n[data]\nsource = "./rows"\n[student]\nmodel = "{LONG}"',
        "student.model",
    ),
    "100,000 seeds": (
        f'technique = "none"\nseeds = {list(range(100_000))}\n[data]\nsource = "./rows"\n',
        "seeds",
    ),
    "20,000 choices in a search": (
        'technique = "none"\n[data]\nsource = "./rows"\n'
        f'[search]\n"optim.batch" = {{ choice = {list(range(1, 20_001))} }}',
        "search",
    ),
}
for _name, (_content, _words) in TEXTS.items():
    add("recipe", _name, partial(of_text, _content, _words))

HUGE = 10**18
TAUGHT = (
    "technique=vanilla",
    "teacher.model=mine:teacher",
    "teacher.weights=teacher.safetensors",
)
SETS: dict[str, tuple[tuple[str, ...], Any, Any]] = {
    "a set key of 10,000 parts": ((f"{KEYS}=1",), 2, "--set"),
    "a set value of 100,000 lists": ((f"optim.steps={nested('[', ']', 50_000)}",), 2, "--set"),
    "a set number of 5,000 digits": ((f"optim.steps={'9' * 5000}",), 2, "optim.steps"),
    "a set of a table's own key": (("optim=1",), 2, "optim"),
    "a quadrillion steps": ((f"optim.steps={HUGE}",), 2, "optim.steps"),
    "a quadrillion workers": ((f"scale.workers={HUGE}", f"optim.batch={HUGE}"), 2, ""),
    "a seed of a hundred digits": ((f"seeds=[{10**100}]",), 2, "seeds"),
    "a label seed of a hundred digits": (
        (f"data.label_seed={10**100}", "data.label_fraction=0.5"),
        2,
        "data.label_seed",
    ),
    "a student of a billion layers": ((f"student.settings.layers={10**9}",), 2, "student"),
    "a student of a billion columns": ((f"student.settings.width={10**9}",), 2, "student"),
    "a student of no heads": (("student.settings.heads=0",), 2, "student"),
    "a kernel of a billion": ((f"student.settings.kernel={10**9}",), 2, "student"),
    "a window of a quadrillion": (
        ("data.source=watch_gestures", f"data.window={HUGE}"),
        (2, 3),
        "window",
    ),
    "NUL in weights": (('student.weights="a\\u0000b.safetensors"',), 2, "student.weights"),
    "NUL in a store": (('scale.store="a\\u0000b"',), 2, "scale.store"),
    "a path of 100,000 letters": (
        (f"student.weights={'x' * 100_000}.safetensors",),
        2,
        "student.weights",
    ),
    "a store that is no bucket": (("scale.store=s3://../x",), 2, "scale.store"),
    "a store in a file URL": (("scale.store=file:///etc",), 2, "scale.store"),
    "a codec of more classes than there are": (
        (*TAUGHT, 'store.codec="topk"'),
        2,
        "store.top",
    ),
    "a graphics card that is not there": (('scale.device="cuda"',), (2, 5), "scale.device"),
    "a tracker at port 99999": (('track.uri="http://localhost:99999"',), 2, "track.uri"),
}
for _name, (_sets, _code, _words) in SETS.items():
    add("recipe", _name, partial(of_sets, _sets, _code, _words))


@hostile("recipe")
def twenty_thousand_phases(home: Home) -> Asked:
    text = (home.here / "own.toml").read_text().replace("steps = 4", "steps = 10000000")
    text += "".join(f"[[phases]]\nuntil = {(i + 1) / 20_000}\n" for i in range(20_000))
    return home.asked("check", home.write("recipe.toml", text), code=(0, 2))


@hostile("recipe")
def a_fifo(home: Home) -> Asked:
    os.mkfifo(home.here / "fifo.toml")
    return home.asked("check", "fifo.toml", code=2, words="fifo.toml")


@hostile("recipe")
def a_link_to_dev_zero(home: Home) -> Asked:
    (home.here / "zero.toml").symlink_to("/dev/zero")
    return home.asked("check", "zero.toml", code=2, words="zero.toml")


@hostile("recipe")
def a_loop_of_links(home: Home) -> Asked:
    (home.here / "loop.toml").symlink_to("loop.toml")
    return home.asked("check", "loop.toml", code=2, words="loop.toml")


@hostile("recipe")
def a_folder(home: Home) -> Asked:
    return home.asked("check", "rows", code=2, words="rows")


@hostile("recipe")
def a_path_with_escape_sequences(home: Home) -> Asked:
    return home.asked("check", f"{ESCAPE}.toml", code=2, words=".toml")


@hostile("recipe")
def a_path_of_100_000_letters(home: Home) -> Asked:
    return home.asked("check", "x" * 100_000, code=2)


@hostile("recipe")
def weights_that_are_a_fifo(home: Home) -> Asked:
    os.mkfifo(home.here / "fifo.safetensors")
    return home.asked(
        "check", "own.toml", "student.weights=fifo.safetensors", code=2, words="student.weights"
    )


@hostile("recipe")
def weights_in_a_loop_of_links(home: Home) -> Asked:
    (home.here / "loop.safetensors").symlink_to("loop.safetensors")
    return home.asked(
        "check", "own.toml", "student.weights=loop.safetensors", code=2, words="student.weights"
    )


@hostile("recipe")
def a_password_in_the_trackers_address(home: Home) -> Asked:
    uri = "http://user:hunter2@127.0.0.1:9/?token=hunter2"
    return home.asked("check", "own.toml", f"track.uri={uri}", code=(0, 2), check=_no_password)


@hostile("recipe")
def a_password_in_the_trackers_address_as_json(home: Home) -> Asked:
    uri = "http://user:hunter2@127.0.0.1:9/?token=hunter2"
    options = ("--json",)
    return home.asked(
        "check", "own.toml", f"track.uri={uri}", code=(0, 2), options=options, check=_no_password
    )


def _no_password(_home: Home, done: Done) -> list[str]:
    return ["the password is printed"] if "hunter2" in done.out + done.err else []


@hostile("sound")
def a_sound_recipe(home: Home) -> Asked:
    return home.asked("check", "own.toml", code=0)


@hostile("sound")
def a_sound_recipe_with_a_teacher(home: Home) -> Asked:
    return home.asked("check", "done.toml", code=0)


@hostile("sound")
def a_sound_recipe_over_text(home: Home) -> Asked:
    home.text()
    return home.asked("check", "recipe.toml", code=0)
