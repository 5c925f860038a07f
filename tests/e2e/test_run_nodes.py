"""`run` on a Ray cluster of three raylets on loopback: a machine is lost, another joins; the head itself is killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from run_command import BOUND, ending, kept_keys, num_ready, num_steps, ray_processes, real_keys, start, until, words
from small_run import lines, overrides, write_input
from undisturbed import write_source

from qwenimg_dist.data.facets import Dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
HERE = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 * 1024**2}
UNITS, STEPS = 20, 24


def start_cluster() -> Cluster:
    head = {**HERE, "num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=2, **HERE)
    return cluster


def end_cluster(cluster: Cluster) -> None:
    """As if all its machines lost power."""
    for node in [*cluster.worker_nodes]:
        cluster.remove_node(node, allow_graceful=False)
    cluster.remove_node(cluster.head_node, allow_graceful=False)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    # All listen on loopback alone. Unset, a driver would use the token that a user may have, and the others not.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # A driver would look for 127.0.0.1 under the machine's other address.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    made = start_cluster()
    yield made
    if made.head_node is not None:
        end_cluster(made)


def with_a_rank(cluster: Cluster) -> Any:
    """A machine, not the head, that a rank runs on."""
    for node in cluster.worker_nodes:
        raylet = node.all_processes["raylet"][0].process
        if ray_processes(raylet.pid, "TrainWorker"):
            return node
    raise AssertionError("no rank runs beside the head")


def command(root: Path, cluster: Cluster) -> list[str]:
    extra = (f"train.steps={STEPS}", "checkpoint.every=2", f"cluster.max_ahead_bytes={BOUND}")
    return words(root, "run", *extra, f"cluster.address={cluster.address}", "cluster.max_restarts=8")


def assert_whole(root: Path) -> None:
    """Every step once, and the first epoch has every sample once."""
    run = root / "run"
    samples = lines(run / "samples.jsonl")
    assert [line["step"] for line in samples] == list(range(1, STEPS + 1))
    first = [line["step"] for line in lines(run / "metrics.jsonl") if line["train/epoch"] == 0]
    kept = kept_keys(Dataset.open(root / "data"))
    assert len(kept) == 5 * UNITS - 1
    assert real_keys(samples, first) == kept  # type: ignore[arg-type]


def test_a_machine_is_lost_and_another_one_joins(tmp_path: Path, cluster: Cluster) -> None:
    write_source(tmp_path / "source", 5 * UNITS, 5 * UNITS)
    log = tmp_path / "run" / "train.log"
    with ending(start("run", *command(tmp_path, cluster))) as process:
        until(lambda: num_steps(tmp_path, "run") >= 3, process)
        assert num_ready(tmp_path) < UNITS
        cluster.remove_node(with_a_rank(cluster), allow_graceful=False)
        until(lambda: "the gang failed" in log.read_text(), process)
        cluster.add_node(num_cpus=2, **HERE)
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    assert_whole(tmp_path)


def drain(cluster: Cluster, node: Any, deadline_s: int) -> None:
    """As the pods of launch/kuberay do when they are told to end."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address]
    command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "taken away", "--deadline-remaining-seconds", str(deadline_s)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_a_machine_that_is_announced_to_go_costs_no_step(tmp_path: Path, cluster: Cluster) -> None:
    """It is drained, not killed: the ranks save at once, and go on elsewhere long before the deadline."""
    write_source(tmp_path / "source", 5 * UNITS, 5 * UNITS)
    log = tmp_path / "run" / "train.log"
    with ending(start("run", *command(tmp_path, cluster), "checkpoint.every=1000")) as process:
        until(lambda: num_steps(tmp_path, "run") >= 3, process)
        leaving = with_a_rank(cluster)
        drain(cluster, leaving, 600)
        until(lambda: "saved step" in log.read_text(), process)
        cluster.add_node(num_cpus=2, **HERE)
        raylet = leaving.all_processes["raylet"][0].process
        until(lambda: not ray_processes(raylet.pid, "TrainWorker"), process)
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    assert "a machine is taken away (Ray drains it): the ranks have saved, 2 start on what stays" in err
    assert "the gang failed" not in log.read_text()
    (first, again) = lines(tmp_path / "run" / "starts.jsonl")
    assert (first["ranks"], first["step"], again["ranks"]) == (2, 0, 2)
    assert 3 <= int(str(again["step"])) < STEPS
    assert_whole(tmp_path)


def test_a_machine_is_lost_and_none_takes_its_place(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would place the gang again and again, for ever; the others' processors are given back."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    write_input(tmp_path)
    steps = ("train.steps=400", "checkpoint.every=2")
    where = ("cluster.ranks=2", "cluster.cpus_per_rank=2", f"cluster.address={cluster.address}")
    command = [*overrides(tmp_path, "run", *steps), *where, "cluster.rank_wait_s=12"]
    with ending(start("train", *command)) as process:
        until(lambda: num_steps(tmp_path, "run") >= 3, process)
        lost = with_a_rank(cluster)
        cluster.remove_node(lost, allow_graceful=False)
        out, err = process.communicate(timeout=400)
    assert process.returncode == 1, out + err
    log = (tmp_path / "run" / "train.log").read_text()
    assert "restart 1 of 3, from the newest valid checkpoint (step " in log
    missing = "there is room for 1 of 2 ranks on the 2 machines that Ray has; gone: "
    assert f" s so far, up to 12 s: {missing}" in log
    assert f"({lost.node_ip_address})" in log.partition(missing)[2]
    assert f"error: training failed: {missing}" in err
    assert "The same command goes on from the newest valid checkpoint" in err


def test_the_head_is_killed_and_the_same_command_goes_on_on_a_new_one(tmp_path: Path, cluster: Cluster) -> None:
    write_source(tmp_path / "source", 5 * UNITS, 5 * UNITS)
    with ending(start("run", *command(tmp_path, cluster))) as process:
        until(lambda: num_steps(tmp_path, "run") >= 3, process)
        assert num_ready(tmp_path) < UNITS
        cluster.remove_node(cluster.head_node, allow_graceful=False)
        process.communicate(timeout=400)
    assert process.returncode not in (0, None)
    again = start_cluster()
    try:
        # The other machines of the old cluster may still be at work: locks keep them apart.
        with ending(start("run", *command(tmp_path, again))) as process:
            out, err = process.communicate(timeout=900)
        assert process.returncode == 0, out + err
        assert_whole(tmp_path)
    finally:
        end_cluster(again)
        for node in [*cluster.worker_nodes]:
            cluster.remove_node(node, allow_graceful=False)
