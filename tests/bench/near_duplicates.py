"""The perceptual hash beside imagehash's pHash, and the Hamming index at millions of rows.

Hash: speed from JPEG bytes, one thread; recall on re-encoded, resized and cropped copies at distances that give other
pictures the same chance of being taken for copies. Pictures: the photographs that scikit-image's wheel carries, cut in
four, and generated stand-ins; a few hundred, so that recall is good to some per cent, and false positives can only be
bounded. Index: memory per row, and time per lookup of a 512-row unit whose every tenth row is a copy.

    python tests/bench/near_duplicates.py [--quick] [--repeats 5] [--rows 1000000,10000000] [--out FILE]

Needs `imagehash` (the `dev` extra).
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import imagehash
import numpy as np
import numpy.typing as npt
import skimage
from harness import Figures, Report, interleaved, num_repeats, parser, timed
from PIL import Image

from producers.near_index import HammingIndex
from producers.perceptual_hash import perceptual_hash
from qwenimg_dist.demo.photos import generic_picture

PHOTOS: Final = (
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg"),
    *("hubble_deep_field.jpg", "ihc.png", "camera.png", "moon.png", "coins.png", "brick.png", "grass.png"),
)
DISTANCES: Final = (4, 6, 8, 10)
UNIT: Final = 512
Hash = Callable[[bytes], int | None]


def by_imagehash(data: bytes) -> int | None:
    """Its pHash as the usual code calls it: 32x32, DCT, 64 bits."""
    bits = imagehash.phash(Image.open(io.BytesIO(data))).hash.ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True)


def pictures(num_generated: int) -> Iterator[Image.Image]:
    """Quarters of photographs, 1024 px wide, then generated pictures of 512 px."""
    folder = Path(skimage.__file__).parent / "data"
    for name in PHOTOS:
        photo = Image.open(folder / name).convert("RGB")
        width, height = photo.size
        for left, top in ((0, 0), (0, 1), (1, 0), (1, 1)):
            box = (left * width // 2, top * height // 2, (left + 1) * width // 2, (top + 1) * height // 2)
            yield photo.crop(box).resize((1024, 1024 * height // width), Image.Resampling.BICUBIC)
    rng = np.random.default_rng(0)
    for _ in range(num_generated):
        yield generic_picture(rng, 512)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def copies(image: Image.Image, rng: np.random.Generator) -> dict[str, bytes]:
    """One copy of each kind."""

    def resized(width: int) -> Image.Image:
        return image.resize((width, max(1, round(width * image.height / image.width))), Image.Resampling.LANCZOS)

    def cropped(share: float) -> Image.Image:
        cut_x, cut_y = round(image.width * share), round(image.height * share)
        left, top = int(rng.integers(0, cut_x + 1)), int(rng.integers(0, cut_y + 1))
        return image.crop((left, top, left + image.width - cut_x, top + image.height - cut_y))

    return {
        "q50": jpeg(image, 50),
        "q20": jpeg(image, 20),
        "half": jpeg(resized(image.width // 2)),
        "256 px": jpeg(resized(256)),
        "crop 2%": jpeg(cropped(0.02)),
        "crop 3%": jpeg(cropped(0.03)),
        "crop 5%": jpeg(cropped(0.05)),
    }


def measure_recall(report: Report, num_generated: int) -> None:
    """Share of copies found at each distance; the pictures that have both hashes."""
    rng = np.random.default_rng(1)
    found: dict[str, dict[str, list[int]]] = {"ours": {}, "imagehash": {}}
    originals: dict[str, list[int]] = {"ours": [], "imagehash": []}
    num, hashed = 0, 0
    for image in pictures(num_generated):
        num += 1
        data = jpeg(image, 92)
        if perceptual_hash(data) is None:
            continue
        hashed += 1
        made = copies(image, rng)
        for name, of in (("ours", perceptual_hash), ("imagehash", by_imagehash)):
            original = of(data)
            assert original is not None
            originals[name].append(original)
            for kind, copy in made.items():
                value = of(copy)  # a copy that has no hash is not found
                found[name].setdefault(kind, []).append(65 if value is None else _between(original, value))
    for distance in DISTANCES:
        for name, of_kind in found.items():
            figures = {kind: float(np.mean(np.array(far) <= distance)) for kind, far in of_kind.items()}
            others = _pairs(originals[name])
            figures["others, per million"] = 1e6 * float((others <= distance).mean())
            report.add(f"recall at {distance:2d} bits, {name}", [figures])
    nearest = {name: int(_pairs(values).min()) for name, values in originals.items()}
    report.notes.append(
        f"{hashed} of {num} pictures have our hash, the rest are too plain for one; of {hashed * (hashed - 1) // 2:,} "
        f"pairs of other pictures the nearest differ in {nearest['ours']} bits (imagehash: {nearest['imagehash']})"
    )


def _between(one: int, other: int) -> int:
    return ((one ^ other) & (2**64 - 1)).bit_count()


def _pairs(values: Sequence[int]) -> npt.NDArray[np.uint8]:
    hashes = np.array(values, dtype=np.int64).view(np.uint64)
    between = np.bitwise_count(hashes[:, None] ^ hashes[None])
    distances: npt.NDArray[np.uint8] = between[np.triu_indices(len(hashes), 1)]
    return distances


def measure_speed(report: Report, repeats: int, num: int) -> None:
    """1024x1024 JPEG bytes of usual weight (photographs at quality 75, 60 to 200 KB), in memory, one thread."""
    images = [image.resize((1024, 1024), Image.Resampling.BICUBIC) for image, _ in zip(pictures(0), range(4 * num))]
    files = [jpeg(image, 75) for image in images[::4]]

    def variant(of: Hash) -> Callable[[], Figures]:
        def run() -> Figures:
            with timed() as clock:
                for data in files:
                    of(data)
            return {"images/s": len(files) / clock.wall_s, "images/CPU-s": len(files) / clock.cpu_s}

        return run

    results = interleaved(
        {"hash, ours": variant(perceptual_hash), "hash, imagehash": variant(by_imagehash)}, repeats=repeats
    )
    for name, figures in results.items():
        report.add(name, figures)
    report.add_ratio("hash speed, ours / imagehash", "images/s", "hash, ours", "hash, imagehash")
    report.settings["mean_jpeg_kb"] = round(sum(map(len, files)) / len(files) / 1024)


def measure_index(report: Report, num_rows: int, distance: int, repeats: int) -> None:
    """Random hashes: the hardest case for the number of rows, since nothing settles as a copy."""
    rng = np.random.default_rng(2)
    index = HammingIndex(distance)
    hashes = rng.integers(0, 2**64, num_rows, dtype=np.uint64)
    begin = time.perf_counter()
    index.add(hashes, np.arange(num_rows, dtype=np.int64))
    loaded = time.perf_counter() - begin
    lookups, additions = [], []
    for _ in range(repeats):
        asked = rng.integers(0, 2**64, UNIT, dtype=np.uint64)
        asked[::10] = hashes[rng.integers(0, num_rows, len(asked[::10]))] ^ np.uint64(0b100010001)
        begin = time.perf_counter()
        hits = index.find(asked)
        lookups.append(time.perf_counter() - begin)
        assert len(np.unique(hits.asked)) >= len(asked[::10])
    for _ in range(33):  # 33 units of new rows: one merge among them
        begin = time.perf_counter()
        index.add(rng.integers(0, 2**64, UNIT, dtype=np.uint64), np.arange(UNIT, dtype=np.int64) + len(index))
        additions.append(time.perf_counter() - begin)
    full = [
        {
            "bytes/row": index.nbytes / len(index),
            "load s": loaded,
            "lookup ms/unit": 1000 * lookup,
            "add ms/unit": 1000 * sum(additions) / len(additions),
        }
        for lookup in lookups
    ]
    report.add(f"index, {num_rows:,} rows, distance {distance}", full)


def main() -> int:
    options = parser(__doc__, repeats=5)
    options.add_argument("--rows", default=None, help="sizes of the index, separated by commas")
    args = options.parse_args()
    sizes = [int(size) for size in args.rows.split(",")] if args.rows else [200_000 if args.quick else 10_000_000]
    repeats = num_repeats(args)
    report = Report(
        name="near_duplicates",
        what="our perceptual hash beside imagehash's pHash; the Hamming index",
        settings={"unit": UNIT},
        targets=["hash: at least 1,000 images/s per core from 1024x1024 JPEG bytes, recall not below imagehash's"],
        notes=["index: 28 bytes per row, 32 MB of tables, and a buffer of 0.3 MB; time grows with the rows"],
    )
    measure_speed(report, repeats, 4 if args.quick else 12)
    measure_recall(report, 10 if args.quick else 100)
    for size in sizes:
        for distance in (6, 8):
            measure_index(report, size, distance, repeats)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
