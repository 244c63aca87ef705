"""What lies below cluster/ fits the schemas of those who read it, and lets nobody in."""

import copy
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster_fields
import pytest
import yaml
from jsonschema import Draft7Validator, Draft202012Validator

from raykd.stages.load import load

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
FILES = [
    path for path in sorted(CLUSTER.rglob("*")) if path.is_file() and ".local" not in path.parts
]
TEXTS = {path.relative_to(CLUSTER).as_posix(): path.read_text() for path in FILES}
DOCKERFILE = TEXTS["Dockerfile"]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(TEXTS[name]))


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    """The cluster that a RayJob or a RayCluster describes."""
    return document["spec"].get("rayClusterSpec", document["spec"])


def faults(schema: dict[str, Any], document: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(schema).iter_errors(document)]


RAY = [document for name in TEXTS if "kuberay" in name for document in documents(name)]
CLUSTERS = [document for document in RAY if document["apiVersion"] == "ray.io/v1"]


@pytest.mark.parametrize("document", RAY, ids=lambda document: document["kind"])
def test_kuberays_documents_have_keys_that_it_reads(document):
    assert faults(cluster_fields.document(document["kind"]), document) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job: job["spec"].update(backofLimit=2),
        lambda job: job["spec"].update(submissionMode="HttpMode"),
        lambda job: job["spec"].pop("rayClusterSpec"),
        lambda job: cluster_of(job)["workerGroupSpecs"][0].pop("maxReplicas"),
        lambda job: cluster_of(job)["workerGroupSpecs"][0].update(minReplicas="1"),
        lambda job: cluster_of(job)["headGroupSpec"]["template"]["spec"].update(volume=[]),
    ],
)
def test_a_misspelt_key_is_found(spoil: Callable[[dict[str, Any]], Any]):
    (job,) = [copy.deepcopy(document) for document in RAY if document["kind"] == "RayJob"]
    spoil(job)
    assert len(faults(cluster_fields.document("RayJob"), job)) == 1


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.mark.parametrize("document", CLUSTERS, ids=lambda document: document["kind"])
def test_a_cluster_asks_for_a_token_and_gives_no_right_that_it_can_do_without(document):
    cluster = cluster_of(document)
    assert cluster["authOptions"] == {"mode": "token"}
    for group in groups(cluster):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["terminationGracePeriodSeconds"] >= 120
        names = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == names
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
    (gpus,) = cluster["workerGroupSpecs"]
    assert gpus["minReplicas"] <= gpus["replicas"] <= gpus["maxReplicas"]
    assert gpus["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_a_job_has_an_end_tries_again_and_leaves_no_cluster():
    (job,) = [document for document in RAY if document["kind"] == "RayJob"]
    keys = ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished")
    assert all(job["spec"][key] > 0 for key in keys)
    assert job["spec"]["shutdownAfterJobFinishes"] is True


def test_job_and_standing_cluster_are_the_same_cluster():
    """But for the recipe, which is mounted where the job is known."""
    job, standing = (copy.deepcopy(cluster_of(document)) for document in CLUSTERS)
    if CLUSTERS[0]["kind"] == "RayCluster":
        job, standing = standing, job
    for group in groups(job):
        pod = group["template"]["spec"]
        pod["volumes"] = [one for one in pod["volumes"] if one["name"] != "recipe"]
        mounts = pod["containers"][0]["volumeMounts"]
        pod["containers"][0]["volumeMounts"] = [one for one in mounts if one["name"] != "recipe"]
    for cluster in (job, standing):
        for key in ("replicas", "minReplicas"):
            cluster["workerGroupSpecs"][0].pop(key)
    assert job == standing


def settings_of(command: str) -> list[str]:
    words = shlex.split(command.replace("BUCKET", "lab").replace("$SKYPILOT_NUM_NODES", "3"))
    return [words[place + 1] for place, word in enumerate(words) if word == "--set"]


def test_the_commands_of_job_and_task_set_keys_that_a_recipe_has():
    (job,) = [document for document in RAY if document["kind"] == "RayJob"]
    (task,) = documents("skypilot.yaml")
    (line,) = re.findall(r"^raykd run (?:.*\\\n)*.*$", task["run"], re.M)
    for command in (job["spec"]["entrypoint"], line.replace("\\\n", " ")):
        recipe = load(ROOT / "examples" / "gesture" / "recipe.toml", settings_of(command))
        assert recipe.scale.store == "s3://lab/stores"
        assert recipe.scale.workers[0] < recipe.scale.workers[1]


def test_ray_up_fits_rays_own_schema_and_its_nodes_share_a_token():
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    (found,) = documents("ray-up.yaml")
    assert [error.message for error in Draft7Validator(schema).iter_errors(found)] == []
    assert list(Draft7Validator(schema).iter_errors(found | {"max_worker": 4}))
    assert "/home/ray/.ray/auth_token" in found["file_mounts"]
    assert "--env RAY_AUTH_MODE=token" in found["docker"]["run_options"]
    assert "--dashboard-host=127.0.0.1" in " ".join(found["head_start_ray_commands"])
    assert found["provider"]["use_internal_ips"] is True
    gpus = found["available_node_types"]["gpu"]
    assert gpus["min_workers"] <= gpus["max_workers"] == found["max_workers"]


def test_skypilots_task_has_keys_that_it_reads_and_holds_no_secret():
    (task,) = documents("skypilot.yaml")
    assert faults(cluster_fields.SKYPILOT, task) == []
    assert faults(cluster_fields.SKYPILOT, task | {"node": 3})
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None}
    done = subprocess.run(["bash", "-n"], input=task["run"], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_runtime_environment_is_one_that_ray_takes():
    from ray.runtime_env import RuntimeEnv

    (found,) = documents("runtime_env.yaml")
    assert RuntimeEnv(**found, _validate=True)
    with pytest.raises(TypeError):
        RuntimeEnv(**found | {"env_vars": {"OMP_NUM_THREADS": 1}}, _validate=True)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments; lines that go on are joined."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.M))
    for line in filter(None, joined.splitlines()):
        name, _, rest = line.partition(" ")
        yield name, rest


def complaints(text: str) -> list[str]:
    """What is wrong with a Dockerfile, by a few of hadolint's rules."""
    lines = list(instructions(text))
    found = []
    users = [rest for name, rest in lines if name == "USER"]
    if not users or re.match(r"(root|0)\b", users[-1]):
        found.append("DL3002: the last user is root")
    for name, rest in lines:
        if name == "FROM" and not re.search(r":[\w.${}-]*\d|:\$\{\w+\}-", rest):
            found.append("DL3006: an image without a version")
        if name == "FROM" and ":latest" in rest:
            found.append("DL3007: latest")
        if name == "ADD":
            found.append("DL3020: ADD in place of COPY")
        if name == "WORKDIR" and not rest.startswith("/"):
            found.append("DL3000: a relative WORKDIR")
        if name == "COPY" and rest.split()[-2:-1] == ["."]:
            found.append("the whole folder is copied")
        if name == "RUN":
            rules = {
                "DL3004: sudo": r"\bsudo\b",
                "DL3005: an upgrade of everything": r"apt-get (dist-)?upgrade",
                "DL3015: recommended packages": r"apt-get install(?!.*--no-install-recommends)",
                "DL3042: pip keeps a cache": r"pip install(?!.*--no-cache-dir)",
                "DL4006: a pipe hides a failure": r"(?<!\|)\|(?!\|)",
            }
            found += [rule for rule, sign in rules.items() if re.search(sign, rest)]
        if name in ("ENV", "ARG") and re.search(r"(?i)(password|token|secret|_key)\w*=", rest):
            found.append("a secret stays in the image")
    return found


def test_the_dockerfile_breaks_no_rule():
    assert complaints(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("FROM rayproject/ray:latest", "DL3007"),
        ("FROM rayproject/ray", "DL3006"),
        ("USER root", "DL3002"),
        ("ADD raykd raykd", "DL3020"),
        ("COPY . .", "the whole folder"),
        ("RUN sudo true", "DL3004"),
        ("RUN pip install raykd", "DL3042"),
        ("RUN curl https://example.org | sh", "DL4006"),
        ("RUN apt-get install nfs-common", "DL3015"),
        ("ENV AWS_SECRET_ACCESS_KEY=mine", "a secret"),
    ],
)
def test_each_rule_finds_what_breaks_it(line, rule):
    assert any(found.startswith(rule) for found in complaints(f"{DOCKERFILE}{line}\n"))


