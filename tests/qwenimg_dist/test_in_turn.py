"""Results come in order, from several threads at a time, and do not pile up."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from qwenimg_dist import in_turn as module
from qwenimg_dist.in_turn import in_turn


@pytest.mark.parametrize("threads", [2, 3])
def test_several_work_at_a_time_in_order_and_results_do_not_pile_up(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items wait for each other: fewer at a time would wait for ever."""
    together = threading.Barrier(threads, timeout=20)
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    begun: list[int] = []
    ticks: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        together.wait()
        return item

    taken = []
    for item in in_turn(work, range(12 * threads), threads=threads, ahead=2 * threads, tick=lambda: ticks.append(0)):
        taken.append(item)
        assert len(begun) <= item + 1 + 2 * threads
    assert taken == list(range(12 * threads))
    assert len(ticks) >= len(taken)


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_comes_at_its_turn_and_nothing_is_begun_after_it(threads: int) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise TimeoutError("of the storage")
        return item

    results = in_turn(work, range(100), threads=threads)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(TimeoutError, match="of the storage"):
        next(results)
    assert len(begun) <= 3 + 2 * threads


def test_items_are_asked_for_as_they_are_wanted() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            asked.append(number)
            yield number

    results = in_turn(lambda item: item, items(), threads=2)
    assert next(results) == 0
    assert len(asked) == 3
    results.close()  # type: ignore[attr-defined]
