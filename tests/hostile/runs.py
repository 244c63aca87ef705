"""Run folders and artefacts that were changed, cut, forged or pointed elsewhere after the run."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hostile.harness import PLANT, Asked, Done, Home, add, hostile

DEEP = b"[" * 100_000 + b"]" * 100_000
GARBAGE: dict[str, bytes] = {
    "an empty object": b"{}",
    "an empty list": b"[]",
    "a number": b"7",
    "null": b"null",
    "cut short": b'{"a": ',
    "bytes": bytes(range(256)),
    "100,000 lists": DEEP,
}
FILES = {  # file of a run: the kinds of garbage that it is tried with
    "report.json": ("an empty object", "100,000 lists"),
    "arms/student-0/arm.json": ("an empty list", "100,000 lists"),
    "arms/student-0/predictions.parquet": ("bytes",),
    "artefact/manifest.json": ("cut short", "100,000 lists"),
    "artefact/model.json": ("an empty object", "bytes"),
    "digests.json": ("a number", "100,000 lists"),
    "journal.jsonl": ("an empty list", "bytes", "100,000 lists"),
    "journal.synced.json": ("100,000 lists",),
    "tune.json": ("an empty list",),
    "recipe.json": ("bytes",),
    "progress.jsonl": ("an empty list",),
    "answers.parquet": ("an empty object",),
}
NEEDS_REPORT = {"arms/student-0/predictions.parquet", "artefact/model.json", "answers.parquet"}


def accuracy(folder: Path) -> Any:
    """What a report says of the students and the artefact, or None without one."""
    try:
        made = json.loads((folder / "report.json").read_bytes())
        return made["student"], made.get("artefact")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def as_before(home: Home) -> list[str]:
    """The report is that of the finished run, or is not there."""
    sound = next((home.finished / "out").glob("done-*"))
    made = accuracy(next(home.out.glob("done-*")))
    wanted = accuracy(sound)
    if made is None or wanted is None:
        return []
    return [] if _figures(made) == _figures(wanted) else ["the report says what was not measured"]


def _figures(found: Any) -> Any:
    student, artefact = found
    return student.get("metrics"), (artefact or {}).get("metrics")


def same_or_refused(home: Home, done: Done) -> list[str]:
    return as_before(home) if done.code == 0 else []


def garbage(name: str, content: bytes, home: Home) -> Asked:
    run = home.run()
    if name in NEEDS_REPORT:
        (run / "report.json").unlink()
    (run / name).write_bytes(content + b"\n")
    return home.asked("report", "done.toml", code=(0, 3), check=same_or_refused)


for _name, _kinds in FILES.items():
    for _kind in _kinds:
        add("run", f"{_kind} as {_name}", partial(garbage, _name, GARBAGE[_kind]))


def fifo(name: str, home: Home) -> Asked:
    run = home.run()
    (run / name).unlink()
    os.mkfifo(run / name)
    return home.asked("report", "done.toml", code=(0, 3, 5))


for _name in ("arms/student-0/arm.json", "journal.jsonl"):
    add("run", f"a fifo as {_name}", partial(fifo, _name))


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 0x40])


def forged_answers(path: Path) -> None:
    """All answers right."""
    table = pq.read_table(path)
    at = table.column_names.index("answer")
    forged = table.column("label").cast(table.column("answer").type)
    pq.write_table(table.set_column(at, "answer", forged), path)


def changed(name: str, change: Callable[[Path], Any], verb: str, home: Home) -> Asked:
    """A file of a run that was changed afterwards is refused, or made again as it was."""
    run = home.run()
    path = run / name
    was = path.read_bytes()
    change(path)
    forged = path.read_bytes()
    if verb == "report":
        (run / "report.json").unlink(missing_ok=True)

    def made_again(home: Home, done: Done) -> list[str]:
        if done.code != 0:
            return []
        found = as_before(home)
        stays = path.exists() and path.read_bytes() == forged and forged != was
        return [*found, f"{name} stays as it was forged, and is called done"] if stays else found

    return home.asked(verb, "done.toml", code=(0, 3), check=made_again)


def rewritten(edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(edit(json.loads(path.read_bytes()))))

    return change


def _flip(path: Path) -> None:
    path.write_bytes(flipped(path.read_bytes()))


def _replace_run(path: Path) -> None:
    path.write_text(PLANT)


def _other_accuracy(made: Any) -> Any:
    made["student"]["metrics"]["accuracy"]["value"] = 1.0
    return made


def _perfect_arm(record: Any) -> Any:
    return record | {"val": {"val_accuracy": 1.0, "val_nll": 0.0}}


def _schema_99(manifest: Any) -> Any:
    return manifest | {"schema": 99}


def _climbing(manifest: Any) -> Any:
    files = manifest["files"] | {"../../../victim/secret.txt": {"bytes": 1, "sha256": "0" * 64}}
    return manifest | {"files": files}


CHANGED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "the artefact's weights flipped": ("artefact/student.safetensors", _flip, "export"),
    "the student's weights flipped": ("student.safetensors", _flip, "export"),
    "the arm's weights flipped": ("arms/student-0/weights.safetensors", _flip, "train"),
    "run.py replaced": ("artefact/run.py", _replace_run, "export"),
    "predictions forged": ("arms/student-0/predictions.parquet", forged_answers, "report"),
    "the report's accuracy forged": ("report.json", rewritten(_other_accuracy), "report-kept"),
    "an arm's record forged": ("arms/student-0/arm.json", rewritten(_perfect_arm), "export"),
    "a manifest of schema 99": ("artefact/manifest.json", rewritten(_schema_99), "export"),
    "a manifest that climbs": ("artefact/manifest.json", rewritten(_climbing), "export"),
    "a manifest without files": (
        "artefact/manifest.json",
        rewritten(lambda m: m | {"files": {}}),
        "export",
    ),
    "a manifest whose files are a list": (
        "artefact/manifest.json",
        rewritten(lambda m: m | {"files": ["student.safetensors"]}),
        "export",
    ),
}


def changed_with(name: str, change: Callable[[Path], Any], verb: str, home: Home) -> Asked:
    if verb != "report-kept":
        return changed(name, change, verb, home)
    change(home.run() / name)
    return home.asked("report", "done.toml", code=(0, 3), check=same_or_refused)


for _name, (_file, _change, _verb) in CHANGED.items():
    add("run", _name, partial(changed_with, _file, _change, _verb))


def named_model(model: str, home: Home) -> Asked:
    """An artefact whose model.json names code is not run by a report that asks it."""
    run = home.run()
    (run / "report.json").unlink()
    home.write("hubconf.py", f"{PLANT}\ndef x(**settings):\n    pass\n")
    path = run / "artefact" / "model.json"
    described = json.loads(path.read_bytes())
    settings = {"repo_or_dir": str(home.here), "model": "x", "source": "local"}
    described |= {"model": model, "settings": settings if "hub" in model else {}}
    path.write_text(json.dumps(described))
    return home.asked("report", "done.toml", code=(0, 2, 3), check=same_or_refused)


for _name in ("torch.hub:load", "planted:build", "os:getcwd", "builtins:dict"):
    add("run", f"model.json names {_name}", partial(named_model, _name))


@hostile("run")
def a_model_json_of_a_billion_layers(home: Home) -> Asked:
    run = home.run()
    (run / "report.json").unlink()
    path = run / "artefact" / "model.json"
    described = json.loads(path.read_bytes())
    path.write_text(json.dumps(described | {"settings": {"layers": 10**9}}))
    return home.asked("report", "done.toml", code=(0, 2, 3), check=same_or_refused)


@hostile("run")
def a_run_folder_that_is_a_link(home: Home) -> Asked:
    run = home.run()
    shutil.rmtree(run)
    run.symlink_to(home.victim)
    return home.asked("train", "done.toml", code=(3, 5), words="done-")


@hostile("run")
def arms_that_are_a_link(home: Home) -> Asked:
    run = home.run()
    shutil.rmtree(run / "arms")
    (run / "arms").symlink_to(home.victim)
    return home.asked("train", "done.toml", code=(3, 5), words="arms")


@hostile("run")
def an_artefact_that_is_a_link(home: Home) -> Asked:
    run = home.run()
    shutil.move(run / "artefact", home.victim / "artefact")
    (run / "artefact").symlink_to(home.victim / "artefact")
    return home.asked("export", "done.toml", code=(0, 3), check=_no_link(run / "artefact"))


@hostile("run")
def weights_that_are_a_link(home: Home) -> Asked:
    run = home.run()
    path = run / "artefact" / "student.safetensors"
    shutil.move(path, home.victim / "student.safetensors")
    path.symlink_to(home.victim / "student.safetensors")
    return home.asked("export", "done.toml", code=(0, 3), check=_no_link(path))


def _no_link(path: Path) -> Callable[[Home, Done], list[str]]:
    def check(_home: Home, done: Done) -> list[str]:
        return (
            ["a link that leads outside is called done"]
            if done.code == 0 and path.is_symlink()
            else []
        )

    return check


@hostile("run")
def a_link_in_the_artefact_is_not_uploaded(home: Home) -> Asked:
    run = home.run()
    (run / "artefact" / "notes.txt").symlink_to(home.victim / "secret.txt")
    uri = f"sqlite:///{home.out / 'other.db'}"
    argv = ("track", "sync", run, "--uri", uri)
    return Asked(argv, (0, 3), env={"PWD": str(home.here)})


@hostile("run")
def a_journal_that_names_a_file_outside(home: Home) -> Asked:
    run = home.run()
    lines = (run / "journal.jsonl").read_text().splitlines()
    climbing = {
        "seq": len(lines),
        "time_ms": 0,
        "kind": "artefact",
        "run": "run",
        "path": "../../victim",
        "folder": "",
    }
    (run / "journal.jsonl").write_text("\n".join([*lines, json.dumps(climbing)]) + "\n")
    uri = f"sqlite:///{home.out / 'other.db'}"
    return Asked(("track", "sync", run, "--uri", uri), (0, 3))


def sync(name: str, content: bytes, home: Home) -> Asked:
    run = home.run()
    (run / name).write_bytes(content)
    return Asked(("track", "sync", run, "--uri", "http://127.0.0.1:9"), 3, (name,))


for _kind in ("an empty object", "100,000 lists"):
    add("run", f"sync with {_kind} as recipe.json", partial(sync, "recipe.json", GARBAGE[_kind]))


@hostile("run")
def a_sync_of_a_folder_that_is_no_run(home: Home) -> Asked:
    return Asked(("track", "sync", home.victim), 3, ("recipe.json",))


def sync_to(uri: str, home: Home) -> Asked:
    return Asked(("track", "sync", home.run(), "--uri", uri), (2, 5))


for _uri in ("http://[::1", "http://localhost:99999"):
    add("run", f"sync to {_uri or 'an empty address'}", partial(sync_to, _uri))


@hostile("run")
def a_password_stays_out_of_the_results(home: Home) -> Asked:
    home.run()
    uri = "http://user:hunter2@127.0.0.1:9/?token=hunter2"

    def check(home: Home, done: Done) -> list[str]:
        told = "hunter2" in done.out + done.err
        files = [
            str(p.relative_to(home.out))
            for p in home.out.rglob("*")
            if p.is_file() and b"hunter2" in p.read_bytes()
        ]
        return [f"the password is in {', '.join(files)}"] * bool(files) + [
            "the password is printed"
        ] * told

    return home.asked("report", "done.toml", f"track.uri={uri}", code=(0, 2), check=check)


def compared(name: str, content: bytes | None, home: Home) -> Asked:
    run = home.run()
    other = home.out / "other-run"
    shutil.copytree(run, other)
    if content is None:
        (other / name).unlink()
    else:
        (other / name).write_bytes(content)
    return Asked(("report", run, other, "--out", home.out), 3, (name,))


for _file in ("recipe.json", "report.json"):
    for _kind in ("an empty list", "100,000 lists"):
        add("run", f"compared with {_kind} as {_file}", partial(compared, _file, GARBAGE[_kind]))
add("run", "compared without answers", partial(compared, "answers.parquet", None))
add("run", "compared with bytes as answers", partial(compared, "answers.parquet", GARBAGE["bytes"]))


def compared_after(name: str, change: Callable[[Path], Any], home: Home) -> Asked:
    """A run that was changed is not compared, as it is not reported."""
    run = home.run()
    other = home.out / "other-run"
    shutil.copytree(run, other)
    change(other / name)
    return Asked(("report", run, other, "--out", home.out), 3, (name,))


def _to_victim(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../../victim/secret.txt")


COMPARED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "forged answers": ("answers.parquet", _flip),
    "a forged report": ("report.json", rewritten(_other_accuracy)),
    "forged weights": ("arms/student-0/weights.safetensors", _flip),
    "a link that leads out": ("arms/student-0/predictions.parquet", _to_victim),
}
for _name, (_file, _change) in COMPARED.items():
    add("run", f"compared with {_name}", partial(compared_after, _file, _change))


@hostile("run")
def a_comparison_with_a_folder_of_other_things(home: Home) -> Asked:
    return Asked(("report", home.run(), home.victim, "--out", home.out), 3, ("recipe.json",))


@hostile("run")
def a_comparison_of_parquet_with_other_columns(home: Home) -> Asked:
    run = home.run()
    other = home.out / "other-run"
    shutil.copytree(run, other)
    pq.write_table(pa.table({"x": [1]}), other / "answers.parquet")
    return Asked(("report", run, other, "--out", home.out), 3, ("answers.parquet",))


@hostile("sound")
def a_model_card_that_its_user_filled_in(home: Home) -> Asked:
    path = home.run() / "artefact" / "README.md"
    path.write_text("Made for wrists.")

    def check(_home: Home, _done: Done) -> list[str]:
        return [] if path.read_text() == "Made for wrists." else ["the user's card is gone"]

    return home.asked("export", "done.toml", code=0, words="done before", check=check)


@hostile("sound")
def a_finished_run(home: Home) -> Asked:
    home.run()
    return home.asked("report", "done.toml", code=0, words="done before", check=same_or_refused)


@hostile("sound")
def a_finished_run_reported_again(home: Home) -> Asked:
    (home.run() / "report.json").unlink()
    return home.asked("report", "done.toml", code=0, check=same_or_refused)
