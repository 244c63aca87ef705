import sys; sys.path.insert(0, "tests")
import time, json
from pathlib import Path
import pytest
pytestmark = pytest.mark.ray
import command
def test_a(scored, cluster, stocked, tiny, tmp_path):
    import os
    print(list(scored.rglob("*")))
    env = {"RAY_ADDRESS": cluster, "RAY_AUTH_MODE":"token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
    t=time.time()
    d = command.raykd(tmp_path, "train", tiny, "--out", stocked("a"), "--set", "scale.workers=2", **env)
    print(d.code, d.out, d.err); print("2 workers", time.time()-t)
    t=time.time()
    fired = tmp_path/"fired"
    env["RAY_JOB_CONFIG_JSON_ENV_VAR"]=json.dumps({"runtime_env": {"env_vars": {"RAYKD_FAULT":"train:step=25,rank=1,arm=student-0","RAYKD_FAULT_FIRED":str(fired)}}})
    d = command.raykd(tmp_path, "train", tiny, "--out", stocked("b"), "--set", "scale.workers=2", **env)
    print(d.code, d.out, d.err, fired.exists()); print("2 workers fault", time.time()-t)
    t=time.time()
    d = command.raykd(tmp_path, "train", tiny, "--out", stocked("c"))
    print(d.code, d.out, d.err); print("local", time.time()-t)
    import hashlib
    for p in sorted(tmp_path.rglob("weights.safetensors")): print(p, hashlib.sha256(p.read_bytes()).hexdigest()[:12])
