"""What a step cost: rates, waiting, padding, memory, and the share of the device's peak that did useful work.

Place in the flow: the trainer counts every step and asks at log time. Rates are over the steps since the last log and
leave out evaluation and saving. Deliberately left out: utilisation on devices whose peak is not known.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import Any

import torch

from consumers.batch import RankBatch
from consumers.ranks import Ranks
from qwenimg_dist.metrics import peak_flops
from qwenimg_dist.models.transformer import forward_flops


class Throughput:
    """Counts steps of this rank; `metrics` sums over the ranks and starts anew."""

    def __init__(self, transformer_config: Mapping[str, Any], ranks: Ranks, *, forwards_per_batch: int) -> None:
        self._model = transformer_config
        self._ranks = ranks
        self._forwards = forwards_per_batch
        on_gpu = ranks.device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(ranks.device)) if on_gpu else None
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._seconds = self._wait_s = self._images = self._tokens = self._flops = self._padding = 0.0

    def count(self, batch: RankBatch, seconds: float) -> None:
        """Take in one step; `seconds` from asking for its batch to the end of its update."""
        self._steps += 1
        self._seconds += seconds
        self._wait_s += batch.wait_s
        self._images += batch.num_real / self._ranks.world_size
        self._tokens += batch.image_tokens + batch.text_tokens
        self._padding += batch.padding
        for micro in batch.micro_batches:
            count, longest = micro.text.shape[:2]
            tokens = longest if micro.text_mask is None else float(micro.text_mask.sum()) / count
            per_image = forward_flops(self._model, micro.bucket.image_tokens, round(tokens))
            # A backward costs twice its forward. Recomputation is no useful work and is not counted.
            self._flops += 3 * self._forwards * count * per_image

    def metrics(self) -> dict[str, float]:
        """Collective. `train/…` values of the steps since the last call."""
        steps, ranks = max(1, self._steps), self._ranks
        images, tokens, flops, padding = ranks.sum([self._images, self._tokens, self._flops, self._padding])
        memory = torch.cuda.max_memory_allocated(ranks.device) if ranks.device.type == "cuda" else 0
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds, wait_s, memory_gb, host_gb = ranks.max([self._seconds, self._wait_s, memory / 1e9, host / 1e9])
        self._reset()
        seconds = max(seconds, 1e-9)
        found = {
            "train/step_s": seconds / steps,
            "train/images_per_s": images / seconds,
            "train/tokens_per_s": tokens / seconds,
            "train/model_tflops_per_s": flops / seconds / 1e12,
            "train/data_wait_s": wait_s / steps,
            "train/padding": padding / steps / ranks.world_size,
            "train/host_memory_gb": host_gb,
        }
        if memory:
            found["train/memory_gb"] = memory_gb
        if self._peak:
            found["train/mfu"] = flops / seconds / (self._peak * ranks.world_size)
        return found
