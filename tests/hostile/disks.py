"""Disks without room: every command ends with 5, and the same one goes on when there is room.

A file cannot grow beyond a limit, so that each kind of file is the first that does not fit.
"""

import json
import shutil
from functools import partial
from pathlib import Path

from hostile.harness import Asked, Done, Home, add, hostile

ROOM = (0, 700, 2000, 3000, 4000)  # bytes of a file


def weights(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
        if "checkpoints" not in path.parts
    }


def unexported(home: Home) -> Path:
    """A run that is trained, and was never exported."""
    run = home.run()
    shutil.rmtree(run / "artefact")
    for name in ("digests.json", "artefact_answers.parquet", "student.safetensors"):
        (run / name).unlink()
    return run


def untrained(room: int, home: Home) -> Asked:
    """A training without room for a record, a state or weights goes on where there is room."""
    run = unexported(home)
    sound = weights(run)
    shutil.rmtree(run / "arms")
    (run / "journal.jsonl").unlink()  # as before the training, which writes the most into it

    def goes_on(_home: Home, _done: Done) -> list[str]:
        return [] if weights(run) == sound else ["the weights differ from those of a run with room"]

    again = home.asked("train", "done.toml", code=0, check=goes_on)
    return home.asked("train", "done.toml", code=5, most_bytes=room, then=again)


for _room in ROOM:
    add("disk", f"{_room} bytes a file for training", partial(untrained, _room))


@hostile("disk")
def no_room_for_the_artefact(home: Home) -> Asked:
    run = unexported(home)

    def is_absent(_home: Home, _done: Done) -> list[str]:
        left = [path.name for path in run.iterdir() if "artefact" in path.name]
        return [f"{left} are half written"] if left else []

    return home.asked("export", "done.toml", code=5, most_bytes=2500, check=is_absent)


def recorded(room: int, home: Home) -> Asked:
    """MLflow's tables, half of which fit, are made whole later."""
    run = home.run()

    def is_recorded(_home: Home, done: Done) -> list[str]:
        return [] if json.loads(done.out)["done"] else ["not all is recorded"]

    argv = ("track", "sync", run, "--uri", f"sqlite:///{home.out / 'mlflow.db'}", "--json")
    again = Asked(argv, 0, check=is_recorded)
    return Asked(argv, 5, most_bytes=room, then=again)


add("disk", "half of the room for the tables of MLflow", partial(recorded, 200_000))
