"""The loader: index + pread + prefetch against a raw sequential read of the same bytes, and against stock webdataset.

A fake data set of samples of about 1.6 MB (latents of 1024 px, about 150 tokens of 3584 features, all bf16) is written
through `Dataset` and `ShardWriter`; for webdataset the same tensors lie together in one tar, a sample after the other,
which is its best case. All files are read once before, so the page cache is warm and the disk does not count; the cold
variants have the tars dropped from it before each round. Variants:

    raw read      every byte of the tars, in order, into one reused buffer of the size that was fastest; nothing parsed
    reader        `TarReader`, one thread: just the tensors of each global batch in ledger order, into reused buffers
    stream        `Stream`: the same, assembled as the trainer gets it (bf16 latents, padded bf16 text, mask); one
                  stream goes on from round to round, as in a run
    webdataset    in process: tar iteration, safetensors parsed, the same tensors assembled, in the order of the tar
    webdataset+2  the same in a DataLoader with 2 worker processes

    python tests/bench/loader.py [--quick] [--repeats 5] [--out FILE]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import webdataset
from fake_data import FakeData, lognormal_tokens
from harness import Clock, Figures, Report, interleaved, num_repeats, parser, scratch, timed
from safetensors.torch import load as load_safetensors

from consumers.stream import Stream
from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.reader import TarReader
from qwenimg_dist.data.shards import ShardWriter
from qwenimg_dist.schema import latents_facet, text_facet

RESOLUTION: Final = 1024
WIDTH: Final = 3584
BATCH: Final = 16
UNIT: Final = 64
RAW_BUFFERS: Final = (256 << 10, 1 << 20, 4 << 20)
FACETS: Final = RunFacets(
    text=text_facet("0123456789ab"), latents={RESOLUTION: latents_facet(RESOLUTION, "0123456789ab")}
)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What was written."""

    data: FakeData
    generations: Generations
    combined: list[Path]
    """Tars for webdataset."""

    @property
    def num_samples(self) -> int:
        return self.data.num_rows

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def make(root: Path, num_units: int, epochs: int) -> Made:
    """Write the data set, the combined tars, and one generation over all samples for so many epochs."""
    data = FakeData(root / "data", FACETS, unit_size=UNIT, text_width=WIDTH)
    both = Dataset.create(root / "combined", UNIT)
    random = np.random.default_rng(0)
    combined: list[Path] = []
    for unit in range(num_units):
        samples = data.unit(lognormal_tokens(random, 150, 0.3, UNIT).tolist())
        with ShardWriter(both, Part(facet="both", unit=unit, part=0), max_shard_bytes=1 << 40) as writer:
            for key, text, mean in samples:
                writer.write(key, {}, {"features": text, "mean": mean})
            combined += [both.tar("both", tar.name) for tar in writer.close()]
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=epochs * data.num_rows // BATCH,
        weights={RESOLUTION: 1.0},
        global_batch=BATCH,
        micro_batch_tokens=4 * (RESOLUTION // 16) ** 2,
        lr_scale=1.0,
        where=None,
    )
    config = LedgerConfig(phases=(phase,), seed=0, caption_dropout=0.0, where=None, held_out=0.0, max_held_out=0)
    generations = Generations(root / "run", data.dataset, FACETS, config, follow=False)
    generations.advance(0)
    for tar in (*data.tars(), *combined):
        tar.read_bytes()  # into the page cache
    return Made(data=data, generations=generations, combined=combined)


def best_buffer(made: Made) -> int:
    """The size of buffer that the raw read is fastest with here."""
    rates = {size: max(raw_read(made, size)["MB/s"] for _ in range(2)) for size in RAW_BUFFERS}
    return max(rates, key=rates.__getitem__)


