"""The Hamming index finds what comparing with everything finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producers.near_index import _BANDS, HammingIndex, _radii


def brute(hashes: np.ndarray, rows: np.ndarray, asked: np.ndarray, distance: int) -> set[tuple[int, int, int]]:
    between = np.bitwise_count(asked[:, None] ^ hashes[None])
    return {(int(a), int(rows[b]), int(between[a, b])) for a, b in zip(*np.nonzero(between <= distance))}


def flipped(rng: np.random.Generator, hashes: np.ndarray, most: int) -> np.ndarray:
    """Copies with up to `most` bits changed."""
    copies = hashes.copy()
    for number in range(len(copies)):
        for bit in rng.choice(64, rng.integers(0, most + 1), replace=False):
            copies[number] ^= np.uint64(1) << np.uint64(bit)
    return copies


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32), distance=st.integers(0, 12), blocks=st.lists(st.integers(0, 60), min_size=1, max_size=6)
)
def test_finds_exactly_what_lies_within_the_distance(seed: int, distance: int, blocks: list[int]) -> None:
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("producers.near_index._RECENT", 50)
        patch.setattr("producers.near_index._CHUNK", 64)
        index = HammingIndex(distance)
        # A few centres, so that many lie about the distance apart, and rows in no order.
        centres = rng.integers(0, 2**64, 4, dtype=np.uint64)
        hashes = np.empty(0, dtype=np.uint64)
        rows = rng.permutation(10_000)[: sum(blocks)].astype(np.int64)
        for size in blocks:
            fresh = flipped(rng, centres[rng.integers(0, 4, size)], 2 + distance)
            index.add(fresh, rows[len(hashes) : len(hashes) + size])
            hashes = np.concatenate([hashes, fresh])
            asked = flipped(rng, centres[rng.integers(0, 4, 7)], 2 + distance)
            hits = index.find(asked)
            found = list(zip(hits.asked.tolist(), hits.rows.tolist(), hits.distances.tolist(), strict=True))
            assert len(found) == len(set(found))
            assert set(found) == brute(hashes, rows[: len(hashes)], asked, distance)
        assert len(index) == len(hashes)


def test_the_bands_cover_all_bits_and_their_radii_every_distance() -> None:
    assert sorted(bit for low, width in _BANDS for bit in range(low, low + width)) == list(range(64))
    for distance in range(13):
        assert sum(radius + 1 for radius in _radii(distance)) == distance + 1


def test_many_rows_with_one_hash_are_all_found_and_the_index_says_its_size() -> None:
    index = HammingIndex(6)
    hashes = np.full(40_000, 12345, dtype=np.uint64)
    index.add(hashes, np.arange(40_000))
    assert len(index.find(np.array([12345, 12344, 999_999_999_999], dtype=np.uint64)).rows) == 80_000
    assert index.nbytes - HammingIndex(6).nbytes == 40_000 * 28 + (2**22 + 2 * 2**21 + 3) * 4


def test_an_unusable_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="choose 0 to 12"):
        HammingIndex(13)
