"""Several data sets in one run: each is pinned, held out, taken down and held to as one alone would be."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from fake_dataset import FakeProducer, facets_for
from fake_mix import NUM_ROWS, make_producers, mix_config, open_mix

from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.generation_log import FILE, append_line, read_lines
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import DatasetConfig
from qwenimg_dist.data.where import WhereError

Step = tuple[tuple[str, ...], tuple[int, ...], tuple[float, ...]]


@pytest.fixture(scope="module")
def producers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FakeProducer]:
    return make_producers(tmp_path_factory.mktemp("data"))


def train(run: Generations, first: int = 0, last: int = 24) -> list[Step]:
    seen = []
    for step in range(first, last):
        assert run.advance(step) == "ready"
        batch = run.ledger.batch(step)
        tokens = run.ledger.catalogs.text_tokens(batch.texts)
        seen.append(
            (tuple(run.ledger.catalogs.keys(batch.rows)), tuple(tokens.tolist()), tuple(batch.weights.tolist()))
        )
    return seen


def real_keys(steps: list[Step]) -> list[str]:
    return [key for keys, _, weights in steps for key, weight in zip(keys, weights, strict=True) if weight]


def test_each_data_set_is_pinned_and_a_resume_gives_the_same_sequence(
    tmp_path: Path, producers: dict[str, FakeProducer]
) -> None:
    run = open_mix(tmp_path / "run", producers, mix_config())
    assert not run.settled
    seen = train(run)
    assert run.settled
    lines = read_lines(tmp_path / "run" / FILE)[0]
    assert [(line.dataset, line.units, line.phase, line.last) for line in lines] == [
        ("photos", 4, None, True),
        ("text", 2, None, True),
    ]
    assert len({line.digest for line in lines}) == 2
    names = Counter(key.partition("/")[0] for key in real_keys(seen))
    assert names["photos"] == pytest.approx(names["text"], abs=6)
    # Uris stand in both data sets, keys do not.
    assert len(set(real_keys(seen))) > max(NUM_ROWS.values())
    for step in (0, 7, 23):
        assert train(open_mix(tmp_path / "run", producers, mix_config()), step, step + 1) == seen[step : step + 1]
    # Also if the compiled catalogs are gone; and another rank reads what rank 0 wrote.
    shutil.rmtree(tmp_path / "run" / "index")
    again = open_mix(tmp_path / "run", producers, mix_config())
    assert train(again) == seen
    other = Generations(
        tmp_path / "run",
        {name: producer.dataset for name, producer in reversed(producers.items())},
        again.facets,
        mix_config(),
        follow=False,
    )
    other.refresh(again.count)
    assert other.ledger.batch(5).rows.tolist() == again.ledger.batch(5).rows.tolist()


def test_a_process_that_died_between_the_lines_goes_on(tmp_path: Path, producers: dict[str, FakeProducer]) -> None:
    calm = open_mix(tmp_path / "calm", producers, mix_config())
    expected = train(calm)
    torn = open_mix(tmp_path / "torn", producers, mix_config())
    torn.advance(0)
    lines = read_lines(tmp_path / "torn" / FILE)[0]
    (tmp_path / "torn" / FILE).unlink()
    append_line(tmp_path / "torn" / FILE, lines[0])
    resumed = open_mix(tmp_path / "torn", producers, mix_config())
    resumed.refresh()
    assert not resumed.settled
    with pytest.raises(DataError, match="has no generation yet"):
        _ = resumed.ledger
    assert train(resumed) == expected
    assert read_lines(tmp_path / "torn" / FILE)[0] == lines


def test_each_data_set_holds_out_rows_of_its_own(tmp_path: Path, producers: dict[str, FakeProducer]) -> None:
    config = mix_config(steps=60)
    run = open_mix(tmp_path / "run", producers, config)
    trained = set(real_keys(train(run, 0, 60)))
    groups = run.held_out(32, 8)
    held = {name: set[str]() for name in producers}
    for group in groups:
        held[group.dataset] |= set(run.ledger.catalogs.keys(group.rows))
    assert all(0 < len(keys) <= 4 for keys in held.values())
    assert not trained & set().union(*held.values())
    every = {f"{name}/{row.key}" for name, producer in producers.items() for row in producer.rows}
    assert trained | set().union(*held.values()) == every
    slots = sorted(int(slot) for group in groups for slot in group.slots)
    assert slots == list(range(len(slots)))
    # The limit is shared: half for each.
    assert Counter(group.dataset for group in run.held_out(32, 2) for _ in group.rows) == {"photos": 1, "text": 1}


def test_what_holds_for_one_data_set_alone(tmp_path: Path, producers: dict[str, FakeProducer]) -> None:
    narrowed = replace(
        mix_config(held_out=0, photos=DatasetConfig(where="row >= 10"), text=DatasetConfig(where="sharpness > 0.35")),
        where="row < 20 and dataset in ('photos', 'text')",
        weights={"dataset == 'text' and row >= 8": 0.0},
    )
    keys = set(real_keys(train(open_mix(tmp_path / "run", producers, narrowed))))
    expected = {f"photos/{row.key}" for row in producers["photos"].rows[10:20]}
    expected |= {f"text/{row.key}" for row in producers["text"].rows[4:8]}
    assert keys == expected
    kinds = replace(mix_config(text=DatasetConfig(caption_weights={"recaption": 1.0})), caption_weights={"raw": 1.0})
    with pytest.raises(DataError, match="no weight for the caption kind 'raw'"):
        train(open_mix(tmp_path / "kinds", producers, kinds))


def test_one_takedown_list_serves_all(tmp_path: Path, producers: dict[str, FakeProducer]) -> None:
    gone = [producers["photos"].rows[20].key, producers["text"].rows[3].uri]
    (tmp_path / "list").write_text("\n".join(gone))
    run = open_mix(tmp_path / "run", producers, mix_config(held_out=0, takedown=str(tmp_path / "list")))
    keys = {key.partition("/")[2] for key in real_keys(train(run))}
    assert producers["photos"].rows[20].key not in keys
    assert producers["text"].rows[3].key not in keys
    assert run.not_yet_taken_down is None
    (tmp_path / "list").write_text(gone[0])
    assert "one generation for good" in (run.not_yet_taken_down or "")


def test_what_is_refused_names_the_data_set(tmp_path: Path, producers: dict[str, FakeProducer]) -> None:
    config = mix_config()
    datasets = {name: producer.dataset for name, producer in producers.items()}
    lone = {"photos": producers["photos"]}
    other = Generations(tmp_path / "a", datasets, facets_for((32, 64), "ffffffffffff"), config, follow=False)
    with pytest.raises(DataError, match=r"data.mix.photos: .*photos has text-0123456789ab, this run needs text-ffff"):
        other.advance(0)
    nowhere = replace(config, of_dataset={"text": DatasetConfig(where="row > 50")})
    with pytest.raises(DataError, match=r"phase 0 at 32 px has nothing to train on of data.mix.text, so the shares"):
        open_mix(tmp_path / "b", producers, nowhere).advance(0)
    with pytest.raises(WhereError, match="no column 'rwo', did you mean 'row'"):
        open_mix(tmp_path / "c", producers, replace(config, where="rwo > 1")).advance(0)
    assert not any((tmp_path / name / FILE).exists() for name in "abc")
    with pytest.raises(ValueError, match="follow"):
        Generations(tmp_path / "d", datasets, facets_for((32, 64)), config, follow=True)
    open_mix(tmp_path / "run", producers, config).advance(0)
    with pytest.raises(DataError, match=r"trains on photos, text, the config names photos: give the same data.mix"):
        open_mix(tmp_path / "run", lone, config)


def test_a_file_of_either_data_set_that_changed_is_named(tmp_path: Path) -> None:
    producers = make_producers(tmp_path)
    open_mix(tmp_path / "run", producers, mix_config()).advance(0)
    victim = next((tmp_path / "text" / producers["text"].facets.latents[64]).glob("*.parquet"))
    victim.write_bytes(victim.read_bytes()[:-8])
    with pytest.raises(DataError, match=f"text/.*{victim.name}"):
        open_mix(tmp_path / "run", producers, mix_config())
    assert {json.loads(line)["dataset"] for line in (tmp_path / "run" / FILE).read_text().splitlines()} == {
        "photos",
        "text",
    }
