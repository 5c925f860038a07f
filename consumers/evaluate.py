"""Held-out losses at fixed sigma quantiles with fixed noise, beside the starting model's on the same samples.

Place in the flow: the trainer calls it when due. The set (`held_out.py`), the noise and the sigmas are the same at
every call and on any number of ranks; every sample's error is all-reduced, so that all groupings (resolution, bucket,
text length, the worst samples) are sums over the same small matrix, equal on all ranks to the last bit. The starting
model's errors are computed once before the first step and kept in the run directory: a run whose held-out loss rises
above them has degraded its base model, whatever the training loss says (`guard.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from consumers.batch import MicroBatch
from consumers.ema import Ema
from consumers.held_out import Errors, HeldOutClass, Start
from consumers.held_out_pairs import pair_metrics
from consumers.objectives.base import Predict
from consumers.objectives.dpo import pair_errors
from consumers.objectives.flow_matching import shift_mu, squared_errors
from consumers.ranks import Ranks
from qwenimg_dist.config import Config, DpoConfig
from qwenimg_dist.flow.sigmas import draw_noise, sigma_at_quantiles

TEXT_BINS: Final = ((1, 64), (65, 128), (129, 256), (257, 512), (513, None))
_WORST: Final = 8
Weights = Literal["ema", "raw"]
Rows = npt.NDArray[np.float64]


class Measurable(Protocol):
    """What is measured: the engine, or a frozen model."""

    @property
    def ranks(self) -> Ranks: ...
    @property
    def predict(self) -> Predict: ...
    def train(self, mode: bool = True) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Errors of every held-out sample at every quantile, by class."""

    errors: Errors
    """Of pairs, the chosen pictures'."""
    rejected: Errors = field(default_factory=dict)
    """The rejected pictures', of classes that hold pairs."""


