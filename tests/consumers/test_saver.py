"""A save beside training is of its step, whole or nothing; what a writer meets is raised on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
