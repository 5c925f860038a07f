"""A save beside training is of its step, whole or nothing; what a writer meets is raised on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consumers import watchdog_process
from consumers.saver import _check_room
from consumers.watchdog_process import available_memory, host_memory

Results = Callable[[str], dict[str, Any]]


def test_a_save_beside_training_is_of_the_step_at_which_it_began(damage_results: Results) -> None:
    found = damage_results("background")
    assert found["writing"]
    assert found["finished"] == [1, False]
    assert found["note"] == [1, "then", 1]
    assert found["same"]
    assert found["same_later"]


def test_it_is_no_checkpoint_before_all_ranks_have_written(damage_results: Results) -> None:
    assert damage_results("background")["nothing_yet"]


def test_a_writer_that_fails_on_one_rank_fails_all_and_shows_nothing(damage_results: Results) -> None:
    found = damage_results("background")
    assert "step 4 was not committed: rank 1: [Errno 27] File too large" in found["one_failed"]
    assert found["visible"] == ["step-00000001"]


def test_what_was_given_up_is_removed_by_the_next_save(damage_results: Results) -> None:
    found = damage_results("background")
    assert found["given_up"] == [".tmp-step-00000005", "step"]
    assert found["kept"] == ["step-00000007", "step-00000008"]


def test_its_copy_of_a_rank_s_part_must_fit_into_memory(damage_results: Results) -> None:
    found = damage_results("background")
    assert found["copy"]
    for words in ("checkpoint.background=true", "2 of them, 0.00 GB are free", "set checkpoint.background=false"):
        assert words in found["no_memory"]


@pytest.mark.parametrize(
    ("own", "folder", "limit", "used", "files"),
    [
        ("0::/", "", "memory.max", "memory.current", "file"),  # a container's own view, cgroup v2
        ("0::/slurm/job_7/step_0", "slurm/job_7", "memory.max", "memory.current", "file"),  # of a parent
        ("5:cpu:/\n4:memory:/docker/0a1b", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total"),  # v1
    ],
)
def test_the_memory_is_that_of_the_container_where_it_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, folder: str, limit: str, used: str, files: str
) -> None:
    """A pod's limit lies far below its machine's memory: what goes beyond it is killed, whatever is free outside."""
    group = tmp_path / "cgroup" / folder
    group.mkdir(parents=True)
    (tmp_path / "meminfo").write_text("MemTotal: 1000000000 kB\nMemAvailable: 900000000 kB\nHugePages_Total: 0\n")
    (tmp_path / "own").write_text(f"{own}\n")
    prefix = "total_" if files == "total" else ""
    (group / "memory.stat").write_text(f"anon 1\n{prefix}active_file 10000000000\n{prefix}inactive_file 20000000000\n")
    (group / used).write_text("90000000000\n")
    (group / limit).write_text("100000000000\n")
    monkeypatch.setattr(watchdog_process, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(watchdog_process, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(watchdog_process, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert host_memory() == (40_000_000_000, 100_000_000_000)
    assert available_memory() == 0.4
    _check_room(5_000_000_000)
    with pytest.raises(ValueError, match=r"8 of them, 40\.00 GB are free of the 100\.00 GB of this machine or"):
        _check_room(5_000_000_001)
    (group / limit).write_text("max\n")
    assert host_memory() == (900_000_000 * 1024, 1_000_000_000 * 1024)
    (tmp_path / "meminfo").unlink()
    assert host_memory() is None
    _check_room(10**15)
