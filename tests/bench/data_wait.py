"""How long training waits for data: on a disk that is only a little faster than needed, and after a resume.

    wait      a reader throttled to 1.2 times what the steps consume: share of the time that `Stream.get` waited
    resume    from nothing to the first batch in hand, at the first step of the plan and deep in its last epoch: the
              run's generations opened and verified, the catalog mapped, the epoch's order found, the batch read

The throttle is a token bucket in `TarReader.read`, the step a sleep; data, ledger and stream are real. Weights are not
loaded, so `resume` is what a resume takes beyond loading.

    python tests/bench/data_wait.py [--quick] [--repeats 3] [--out FILE]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from fake_data import FakeData, lognormal_tokens
from harness import Figures, Report, interleaved, num_repeats, parser, scratch

from consumers.stream import Stream
from qwenimg_dist.data.catalog import Places, RunFacets
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.reader import Bytes, TarReader
from qwenimg_dist.schema import latents_facet, text_facet

BATCH: Final = 16
HEADROOM: Final = 1.2
STEP_S: Final = 0.3
EPOCHS: Final = 50
WAIT, RESUME = (1024, 3584), (64, 32)
"""Resolution class and text width of the two data sets: real sizes, and many small rows."""


class ThrottledReader(TarReader):
    """Delivers `bytes_per_s` over time, as a disk does; what it did not deliver while idle is lost."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__()
        self._rate = bytes_per_s
        self._free_at = 0.0

    def read(self, places: Places, out: Sequence[Bytes]) -> int:
        begin = time.perf_counter()  # the page cache's own time is part of the disk's
        nbytes = super().read(places, out)
        self._free_at = max(self._free_at, begin) + nbytes / self._rate
        time.sleep(max(0.0, self._free_at - time.perf_counter()))
        return nbytes


def make(root: Path, sizes: tuple[int, int], num_rows: int, unit: int) -> FakeData:
    """A data set and a run over it for many epochs."""
    resolution, width = sizes
    facets = RunFacets(text=text_facet("0123456789ab"), latents={resolution: latents_facet(resolution, "0123456789ab")})
    data, random = FakeData(root / "data", facets, unit_size=unit, text_width=width), np.random.default_rng(0)
    for _ in range(num_rows // unit):
        data.unit(lognormal_tokens(random, 150, 0.3, unit).tolist())
    generations(root, data.dataset, facets, data.num_rows).advance(0)
    return data


def generations(root: Path, dataset: Dataset, facets: RunFacets, num_rows: int) -> Generations:
    """As a start of the run makes them."""
    resolution = next(iter(facets.latents))
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=EPOCHS * num_rows // BATCH,
        weights={resolution: 1.0},
        global_batch=BATCH,
        micro_batch_tokens=4 * (resolution // 16) ** 2,
        lr_scale=1.0,
        where=None,
    )
    config = LedgerConfig(phases=(phase,), seed=0, caption_dropout=0.1, where=None, held_out=0.0, max_held_out=0)
    return Generations(root / "run", dataset, facets, config, follow=False)


def wait_share(root: Path, data: FakeData, num_steps: int) -> Figures:
    """Steps that sleep, on a disk that delivers `HEADROOM` times what they need on average."""
    run = generations(root, data.dataset, data.facets, data.num_rows)
    run.advance(0)
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.bfloat16)
    per_batch = data.nbytes / data.num_rows * BATCH
    stream._assembler._reader = ThrottledReader(HEADROOM * per_batch / STEP_S)
    stream.get(0)  # the pipeline's first batch is `resume`'s matter
    waited, begin = 0.0, time.perf_counter()
    for step in range(1, num_steps):
        time.sleep(STEP_S)
        waited += stream.get(step).wait_s
    share = waited / (time.perf_counter() - begin)
    stream.close()
    return {"data wait (share)": share, "MB/s delivered": HEADROOM * per_batch / STEP_S / 1e6}


def first_batch(root: Path, data: FakeData, step: int) -> Figures:
    """Everything anew, as after a restart."""
    begin = time.perf_counter()
    run = generations(root, Dataset.open(data.dataset.root), data.facets, data.num_rows)
    run.verify()
    run.advance(step)
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.bfloat16)
    stream.get(step)
    seconds = time.perf_counter() - begin
    stream.close()
    return {"first batch (s)": seconds}


def main() -> int:
    args = parser(__doc__, repeats=3).parse_args()
    torch.set_num_threads(1)
    with scratch("data-wait") as folder:
        wait = make(folder / "wait", WAIT, 64 if args.quick else 256, 64)
        many = make(folder / "resume", RESUME, 2_048 if args.quick else 20_480, 512)
        deep = (EPOCHS - 1) * many.num_rows // BATCH + many.num_rows // BATCH // 2
        variants: dict[str, Any] = {
            "wait": partial(wait_share, folder / "wait", wait, 20 if args.quick else 40),
            "resume at step 0": partial(first_batch, folder / "resume", many, 0),
            f"resume at step {deep}": partial(first_batch, folder / "resume", many, deep),
        }
        report = Report(
            name="data_wait",
            what=f"waiting on a disk with {HEADROOM} times the demand; from a start to the first batch",
            settings={"batch": BATCH, "step_s": STEP_S, "rows": many.num_rows, "epochs": EPOCHS},
            targets=["data wait <= 1 % of the time", "first batch <= 1 s beyond loading, at any step"],
        )
        found = interleaved(variants, repeats=num_repeats(args), warmup=0)
        for name, figures in found.items():
            report.add(name, figures)
        report.add_ratio(
            "first batch: deep / at step 0", "first batch (s)", f"resume at step {deep}", "resume at step 0"
        )
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
