"""Documents are what a newcomer types and reads: commands run, links and names exist, README is
short, each folder's README names its files.
"""

import importlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command import PATIENT

import raykd
from raykd import techniques
from raykd.recipe import ModelRef, StudentRef
from raykd.recipe.keys import HEADINGS, REQUIRED, recipe_keys, toml_value

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = re.compile(r"^python3 -m venv \.venv && \.venv/bin/pip install \S+ && ")
SMOKE = re.compile(r"raykd (run|train) ")

# Commands that no test here runs, and why: a pattern of "FILE: COMMAND", and the reason.
NOT_RUN = {
    r" -m pytest": "the tests themselves",
    r"cluster/(local\.sh|README\.md: )": "needs a head; tests/orchestration/test_jobs.py has one",
    r"pipelines\.bench\.": "a bench measures for minutes",
    r"qat_progressive": "trains for ten minutes; tests/training/test_phases.py has small phases",
    r"(run|train) examples/own/(teacher|recipe)": "trains as own/reverse.toml does, which is run",
    r"^examples/valence/|raykd run examples/valence/": "fetches its data from the network",
    r"^examples/smollm2/": "fetches its teacher from the network",
    r"^examples/code_lm/": "trains for minutes; tests/data/test_text.py has a small one",
}


def tracked() -> list[str]:
    """What is committed or about to be; without git, every file."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    names = names or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    return sorted(name for name in names if (ROOT / name).is_file())


FILES = tracked()
DOCUMENTS = [name for name in FILES if name.endswith(".md")]
FOLDERS = sorted(
    name.removesuffix("/__init__.py")
    for name in FILES
    if re.fullmatch(r"raykd/\w+/__init__\.py", name)
)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks_of(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands_of(name: str) -> list[str]:
    """The lines of a document's bash blocks, without comments and without installing raykd."""
    lines = "\n".join(blocks_of("bash", text_of(name))).replace("\\\n", " ").splitlines()
    plain = (INSTALL.sub("", line).split(" #")[0].strip() for line in lines)
    return [line for line in plain if line]


def reason_not_to_run(name: str, command: str) -> str | None:
    wanted = f"{name}: {command}"
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, wanted)), None)


ORDERED = ["README.md", *(name for name in DOCUMENTS if name != "README.md")]
ALL_COMMANDS = [(name, command) for name in ORDERED for command in commands_of(name)]
RUN = dict.fromkeys(
    command for name, command in ALL_COMMANDS if not reason_not_to_run(name, command)
)


def test_the_first_two_commands_set_everything_up():
    first, second = blocks_of("bash", README)[:2]
    assert INSTALL.match(first)
    assert "raykd run" in first
    assert INSTALL.match(second)
    assert "[dev]" in second
    assert " -m pytest" in second
    assert "README.md" in text_of(".ci/run"), "CI runs the second command as README has it"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what is committed or about to be, in a folder of its own."""
    folder = tmp_path_factory.mktemp("readme") / "raykd"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    return folder


@pytest.mark.ray
@pytest.mark.parametrize("command", RUN)
def test_every_command_runs(command, checkout):
    if SMOKE.search(command) and "--smoke" not in command:
        command += " --smoke"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # no Ray of ours: a newcomer has none
    mine = {k: v for k, v in os.environ.items() if not k.startswith("RAY")}
    done = subprocess.run(
        command,
        shell=True,
        cwd=checkout,
        env=mine | PATIENT | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_a_reason_not_to_run_is_still_needed(pattern):
    assert any(re.search(pattern, f"{name}: {command}") for name, command in ALL_COMMANDS)


def sentences(text: str) -> list[str]:
    """The sentences of prose: no code, table, heading or picture; a list item is one by itself."""
    text = re.sub(r"```.*?```", "\n\n", text, flags=re.S)
    text = re.sub(r"^\s*[|#!<].*$", "\n", text, flags=re.M)
    text = re.sub(r"^\s*(?:[*-]|\d+\.) ", "\n\n", text, flags=re.M)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "Code", text))
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    parts = [part for p in paragraphs for part in re.split(r"(?<=[.!?])\s+", p)]
    return [part for part in parts if re.search(r"\w", part)]


def test_readme_is_short_and_so_are_its_sentences():
    assert README.count("\n") <= 200
    assert len(README.encode()) <= 14_000
    assert statistics.median(len(sentence.split()) for sentence in sentences(README)) <= 16


def test_the_tree_names_every_folder():
    (tree,) = blocks_of("text", README)
    entries = re.findall(r"^( *)(\w+)/", tree, re.M)
    top = {name for name in FILES if "/" in name and not name.startswith(".")}
    assert {name for indent, name in entries if not indent} == {n.split("/")[0] for n in top}
    assert sorted(f"raykd/{name}" for indent, name in entries if indent) == FOLDERS


def first_column(text: str) -> set[str]:
    """What stands as code in the first column of a document's tables."""
    cells = re.findall(r"^\| ([^|]*) \|", text, re.M)
    return {name for cell in cells for name in re.findall(r"`([\w./]+)`", cell)}