class HeldOut:
    """The held-out classes of a run and how they are measured."""

    def __init__(self, config: Config, classes: Mapping[int, HeldOutClass], start: Start | None) -> None:
        """What `start` fixed is stronger than the config."""
        self._objective = config.objective
        self._seed = start.seed if start else config.evaluate.seed
        self.quantiles = start.quantiles if start else config.evaluate.sigma_quantiles
        self.num_samples = start.num_samples if start else config.evaluate.num_samples
        self.classes = classes

    def measure(self, model: Measurable, ema: Ema | None, tell: Callable[[], None] = lambda: None) -> Measured:
        """The error of every sample at every quantile, with the EMA's weights if given. Collective.

        `tell` is called before each micro-batch: on few ranks a large set takes longer than the watchdog lets a stage
        last.
        """
        num = len(self.quantiles)
        found = {
            (r, i): np.zeros((len(one.keys), num)) for r, one in self.classes.items() for i in range(1 + one.pairs)
        }
        model.train(False)
        with torch.no_grad(), ema.applied() if ema is not None else contextlib.nullcontext():
            for resolution, one in self.classes.items():
                for micro in one.batches:
                    tell()
                    real = np.flatnonzero(micro.weights.numpy() > 0)
                    for picture, errors in enumerate(self._errors(model.predict, micro.to(model.ranks.device))):
                        found[resolution, picture][micro.slots.numpy()[real]] = errors[real]
        model.train()
        # One rank has each sample, the others add nought: the sum is exact.
        flat = np.concatenate([np.zeros(0), *(errors.ravel() for errors in found.values())])
        summed = np.array(model.ranks.sum(flat.tolist())) if len(flat) else flat
        ends = np.cumsum([errors.size for errors in found.values()])
        parts = np.split(summed, ends[:-1]) if len(ends) else []
        by_picture: tuple[Errors, Errors] = ({}, {})
        for (resolution, picture), part in zip(found, parts, strict=True):
            by_picture[picture][resolution] = part.reshape(-1, num)
        return Measured(errors=by_picture[0], rejected=by_picture[1])

    def _errors(self, predict: Predict, micro: MicroBatch) -> Rows:
        """(pictures of a sample, b, quantiles) fp64."""
        objective = self._objective
        sigmas = sigma_at_quantiles(
            self.quantiles,
            density=objective.sigma_density,
            mean=objective.sigma_mean,
            std=objective.sigma_std,
            mode_scale=objective.sigma_mode_scale,
            mu=shift_mu(objective, micro.bucket.image_tokens),
        )
        noise = draw_noise(self._seed, 0, micro.slots.tolist(), micro.latents.shape[1:], stream="eval")
        noise = noise.to(micro.latents.device)
        columns = []
        for value in sigmas.tolist():
            sigma = torch.full((len(micro.weights),), value, device=micro.latents.device)
            if micro.rejected is None:
                errors = squared_errors(predict, micro, sigma, noise)[None]
            else:
                errors = pair_errors(predict, micro, sigma, noise)
            columns.append(errors.double().cpu())
        return torch.stack(columns, dim=-1).numpy()

    def start_of(self, measured: Measured, model: str) -> Start:
        """What is kept of the starting model with this fingerprint."""
        keys = {r: one.keys for r, one in self.classes.items()}
        quantiles, seed = tuple(self.quantiles), self._seed
        return Start(
            num_samples=self.num_samples,
            quantiles=quantiles,
            seed=seed,
            keys=keys,
            errors=measured.errors,
            rejected=measured.rejected,
            model=model,
        )

    def metrics(
        self, now: Errors, resolutions: Sequence[int], start: Errors | None, *, prefix: str = "eval/"
    ) -> dict[str, float]:
        """`loss`, `loss_q0.5`, ... and `text/65-128` over the classes of the present phase; `loss_512` and
        `bucket/1024x576` of every class, `dataset/photos` of each of several data sets; and where the starting model's
        are known, `start_loss...` beside the losses.
        """
        found: dict[str, float] = {}
        trained = [r for r in resolutions if r in now]
        if trained:
            pooled = np.concatenate([now[r] for r in trained])
            found |= self._losses(pooled)
            tokens = np.concatenate([np.array(self.classes[r].tokens) for r in trained])
            found |= _by_text(pooled.mean(axis=1), tokens)
            found["num_samples"] = float(len(pooled))
            if start is not None and all(r in start for r in trained):
                at_start = self._losses(np.concatenate([start[r] for r in trained]))
                found |= {f"start_{name}": value for name, value in at_start.items()}
        for resolution, errors in now.items():
            found[f"loss_{resolution}"] = float(errors.mean())
            if start is not None and resolution in start:
                found[f"start_loss_{resolution}"] = float(start[resolution].mean())
        found |= self._by_word("bucket", now, {r: one.buckets for r, one in self.classes.items()})
        if any(name for one in self.classes.values() for name in one.datasets):
            found |= self._by_word("dataset", now, {r: one.datasets for r, one in self.classes.items()})
        return {prefix + name: value for name, value in found.items()}

    def pairs(
        self, now: Measured, resolutions: Sequence[int] | None, start: Start | None, *, prefix: str = "eval/"
    ) -> dict[str, float]:
        """Implicit accuracy, margin and loss on held-out pairs (`held_out_pairs.py`); empty where there are none."""
        if start is None or not isinstance(self._objective, DpoConfig):
            return {}
        beta, theirs = self._objective.beta, (start.errors, start.rejected)
        found = pair_metrics(now.errors, now.rejected, *theirs, beta=beta, resolutions=resolutions)
        return {prefix + name: value for name, value in found.items()}

    def _losses(self, errors: Rows) -> dict[str, float]:
        by_quantile = {f"loss_q{q:g}": float(v) for q, v in zip(self.quantiles, errors.mean(axis=0), strict=True)}
        return {"loss": float(errors.mean()), **by_quantile}

    def _by_word(self, kind: str, now: Errors, words: Mapping[int, Sequence[str]]) -> dict[str, float]:
        """Means over the samples of each word, of all classes."""
        values: dict[str, list[float]] = {}
        for resolution, errors in now.items():
            for word, value in zip(words[resolution], errors.mean(axis=1).tolist(), strict=True):
                values.setdefault(f"{kind}/{word}", []).append(value)
        return {name: float(np.mean(found)) for name, found in sorted(values.items())}

    def worst(self, now: Errors, start: Errors | None) -> list[list[str | float | None]]:
        """The samples with the largest errors, and those that got worse most; rows of `WORST_COLUMNS`."""
        rows: list[list[str | float | None]] = []
        for resolution, errors in now.items():
            one = self.classes[resolution]
            before = start.get(resolution) if start is not None else None
            for slot, loss in enumerate(errors.mean(axis=1).tolist()):
                at_start = float(before[slot].mean()) if before is not None else None
                change = loss / at_start - 1 if at_start else None
                rows.append([one.keys[slot], resolution, one.buckets[slot], one.tokens[slot], loss, at_start, change])
        by_loss = sorted(rows, key=lambda row: _descending(row[4]))[:_WORST]
        by_change = sorted(rows, key=lambda row: _descending(row[6]))[:_WORST] if start is not None else []
        return by_loss + [row for row in by_change if row not in by_loss]


WORST_COLUMNS: Final = ("key", "resolution", "bucket", "text_tokens", "loss", "start_loss", "change")


def weights_of(config: Config, ema: Ema | None) -> list[tuple[Weights, Ema | None]]:
    """Which weights are looked at; the first are those that guard, curves and export go by."""
    wanted = config.evaluate.weights
    if ema is None or wanted == "raw":
        return [("raw", None)]
    return [("ema", ema), ("raw", None)] if wanted == "both" else [("ema", ema)]


def _by_text(losses: Rows, tokens: npt.NDArray[np.int64]) -> dict[str, float]:
    found = {}
    for low, high in TEXT_BINS:
        inside = (tokens >= low) & (tokens <= (high or tokens.max()))
        if inside.any():
            found[f"text/{low}-{high}" if high else f"text/{low}+"] = float(losses[inside].mean())
    return found


def _descending(value: str | float | None) -> float:
    """Sort key: large first, what is not finite before all, what is not known last."""
    if not isinstance(value, int | float):
        return float("inf")
    return -value if np.isfinite(value) else -float("inf")
