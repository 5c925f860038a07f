"""Generations made before they are needed: recorded ahead, never in the way, and the same sequence on every replay."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_dataset import FakeProducer
from growing_run import describe, make_config, open_run, produce_units, train
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qwenimg_dist.data.early import EarlyLook
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.generation_log import FILE, Generation, read_lines
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig

EARLY = 3


def until(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def seen_of(line: Generation, seen: list[tuple[object, ...]], config: LedgerConfig) -> list[tuple[object, ...]]:
    """The batches of a generation's phase."""
    phase = config.phases[line.phase or 0]
    return seen[phase.first_step : phase.last_step]


def looked(run: Generations) -> bool:
    """Nothing is being looked for, or what was found waits to be recorded."""
    look = run._early._look
    return look is None or look.done()


@pytest.mark.parametrize("phases", [1, 2])
def test_the_next_generation_is_recorded_while_the_present_one_still_has_steps(tmp_path: Path, phases: int) -> None:
    """Of a phase that has begun, and of the next phase."""
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    produce_units(producer, 3)  # two buckets of 6 rows, batches of 3
    producer.complete()
    steps = 4 * phases if phases == 2 else 100
    run = open_run(tmp_path / "run", producer, make_config(steps=steps, phases=phases), follow=True, early_steps=EARLY)
    assert run.advance(0) == "ready"
    assert run.count == 1
    until(lambda: looked(run), "no look ended")
    assert run.advance(0) == "ready"
    assert run.count == 1  # the first of the steps without a batch is 4: 3 more are no reason to look
    assert run.advance(1) == "ready"
    until(lambda: looked(run), "no look ended")
    assert run.count == 1  # a look records nothing
    assert run.advance(2) == "ready"
    assert [(line.generation, line.phase, line.epoch) for line in run.lines] == [
        (0, 0, 0),
        (1, phases - 1, 2 - phases),
    ]
    assert run.lines == read_lines(tmp_path / "run" / FILE)[0]
    assert run.ledger.available(4)
    run.close()


def test_what_cannot_be_taken_in_ends_the_run_when_it_is_needed_and_not_before(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    produce_units(producer, 3)
    run = open_run(tmp_path / "run", producer, make_config(), follow=True, early_steps=EARLY)
    assert run.advance(0) == "ready"
    produce_units(producer, 1)
    damaged = next((producer.dataset.root / producer.facets.text).glob("unit-000003*.tar"))
    damaged.unlink()
    for step in range(1, 4):
        until(lambda: looked(run), "no look ended")
        assert run.advance(step) == "ready"
    with pytest.raises(DataError, match=damaged.name):
        run.advance(4)
    assert run.count == 1
    run.close()


def test_too_little_that_is_ready_is_looked_at_again(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    produce_units(producer, 3)
    run = open_run(tmp_path / "run", producer, make_config(), follow=True, early_steps=EARLY)
    for step in range(4):
        assert run.advance(step) == "ready"
        until(lambda: looked(run), "no look ended")
    assert run.count == 1
    produce_units(producer, 1)
    assert run.advance(3) == "ready"  # takes the look that found nothing, and begins one that does
    until(lambda: looked(run), "no look ended")
    assert run.advance(3) == "ready"
    assert run.count == 2
    run.close()


@settings(
    max_examples=10,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # files make shrinking slow
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    story=st.lists(
        st.tuples(st.sampled_from(["produce", "train", "train", "kill"]), st.integers(1, 3)), min_size=4, max_size=9
    ),
    phases=st.integers(1, 2),
    chance=st.randoms(use_true_random=False),
    patient=st.booleans(),
)
def test_a_run_killed_at_will_repeats_its_steps_and_so_does_a_replay(
    tmp_path: Path, story: list[tuple[str, int]], phases: int, chance: object, patient: bool
) -> None:
    """When looks end is left to chance, or each is waited for; what was recorded holds in any case."""
    root = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    producer = FakeProducer(root / "data", unit_size=4)
    config = make_config(steps=30, phases=phases)
    run = open_run(root / "run", producer, config, follow=True, early_steps=EARLY)
    seen: list[tuple[object, ...]] = []

    def go(first: int, steps: int) -> list[tuple[object, ...]]:
        made: list[tuple[object, ...]] = []
        for step in range(first, min(first + steps, 30)):
            if patient:
                until(lambda: looked(run), "no look ended")
            if run.advance(step) == "wait":
                break
            made.append(describe(run, run.ledger.batch(step)))
        return made

    for kind, amount in [("produce", 1), *story, ("complete", 0), ("train", 6), ("kill", 0), ("train", 15)]:
        if kind == "produce":
            produce_units(producer, amount)
        elif kind == "complete":
            producer.complete()
        elif kind == "train":
            seen += go(len(seen), 2 * amount)
        else:
            run.close()  # a look that a kill takes with it has recorded nothing either
            run = open_run(root / "run", producer, config, follow=True, early_steps=EARLY)
            back = max(0, len(seen) - chance.randint(0, 8))  # type: ignore[attr-defined]
            assert go(back, len(seen) - back) == seen[back:]
    run.close()
    assert len(seen) == 30
    whole = [line for line in run.lines if line.last and line.epoch < seen_of(line, seen, config)[-1][1]]  # type: ignore[operator]
    for line in whole:
        mine = [batch for batch in seen_of(line, seen, config) if batch[1] == line.epoch]
        keys = sorted(key for b in mine for key, w in zip(b[3], b[5], strict=True) if w)  # type: ignore[call-overload]
        assert keys == sorted(row.key for row in producer.rows[: 4 * line.units])
    (root / "replay").mkdir()
    shutil.copy(root / "run" / FILE, root / "replay" / FILE)
    assert train(open_run(root / "replay", producer, config, follow=True), 0, 30) == seen


def test_a_growing_epoch_with_early_looks_gives_every_sample_once(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    run = open_run(tmp_path / "run", producer, make_config(), follow=True, early_steps=EARLY)
    seen: list[tuple[object, ...]] = []
    for unit in range(9):
        produce_units(producer, 1)
        if unit == 8:
            producer.complete()
        seen += train(run, len(seen), 2)
    seen += train(run, len(seen), 12 + 5 - len(seen))  # 18 rows of each of two buckets
    first = [batch for batch in seen if batch[1] == 0]
    keys = sorted(key for batch in first for key, w in zip(batch[3], batch[5]) if w)  # type: ignore[call-overload]
    assert keys == sorted(row.key for row in producer.rows)
    assert {batch[1] for batch in seen} == {0, 1}
    run.close()


def test_one_look_at_a_time_and_an_end_that_waits_for_it() -> None:
    early, may_end = EarlyLook(), threading.Event()
    ended = []

    def slow() -> list[Generation]:
        may_end.wait(30)
        ended.append(True)
        return []

    early.begin(slow)
    assert early.is_busy
    assert early.take(wait=False) == []
    assert early.is_busy
    with pytest.raises(AssertionError):
        early.begin(slow)
    threading.Timer(0.1, may_end.set).start()
    early.close()
    assert ended