@pytest.mark.parametrize("folder", [*FOLDERS, "pipelines/bench"])
def test_a_folders_readme_names_each_of_its_files(folder):
    """A nested folder's files too, unless its README names the whole folder."""
    named = first_column(text_of(f"{folder}/README.md"))
    if folder == "raykd/techniques":  # by their names in recipes
        named = {f"{name}.py" for name in named if (ROOT / folder / f"{name}.py").exists()}
    files = {name for name in named if name.endswith((".py", ".j2"))}
    whole = tuple(n for n in named if n.endswith("/") and (ROOT / folder / n).is_dir())
    there = {
        name.removeprefix(f"{folder}/")
        for name in FILES
        if name.startswith(f"{folder}/") and name.endswith((".py", ".j2"))
    }
    there = {name for name in there if not name.endswith("__init__.py")}
    assert {name for name in there if not name.startswith(whole)} == files


def test_readme_names_every_technique():
    names = {technique.name for technique in techniques.all_techniques()}
    assert names <= first_column(README)


def test_the_packages_readme_names_its_folders_and_its_files():
    text = text_of("raykd/README.md")
    assert sorted(f"raykd/{n}" for n in re.findall(r"^\| \[(\w+)\]\(", text, re.M)) == FOLDERS
    there = {name.removeprefix("raykd/") for name in FILES if re.fullmatch(r"raykd/\w+\.py", name)}
    named = {name for name in first_column(text) if name.endswith(".py")}
    assert named == there - {"__init__.py"}


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def prose_of(name: str) -> str:
    return re.sub(r"```.*?```", "", text_of(name), flags=re.S)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_meets_a_file_and_a_heading(name):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(name)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            lost.append(link)
    assert lost == []


def anchors_of(document: Path) -> set[str]:
    prose = prose_of(os.path.relpath(document.resolve(), ROOT))
    return {slug(heading) for heading in re.findall(r"^#+ (.*)", prose, re.M)}


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_every_dotted_name_and_path_of_the_package_exists(name):
    """The changelog keeps the names of its time."""
    text = text_of(name)
    lost = [dotted for dotted in set(re.findall(r"\braykd(?:\.\w+)+", text)) if not found(dotted)]
    paths = re.findall(
        r"`((?:raykd|tests|pipelines|cluster|examples)/[\w./-]+\.\w+)`", prose_of(name)
    )
    assert lost == []
    assert [path for path in paths if path not in FILES] == []


def found(dotted: str) -> bool:
    """Whether a module, or an attribute of one, has this name."""
    module, _, attribute = dotted.rpartition(".")
    try:
        importlib.import_module(dotted)
    except ModuleNotFoundError:
        return module != "" and hasattr(importlib.import_module(module), attribute)
    return True


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, block) for name in DOCUMENTS for block in blocks_of("toml", text_of(name))],
)
def test_every_piece_of_a_recipe_is_one(name, block):
    raykd.Recipe.model_validate({"terms": {"ce": {}}} | tomllib.loads(block))


def table_of_keys(table: str) -> list[str]:
    """The table of a document that explains the keys of one table, of the top level if it is ""."""
    of_table = f" of `{table}`" if table else ""
    lines = [f"| key{of_table} | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key in recipe_keys():
        above, _, name = key.key.rpartition(".")
        if above == table and (table or key.type not in HEADINGS):
            default = "none" if key.default is None else f"`{toml_value(key.default)}`"
            default = "required" if key.type.endswith(REQUIRED) else default
            words = f"`{key.type.removesuffix(REQUIRED)}`"
            cells = [cell.replace("|", "\\|") for cell in (words, default, key.doc)]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


TABLES_OF_KEYS = sorted({key.key.rpartition(".")[0] for key in recipe_keys()} - {"teacher"})


@pytest.mark.parametrize("table", TABLES_OF_KEYS)
def test_the_recipes_readme_has_each_key_as_the_command_prints_it(table):
    lines = table_of_keys(table)
    text = text_of("raykd/recipe/README.md").splitlines()
    assert lines[0] in text
    first = text.index(lines[0])
    assert text[first : first + len(lines) + 1] == [*lines, ""]


def test_a_teacher_has_the_keys_of_a_student():
    """So that one table explains both; a student has two more."""
    assert raykd.Recipe.model_fields["student"].annotation is StudentRef
    assert raykd.Recipe.model_fields["teacher"].annotation == ModelRef | None
