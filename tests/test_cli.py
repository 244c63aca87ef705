"""The command line's contract: a mistake is one screen with its exit code, stdout is JSON alone,
signals lose no work.

Each command runs in a process of its own, with its real exit code and its real stdout and stderr.
"""

import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import ROOT, left_in, raykd, start, until

OWN = """
name = "own"
technique = "none"
[data]
source = "./rows"
[student.settings]
width = 8
[optim]
steps = 600
batch = 8
evaluate_every = 20
[scale]
checkpoint_every = 100
"""
SCREEN = 25


def rows() -> list[dict[str, Any]]:
    """Two classes in three splits, four rows each, eight steps of two channels."""
    wave = [[[math.sin(i + t), math.cos(i * t)] for t in range(8)] for i in range(24)]
    return [
        {"inputs": steps, "label": "ab"[i % 2], "split": ("train", "val", "test")[i % 3]}
        for i, steps in enumerate(wave)
    ]


def spoilt(name: str) -> list[dict[str, Any]]:
    """`rows`, with the one fault that `name` names."""
    found = rows()
    match name:
        case "nan":
            found[5]["inputs"][0][1] = math.nan
        case "outside":
            found[5]["label"] = "c"
        case "column":
            found = [
                {"features": row["inputs"], "label": row["label"], "split": row["split"]}
                for row in found
            ]
        case "empty":
            found = [row for row in found if row["split"] != "val"]
        case "absent":
            found = [row for row in found if (row["split"], row["label"]) != ("test", "b")]
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with a sound recipe over Parquet rows, rows with one fault each, and weights that
    are a pickle.
    """
    folder = tmp_path_factory.mktemp("user")
    (folder / "recipe.toml").write_text(OWN)
    for name in ("rows", "nan", "outside", "column", "empty", "absent"):
        (folder / name).mkdir()
        pq.write_table(pa.Table.from_pylist(spoilt(name)), folder / name / "part.parquet")
    (folder / "pickle.pt").write_bytes(pickle.dumps({"weight": [1.0]}))
    (folder / "pickle.safetensors").write_bytes(pickle.dumps({"weight": [1.0]}))
    return folder


BAD = {
    "misspelt key": (2, "optim.stepz", ["optim.stepz=3"]),
    "wrong type": (2, "optim.steps", ['optim.steps="many"']),
    "impossible batch": (2, "optim.batch", ["optim.batch=2", "scale.workers=4"]),
    "unknown technique": (2, "Did you mean vanilla?", ["technique=vanila"]),
    "hostile import": (2, "--allow-import subprocess", ["data.source=subprocess:getoutput"]),
    "label outside": (3, "data.classes", ["data.source=./outside", 'data.classes=["a", "b"]']),
    "NaN": (3, "rows 5", ["data.source=./nan"]),
    "no column": (3, "inputs", ["data.source=./column"]),
    "empty split": (3, "'val' has 0 rows", ["data.source=./empty"]),
}
BAD_TEACHER = {
    "weights do not fit": (2, "do not fit the module", ["teacher.settings.width=64"]),
    "a pickle": (2, "not a .safetensors file", ["teacher.weights=pickle.pt"]),
    "a renamed pickle": (
        2,
        "not a readable safetensors file",
        ["teacher.weights=pickle.safetensors"],
    ),
}


def is_one_screen(err: str) -> bool:
    return 0 < len(err.splitlines()) < SCREEN and "Traceback" not in err


@pytest.mark.parametrize("fault", [*BAD, *BAD_TEACHER])
def test_a_mistake_is_one_screen_with_its_exit_code_and_leaves_nothing_to_trust(
    here, tiny, tmp_path, fault
):
    code, words, sets = (BAD | BAD_TEACHER)[fault]
    recipe = tiny if fault in BAD_TEACHER else "recipe.toml"
    options = [part for text in sets for part in ("--set", text)]
    done = raykd(tmp_path, "run", recipe, "--out", tmp_path / "out", *options, cwd=here)
    assert done.code == code, done.err
    assert words in done.err
    assert is_one_screen(done.err)
    assert done.out == ""
    assert left_in(tmp_path / "out") == []


def test_a_recipe_that_is_not_there_is_a_usage_error_of_the_pipelines_too(tmp_path):
    asked = [sys.executable, "-m", "pipelines.run", "nowhere.toml", "--out", str(tmp_path / "out")]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "nowhere.toml cannot be read" in done.stderr
    assert is_one_screen(done.stderr)
    assert not (tmp_path / "out").exists()


def test_help_loads_nothing_heavy_and_documents_the_exit_codes():
    heavy = {"torch", "ray", "mlflow", "numpy", "pyarrow", "raykd.recipe", "raykd.stages"}
    code = "import sys; sys.argv = ['raykd', '--help']; from raykd.cli import main\ntry: main()\n"
    code += f"finally: print(sorted({heavy} & set(sys.modules)))"
    asked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert asked.stdout.endswith("[]\n")
    for number in ("2 usage", "3 data", "4 quality", "5 infrastructure", "130/143"):
        assert number in " ".join(asked.stdout.split())


@pytest.mark.parametrize("verb", ["check", "techniques", "doctor"])
def test_json_is_one_value_alone_on_stdout(here, tmp_path, verb):
    recipe = ["recipe.toml", "--out", tmp_path] if verb == "check" else []
    done = raykd(tmp_path, verb, *recipe, "--json", cwd=here)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["stages"] if verb == "check" else found[0]["name"]
    assert done.out.count("\n") == 1


def test_the_doctor_says_what_to_type_for_a_server_that_is_down():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    asked = [sys.executable, "-m", "raykd.cli", "doctor", "--uri", f"http://127.0.0.1:{port}"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        asked, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 5
    assert f"start the server at 127.0.0.1:{port}" in done.stdout
    assert is_one_screen(done.stderr)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_training_with_its_code_and_the_rerun_continues(here, tmp_path, sent, code):
    asked = ("train", "recipe.toml", "--out", tmp_path / "out")
    running = start(tmp_path, *asked, cwd=here)
    until(lambda: list((tmp_path / "out").rglob("step-*.safetensors")))
    os.kill(running.pid, sent)
    done = running.wait()
    assert done.code == code, done.err
    assert is_one_screen(done.err)
    assert not list((tmp_path / "out").rglob("arm.json"))
    assert raykd(tmp_path, *asked, cwd=here).code == 0
    lines = (next((tmp_path / "out").glob("own-*")) / "progress.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps.count(20) == 1  # what came before the checkpoint was not done again
    assert steps[-1] == 600


def test_a_second_process_on_a_run_says_so(here, tmp_path):
    asked = ("train", "recipe.toml", "--out", tmp_path / "out", "--set", "optim.steps=100000")
    first = start(tmp_path, *asked, cwd=here)
    until(lambda: list((tmp_path / "out").rglob("step-*.safetensors")))
    second = raykd(tmp_path, *asked, cwd=here)
    os.kill(first.pid, signal.SIGTERM)
    assert second.code == 5
    assert "is being worked on by another process" in second.err
    assert is_one_screen(second.err)
    assert first.wait().code == 143


def test_a_training_that_diverges_names_its_arm_and_terms(tmp_path):
    sets = ("--set", "optim.learning_rate=1e30", "--set", "optim.clip=1e30")
    done = raykd(
        tmp_path,
        "train",
        "examples/gesture/teacher.toml",
        "--smoke",
        *sets,
        "--out",
        tmp_path / "runs",
    )
    assert done.code == 3
    assert "arm student-0: the gradient is not finite at step" in done.err
    assert "lower optim.learning_rate" in done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "runs").rglob("arm.json"))
