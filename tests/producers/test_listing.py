"""The listing streams its source: what is committed when, what is remembered, and how repeats get their keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from producer_world import rows_of

from producers import listing
from producers.key_index import ABSENT, KeyIndex
from producers.listing import ListingChange, sync_listing
from producers.sources.base import SourceRow
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import LISTING, row_key

UNIT = 4


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset.create(tmp_path / "data", UNIT)


def rows(*uris: str, text: str = "words") -> list[SourceRow]:
    return [SourceRow(uri=uri, captions=(f"{text} {uri}",)) for uri in uris]


def sync(dataset: Dataset, source: Sequence[SourceRow] | Iterator[SourceRow]) -> ListingChange:
    return sync_listing(dataset, source, config_hash="x", before_commit=lambda: None)


def test_a_look_that_breaks_off_leaves_full_units_and_goes_on_from_there(dataset: Dataset) -> None:
    everything = rows(*(f"{number:02d}" for number in range(11)))

    def breaks_off() -> Iterator[SourceRow]:
        yield from everything[:10]
        raise ValueError("the manifest was changed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "_BATCH_ROWS", 3)
        with pytest.raises(ValueError, match="was changed"):
            sync(dataset, breaks_off())
        assert sorted(rows_of(dataset, LISTING)) == list(range(8))
        assert sync(dataset, iter(everything)).added == 3
    listed = rows_of(dataset, LISTING)
    assert [listed[row]["uri"] for row in range(11)] == [one.uri for one in everything]
    assert not dataset.unit_parts(LISTING, 3)


def test_nothing_is_announced_or_written_when_nothing_changed(dataset: Dataset) -> None:
    announced: list[int] = []

    def look() -> ListingChange:
        source = iter(rows("a", "b", "c", "d", "e"))
        return sync_listing(dataset, source, config_hash="x", before_commit=lambda: announced.append(1))

    assert look().units == (0, 1)
    assert look().units == ()
    assert announced == [1]


def test_new_captions_are_held_only_up_to_a_limit(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_CHANGES_HELD", 6)
    names = [f"{number:02d}" for number in range(18)]
    sync(dataset, rows(*names))
    backwards = [*reversed(names), "new 1", "new 2", "new 3"]
    change = sync(dataset, rows(*backwards, text="other"))
    assert (change.added, change.recaptioned, change.units) == (3, 18, (0, 1, 2, 3, 4, 5))
    listed = rows_of(dataset, LISTING)
    assert [listed[row]["captions"] for row in range(18)] == [[f"other {name}"] for name in names]
    assert [listed[row]["uri"] for row in range(18, 21)] == ["new 1", "new 2", "new 3"]
    assert sync(dataset, rows(*backwards, text="other")).units == ()


def test_the_nth_occurrence_keeps_its_key_in_and_across_batches(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_BATCH_ROWS", 5)
    names = ["a", "a", "b", "a", "a", "a", "b", "a", "a", "a", "c", "a"]
    assert sync(dataset, rows(*names)).num_rows == len(names)
    listed = rows_of(dataset, LISTING)
    repeats = [names[:row].count(name) for row, name in enumerate(names)]
    assert [listed[row]["key"] for row in range(12)] == [row_key(name, n) for name, n in zip(names, repeats)]
    assert sync(dataset, rows(*names)).units == ()
    assert sync(dataset, rows(*names, "a", "b")).added == 2
    assert sync(dataset, rows("c", "a", "b")).units == ()  # fewer occurrences take nothing back


def test_the_key_index_finds_what_was_added_across_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producers.key_index._MERGE_AT", 50)
    rng = np.random.default_rng(0)
    keys = [rng.bytes(9) + bytes([number % 3]) for number in range(420)]  # every third ends in NUL
    keys += [bytes(10), bytes(9) + b"\1"]
    index = KeyIndex(10)
    for row, key in enumerate(keys):
        assert index.find(key) == ABSENT
        index.add(key, row)
    assert index.find_many(keys).tolist() == list(range(422))
    assert index.find_many([keys[5][:-1] + b"\7", keys[7]]).tolist() == [ABSENT, 7]
    assert index.find_many([]).tolist() == []
    assert len(index) == 422
    with pytest.raises(ValueError, match="a key has 10 bytes, not 3"):
        index.add(b"abc", 1)
