"""Exactly the bytes wanted, whatever the order, and errors that name tar, key and way out."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenimg_dist import patience
from qwenimg_dist.data.catalog import Places, TarFile
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.reader import TarReader
from qwenimg_dist.patience import StorageAwayError


def make_tars(folder: Path, sizes: list[int]) -> list[TarFile]:
    tars = []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.tar"
        path.write_bytes(np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8).tobytes())
        tars.append(TarFile(path=path, size_bytes=size))
    return tars


def make_places(tars: list[TarFile], wanted: list[tuple[int, int, int]]) -> Places:
    return Places(
        tars=tars,
        tar=np.array([tar for tar, _, _ in wanted], dtype=np.int32),
        offset=np.array([offset for _, offset, _ in wanted], dtype=np.int64),
        nbytes=np.array([nbytes for _, _, nbytes in wanted], dtype=np.int64),
        keys=np.array([f"key-{n}".encode() for n in range(len(wanted))], dtype="S20"),
    )


def read(reader: TarReader, places: Places) -> list[bytes]:
    out = [np.empty(int(nbytes), dtype=np.uint8) for nbytes in places.nbytes]
    assert reader.read(places, out) == sum(places.nbytes)
    return [array.tobytes() for array in out]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[TarFile]:
    return make_tars(tmp_path_factory.mktemp("tars"), [400_000, 200_000, 5_000])


PLACE = st.integers(0, 2).flatmap(
    lambda tar: st.tuples(st.just(tar), st.integers(0, [399_000, 199_000, 4_000][tar]), st.integers(1, 1000))
)


@settings(max_examples=80, deadline=None)
@given(wanted=st.lists(PLACE, min_size=0, max_size=30), max_open=st.integers(1, 3))
def test_any_places_in_any_order_also_overlapping(
    tars: list[TarFile], wanted: list[tuple[int, int, int]], max_open: int
) -> None:
    reader = TarReader(max_open=max_open)
    contents = [tar.path.read_bytes() for tar in tars]
    for _ in range(2):
        assert read(reader, make_places(tars, wanted)) == [contents[t][o : o + n] for t, o, n in wanted]
    reader.close()


def test_more_neighbours_than_one_call_takes(tars: list[TarFile]) -> None:
    wanted = [(0, 100 * number, 60) for number in range(3000)]
    content = tars[0].path.read_bytes()
    assert read(TarReader(), make_places(tars, wanted)) == [content[o : o + n] for _, o, n in wanted]


def test_neighbours_are_read_together_and_distant_ones_are_not(
    tars: list[TarFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append(args[2]) or real(*args))
    read(TarReader(), make_places(tars, [(0, 5000, 100), (0, 1000, 100), (0, 300_000, 100), (1, 0, 100)]))
    assert calls == [1000, 300_000, 0]


def test_short_reads_are_completed(tars: list[TarFile], monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems and signals may return less than asked for."""
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, at: real(handle, [memoryview(buffers[0])[:7]], at))
    content = tars[0].path.read_bytes()
    assert read(TarReader(), make_places(tars, [(0, 10, 50), (0, 100, 60)])) == [content[10:60], content[100:160]]


def test_few_files_stay_open(tmp_path: Path) -> None:
    tars = make_tars(tmp_path, [100] * 40)
    reader = TarReader(max_open=4)
    before = len(os.listdir("/proc/self/fd"))
    for tar in range(40):
        read(reader, make_places(tars, [(tar, 0, 10)]))
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    reader.close()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("damage", ["gone", "cut", "grown"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    tars = make_tars(tmp_path, [1000])
    if damage == "gone":
        tars[0].path.unlink()
    else:
        os.truncate(tars[0].path, 900 if damage == "cut" else 1100)
    with pytest.raises(DataError) as caught:
        read(TarReader(), make_places(tars, [(0, 0, 10)]))
    for part in (
        "0.tar",
        "key-0",
        "data verify",
        "data repair",
        "cannot be opened" if damage == "gone" else "1000 were committed",
    ):
        assert part in str(caught.value)


def test_a_tar_cut_while_it_is_open_is_named(tmp_path: Path) -> None:
    tars = make_tars(tmp_path, [1000])
    reader = TarReader()
    read(reader, make_places(tars, [(0, 0, 10)]))
    os.truncate(tars[0].path, 500)
    with pytest.raises(DataError, match=r"0.tar ends at byte 500.*key-1"):
        read(reader, make_places(tars, [(0, 0, 10), (0, 450, 100)]))


def away(monkeypatch: pytest.MonkeyPatch, number: int, *, times: int, since_open: bool = False) -> list[int]:
    """Reads fail so often with this errno; with `since_open`, for as long as the tar is not opened anew. Waiting takes
    no time. Returns the handle that failed last, as a list."""
    real, left, stale = os.preadv, [times], [-1]
    monkeypatch.setattr(patience, "PAUSES_S", (0.0,) * 3)

    def preadv(handle: int, *args: Any) -> int:
        left[0] -= 1
        if left[0] >= 0 or (since_open and os.lseek(handle, 0, os.SEEK_CUR) == 1):
            if since_open:
                os.lseek(handle, 1, os.SEEK_SET)  # a mark on this opening
            stale[0] = handle
            raise OSError(number, os.strerror(number))
        return real(handle, *args)

    monkeypatch.setattr(os, "preadv", preadv)
    return stale


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_storage_that_was_away_costs_no_sample(
    tars: list[TarFile], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    away(monkeypatch, number, times=3)
    contents = tars[0].path.read_bytes()
    places, out = make_places(tars, [(0, 10, 50), (0, 300_000, 60)]), [np.empty(50, np.uint8), np.empty(60, np.uint8)]
    assert TarReader(threads=1).read_what_can_be(places, out) == {}
    assert [one.tobytes() for one in out] == [contents[10:60], contents[300_000:300_060]]


def test_a_stale_handle_is_opened_anew_and_stays_in_its_place(
    tars: list[TarFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = TarReader()
    stale = away(monkeypatch, errno.ESTALE, times=1, since_open=True)
    content = tars[0].path.read_bytes()
    for _ in range(2):
        assert read(reader, make_places(tars, [(0, 10, 50)])) == [content[10:60]]
    assert stale[0] in reader._open.values()
    assert not os.get_inheritable(stale[0])


def test_storage_that_stays_away_is_no_verdict_on_samples(tars: list[TarFile], monkeypatch: pytest.MonkeyPatch) -> None:
    away(monkeypatch, errno.EIO, times=99)
    with pytest.raises(StorageAwayError, match=r"0\.tar \(reading sample key-0 at byte 10\): Input/output error"):
        TarReader().read_what_can_be(make_places(tars, [(0, 10, 50)]), [np.empty(50, np.uint8)])


def test_a_tar_that_cannot_be_opened_for_a_moment_is_waited_for(
    tars: list[TarFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.open, [2]
    monkeypatch.setattr(patience, "PAUSES_S", (0.0,) * 3)

    def opened(*args: Any, **options: Any) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EHOSTDOWN, os.strerror(errno.EHOSTDOWN))
        return real(*args, **options)

    monkeypatch.setattr(os, "open", opened)
    assert read(TarReader(), make_places(tars, [(1, 0, 10)])) == [tars[1].path.read_bytes()[:10]]
