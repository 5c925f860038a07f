"""One line says which rank failed and why; failures count from the last new checkpoint; a wait without a gang ends."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2.api.exceptions import ControllerError
from written_checkpoint import write_bare_checkpoint

from consumers.checkpoint_files import STATE, checkpoints_dir, step_name
from qwenimg_dist.commands import train_deaths
from qwenimg_dist.commands.train import Ended, Training
from qwenimg_dist.commands.train_deaths import Deaths, GangLostError, GangStoppedError, cause_of, describe
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import ClusterConfig

LOST_PEER = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:24239")


def noticed(error: Exception) -> Exception:
    """As Ray Train hands over the death of a worker process."""
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", failure=error)


def told(errors: dict[int, Exception]) -> str:
    return describe({rank: cause_of(error) for rank, error in errors.items()})


def test_the_dead_rank_is_named_before_those_that_lost_it() -> None:
    line = told({0: LOST_PEER, 3: noticed(ActorDiedError())})
    assert line.startswith("the gang failed: rank 3: its process was killed (SIGKILL")
    assert line.endswith(", 1 more failed with it")
    assert "\n" not in line


def test_host_memory_is_named_with_the_way_out() -> None:
    line = told({1: noticed(OutOfMemoryError("Task was killed due to the node running low on memory."))})
    assert "rank 1: Ray ended its process because its machine ran out of memory" in line
    assert "run fewer ranks per machine" in line


class Run:
    """The callback of one command, as Ray Train's controller calls it, with a clock and machines of the test's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.folder = folder
        self.now_s = 0.0
        self.nodes = [node(number) for number in range(2)]
        monkeypatch.setattr(train_deaths.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(train_deaths.ray, "nodes", lambda: self.nodes)
        cluster = ClusterConfig.model_validate({"ranks": 4, "cpus_per_rank": 2, **settings})
        self.deaths = pickle.loads(pickle.dumps(Deaths(folder, folder / "train.log", folder / ".stop-1", cluster)))

    def place(self) -> None:
        self.deaths.before_worker_group_start(SimpleNamespace(num_workers=4))

    def start(self) -> None:
        self.place()
        self.deaths.after_worker_group_start(None)

    def look(self, errors: dict[int, Exception]) -> None:
        statuses = {rank: WorkerStatus(running=True, error=errors.get(rank)) for rank in range(4)}
        self.deaths.after_worker_group_poll_status(WorkerGroupPollStatus(worker_statuses=statuses))

    def fail(self, error: Exception = LOST_PEER) -> None:
        """A gang starts, and its ranks are looked at until it is taken down."""
        self.start()
        self.look({})
        self.look({2: error})

    def lines(self) -> list[str]:
        return (self.folder / "train.log").read_text().splitlines()


def node(number: int) -> dict[str, Any]:
    return {
        "NodeID": f"id-{number}",
        "NodeManagerHostname": f"gpu-{number}",
        "NodeManagerAddress": f"10.0.0.{number}",
        "Resources": {"CPU": 4.0},
        "Alive": True,
    }


def test_failures_count_from_the_last_new_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three faults in weeks with progress between them are no reason to end; as many at one place are."""
    run = Run(tmp_path, monkeypatch, max_restarts=2)
    run.fail()
    run.fail()
    for step in (10, 20, 30):
        write_bare_checkpoint(tmp_path, step, {})
        run.fail()
        run.fail()
    with pytest.raises(GangLostError, match=r"no restart is left \(cluster.max_restarts=2 without a new checkpoint\)"):
        run.fail(RuntimeError("CUDA error: an illegal\nmemory access"))
    *lines, last = run.lines()
    assert [line.partition("; ")[2] for line in lines[:4]] == [
        "restart 1 of 2, from the newest valid checkpoint",
        "restart 2 of 2, from the newest valid checkpoint",
        "restart 1 of 2, from the newest valid checkpoint (step 10)",
        "restart 2 of 2, from the newest valid checkpoint (step 10)",
    ]
    assert len(lines) == 8
    assert "rank 2: RuntimeError: CUDA error: an illegal memory access; no restart is left" in last


def test_a_checkpoint_that_is_not_whole_is_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, max_restarts=1)
    run.fail()
    write_bare_checkpoint(tmp_path, 10, {})
    (checkpoints_dir(tmp_path) / step_name(10) / STATE).write_text("{")
    with pytest.raises(GangLostError):
        run.fail()


def test_a_gang_is_counted_once_and_a_machine_that_was_taken_away_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, max_restarts=1)
    taken = noticed(ActorDiedError())
    taken.health_check_failure._preempted = True  # type: ignore[attr-defined]
    for _ in range(3):
        run.fail(taken)
        run.look({2: taken, 3: LOST_PEER})  # until the machine's grace is over
    run.fail()
    run.look({1: LOST_PEER, 2: LOST_PEER})
    assert len(run.lines()) == 4
    assert all("a machine was taken away; a restart, from" in line for line in run.lines()[:3])
    assert run.lines()[3].endswith("; restart 1 of 1, from the newest valid checkpoint")


def test_a_lost_machine_is_missed_by_name_and_the_wait_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray places a gang anew every minute, for ever and in silence."""
    run = Run(tmp_path, monkeypatch, rank_wait_s=3600)
    run.fail()
    run.nodes = [node(0), {**node(1), "Alive": False}]
    for _ in range(60):
        run.place()
        run.now_s += 60
    with pytest.raises(GangLostError) as ended:
        run.place()
    missing = "there is room for 2 of 4 ranks on the 1 machines that Ray has; gone: gpu-1 (10.0.0.1)"
    assert str(ended.value).startswith(f"{missing}; waited 60 min (cluster.rank_wait_s=3600). The same command goes on")
    first, *lines, last = run.lines()[1:]
    assert last == f"not waiting for ranks any longer: {ended.value}"
    assert first == f"waiting for ranks, 60 s so far, up to 60 min: {missing}"
    assert len(lines) == 5  # every ten minutes


def test_what_is_missing_is_told_anew_when_it_changes_and_the_wait_begins_anew_with_each_gang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, rank_wait_s=None)
    run.nodes = []
    for count in range(3):
        run.place()
        run.now_s += 60
        if count == 1:
            run.nodes = [node(0), node(1)]
    run.place()
    assert "for ever (cluster.rank_wait_s): there is room for 0 of 4 ranks on the 0 machines" in run.lines()[0]
    assert "there is room for 4 ranks, but it is taken, or their processes do not start" in run.lines()[1]
    run.now_s += 1e6
    run.place()
    run.deaths.after_worker_group_start(None)
    run.fail()
    assert len(run.lines()) == 4


