"""README is what a newcomer types and reads: its commands run, its tree is the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
INSTALL = re.compile(r"^python3 -m venv \.venv && \.venv/bin/pip install \S+ && ")
COMMANDS = [
    INSTALL.sub("", line).split("#")[0].strip() for block in BLOCKS for line in block.splitlines()
]
OTHERS = [
    c for c in COMMANDS if c and "pytest" not in c and "cluster/" not in c
]  # a cluster's are in test_jobs
TREE = re.search(r"```text\n(.*?)```", README, re.S)


def test_the_first_two_commands_set_everything_up():
    assert INSTALL.match(BLOCKS[0])
    assert "raykd run" in BLOCKS[0]
    assert INSTALL.match(BLOCKS[1])
    assert "[dev]" in BLOCKS[1]
    assert " -m pytest" in BLOCKS[1]
    assert "README.md" in (ROOT / ".ci" / "run").read_text(), (
        "CI runs the second command as README has it"
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what is committed or about to be, in a folder of its own."""
    folder = tmp_path_factory.mktemp("readme") / "raykd"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for name in names or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    return folder


@pytest.mark.ray
@pytest.mark.parametrize("command", dict.fromkeys(OTHERS))
def test_every_command_runs(command, checkout):
    if "raykd run" in command or "raykd train" in command or "pipelines." in command:
        command += " --smoke"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # no Ray of ours: a newcomer has none
    mine = {k: v for k, v in os.environ.items() if not k.startswith("RAY")}
    done = subprocess.run(
        command,
        shell=True,
        cwd=checkout,
        env=mine | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_tree_names_every_file_of_the_package():
    assert TREE
    told = set(re.findall(r"[\w./-]+\.(?:py|toml|sh|j2|npz)\b", TREE[1]))
    folders = ("raykd", "pipelines", "cluster")
    there = {
        p.name
        for f in folders
        for p in (ROOT / f).rglob("*")
        if p.suffix in (".py", ".sh", ".j2", ".npz")
    }
    there -= {"__init__.py", "run.py", "score.py", "train.py", "tune.py", "export.py", "report.py"}
    assert there - {Path(name).name for name in told} == set(), (
        "files that README's tree does not name"
    )
    every = {p.name for p in ROOT.rglob("*") if ".venv" not in p.parts}
    assert {name for name in told if Path(name).name not in every} == set(), (
        "names in README's tree without a file"
    )
