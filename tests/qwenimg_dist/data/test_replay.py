"""A replay has the other run's batches, whatever it would have done by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_dataset import FakeProducer, make_rows
from growing_run import make_config, open_run, produce_units, train

from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.generation_log import FILE, read_lines
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.replay import read_replay, take_over


def grown(root: Path) -> tuple[FakeProducer, list[tuple[object, ...]]]:
    """A run that met its units one by one."""
    producer = FakeProducer(root / "data", unit_size=4)
    run = open_run(root / "run", producer, make_config(), follow=True)
    seen: list[tuple[object, ...]] = []
    for _ in range(4):
        produce_units(producer, 1)
        seen += train(run, len(seen), 100)
    producer.complete()
    seen += train(run, len(seen), 6)
    assert run.count > 3
    return producer, seen


@pytest.mark.parametrize("follow", [False, True])
def test_a_replay_gives_the_same_batches_and_goes_on_by_itself(tmp_path: Path, follow: bool) -> None:
    producer, seen = grown(tmp_path)
    other = open_run(tmp_path / "other", producer, make_config(), follow=follow)
    assert train(other, 0, len(seen)) != seen
    count = take_over(tmp_path / "replay", tmp_path / "run" / FILE)
    assert count == len(read_lines(tmp_path / "run" / FILE)[0])
    replay = open_run(tmp_path / "replay", producer, make_config(), follow=follow)
    assert train(replay, 0, len(seen)) == seen
    beyond = train(replay, len(seen), 20)
    assert len(beyond) == 20
    assert replay.count > count
    # Asked again (a resume) it keeps what it went on with.
    assert take_over(tmp_path / "replay", tmp_path / "run" / FILE) == count
    assert len(read_lines(tmp_path / "replay" / FILE)[0]) == replay.count


def test_a_replay_takes_lines_that_came_since(tmp_path: Path) -> None:
    producer, seen = grown(tmp_path)
    whole = (tmp_path / "run" / FILE).read_text().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    part = tmp_path / "part" / FILE
    part.write_text("".join(whole[:2]) + whole[2][:20])  # torn while it is being written
    assert take_over(tmp_path / "replay", part) == 2
    part.write_text("".join(whole))
    assert take_over(tmp_path / "replay", part) == len(whole)
    assert (tmp_path / "replay" / FILE).read_text() == "".join(whole)
    assert train(open_run(tmp_path / "replay", producer, make_config(), follow=False), 0, len(seen)) == seen


def test_what_cannot_be_replayed_is_named(tmp_path: Path) -> None:
    producer, _ = grown(tmp_path)
    with pytest.raises(DataError, match=r"is not there: give the generations\.jsonl of a run"):
        read_replay(tmp_path / "nowhere" / FILE)
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="has no generation"):
        read_replay(tmp_path / "empty")
    open_run(tmp_path / "begun", producer, make_config(), follow=False).advance(0)
    with pytest.raises(DataError, match=r"has another generation 0 than .*run/generations\.jsonl: replay into a new"):
        take_over(tmp_path / "begun", tmp_path / "run" / FILE)
    # Another data set has other bytes under the same names.
    stranger = FakeProducer(tmp_path / "stranger", unit_size=4)
    stranger.add(make_rows(16, start=100, captions=2))
    stranger.produce(complete=True)
    take_over(tmp_path / "replay", tmp_path / "run" / FILE)
    with pytest.raises(DataError, match=r"their files in .*stranger give another"):
        open_run(tmp_path / "replay", stranger, make_config(), follow=False)


def test_the_takedown_list_comes_along(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    produce_units(producer, 3)
    (tmp_path / "list.txt").write_text("pictures/000002.png\n")
    config = make_config()
    config = config.__class__(**{**config.__dict__, "takedown": str(tmp_path / "list.txt")})
    first = open_run(tmp_path / "run", producer, config, follow=False)
    seen = train(first, 0, 8)
    (tmp_path / "list.txt").write_text("pictures/000002.png\npictures/000003.png\n")
    take_over(tmp_path / "replay", tmp_path / "run" / FILE)
    replay = Generations(
        tmp_path / "replay", Dataset.open(producer.dataset.root), producer.facets, config, follow=False
    )
    replay.verify()
    assert train(replay, 0, 8) == seen
    (digest,) = {json.loads(line)["takedown"] for line in (tmp_path / "run" / FILE).read_text().splitlines()}
    (tmp_path / "run" / "takedown" / f"{digest}.json").unlink()
    with pytest.raises(DataError, match="is gone or damaged"):
        take_over(tmp_path / "again", tmp_path / "run" / FILE)
