"""Every file in launch/ is parsed and held to the schema of what reads it."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from dockerfile_parse import DockerfileParser

from qwenimg_dist.commands.main import COMMANDS
from qwenimg_dist.compose import load_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
KUBERAY = {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob"}
# The fields of ray.io/v1 that are used here. Both files were checked whole against the CRDs of KubeRay 1.4 to 1.7: from
# 1.6.0 on these know every field of them.
_CLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
_AUTH_FIELDS = {"mode": (1, 5), "secretName": (1, 6), "enableK8sTokenAuth": (1, 6)}
"""Field -> the KubeRay that brought it. `kubectl apply` refuses what the cluster's CRD does not know."""
_HEAD_FIELDS = {"rayStartParams", "template"}
_GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
_JOB_FIELDS = {
    "entrypoint",
    "runtimeEnvYAML",
    "backoffLimit",
    "submitterConfig",
    "activeDeadlineSeconds",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
}


def _load(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def _cluster_spec(name: str) -> dict[str, Any]:
    spec = _load(f"kuberay/{name}")["spec"]
    spec = spec.get("rayClusterSpec", spec)
    assert isinstance(spec, dict)
    return spec


def _pods(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["template"]


def test_all_files_are_known_here() -> None:
    found = {str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*") if path.is_file()}
    assert found == {"README.md", "Dockerfile", "runtime_env.yaml", "ray_cluster.yaml"} | {
        f"kuberay/{k}" for k in KUBERAY
    }


def test_the_runtime_env_is_what_ray_takes_and_installs_nothing() -> None:
    from ray.runtime_env import RuntimeEnv

    plain = _load("runtime_env.yaml")
    RuntimeEnv(**plain)  # refuses unknown keys and wrong types
    assert set(plain) == {"excludes", "env_vars"}, "packages belong into the image"
    assert all(isinstance(value, str) for value in plain["env_vars"].values())
    assert int(plain["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 600, "a large save takes minutes"
    assert not [name for name in plain["env_vars"] if name.endswith(("_KEY", "_TOKEN"))]


def test_the_runtime_env_takes_the_package_along_and_nothing_large(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    for name in ("runs", "demo", "outputs", ".git", ".venv", "qwenimg_dist/demo", "conf/stage"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file.py").write_text("x")
    (tmp_path / "latents.tar").write_text("x")
    package = tmp_path.parent / "package.zip"
    create_package(str(tmp_path), package, include_gitignore=True, excludes=_load("runtime_env.yaml")["excludes"])
    with zipfile.ZipFile(package) as archive:
        taken = {name for name in archive.namelist() if not name.endswith("/")}
    assert taken == {"qwenimg_dist/demo/file.py", "conf/stage/file.py"}


def test_rays_launcher_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    plain = _load("ray_cluster.yaml")
    prepared = prepare_config(plain)
    validate_config(prepared)
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == len(plain["provider"]["worker_ips"])
    starts = [line for line in plain["head_start_ray_commands"] + plain["worker_start_ray_commands"] if "start" in line]
    assert starts
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in plain["head_start_ray_commands"][1]
    for option in ("--shm-size=", "--env-file=", "--env=HF_HOME="):  # the file has the keys
        assert any(given.startswith(option) for given in plain["docker"]["run_options"]), option


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_have_known_fields_tokens_and_room_to_end(name: str) -> None:
    whole, spec = _load(f"kuberay/{name}"), _cluster_spec(name)
    assert (whole["apiVersion"], whole["kind"]) == ("ray.io/v1", KUBERAY[name])
    assert set(spec) == _CLUSTER_FIELDS
    assert spec["authOptions"]["mode"] == "token"
    needed = max(_AUTH_FIELDS[field] for field in spec["authOptions"])
    for text in ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "README.md"):
        told = re.findall(r"KubeRay (\d+)\.(\d+)", (LAUNCH / text).read_text(encoding="utf-8"))
        assert [(int(major), int(minor)) for major, minor in told] == [needed], f"{text} names another KubeRay"
    assert set(spec["headGroupSpec"]) == _HEAD_FIELDS
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group in spec["workerGroupSpecs"]:
        assert set(group) == _GROUP_FIELDS
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"], "a gang waits for its last machine"


@pytest.mark.parametrize("registry", ["ghcr.io/team/images", "10.0.0.1:5000"])
def test_the_readmes_line_puts_ones_registry_into_all_files(tmp_path: Path, registry: str) -> None:
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (command,) = re.findall(r"`(grep -rl registry[^`]*)`", (LAUNCH / "README.md").read_text())
    assert "YOURS" in command
    subprocess.run(["bash", "-c", command.replace("YOURS", registry)], cwd=tmp_path, check=True)
    spec = yaml.safe_load((tmp_path / "launch/kuberay/raycluster.yaml").read_text())["spec"]
    assert {pod["spec"]["containers"][0]["image"] for pod in _pods(spec)} == {f"{registry}/qwenimg-dist:0.1.0"}
    left = [file for file in (tmp_path / "launch").rglob("*.yaml") if "registry.example.com" in file.read_text()]
    assert left == []


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_are_valid_kubernetes_with_shared_memory(name: str) -> None:
    for template in _pods(_cluster_spec(name)):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
        kubernetes_validate.validate(pod, desired_version="1.33", strict=True)
        shm = next(volume for volume in template["spec"]["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"
        assert template["spec"]["terminationGracePeriodSeconds"] >= 600
        for container in template["spec"]["containers"]:
            assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
            keys = [variable for variable in container["env"] if variable["name"].endswith(("_KEY", "_TOKEN"))]
            assert [list(variable) for variable in keys] == [["name", "valueFrom"]] * 2, "keys come from a secret"


@pytest.mark.parametrize("name", KUBERAY)
def test_a_pod_that_ends_has_time_to_tell_ray_and_to_be_left(name: str) -> None:
    from ray.scripts.scripts import drain_node

    spec = _cluster_spec(name)
    stop_wait_s = int(_load("runtime_env.yaml")["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert spec["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= stop_wait_s
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        shell = container["lifecycle"]["preStop"]["exec"]["command"]
        assert shell[:2] == ["/bin/sh", "-c"]
        told, _, waited = shell[2].partition(" && sleep ")  # a head that is gone must not hold the GPUs
        words = shlex.split(told)
        assert words[:4] == ["timeout", "60", "ray", "drain-node"]
        given = drain_node.make_context("drain-node", words[4:]).params  # refuses what Ray does not know
        assert given["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
        assert 600 <= given["deadline_remaining_seconds"] <= int(waited), "a large save takes minutes"
        assert int(words[1]) + int(waited) < pod["terminationGracePeriodSeconds"]


def test_the_job_has_the_clusters_pods_and_the_runtime_envs_variables() -> None:
    job = _load("kuberay/rayjob.yaml")["spec"]
    assert set(job) == _JOB_FIELDS
    assert job["rayClusterSpec"] == _cluster_spec("raycluster.yaml")
    assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"] == _load("runtime_env.yaml")["env_vars"]
    assert job["backoffLimit"] > 0
    assert job["submitterConfig"]["backoffLimit"] == 0
    assert job["activeDeadlineSeconds"] > 0
    assert job["shutdownAfterJobFinishes"]
    assert job["ttlSecondsAfterFinished"] > 0


def _entrypoints() -> list[str]:
    """Every `python -m qwenimg_dist ...` of these files and of README.md's, as one line each."""
    texts = [_load("kuberay/rayjob.yaml")["spec"]["entrypoint"]]
    for readme in (LAUNCH / "README.md", ROOT / "README.md"):
        joined = readme.read_text(encoding="utf-8").replace("\\\n", " ")
        texts += [
            line[line.index("python -m qwenimg_dist") :]
            for line in joined.splitlines()
            if "-- " in line and "python -m qwenimg_dist" in line and "..." not in line
        ]
    return texts


@pytest.mark.parametrize("entrypoint", _entrypoints())
def test_entrypoints_compose(entrypoint: str) -> None:
    words = shlex.split(entrypoint)
    assert words[:3] == ["python", "-m", "qwenimg_dist"]
    assert words[3] in COMMANDS
    config = load_config([word for word in words[4:] if "=" in word or word.startswith("~")])
    assert not set("'\"[]{}$") & set(entrypoint), "these get mangled on the way"
    if words[3] in ("ckpt", "sample"):  # in one process
        return
    gpus = sum(
        group["replicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for group in _cluster_spec("raycluster.yaml")["workerGroupSpecs"]
    )
    producing = config.cluster.producers * config.cluster.gpus_per_producer
    assert config.cluster.ranks + (producing if words[3] in ("run", "doctor") else 0) == gpus


def test_the_image_installs_torch_alone_first_and_does_not_run_as_root() -> None:
    parser = DockerfileParser(fileobj=io.BytesIO((LAUNCH / "Dockerfile").read_bytes()))
    steps = [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]
    users = [value for name, value in steps if name == "USER"]
    assert users[-1] == "ray"
    installs = [value for name, value in steps if name == "RUN" and "pip install" in value]
    assert "TORCH" in installs[0]
    assert "qwenimg-dist" in installs[1]
    base = next(value for name, value in steps if name == "ARG" and value.startswith("BASE="))
    version = _cluster_spec("raycluster.yaml")["rayVersion"]
    assert f":{version}-" in base, "head and nodes need one version of Ray"
    assert f"ray[default]=={version}" in (LAUNCH / "README.md").read_text(), "and so do those who submit"
    copied = {value.split()[-2] for name, value in steps if name == "COPY"}
    assert {"qwenimg_dist", "producers", "consumers", "conf"} <= copied
    assert all((ROOT / word).exists() for name, value in steps if name == "COPY" for word in value.split()[1:-1])
