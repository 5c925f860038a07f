"""Padding per phase: how much of the transformer's work goes to text padding and to fill slots.

The ledger orders 2^20 samples with log-normal captions (median 129 tokens) and caption dropout through the phases of
`model=qwen_image_2512`; each global batch is cut into ranks and micro-batches by the stream's own `cut_for`. FLOPs are
those of the real architecture. Beside the ledger's order stand what simpler orders would cost on the same samples:
the same order with dropout drawn after the batches were cut, and no sorting at all. `mix` is the ledger's order of two
data sets of half the rows each, weighed 3 to 1, the second with captions twice as long and the rows of one aspect
coming twice (`weights` of the phase). No tensor is made.

    python tests/bench/padding.py [--quick] [--ranks 64] [--out FILE]

The spread is over batches: median, and the 10th and 90th percentile as one value each.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from harness import Figures, Report, num_repeats, parser, scratch

from consumers.curriculum import plan
from consumers.stream import cut_for
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.data.buckets import buckets
from qwenimg_dist.data.catalog import CATALOG_VERSION, HEAD
from qwenimg_dist.data.catalogs import CatalogFolder, Catalogs
from qwenimg_dist.data.draws import hash_keys, uniform
from qwenimg_dist.data.ledger import GlobalBatch, Ledger
from qwenimg_dist.data.mix import Mix
from qwenimg_dist.data.order import Segment
from qwenimg_dist.data.samples import Selection

WIDTH: Final = 3072
LAYERS: Final = 60
SUFFIX_TOKENS: Final = 5
"""Tokens of the empty prompt: the template's suffix."""
MEDIAN_TOKENS: Final = 129
SIGMA: Final = 0.6
"""Of log(tokens): 10 % of the captions are shorter than 60 tokens, 10 % longer than 278."""

Ints = npt.NDArray[np.int64]


