"""`run` as a user starts it: both sides in one Ray job on one machine, training while producing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from run_command import (
    BOUND,
    EPOCH,
    NUM_UNITS,
    bytes_on_disk,
    ending,
    kept_keys,
    kill_one,
    num_ready,
    num_steps,
    ray_processes,
    real_keys,
    start,
    until,
    words,
)
from small_run import lines, numbers
from undisturbed import write_source

from consumers.checkpoint_files import list_checkpoints
from qwenimg_dist.commands.main import main
from qwenimg_dist.data.facets import Dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_source(folder / "source", 5 * NUM_UNITS, 5 * NUM_UNITS)
    return folder


def test_training_begins_before_half_of_the_units_are_there_and_takes_each_sample_once(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(root, "run", f"cluster.max_ahead_bytes={BOUND}")
    with ending(start("run", *command)) as process:
        until(lambda: num_steps(root, "run") > 0, process)
        ready, ahead = num_ready(root), bytes_on_disk(Dataset.open(root / "data"))
        out, err = process.communicate(timeout=250)
    assert process.returncode == 0, out + err
    assert 0 < ready <= NUM_UNITS // 2
    assert ahead <= 1.1 * BOUND
    assert "training complete" in err
    assert "all units are ready" in err
    assert "Funnel" in out
    dataset, samples = Dataset.open(root / "data"), lines(root / "run" / "samples.jsonl")
    assert [line["step"] for line in samples] == list(range(1, EPOCH + 1))
    assert len(lines(root / "run" / "generations.jsonl")) > 1
    assert real_keys(samples, list(range(1, EPOCH + 1))) == kept_keys(dataset)
    assert main(["run", *command]) == 0
    assert "training complete already" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kills_of_a_producer_a_rank_the_driver_and_ray_end_in_what_a_replay_of_its_generations_gives(
    tmp_path: Path,
) -> None:
    num_units, steps = 24, 26
    write_source(tmp_path / "source", 5 * num_units, 5 * num_units)
    settings = (f"train.steps={steps}", "checkpoint.every=2", f"cluster.max_ahead_bytes={BOUND}")
    command = words(tmp_path, "run", *settings)
    log = tmp_path / "run" / "train.log"

    def further(count: int) -> None:
        """So many steps more, and producers are still at it."""
        before = log.read_text().count("s/step") if log.exists() else 0
        until(lambda: log.exists() and log.read_text().count("s/step") >= before + count, process)
        assert num_ready(tmp_path) < num_units, "make the source longer"

    with ending(start("run", *command)) as process:
        further(2)
        kill_one(process, "UnitActor")
        further(2)
        kill_one(process, "TrainWorker")
        until(lambda: "restart 1 of" in log.read_text(), process)
        further(2)
        process.kill()
    with ending(start("run", *command)) as process:
        further(2)
        for one in ray_processes(process.pid, "raylet", "gcs_server"):
            one.kill()
        _, err = process.communicate(timeout=400)
        assert process.returncode not in (0, None)
        assert err
    with ending(start("run", *command)) as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    run, replay = tmp_path / "run", tmp_path / "replay"
    generations = f"train.replay_generations={run / 'generations.jsonl'}"
    with ending(start("train", *words(tmp_path, "replay", *settings[:2], generations))) as process:
        out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert (replay / "samples.jsonl").read_bytes() == (run / "samples.jsonl").read_bytes()
    assert numbers(replay) == numbers(run)
    assert lines(replay / "generations.jsonl") == lines(run / "generations.jsonl")
    assert len(lines(run / "generations.jsonl")) > 3
    epochs = {int(line["step"]): int(line["train/epoch"]) for line in lines(run / "metrics.jsonl")}  # type: ignore[call-overload]
    first = [step for step, epoch in epochs.items() if epoch == 0]
    assert set(epochs.values()) == {0, 1}  # so the first one is whole
    dataset = Dataset.open(tmp_path / "data")
    assert real_keys(lines(run / "samples.jsonl"), first) == kept_keys(dataset)
    assert len(kept_keys(dataset)) == 5 * num_units - 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopped_when_the_gang_has_grown_and_goes_on(tmp_path: Path) -> None:
    """The source is exhausted: the producers' places become ranks; SIGTERM then saves, and one more command ends it."""
    num_units, steps = 6, 60
    write_source(tmp_path / "source", 5 * num_units, 5 * num_units)
    command = words(
        tmp_path, "run", f"train.steps={steps}", "cluster.elastic=true", "cluster.ranks=1", "cluster.producers=1"
    )
    log = tmp_path / "run" / "train.log"
    with ending(start("run", *command)) as process:
        until(lambda: log.exists() and "2 ranks are there" in log.read_text(), process)
        grown_at = num_steps(tmp_path, "run")
        until(lambda: num_steps(tmp_path, "run") > grown_at + 1, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=250)
    assert process.returncode == 0, out + err
    assert "the source is exhausted: the ranks save, and 2 go on in the place of 1" in err
    assert "training stopped" in err
    assert "all units are ready" in err
    saved = num_steps(tmp_path, "run")
    assert saved < steps
    with ending(start("run", *command)) as process:
        out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert "1 ranks are there" not in err  # nothing was to be produced: it began with all places
    starts = [(line["ranks"], line["step"]) for line in lines(tmp_path / "run" / "starts.jsonl")]
    assert [ranks for ranks, _ in starts] == [1, 2, 2]
    assert starts[-1] == (2, saved)
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert [line["step"] for line in samples] == list(range(1, steps + 1))
    epochs = {int(line["step"]): int(line["train/epoch"]) for line in lines(tmp_path / "run" / "metrics.jsonl")}  # type: ignore[call-overload]
    kept = kept_keys(Dataset.open(tmp_path / "data"))
    for epoch in range(max(epochs.values())):
        assert real_keys(samples, [step for step, of in epochs.items() if of == epoch]) == kept


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_side_that_fails_ends_the_other_saved_and_the_way_on_is_told(tmp_path: Path) -> None:
    num_units = 8
    write_source(tmp_path / "source", 5 * num_units, 5 * num_units)
    command = words(tmp_path, "run", "train.steps=500", f"cluster.max_ahead_bytes={BOUND}", "cluster.unit_retries=0")
    faults = tmp_path / "faults"
    faults.mkdir()
    log = tmp_path / "run" / "train.log"
    with ending(start("run", *command, fault_dir=faults)) as process:
        until(lambda: log.exists() and "step 2/" in log.read_text(), process)
        (faults / "unit_start@next").touch()
        out, err = process.communicate(timeout=250)
    assert process.returncode == 1, out + err
    assert "error: producing failed: unit" in err
    assert "training stopped" in err
    assert "the same command goes on" in err
    steps = num_steps(tmp_path, "run")
    assert [info.step for info in list_checkpoints(tmp_path / "run") if info.fault is None][-1] == steps
    # Either side goes on alone: the producers by `produce` (held back, they would wait for training), then the ranks.
    with ending(start("produce", *command, "cluster.max_ahead_bytes=null")) as process:
        out, err = process.communicate(timeout=250)
    assert process.returncode == 0, out + err
    with ending(start("train", *command, "follow=true", f"train.stop_after={steps + 8}")) as process:
        out, err = process.communicate(timeout=250)
    assert process.returncode == 0, out + err
    assert num_steps(tmp_path, "run") == steps + 8