def test_one_version_of_ray_is_on_all_nodes_and_is_one_that_raykd_takes():
    from packaging.requirements import Requirement

    (version,) = re.findall(r"^ARG RAY=(.+)$", DOCKERFILE, re.M)
    assert {cluster_of(document)["rayVersion"] for document in CLUSTERS} == {version}
    wanted = re.search(r'"(ray\[.*?)"', (ROOT / "pyproject.toml").read_text())
    assert wanted
    assert version in Requirement(wanted[1]).specifier


def test_what_the_image_is_built_from_is_there():
    for name, rest in instructions(DOCKERFILE):
        if name == "COPY":
            sources = [word for word in rest.split()[:-1] if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources)
            kept = TEXTS["Dockerfile.dockerignore"].splitlines()
            assert all(f"!{source}" in kept for source in sources)


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_listens_to_everybody_floats_or_is_secret(name):
    signs = (
        r"0\.0\.0\.0",
        r":latest\b",
        r"AKIA[0-9A-Z]{16}",
        r"-----BEGIN",
        r"(?i)(password|secret_access_key|auth_token)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{8}",
        r"LoadBalancer|NodePort|hostPort|hostNetwork",
    )
    assert [sign for sign in signs if re.search(sign, TEXTS[name])] == []


def test_readme_tells_of_every_file():
    for name in set(TEXTS) - {"README.md", "Dockerfile.dockerignore"}:
        assert f"`{name}`" in TEXTS["README.md"], name