def flops(image_tokens: int, text_tokens: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """`models.transformer.forward_flops` of the full-size model, over an array of lengths."""
    tokens = image_tokens + text_tokens.astype(np.float64)
    return 24 * WIDTH**2 * LAYERS * (tokens + 1) + 4 * LAYERS * WIDTH * tokens**2


def write_catalog(
    folder: Path, config: Config, num_rows: int, seed: int, *, median: int = MEDIAN_TOKENS, dataset: str = ""
) -> CatalogFolder:
    """A catalog with one caption per row, every row at every resolution, aspects drawn evenly. No tar behind it."""
    random = np.random.default_rng(seed)
    tokens = np.round(np.exp(random.normal(np.log(median), SIGMA, num_rows))).astype(np.int32)
    tokens = np.clip(tokens, SUFFIX_TOKENS + 1, config.model.max_text_tokens).astype(np.int32)
    keys = np.array([f"{row:020d}" for row in range(num_rows)], dtype="S20")
    arrays: dict[str, npt.NDArray[Any]] = {
        "keys": keys,
        "rows": np.arange(num_rows, dtype=np.int64),
        "units": (np.arange(num_rows) // config.data.unit_size).astype(np.int32),
        "key_hash": hash_keys(keys),
        "caption_start": np.arange(num_rows + 1, dtype=np.int64),
        "caption_text": np.arange(1, num_rows + 1, dtype=np.int32),  # text 0 is the empty prompt
        "caption_kind": np.zeros(num_rows, dtype=np.int16),
        "text_keys": np.zeros(num_rows + 1, dtype="S20"),
        "text_tokens": np.concatenate([[SUFFIX_TOKENS], tokens]).astype(np.int32),
        "text_tar": np.zeros(num_rows + 1, dtype=np.int32),
        "text_offset": np.zeros(num_rows + 1, dtype=np.int64),
    }
    aspect = random.random(num_rows)
    arrays["column-aspect"] = aspect.astype(np.float32)
    latents = {}
    for resolution in config.resolutions:
        sizes = buckets(resolution, config.encode.aspects)
        arrays |= {
            f"latents-{resolution}-bucket": (aspect * len(sizes)).astype(np.int16),
            f"latents-{resolution}-tar": np.zeros(num_rows, dtype=np.int32),
            f"latents-{resolution}-offset": np.zeros(num_rows, dtype=np.int64),
        }
        latents[str(resolution)] = {
            "facet": f"latents-{resolution}",
            "dtype": "bfloat16",
            "channels": 16,
            "buckets": [[bucket.height, bucket.width] for bucket in sizes],
        }
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    text = {"facet": "text", "dtype": "bfloat16", "width": 3584, "empty": 0}
    head = {"version": CATALOG_VERSION, "digest": "", "tars": [], "words": {}, "caption_kinds": ["raw"]}
    (folder / HEAD).write_text(json.dumps({**head, "columns": ["aspect"], "text": text, "latents": latents}))
    return CatalogFolder(folder=folder, num_rows=num_rows, num_texts=num_rows + 1, dataset=dataset)


def micro_batches(tokens: Ints, image_tokens: int, ranks: int, budget: int) -> list[tuple[Ints, Ints]]:
    """(slots, what each repeats) of every micro-batch of all ranks; slots beyond the batch even out the ranks."""
    cuts = [cut_for(len(tokens), image_tokens, int(tokens.max()), budget, rank=r, world=ranks) for r in range(ranks)]
    made: list[tuple[Ints, Ints]] = []
    for cut in cuts:
        ends = np.cumsum(cut.sizes)
        made += [(cut.slots[end - size : end], cut.source[end - size : end]) for end, size in zip(ends, cut.sizes)]
    return made


def cost(batch: GlobalBatch, tokens: Ints, ranks: int, budget: int) -> Figures:
    """Share of FLOPs lost to text padding (fill slots are not padding), and of micro-batches that need no mask."""
    image = batch.bucket.image_tokens
    cut = micro_batches(tokens, image, ranks, budget)
    computed = useful = filled = 0.0
    free = 0
    for slots, source in cut:
        mine = tokens[source]
        each = flops(image, mine)
        padded = float(flops(image, mine.max(keepdims=True))[0]) * len(slots)
        real = (batch.weights[source] > 0) & (slots < len(tokens))
        computed += padded
        useful += float(each[real].sum())
        filled += float(each[~real].sum())
        free += int(mine.min() == mine.max())
    return {
        "padding %": 100 * (1 - (useful + filled) / computed),
        "mask-free %": 100 * free / len(cut),
        "samples/forward": len(tokens) / len(cut),
    }


def summary(found: list[Figures]) -> list[Figures]:
    """Over batches: median, 10th and 90th percentile, and the mean under a name of its own (it is what one pays)."""
    names = found[0]
    table = {name: np.array([figures[name] for figures in found]) for name in names}
    picks = [{name: float(np.quantile(values, q)) for name, values in table.items()} for q in (0.5, 0.1, 0.9)]
    means = {f"mean {name}": float(values.mean()) for name, values in table.items() if name.endswith("%")}
    return [{**means, **pick} for pick in picks]


def main() -> int:
    options = parser(__doc__, repeats=400)
    options.add_argument("--ranks", type=int, default=64, help="data-parallel ranks")
    args = options.parse_args()
    num_batches = 60 if args.quick and args.repeats is None else num_repeats(args)
    num_rows = 1 << (17 if args.quick else 20)
    config = load_config(["model=qwen_image_2512", "train.steps=40000"])
    dropout = config.objective.caption_dropout
    report = Report(
        name="padding",
        what="share of the transformer's FLOPs spent on text padding, per phase, as the stream cuts micro-batches",
        settings={"rows": num_rows, "ranks": args.ranks, "median_tokens": MEDIAN_TOKENS, "dropout": dropout},
        targets=["padding <= 2 % of FLOPs in every phase; 73-99 % of micro-batches without a mask (a prototype's)"],
        notes=["spread: 10th and 90th percentile over batches; 'mean' is over the same batches"],
    )
    with scratch("padding") as folder:
        catalogs = Catalogs(folder)
        catalogs.add(write_catalog(folder / "catalog", config, num_rows, seed=config.train.seed))
        measure(report, config, catalogs, num_batches, args.ranks, dropout)
        measure_mix(report, config, folder, num_rows // 2, num_batches, args.ranks)
    return report.finish(args)


def measure(report: Report, config: Config, catalogs: Catalogs, num_batches: int, ranks: int, dropout: float) -> None:
    """All phases and resolutions, batches spread over the phase's first epoch."""
    ledgers = {name: _ledger(config, catalogs, share) for name, share in (("ledger", dropout), ("late", 0.0))}
    lengths = catalogs[0].text_tokens.astype(np.int64)
    random = np.random.default_rng(0)
    for phase in plan(config):
        for resolution in sorted(phase.weights):
            begin = time.perf_counter()
            epoch = _epoch(ledgers["ledger"], phase.index, resolution)
            real = sum(ledgers["ledger"].batch(step).num_real for step in epoch)
            report.notes.append(
                f"phase {phase.index} {resolution} px: an epoch is {len(epoch)} batches, "
                f"{100 * (1 - real / (len(epoch) * phase.global_batch)):.2f} % of their slots are fill; ordered and "
                f"walked in {time.perf_counter() - begin:.1f} s"
            )
            steps = _spread(epoch, num_batches)
            found: dict[str, list[Figures]] = {"ledger": [], "dropout after grouping": [], "unsorted": []}
            for step in steps:
                batch = ledgers["ledger"].batch(step)
                tokens = lengths[batch.texts]
                found["ledger"].append(cost(batch, tokens, ranks, phase.micro_batch_tokens))
                late = ledgers["late"].batch(step)
                drawn = uniform(step, np.arange(len(late.texts))) < dropout
                tokens = np.where(drawn, SUFFIX_TOKENS, lengths[late.texts])
                found["dropout after grouping"].append(cost(late, tokens, ranks, phase.micro_batch_tokens))
                tokens = random.choice(lengths[1:], len(batch.texts))
                tokens = np.where(random.random(len(tokens)) < dropout, SUFFIX_TOKENS, tokens)
                found["unsorted"].append(cost(batch, tokens, ranks, phase.micro_batch_tokens))
            for order, figures in found.items():
                report.add(f"phase {phase.index} {resolution} px, {order}", summary(figures))


def measure_mix(report: Report, config: Config, folder: Path, rows_each: int, num_batches: int, ranks: int) -> None:
    """The ledger's order of two data sets with other captions and with weights of rows."""
    amounts, twice = {"photos": 3.0, "posters": 1.0}, "aspect < 0.2"
    catalogs = Catalogs(dict.fromkeys(amounts, folder))
    for index, name in enumerate(amounts):
        median, seed = MEDIAN_TOKENS * (1 + index), config.train.seed + index
        catalogs.add(write_catalog(folder / name, config, rows_each, seed, median=median, dataset=name))
    phases = tuple(replace(phase, row_weights={twice: 2.0}) for phase in plan(config))
    ledger = Ledger(
        phases=phases,
        seed=config.train.seed,
        caption_dropout=config.objective.caption_dropout,
        catalogs=catalogs,
        selection={name: Selection(where=None, held_out_below=0) for name in amounts},
        mix=Mix(unit="weight", amounts=amounts),
    )
    for index, name in enumerate(amounts):
        ledger.append(Segment(catalog=index, phase=None, epoch=0, last=True, dataset=name))
    lengths = np.concatenate([catalogs[index].text_tokens for index in range(len(amounts))]).astype(np.int64)
    for phase in phases:
        for resolution in sorted(phase.weights):
            batches = [ledger.batch(step) for step in _spread(_epoch(ledger, phase.index, resolution), num_batches)]
            found = [cost(batch, lengths[batch.texts], ranks, phase.micro_batch_tokens) for batch in batches]
            report.add(f"phase {phase.index} {resolution} px, mix", summary(found))


def _ledger(config: Config, catalogs: Catalogs, dropout: float) -> Ledger:
    ledger = Ledger(
        phases=plan(config),
        seed=config.train.seed,
        caption_dropout=dropout,
        catalogs=catalogs,
        selection=Selection(where=None, held_out_below=0),
    )
    ledger.append(Segment(catalog=0, phase=None, epoch=0, last=True))
    return ledger


def _spread(steps: list[int], count: int) -> list[int]:
    """At most so many of the steps, evenly."""
    return [steps[index] for index in np.unique(np.linspace(0, len(steps) - 1, count).astype(int))]


def _epoch(ledger: Ledger, phase: int, resolution: int) -> list[int]:
    """Steps of this resolution in the phase's first epoch (or in the phase, where it is shorter)."""
    planned = ledger.phases[phase]
    steps = (s for s in range(planned.first_step, planned.last_step) if ledger.resolution_at(s) == resolution)
    return list(itertools.islice(steps, ledger.batches_so_far(phase, resolution)))


if __name__ == "__main__":
    sys.exit(main())
