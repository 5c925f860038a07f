"""The unit pipeline against a bare loop that does the same operations, images/s, and what Ray adds per sample.

Pictures are JPEG files of mixed aspect with distinct captions; each goes to 64 and 128 px through the tiny VAE, each
caption through the tiny text encoder. All variants work through the same pictures of a round, one thread each, in units
of 128 rows (the default is 512: fsyncs and small files count for four times as much here):

    bare      open, convert, resize, crop, the same VAE batches, the same text encoder, safetensors into two tars and
              one for text; no hash, no scores, no index, no fsync: what a script would do
    inline    listing, scan, dedup, filters, decode recipe, encode, shards, parquet, commits, in this process
    plain     the same without filters and near duplicates: what the pipeline itself costs
    ray       the same units on one Ray actor, driven from here as `produce` does; its start is not counted
    ray fed   on one loader that feeds an encoder in another process: what passing pixels costs is the CPU time beside
              `ray`'s
    ray 2     on two actors, whose figure means something only where two cores are free: the load is printed beside it

CPU time is counted where it is spent: in this process (for ray: the driver), in the actors, and in Ray's daemons. Ray's
share is also measured by itself: the round trip of one control message, of which a unit costs two.

    python tests/bench/producer.py [--quick] [--in-process] [--repeats 5] [--out FILE]

With `--in-process` the variants on Ray are left out: on a machine that is not quiet, CPU time of one process is what
can still be compared.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import torch
from harness import Figures, Report, interleaved, num_repeats, parser, scratch, timed
from PIL import Image
from safetensors.torch import save as save_safetensors

from producers.actor import Job
from producers.driver import Driver, Pending
from producers.encode import PipelineEncoders
from producers.filters.base import Resources, Scorers
from producers.plan import Plan, make_plan
from producers.pool import RayWorkers
from producers.ray_cluster import ray_session
from producers.sources import open_source
from producers.workers import InlineWorkers, Workers
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.models.identity import latents_facet_names, text_facet_name
from qwenimg_dist.models.pipeline import pipeline_dir
from qwenimg_dist.models.text_encoder import TextEncoder
from qwenimg_dist.models.vae import LatentCodec

UNIT: Final = 128
SIZES: Final = ((800, 600), (600, 800), (700, 700), (960, 540))
"""(width, height) of the source pictures."""
MESSAGES_PER_UNIT: Final = 2
"""Scan and encode."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """The pictures of one round, the same for all variants: whole units, in listing order."""

    units: range
    files: list[Path]
    captions: list[str]


def write_source(folder: Path, num: int) -> None:
    """Pictures with the statistics of photos (smooth areas, edges, some grain), and a metadata.jsonl."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for index in range(num):
        width, height = SIZES[index % len(SIZES)]
        coarse = random.integers(0, 256, (6, 8, 3)).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = random.normal(0, 6, (height, width, 1))
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.jpg", quality=90)
        words = " ".join(random.choice(["red", "green", "blue", "circle", "square", "picture"], 12))
        lines.append(f'{{"file_name": "{index:05d}.jpg", "text": "{words} {index}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))


class BareLoop:
    """One process, one loop, nothing but the operations."""

    def __init__(self, pipeline: Path, plan: Plan, out: Path) -> None:
        self._codec = LatentCodec.load(pipeline)
        self._text = TextEncoder.load(pipeline, dtype=torch.float32)
        self._plan, self._out = plan, out
        out.mkdir(parents=True)

    def __call__(self, work: Round) -> None:
        for number, begin in enumerate(range(0, len(work.files), UNIT)):
            chunk = slice(begin, begin + UNIT)
            self._unit(f"{work.units[number]:05d}", work.files[chunk], work.captions[chunk])

    def _unit(self, name: str, files: Sequence[Path], captions: Sequence[str]) -> None:
        batches: dict[tuple[int, Any], list[tuple[str, Any]]] = defaultdict(list)
        for file in files:
            image = Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
            for resolution, placed in self._plan.placements(image.height, image.width).items():
                resized = image.resize(placed.resized[::-1], Image.Resampling.LANCZOS)
                top, left = placed.crop
                box = (left, top, left + placed.bucket.width, top + placed.bucket.height)
                batches[resolution, placed.bucket].append((file.stem, np.asarray(resized.crop(box))))
        with ExitStack() as stack:
            tars = {
                r: stack.enter_context(tarfile.open(self._out / f"{name}-{r}.tar", "w"))
                for r in self._plan.latents_facets
            }
            for (resolution, _), batch in batches.items():
                pixels = torch.from_numpy(np.stack([array for _, array in batch])).permute(0, 3, 1, 2)
                mean, _ = self._codec.encode(pixels.float() / 127.5 - 1)
                for (stem, _), one in zip(batch, mean.to(torch.bfloat16), strict=True):
                    _add(tars[resolution], f"{stem}.safetensors", save_safetensors({"mean": one.contiguous()}))
        with tarfile.open(self._out / f"{name}-text.tar", "w") as tar:
            for index, features in enumerate(self._text.encode(list(captions))):
                data = save_safetensors({"features": features.to(torch.bfloat16).contiguous()})
                _add(tar, f"{index:05d}.safetensors", data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


class Pipeline:
    """The units of a round through a `Driver`; scan and dedup are among the work."""

    def __init__(self, root: Path, plan: Plan, config: Config, make: Callable[[Dataset], Workers]) -> None:
        self.dataset = Dataset.create(root, UNIT)
        source = open_source(config.source)
        self.workers = make(self.dataset)
        self._driver = Driver(dataset=self.dataset, plan=plan, root=source.root, make_workers=lambda: self.workers)
        self._num_rows = self._driver.list_source(source.find()).num_rows

    def __call__(self, work: Round) -> None:
        if not self._driver.produce([Pending(unit=unit) for unit in work.units], self._num_rows):
            raise RuntimeError("the driver stopped")


def _job(config: Config, pipeline: Path, plan: Plan, data: Path) -> Job:
    assert isinstance(config.source.path, str)
    return Job(
        config_json=config.model_dump_json(),
        data_path=str(data),
        pipeline_dir=str(pipeline),
        text_facet=plan.text_facet,
        latents_facets=dict(plan.latents_facets),
        root=config.source.path,
        num_threads=1,
    )


def _variant(run: Callable[[Round], None], rounds: Sequence[Round]) -> Callable[[], Figures]:
    """Each call takes the next round's pictures."""
    left = iter(rounds)

    def once() -> Figures:
        work = next(left)
        before = cpu_seconds()
        with timed() as clock:
            run(work)
        spent = {who: after - before.get(who, 0.0) for who, after in cpu_seconds().items()}
        per_image = 1000 / len(work.files)
        return {
            "images/s": len(work.files) / clock.wall_s,
            "ms/image": per_image * clock.wall_s,
            "CPU ms/image here": per_image * clock.cpu_s,
            "in actors": per_image * spent.get("actors", 0.0),
            "in Ray's daemons": per_image * spent.get("daemons", 0.0),
        }

    return once


def cpu_seconds() -> dict[str, float]:
    """Of the processes below this one, actors and others apart."""
    spent: dict[str, float] = defaultdict(float)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times = process.cpu_times()
            who = "actors" if process.name().startswith("ray::") else "daemons"
            spent[who] += times.user + times.system
    return spent


def round_trip_ms(num: int) -> list[float]:
    """Round trips of the smallest message to an idle actor."""
    import ray

    class Echo:
        def ready(self) -> bool:
            return True

    echo = ray.remote(Echo).remote()
    ray.get(echo.ready.remote())
    found = []
    for _ in range(num):
        begin = time.perf_counter()
        ray.get(echo.ready.remote())
        found.append(1000 * (time.perf_counter() - begin))
    ray.kill(echo)
    return found


def main() -> int:
    options = parser(__doc__, repeats=5)
    options.add_argument("--in-process", action="store_true", help="without the variants on Ray")
    args = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    repeats, per_round = num_repeats(args), UNIT * (2 if args.quick else 4)
    report = Report(
        name="producer",
        what="the unit pipeline, in process and on a Ray actor, against a bare loop of the same operations",
        settings={"images_per_round": per_round, "unit": UNIT, "resolutions": "64+128", "model": "tiny"},
        targets=["plain / bare >= 0.95", "ray 2 / ray >= 1.85 on two quiet cores", "<= 5 us of messages per sample"],
        notes=["ray: scan, dedup and encoding of neighbouring units overlap as far as there are cores"],
    )
    with scratch("producer") as folder:
        write_source(folder / "pictures", per_round * (repeats + 1))
        words = [f"source.path={folder / 'pictures'}", f"data.unit_size={UNIT}", "encode.resolutions=[64,128]"]
        config = load_config(words)
        off = [*(f"filters.{name}.enabled=false" for name in config.filters), "dedup.near=false"]
        without = load_config([*words, *off])
        pipeline = pipeline_dir(config.model)
        text, latents = text_facet_name(pipeline, config), latents_facet_names(pipeline, config)
        plan, plain_plan = (make_plan(one, text_facet=text, latents_facets=latents) for one in (config, without))
        found = list(open_source(config.source).find().rows)
        rounds = [_round(folder / "pictures", found, index, per_round) for index in range(repeats + 1)]
        encoders = PipelineEncoders.load(pipeline, config)
        scorers = Scorers(Resources(pipeline_dir=pipeline, device=config.cluster.device))
        bare = BareLoop(pipeline, plan, folder / "bare")

        def in_process(name: str, plan: Plan, config: Config) -> Pipeline:
            root = str(folder / "pictures")
            make = partial(InlineWorkers, plan=plan, root=root, encoders=encoders, scorers=scorers)
            return Pipeline(folder / name, plan, config, make)

        variants: dict[str, Callable[[Round], None]] = {
            "bare": bare,
            "inline": in_process("inline", plan, config),
            "plain": in_process("plain", plain_plan, without),
        }
        trips: list[float] = []

        def on_ray(producers: int, loaders: int = 0) -> Pipeline:
            cluster = config.cluster.model_copy(update={"producers": producers, "loaders_per_producer": loaders})
            return Pipeline(
                folder / f"ray-{producers}-{loaders}",
                plan,
                config,
                lambda dataset: RayWorkers(_job(config, pipeline, plan, dataset.root), cluster),
            )

        with ExitStack() as stack:
            if not args.in_process:
                cluster = config.cluster.model_copy(update={"producers": 3, "loaders_per_producer": 1})
                stack.enter_context(ray_session(cluster))
                on_actors = {"ray": on_ray(1), "ray fed": on_ray(1, 1), "ray 2": on_ray(2)}
                variants |= on_actors
                for each in on_actors.values():
                    assert isinstance(each.workers, RayWorkers)
                    stack.callback(each.workers.close)
                trips = round_trip_ms(200)
            load = os.getloadavg()[0]
            results = interleaved(
                {name: _variant(run, rounds) for name, run in variants.items()}, repeats=repeats, warmup=1
            )
    for name, figures in results.items():
        report.add(name, figures)
    for name in ("plain", "inline"):
        report.add_ratio(f"{name} / bare", "images/s", name, "bare")
        report.add_ratio(f"{name} / bare, by CPU time", "CPU ms/image here", "bare", name)
    if trips:
        _say_overheads(report, trips)
    report.notes.append(f"{os.cpu_count()} cores; load {load:.1f} before the first round, of which none is ours")
    return report.finish(args)


def _round(folder: Path, found: Sequence[Any], index: int, per_round: int) -> Round:
    rows = found[index * per_round : (index + 1) * per_round]
    return Round(
        units=range(index * per_round // UNIT, (index + 1) * per_round // UNIT),
        files=[folder / row.uri for row in rows],
        captions=[row.captions[0] for row in rows],
    )


def _say_overheads(report: Report, trips: Sequence[float]) -> None:
    report.add_ratio("ray / inline", "images/s", "ray", "inline")
    report.add_ratio("ray fed / ray", "images/s", "ray fed", "ray")
    report.add_ratio("ray 2 / ray", "images/s", "ray 2", "ray")
    quantiles = statistics.quantiles(trips, n=10)
    middle = statistics.median(trips)
    report.settings["ray_round_trip_ms"] = round(middle, 3)
    report.notes.append(
        f"Ray's control message: {middle:.2f} ms round trip (10th-90th percentile {quantiles[0]:.2f}-"
        f"{quantiles[-1]:.2f}); {MESSAGES_PER_UNIT} per unit are {1000 * MESSAGES_PER_UNIT * middle / UNIT:.0f} us per "
        f"sample at {UNIT} rows a unit, {1000 * MESSAGES_PER_UNIT * middle / 512:.1f} us at the default 512"
    )


if __name__ == "__main__":
    sys.exit(main())
