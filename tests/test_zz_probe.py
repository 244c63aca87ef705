import sys; sys.path.insert(0, "tests")
import time, json
from pathlib import Path
import pytest
pytestmark = pytest.mark.ray
import command
def test_a(scored, cluster, stocked, tiny, tmp_path):
    import os
    env = {"RAY_ADDRESS": cluster, "RAY_AUTH_MODE":"token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
    def go(name, *a, **e):
        t=time.time(); d = command.raykd(tmp_path, *a, **e); print("=====", name, d.code, round(time.time()-t,1)); print(d.out); print("-- err"); print(d.err)
    go("local", "train", tiny, "--out", stocked("c"))
    go("bad teacher", "run", tiny, "--out", tmp_path/"x", "--set", "teacher.settings.width=64", **env)
    go("diverge 1", "train", tiny, "--out", stocked("d"), "--set", "optim.learning_rate=1e30", **env)
    go("diverge 2", "train", tiny, "--out", stocked("e"), "--set", "optim.learning_rate=1e30", "--set", "scale.workers=2", **env)
    go("bad student 2", "train", tiny, "--out", stocked("f"), "--set", "student.settings.width=7", "--set", "scale.workers=2", **env)
    go("search", "tune", tiny, "--out", stocked("g"), "--set", "search={trials=4,grace=20,\"optim.learning_rate\"={loguniform=[1e-3,1e-2]}}", **env)
    go("search bad", "tune", tiny, "--out", stocked("h"), "--set", "search={trials=4,grace=20,\"optim.learning_rate\"={loguniform=[1e29,1e30]}}", **env)
