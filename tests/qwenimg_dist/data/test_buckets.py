"""Buckets: the model's own at 1328, sane ones elsewhere, and placements that never distort."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenimg_dist.data.buckets import buckets, nearest_bucket, parse_aspect, place
from qwenimg_dist.schema import Bucket

ASPECTS = ("1:1", "2:3", "3:2", "3:4", "4:3", "9:16", "16:9")


def sizes(resolution: int, aspects: tuple[str, ...] = ASPECTS) -> set[str]:
    return {str(bucket) for bucket in buckets(resolution, aspects)}


def test_the_1328_class_is_the_models_official_seven() -> None:
    official = {"1328x1328", "1664x928", "928x1664", "1472x1104", "1104x1472", "1584x1056", "1056x1584"}
    assert sizes(1328) == official


@pytest.mark.parametrize("resolution", [256, 512, 640, 1024, 1328])
def test_sides_area_and_aspect(resolution: int) -> None:
    aspects = (*ASPECTS, "1:3", "3:1")
    found = buckets(resolution, aspects)
    assert len(found) == 9
    assert found == tuple(sorted(found))
    for bucket in found:
        assert bucket.height % 16 == bucket.width % 16 == 0
        assert bucket.height * bucket.width == pytest.approx(resolution**2, rel=0.13)
        wanted = min(abs(math.log(bucket.width / bucket.height / parse_aspect(a))) for a in aspects)
        assert wanted < 0.06
        assert Bucket(height=bucket.width, width=bucket.height) in found


def test_small_classes_merge_buckets_instead_of_inventing_sides() -> None:
    assert "64x64" in sizes(64)
    assert all(int(side) % 16 == 0 for size in sizes(64) for side in size.split("x"))
    assert sizes(16) >= {"16x16"}


@pytest.mark.parametrize("aspect", ["", "1", "0:1", "1:0", "a:b", "1:-2", "1:2:3"])
def test_an_aspect_that_is_none_is_named(aspect: str) -> None:
    with pytest.raises(ValueError, match=r"encode\.aspects"):
        buckets(64, (aspect,))


def test_bad_classes() -> None:
    with pytest.raises(ValueError, match="smallest side"):
        buckets(8, ASPECTS)
    with pytest.raises(ValueError, match="empty"):
        buckets(64, ())


def test_nearest_is_by_log_aspect() -> None:
    choices = buckets(1328, ASPECTS)
    assert str(nearest_bucket(1000, 1000, choices)) == "1328x1328"
    assert str(nearest_bucket(1080, 1920, choices)) == "1664x928"
    assert str(nearest_bucket(1920, 1080, choices)) == "928x1664"
    assert str(nearest_bucket(100, 5000, choices)) == "1664x928"


@given(height=st.integers(1, 4000), width=st.integers(1, 4000), resolution=st.sampled_from([64, 256, 640, 1328]))
def test_a_placement_covers_its_bucket_without_distortion(height: int, width: int, resolution: int) -> None:
    choices = buckets(resolution, ASPECTS)
    strict, grown = (place(height, width, choices, upscale=upscale) for upscale in (False, True))
    assert grown is not None
    bucket, (resized_h, resized_w), (top, left) = grown.bucket, grown.resized, grown.crop
    assert 0 <= top <= resized_h - bucket.height
    assert 0 <= left <= resized_w - bucket.width
    assert resized_h == bucket.height or resized_w == bucket.width
    # One scale for both sides, up to the rounding of one pixel.
    assert abs(resized_h * width - resized_w * height) <= max(height, width)
    if strict is None:
        assert bucket.height > height or bucket.width > width
    else:
        assert strict == grown
        assert resized_h <= height
        assert resized_w <= width


def test_the_picture_that_is_the_bucket_is_left_alone() -> None:
    fitted = place(1104, 1472, buckets(1328, ASPECTS), upscale=False)
    assert fitted is not None
    assert fitted.resized == (1104, 1472)
    assert fitted.crop == (0, 0)
    assert place(1103, 1472, buckets(1328, ASPECTS), upscale=False) is None