def drop_from_cache(tars: Sequence[Path]) -> None:
    """Out of the page cache, where the file system takes the advice."""
    for tar in tars:
        with open(tar, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(variant: Callable[[], Figures], tars: Sequence[Path]) -> Figures:
    drop_from_cache(tars)
    return variant()


def raw_read(made: Made, buffer_bytes: int) -> Figures:
    buffer = bytearray(buffer_bytes)
    with timed() as clock:
        for tar in made.data.tars():
            with open(tar, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return _figures(made, clock)


class ReaderVariant:
    """`TarReader` alone; the epoch's order is taken from the ledger, whose time counts."""

    def __init__(self) -> None:
        self._reader = TarReader(threads=1)
        self._buffers: dict[str, np.ndarray[Any, Any]] = {}

    def __call__(self, made: Made) -> Figures:
        ledger = made.generations.ledger
        catalogs = ledger.catalogs
        seen = 0
        with timed() as clock:
            for step in range(made.num_samples // BATCH):
                batch = ledger.batch(step)
                for name, groups in (
                    ("latents", catalogs.latents_places(batch.rows, RESOLUTION, batch.bucket)),
                    ("texts", catalogs.text_places(batch.texts)),
                ):
                    for _, _, places in groups:
                        seen += self._reader.read(places, self._parts(name, places.nbytes))
        _check(seen, made)
        return _figures(made, clock)

    def _parts(self, name: str, nbytes: Any) -> list[Any]:
        total = int(nbytes.sum())
        if name not in self._buffers or len(self._buffers[name]) < total:
            self._buffers[name] = np.empty(2 * total, dtype=np.uint8)
        ends = np.cumsum(nbytes)
        return [self._buffers[name][int(end - num) : int(end)] for end, num in zip(ends, nbytes, strict=True)]


class StreamVariant:
    """What the trainer calls, an epoch per round; two batches are ahead at the begin of a round and at its end."""

    def __init__(self, made: Made) -> None:
        self._made = made
        self._stream = Stream(made.generations.ledger, rank=0, world=1, compute_dtype=torch.bfloat16)
        self._step = 0

    def __call__(self) -> Figures:
        seen = 0
        with timed() as clock:
            for step in range(self._step, self._step + self._made.num_samples // BATCH):
                seen += self._stream.get(step).read_bytes
        self._step += self._made.num_samples // BATCH
        _check(seen, self._made)
        return _figures(self._made, clock)

    def close(self) -> None:
        self._stream.close()


def webdataset_epoch(made: Made, workers: int) -> Figures:
    """One pass over the combined tars. Workers are started and ended within the time, as at every epoch by default."""
    pipeline = webdataset.WebDataset(
        [str(tar) for tar in made.combined],
        shardshuffle=False,
        nodesplitter=webdataset.split_by_node,
        workersplitter=webdataset.split_by_worker,
        handler=webdataset.reraise_exception,
    ).batched(BATCH, collation_fn=_collate)
    seen = 0
    with timed() as clock:
        source: Iterator[Any] = iter(pipeline)
        if workers:
            source = iter(torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers))
        for latents, text, mask in source:
            seen += latents.numel() * 2 + int(mask.sum()) * text.shape[2] * 2
        del source
    _check(seen, made)
    return _figures(made, clock)


def _collate(samples: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the stream assembles: fp32 latents, padded text, mask."""
    loaded = [load_safetensors(sample["safetensors"]) for sample in samples]
    latents = torch.stack([one["mean"] for one in loaded]).float()
    text = torch.nn.utils.rnn.pad_sequence([one["features"] for one in loaded], batch_first=True)
    lengths = torch.tensor([len(one["features"]) for one in loaded])
    return latents, text, torch.arange(text.shape[1])[None, :] < lengths[:, None]


def _check(seen: int, made: Made) -> None:
    if seen != made.nbytes:
        raise RuntimeError(f"{seen} bytes of tensors were seen, {made.nbytes} were written: not the same work")


def _figures(made: Made, clock: Clock) -> Figures:
    return {
        "samples/s": made.num_samples / clock.wall_s,
        "MB/s": made.nbytes / 1e6 / clock.wall_s,
        "CPU s per 1000": 1000 * clock.cpu_s / made.num_samples,
        "of it kernel": 1000 * clock.kernel_s / made.num_samples,
    }


def main() -> int:
    args = parser(__doc__, repeats=5).parse_args()
    torch.set_num_threads(1)
    with scratch("loader") as folder:
        # Warm and cold rounds, the thrown-away ones, and what is read ahead at the end.
        made = make(folder, 2 if args.quick else 8, epochs=2 * (num_repeats(args) + 1) + 1)
        buffer, stream = best_buffer(made), StreamVariant(made)
        raw, tars = partial(raw_read, made, buffer), made.data.tars()
        variants: dict[str, Callable[[], Figures]] = {
            "raw read": raw,
            "reader": partial(ReaderVariant(), made),
            "stream": stream,
            "webdataset": partial(webdataset_epoch, made, 0),
            "webdataset+2": partial(webdataset_epoch, made, 2),
            # Last in the round: whatever follows finds the page cache warm again.
            "raw read, cold": partial(cold, raw, tars),
            "stream, cold": partial(cold, stream, tars),
        }
        report = Report(
            name="loader",
            what="indexed reader and stream against the best raw sequential read and against webdataset",
            settings={
                "samples": made.num_samples,
                "MB_per_sample": round(made.nbytes / made.num_samples / 1e6, 2),
                "batch": BATCH,
                "raw_buffer_KiB": buffer >> 10,
            },
            targets=[
                "stream / raw read >= 0.8, stream / webdataset+2 >= 5, both warm",
                "stream: CPU <= 0.3 s per 1,000 samples (its kernel part is the raw read's own, see that line)",
            ],
            notes=["webdataset+2: worker start and end count, CPU of workers counts; webdataset reads in tar order"],
        )
        for name, found in interleaved(variants, repeats=num_repeats(args)).items():
            report.add(name, found)
        stream.close()
    report.add_ratio("reader / raw read", "samples/s", "reader", "raw read")
    report.add_ratio("stream / raw read", "samples/s", "stream", "raw read")
    report.add_ratio("stream / webdataset", "samples/s", "stream", "webdataset")
    report.add_ratio("stream / webdataset+2", "samples/s", "stream", "webdataset+2")
    report.add_ratio("CPU: stream / raw read", "CPU s per 1000", "stream", "raw read")
    report.add_ratio("CPU: stream / webdataset+2", "CPU s per 1000", "stream", "webdataset+2")
    report.add_ratio("cold: stream / raw read", "samples/s", "stream, cold", "raw read, cold")
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