def test_a_stop_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch)
    run.fail()
    (tmp_path / ".stop-1").touch()
    with pytest.raises(GangStoppedError):
        run.place()


@pytest.mark.parametrize(
    ("cause", "outcome", "code", "words"),
    [
        (GangStoppedError("stopped while no ranks were there"), "stopped", 0, "training stopped while"),
        (
            GangLostError("the gang failed: rank 2\n  a\n  b"),
            "failed",
            1,
            "error: training failed: the gang",
        ),
        (
            RuntimeError("a\nb\n\nc"),
            "failed",
            1,
            "error: training failed: Training failed due to",
        ),
    ],
)
def test_what_the_controller_ended_with_is_how_the_run_ended(
    tmp_path: Path, cause: Exception, outcome: str, code: int, words: str
) -> None:
    training = Training(load_config([f"run.path={tmp_path}"]), tmp_path)
    training._gang = SimpleNamespace(error=pickle.loads(pickle.dumps(ControllerError(cause))))  # type: ignore[assignment]
    ended: Ended = training.ended()
    assert (ended.outcome, ended.code) == (outcome, code)
    assert ended.message.startswith(words)


@pytest.mark.slow
def test_ray_train_ends_with_what_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real controller: a gang that fails at once, one that there is no room for, one that is told to stop."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from producers.ray_cluster import ray_session
    from qwenimg_dist.commands.train import prepare_environment

    def fail_at_once() -> None:  # in here, so that it is pickled by value
        raise RuntimeError("a bug")

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    prepare_environment()
    ended: dict[str, BaseException] = {}
    with ray_session(ClusterConfig(), cpus=1):
        for name, cpus in (("fails", 1), ("has no room", 1000), ("is stopped", 1)):
            folder = tmp_path / name
            folder.mkdir()
            cluster = ClusterConfig(max_restarts=1, rank_wait_s=5, cpus_per_rank=cpus)
            if name == "is stopped":
                (folder / ".stop-1").touch()
            trainer = DataParallelTrainer(
                fail_at_once,
                scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": cpus}),
                run_config=RunConfig(
                    storage_path=str(folder),
                    callbacks=[Deaths(folder, folder / "train.log", folder / ".stop-1", cluster)],
                    failure_config=FailureConfig(max_failures=-1),
                ),
            )
            with pytest.raises(ControllerError) as told:
                trainer.fit()
            ended[name] = told.value.controller_failure
    assert isinstance(ended["fails"], GangLostError), ended
    first, second = (tmp_path / "fails" / "train.log").read_text().splitlines()
    assert first == "the gang failed: rank 0: RuntimeError: a bug; restart 1 of 1, from the newest valid checkpoint"
    assert second.endswith("no restart is left (cluster.max_restarts=1 without a new checkpoint)")
    assert str(ended["fails"]).startswith(second)
    assert "in fail_at_once" in str(ended["fails"])  # the traceback
    assert isinstance(ended["has no room"], GangLostError)
    assert str(ended["has no room"]).startswith("there is room for 0 of 1 ranks on the 1 machines that Ray has; waited")
    assert "so far, up to 5 s" in (tmp_path / "has no room" / "train.log").read_text()
    assert isinstance(ended["is stopped"], GangStoppedError)
