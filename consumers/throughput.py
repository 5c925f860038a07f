"""What a step cost: rates, waiting, padding, memory, and the share of the device's peak that did useful work.

Place in the flow: the trainer counts every step and asks at log time. Rates are over the steps since the last log and
leave out evaluation and saving. FLOPs are those of the formula in `models.transformer.forward_flops`; recomputation,
text padding and fill slots are no useful work. Deliberately left out: utilisation where no peak is known or given.

Which rank is the slowest: the one whose steps took longest without what it waited for others in the trainer's own
reductions. A rank that is slow inside a forward makes the others wait inside DeepSpeed's gathers too, so the spread is
a lower bound; the name is right as long as the rank is the last one to come.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from consumers.batch import MicroBatch, RankBatch
from consumers.ranks import Ranks
from qwenimg_dist.metrics import peak_flops
from qwenimg_dist.models.transformer import forward_flops

RANK_COLUMNS: Final = ("rank", "own_step_s", "data_wait_s", "peak_host_memory_gb", "peak_gpu_memory_gb")
_STATUS: Final = Path("/proc/self/status")


class Throughput:
    """Counts steps of this rank; `metrics` sums over the ranks and starts anew."""

    def __init__(
        self,
        transformer_config: Mapping[str, Any],
        ranks: Ranks,
        *,
        forwards_per_batch: int,
        forwards_without_gradient: int = 0,
        peak_tflops: float | None = None,
    ) -> None:
        """Forwards of every micro-batch, with a backward and without. `peak_tflops` of one rank's device; None takes
        the data sheet's, by the device's name."""
        self._model = transformer_config
        self._ranks = ranks
        # A backward costs twice its forward. Recomputation is no useful work and is not counted.
        self._forwards = 3 * forwards_per_batch + forwards_without_gradient
        self._peak = peak_tflops * 1e12 if peak_tflops else _peak_of(ranks.device)
        self.by_rank: list[list[float]] = []
        """Rows of `RANK_COLUMNS` at the last `metrics`, every rank's, on every rank."""
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._seconds = self._own_s = self._wait_s = 0.0
        self._images = self._tokens = self._useful = self._computed = self._padding = 0.0
        self._waited_before = self._ranks.waited.seconds

    def begin(self) -> None:
        """A step begins: what was waited for before it (a stop flag, an evaluation) is none of its time."""
        self._waited_before = self._ranks.waited.seconds

    def count(self, batch: RankBatch, seconds: float) -> None:
        """Take in one step; `seconds` from asking for its batch to the end of its update."""
        self._steps += 1
        self._seconds += seconds
        self._own_s += seconds - (self._ranks.waited.seconds - self._waited_before)
        self._wait_s += batch.wait_s
        self._images += batch.num_real / self._ranks.world_size
        self._tokens += batch.image_tokens + batch.text_tokens
        self._padding += batch.padding
        for micro in batch.micro_batches:
            useful, computed = micro_batch_flops(self._model, micro)
            self._useful += self._forwards * micro.pictures_per_row * useful
            self._computed += self._forwards * micro.pictures_per_row * computed

    def metrics(self) -> dict[str, float]:
        """Collective. `train/…` values of the steps since the last call."""
        steps, ranks = max(1, self._steps), self._ranks
        images, tokens, useful, computed, padding = ranks.sum(
            [self._images, self._tokens, self._useful, self._computed, self._padding]
        )
        gpu = torch.cuda.max_memory_allocated(ranks.device) if ranks.device.type == "cuda" else 0
        by_rank = ranks.table([self._seconds, self._own_s, self._wait_s, peak_host_bytes() / 1e9, gpu / 1e9])
        self.by_rank = [
            [rank, own / steps, wait / steps, *peaks] for rank, (_, own, wait, *peaks) in enumerate(by_rank)
        ]
        seconds, own_s, wait_s, host_gb, gpu_gb = ([row[i] for row in by_rank] for i in range(5))
        self._reset()
        longest = max(*seconds, 1e-9)
        found = {
            "train/step_s": longest / steps,
            "train/images_per_s": images / longest,
            "train/tokens_per_s": tokens / longest,
            "train/model_tflops_per_s": useful / longest / 1e12,
            "train/data_wait_s": max(wait_s) / steps,
            "train/data_wait_share": max(wait_s) / longest,
            "train/padding": padding / steps / ranks.world_size,
            "train/padding_flops": 1 - useful / computed if computed else 0.0,
            "train/own_step_s_max": max(own_s) / steps,
            "train/own_step_s_min": min(own_s) / steps,
            "train/slowest_rank": _first_of(own_s),
            "train/host_memory_gb": max(host_gb),
            "train/host_memory_rank": _first_of(host_gb),
        }
        if max(gpu_gb):
            found |= {"train/memory_gb": max(gpu_gb), "train/memory_rank": _first_of(gpu_gb)}
        if self._peak:
            found["train/mfu"] = useful / longest / (self._peak * ranks.world_size)
        return found


def micro_batch_flops(model: Mapping[str, Any], micro: MicroBatch) -> tuple[float, float]:
    """FLOPs of one forward: of the real samples at their own text lengths, and of all that is computed."""
    count, longest = micro.text.shape[:2]
    lengths = [longest] * count if micro.text_mask is None else micro.text_mask.sum(dim=1).tolist()
    image_tokens = micro.bucket.tokens
    useful = sum(
        forward_flops(model, image_tokens, int(length))
        for length, weight in zip(lengths, micro.weights.tolist(), strict=True)
        if weight > 0
    )
    return useful, count * forward_flops(model, image_tokens, longest)


def peak_host_bytes() -> int:
    """High-water mark of this process's resident memory."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):  # no Linux: what getrusage says, which a parent's peak may be mixed into
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_of(device: torch.device) -> float | None:
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _first_of(values: Sequence[float]) -> int:
    """The rank with the largest value."""
    return values.index(max(values))
