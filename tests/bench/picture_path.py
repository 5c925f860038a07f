"""What a picture costs on its way into a shard: decode and resize, the VAE in 2-D against 3-D, and the bytes written.

resize    a 1536 px JPEG -> 512 px: our recipe (`load_image`, `render`) against PIL's decode + LANCZOS, and against
          JPEG's own reduced decode (`draft`), which the recipe does not use: the pixels of one resolution would
          depend on which others are encoded with it
vae       one 256 px picture through `AutoencoderKLQwenImage` of the real widths (random weights), the stock class
          against `collapse_vae`, and the largest relative difference of the two
bytes     a unit at 256, 640 and 1328 px with text features of 150 x 3584 (the encoders are stubbed here, with the
          real shapes): bytes of all files of the data set over bytes of the tensors, and how much larger it were
          with text stored once per resolution

python tests/bench/picture_path.py [--quick] [--repeats 5] [--out FILE]
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from harness import Figures, Report, interleaved, num_repeats, parser, scratch, timed
from PIL import Image

from producers.driver import Driver
from producers.filters.base import Resources, Scorers
from producers.load import load_image, render
from producers.pictures import Pixels
from producers.plan import make_plan
from producers.sources import open_source
from producers.workers import InlineWorkers
from producers.write import EditPrompt
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.buckets import buckets, place
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.shards import RawTensor
from qwenimg_dist.models.vae import LatentCodec
from qwenimg_dist.schema import latents_facet, text_facet

RESOLUTIONS: Final = (256, 640, 1328)
TEXT_SHAPE: Final = (150, 3584)


class ShapedEncoders:
    """Random tensors of the real model's shapes."""

    def latents(self, pixels: Pixels) -> list[dict[str, RawTensor]]:
        num, height, width, _ = pixels.shape
        shape = (16, height // 8, width // 8)
        return [{"mean": RawTensor(data=np.ones(shape, dtype=np.uint16), dtype="bfloat16")} for _ in range(num)]

    def text(self, captions: Sequence[str]) -> Iterator[tuple[str, RawTensor]]:
        for caption in captions:
            yield caption, RawTensor(data=np.ones(TEXT_SHAPE, dtype=np.uint16), dtype="bfloat16")

    def edit_text(self, prompts: Sequence[EditPrompt]) -> list[RawTensor]:
        raise NotImplementedError("this benchmark has no edits")


def photo(side: int, seed: int = 0) -> bytes:
    """A JPEG with smooth areas, edges and grain."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (9, 9, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
    pixels = np.clip(smooth + random.normal(0, 6, (side, side, 1)), 0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=92)
    return sink.getvalue()


def resize_variants(data: bytes, times: int) -> dict[str, Callable[[], Figures]]:
    placement = place(1536, 1536, buckets(512, ("1:1",)), upscale=False)
    assert placement is not None
    chosen = placement

    def pil() -> None:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        np.asarray(image.resize((512, 512), Image.Resampling.LANCZOS))

    def draft() -> None:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (512, 512))
        np.asarray(image.convert("RGB").resize((512, 512), Image.Resampling.LANCZOS))

    def ours() -> None:
        render(load_image(data).image, chosen)

    return {name: _timed(run, times) for name, run in (("PIL+LANCZOS", pil), ("ours", ours), ("draft", draft))}


def vae_variants(side: int) -> tuple[dict[str, Callable[[], Figures]], float]:
    """The two encoders, and the largest difference of their means relative to the largest mean."""
    torch.manual_seed(0)
    stock = LatentCodec(AutoencoderKLQwenImage(), collapse=False)
    torch.manual_seed(0)
    collapsed = LatentCodec(AutoencoderKLQwenImage())
    images = torch.rand(1, 3, side, side) * 2 - 1
    theirs, mine = stock.encode(images)[0], collapsed.encode(images)[0]
    difference = float((theirs - mine).abs().max() / theirs.abs().max())
    variants = {"stock VAE": lambda: stock.encode(images), "collapsed VAE": lambda: collapsed.encode(images)}
    return {name: _timed(run, 1) for name, run in variants.items()}, difference


def _timed(run: Callable[[], object], times: int) -> Callable[[], Figures]:
    def once() -> Figures:
        with timed() as clock:
            for _ in range(times):
                run()
        return {"CPU ms": 1000 * clock.cpu_s / times}

    return once


def bytes_written(folder: Path, num: int) -> Figures:
    """One unit through the real pipeline with stubbed encoders."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    lines = []
    for index in range(num):
        (pictures / f"{index:04d}.jpg").write_bytes(photo(1400, seed=index))
        lines.append(json.dumps({"file_name": f"{index:04d}.jpg", "text": f"a picture with the number {index}"}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    config = load_config([f"source.path={pictures}", "filters=[broken,resolution]"])
    plan = make_plan(
        config, text_facet=text_facet("0" * 12), latents_facets={r: latents_facet(r, "0" * 12) for r in RESOLUTIONS}
    )
    dataset = Dataset.create(folder / "data", 512)
    source = open_source(config.source)
    scorers = Scorers(Resources(pipeline_dir=folder, device="cpu"))
    workers = InlineWorkers(dataset, plan, source.root, ShapedEncoders(), scorers)
    driver = Driver(dataset=dataset, plan=plan, root=source.root, make_workers=lambda: workers)
    num_rows = driver.list_source(source.find()).num_rows
    driver.produce(driver.pending(), num_rows)
    payload = {facet: _payload(dataset, facet) for facet in plan.facets}
    written = sum(file.stat().st_size for file in dataset.root.rglob("*") if file.is_file())
    text, whole = payload[plan.text_facet], sum(payload.values())
    return {
        "written/payload": written / whole,
        "text per resolution/once": (whole + text * (len(RESOLUTIONS) - 1)) / whole,
        "MB/sample": written / num / 1e6,
    }


def _payload(dataset: Dataset, facet: str) -> int:
    tables = (dataset.read(part, ["nbytes"]) for part in dataset.parts(facet))
    return sum(sum(table["nbytes"].to_pylist()) for table in tables)


def main() -> int:
    args = parser(__doc__, repeats=5).parse_args()
    torch.set_num_threads(1)
    repeats = num_repeats(args)
    report = Report(
        name="picture_path",
        what="decode and resize, the VAE in 2-D, and the bytes of a unit",
        settings={"resize": "1536 -> 512", "vae_px": 128 if args.quick else 256, "resolutions": RESOLUTIONS},
        targets=["resize >= 3x PIL + LANCZOS", "VAE >= 2.2x, difference <= 1e-5", "written/payload <= 1.01"],
        notes=[],
    )
    resize = interleaved(resize_variants(photo(1536), 2 if args.quick else 10), repeats=repeats, warmup=1)
    variants, difference = vae_variants(128 if args.quick else 256)
    vae = interleaved(variants, repeats=repeats, warmup=0)
    for name, figures in {**resize, **vae}.items():
        report.add(name, figures)
    report.add_ratio("PIL+LANCZOS / ours", "CPU ms", "PIL+LANCZOS", "ours")
    report.add_ratio("PIL+LANCZOS / draft", "CPU ms", "PIL+LANCZOS", "draft")
    report.add_ratio("stock / collapsed VAE", "CPU ms", "stock VAE", "collapsed VAE")
    report.notes.append(f"largest relative difference of the collapsed VAE: {difference:.1e}")
    with scratch("picture-path") as folder:
        found = bytes_written(folder, 4 if args.quick else 32)
    report.notes.extend(f"{name}: {value:.3f}" for name, value in found.items())
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
