"""Held-out loss at fixed sigma quantiles with fixed noise, beside the starting model's loss on the same samples.

Place in the flow: the trainer calls it when due. What is evaluated is what an export ships: the EMA where there is one.
The set, the noise and the sigmas are the same at every call and on any number of ranks. The starting model's losses
are computed once before the first step and kept in the run directory: a run whose held-out loss rises above them has
degraded its base model, whatever the training loss says.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from consumers.batch import MicroBatch
from consumers.ema import Ema
from consumers.engine import Engine
from consumers.objectives.flow_matching import shift_mu, squared_errors
from qwenimg_dist.config import Config
from qwenimg_dist.files import write_json
from qwenimg_dist.flow.sigmas import draw_noise, sigma_at_quantiles

START_LOSS: Final = "start_loss.json"
Losses = dict[str, float]
"""`loss` (mean over quantiles and samples), `loss_q0.1`, ... by quantile, and `num_samples`."""


class HeldOut:
    """This rank's share of the held-out samples by resolution class, kept in memory for the run."""

    def __init__(self, config: Config, batches: Mapping[int, Sequence[MicroBatch]]) -> None:
        self._config = config
        self._batches = batches

    def losses(self, engine: Engine, ema: Ema | None, resolutions: Sequence[int]) -> Losses | None:
        """Losses over the samples of these classes; None if there are none. Collective."""
        quantiles = self._config.evaluate.sigma_quantiles
        sums = torch.zeros(len(quantiles) + 1, dtype=torch.float64)
        engine.train(False)
        with torch.no_grad(), ema.applied() if ema is not None else contextlib.nullcontext():
            for resolution in resolutions:
                for micro in self._batches.get(resolution, ()):
                    sums += self._sums(engine, micro.to(engine.ranks.device))
        engine.train()
        *totals, count = engine.ranks.sum(sums.tolist())
        if count == 0:
            return None
        by_quantile = {f"loss_q{q:g}": total / count for q, total in zip(quantiles, totals, strict=True)}
        return {"loss": sum(by_quantile.values()) / len(by_quantile), **by_quantile, "num_samples": count}

    def _sums(self, engine: Engine, micro: MicroBatch) -> torch.Tensor:
        """(quantiles + 1,) fp64: weighted error sums, then the sum of the weights."""
        objective, evaluate = self._config.objective, self._config.evaluate
        sigmas = sigma_at_quantiles(
            evaluate.sigma_quantiles,
            density=objective.sigma_density,
            mean=objective.sigma_mean,
            std=objective.sigma_std,
            mode_scale=objective.sigma_mode_scale,
            mu=shift_mu(objective, micro.bucket.image_tokens),
        )
        noise = draw_noise(evaluate.seed, 0, micro.slots.tolist(), micro.latents.shape[1:], stream="eval")
        noise = noise.to(micro.latents.device)
        found = []
        for value in sigmas.tolist():
            sigma = torch.full((len(micro.weights),), value, device=micro.latents.device)
            errors = squared_errors(engine.predict, micro, sigma, noise)
            found.append((micro.weights * errors).double().sum().cpu())
        return torch.stack([*found, micro.weights.double().sum().cpu()])


def start_losses(held_out: HeldOut, engine: Engine, run_dir: Path, resolutions: Sequence[int]) -> dict[int, Losses]:
    """The starting model's losses per class: computed at step 0, read back on every later start. Collective."""
    file = run_dir / START_LOSS
    ranks = engine.ranks
    kept = ranks.broadcast_json(_read(file) if ranks.is_first else None)
    if kept is None:
        kept = {str(r): found for r in resolutions if (found := held_out.losses(engine, None, [r])) is not None}
        if ranks.is_first:
            write_json(file, kept)
    return {int(resolution): dict(losses) for resolution, losses in kept.items()}


def read_start_losses(run_dir: Path) -> dict[int, Losses]:
    """Those of a run that is past its first step; empty where they were never computed."""
    return {int(resolution): dict(losses) for resolution, losses in (_read(run_dir / START_LOSS) or {}).items()}


def eval_metrics(now: Losses, start: Mapping[int, Losses], resolutions: Sequence[int]) -> dict[str, float]:
    """`eval/loss…` and beside each the starting model's `eval/start_loss…` over the same samples."""
    metrics = {f"eval/{name}": value for name, value in now.items()}
    known = [start[r] for r in resolutions if r in start]
    count = sum(losses["num_samples"] for losses in known)
    if count == now["num_samples"]:
        for name in now.keys() - {"num_samples"}:
            weighted = sum(losses[name] * losses["num_samples"] for losses in known if name in losses)
            metrics[f"eval/start_{name}"] = weighted / count
    return metrics


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
