"""Rollouts: the model's own pictures of a batch of prompts, judged, and cut into what GRPO trains on.

    prompts of the ledger, G slots each -> noise -> sampler, a window of its steps stochastic -> VAE -> rewards
        -> gathered from all ranks -> advantages within each group -> one micro-batch per micro-batch and window step

Place in the flow: the trainer calls `play` between reading a batch and its updates, where the objective is GRPO. All
randomness is from (seed, step, slot in the global batch) and the window from (seed, step), so that a repeated step is
the same step, and a group may lie on several ranks. Every rank makes the same number of forwards, whatever rewards do:
they are asked in a thread with a deadline (`scoring.py`), and what is missing is left out of its group. Refuses to go
on when for `objective.max_failed_rounds` steps no picture had a reward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from consumers.batch import MicroBatch, RankBatch, RolloutStep
from consumers.errors import TrainingError
from consumers.grids import saved_or_said
from consumers.hooks import Hooks
from consumers.objectives.base import Predict
from consumers.objectives.grpo import Groups, Rewards, group_advantages, guided_velocity
from consumers.ranks import Ranks
from consumers.scoring import Judged, Judging, Scorer
from consumers.zero_engine import Engine
from qwenimg_dist.config import Config, GrpoConfig
from qwenimg_dist.data.catalog import Catalog
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.where import compile_where
from qwenimg_dist.debug import fault_point
from qwenimg_dist.flow.samplers import ode_schedule
from qwenimg_dist.flow.sde import Transition, draw_window, sample_sde, transition
from qwenimg_dist.flow.sigmas import draw_noise
from qwenimg_dist.models.generate import load_scheduler_config, save_grid, to_pictures
from qwenimg_dist.models.vae import LatentCodec
from qwenimg_dist.rewards import refusals
from qwenimg_dist.rewards.base import Prompt, Score

_DECODED_PIXELS: Final = 1 << 20
_SHOWN_GROUPS: Final = 4
_CHECKED_PROMPTS: Final = 20_000


@dataclass(frozen=True, kw_only=True)
class Round:
    """One step's rollouts on this rank; all but the micro-batches is the same on every rank."""

    micro_batches: list[MicroBatch]
    """Each with a `rollout`; as many on every rank."""
    metrics: dict[str, float]
    idle: str
    """Why there is nothing to learn from it, and no update; empty if there is."""
    notes: tuple[str, ...]
    """For a person: what went wrong with rewards."""
    grid: Path | None
    """Best and worst of some groups, on rank 0 where it was due."""


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """A micro-batch's rollouts."""

    micro: MicroBatch
    taken: Sequence[Transition]
    reference_means: Sequence[torch.Tensor | None]
    real: npt.NDArray[np.int64]
    """Its rows that are prompts of the batch, whose pictures were handed to the reward."""
    pictures: Sequence[Image.Image] = field(default_factory=list)
    """Of the real rows, where a grid is due."""


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What all ranks' rewards said, by slot of the global batch."""

    total: Rewards
    components: dict[str, Rewards]
    num_asked: int
    failures: int
    timeouts: int
    notes: tuple[str, ...]
    busy_s: float


class Rollouts:
    """Draws and judges. One per rank and run; `bind` it to the engine before the first `play`."""

    def __init__(
        self,
        config: Config,
        objective: GrpoConfig,
        pipeline: Path,
        ranks: Ranks,
        score: Score,
        say: Callable[[str], None],
    ) -> None:
        """Loads the VAE, frozen: call before the engine is built, whose `zero.Init` it must not meet. Collective."""
        self._config = config
        self._objective = objective
        self._ranks = ranks
        self._scheduler = ranks.together(lambda: load_scheduler_config(pipeline))
        self._codec = ranks.together(lambda: LatentCodec.load(pipeline, device=ranks.device))
        self._say = say
        self._scorer = Scorer(score, timeout_s=objective.reward_timeout_s)
        self._failed_rounds = 0
        self._engine: Engine | None = None
        self._reference: Predict | None = None
        self._generations: Generations | None = None

    def bind(self, engine: Engine, reference: Predict | None, generations: Generations) -> None:
        """What the pictures are drawn with, and where the prompts' words are."""
        self._engine, self._reference, self._generations = engine, reference, generations

    def check_prompts(self) -> None:
        """For rank 0, before the first picture: raise ValueError for prompts that the config's rewards cannot judge."""
        generations = self._generations
        assert generations is not None
        if not self._config.reward.active:
            return  # injected, of a kind of their own
        catalogs = generations.catalogs
        for line, index in generations.firsts():
            catalog, selection = catalogs[index], generations.config.selection(line.dataset, line.held_out_below)
            mask = catalog.key_hash >= np.uint64(selection.held_out_below)
            if selection.where is not None:
                mask &= selection.where.mask(catalog.columns, catalog.num_rows)
            mask &= drawn_by_a_phase(generations, catalog)
            rows = np.flatnonzero(mask)[:_CHECKED_PROMPTS] + catalogs.row_base(index)
            found = [Prompt(text=text, metadata=meta) for text, meta in catalogs.prompts(rows)]
            if refused := refusals(self._config.reward, found):
                told = "; ".join(f"{found[at].text!r}: {why}" for at, why in refused)
                raise ValueError(
                    f"there are prompts of which no picture could be judged: {told}. Leave them out (data.where, "
                    "data.takedown), or take other rewards"
                )

    def play(self, batch: RankBatch, *, step: int, tell: Callable[[str], None]) -> Round:
        """Draw and judge the pictures of a batch. Collective. `tell` names what begins."""
        engine, objective = self._engine, self._objective
        assert engine is not None
        begin = time.perf_counter()
        window = draw_window(self._config.train.seed, step, length=objective.window, within=objective.window_within)
        shown = objective.group_grid_every > 0 and (step + 1) % objective.group_grid_every == 0
        # Looked up before the first forward: a rank that failed between two would leave the others in theirs.
        prompts = self._ranks.together(lambda: [self._prompts(batch, micro) for micro in batch.micro_batches])
        judging = self._scorer.begin()
        engine.train(False)
        drawn = []
        for micro, asked in zip(batch.micro_batches, prompts, strict=True):
            tell("rollouts")
            drawn.append(self._draw(engine, micro.to(self._ranks.device), asked, window, step, judging, keep=shown))
            fault_point("rollout")
        engine.train()
        rollout_s, begin = time.perf_counter() - begin, time.perf_counter()
        tell("rewards")
        answers = self._gather(batch, drawn, judging.collect())
        groups = group_advantages(answers.total, group_size=objective.group_size, bound=objective.advantage_clip)
        reward_s = time.perf_counter() - begin
        self._count_failures(answers, step)
        seconds = self._ranks.max([rollout_s, reward_s])
        timing = {"train/rollout_s": seconds[0], "train/reward_s": seconds[1], "train/reward_busy_s": answers.busy_s}
        return Round(
            micro_batches=[one for part in drawn for one in _to_train(part, groups.advantages)],
            metrics={**timing, **_metrics(batch, answers, groups)},
            idle="" if groups.useful.any() else _why_idle(answers),
            notes=answers.notes,
            grid=self._grid(batch, drawn, answers, groups, step) if shown else None,
        )

    @torch.no_grad()
    def _draw(
        self,
        engine: Engine,
        micro: MicroBatch,
        prompts: Sequence[Prompt],
        window: range,
        step: int,
        judging: Judging,
        *,
        keep: bool,
    ) -> _Drawn:
        objective, seed = self._objective, self._config.train.seed
        slots, shape = micro.slots.tolist(), tuple(micro.latents.shape[1:])
        first = [slot // objective.group_size for slot in slots] if objective.share_noise else slots
        noise = draw_noise(seed, step, first, shape, stream="rollout").to(self._ranks.device)
        draws = draw_noise(seed, step, slots, (len(window), *shape), stream="sde").transpose(0, 1)
        sigmas = ode_schedule(objective.num_steps, micro.bucket.image_tokens, self._scheduler)
        end, taken = sample_sde(
            lambda x, sigma: guided_velocity(engine.predict, micro, x, sigma, objective.guidance),
            noise,
            sigmas,
            window=window,
            level=objective.noise_level,
            draws=draws.to(self._ranks.device),
        )
        means = [self._reference_mean(micro, one) for one in taken]
        real = _real(micro)
        pictures = self._decode(end[real]) if len(real) else []
        judging.put(pictures, prompts)
        return _Drawn(micro=micro, taken=taken, reference_means=means, real=real, pictures=pictures if keep else [])

    def _reference_mean(self, micro: MicroBatch, one: Transition) -> torch.Tensor | None:
        if self._reference is None:
            return None
        sigma = one.x.new_full((len(one.x),), one.sigma)
        velocity = guided_velocity(self._reference, micro, one.x, sigma, self._objective.guidance)
        return transition(one.x, velocity, one.sigma, one.sigma_next, level=self._objective.noise_level)[0]

    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """A few at a time: the VAE's activations are hundreds of MB per megapixel."""
        at_once = max(1, _DECODED_PIXELS // (64 * latents.shape[2] * latents.shape[3]))
        parts = [latents[start : start + at_once] for start in range(0, len(latents), at_once)]
        return [picture for part in parts for picture in to_pictures(self._codec.decode(part))]

    def _prompts(self, batch: RankBatch, micro: MicroBatch) -> list[Prompt]:
        """Of its real rows. Reads the catalogs."""
        assert self._generations is not None
        slots = micro.slots.cpu().numpy()[_real(micro)]
        unique, inverse = np.unique(batch.batch.rows[slots], return_inverse=True)
        found = [Prompt(text=text, metadata=meta) for text, meta in self._generations.catalogs.prompts(unique)]
        return [found[index] for index in inverse.tolist()]

    def _gather(self, batch: RankBatch, drawn: Sequence[_Drawn], mine: Judged) -> _Answers:
        """Every rank's rewards on every rank."""
        slots = [slot for one in drawn for slot in one.micro.slots.cpu().numpy()[one.real].tolist()]
        told = {
            "slots": slots,
            "total": mine.total.tolist(),
            "components": {name: values.tolist() for name, values in mine.components.items()},
            "counts": [mine.failures, mine.timeouts],
            "notes": [f"rank {self._ranks.rank}: {note}" for note in mine.notes],
            "busy_s": mine.busy_s,
        }
        everyone: list[dict[str, Any]] = self._ranks.gather_json(told)
        num = len(batch.batch.weights)
        names = sorted({name for one in everyone for name in one["components"]})
        total, components = np.full(num, np.nan), {name: np.full(num, np.nan) for name in names}
        for one in everyone:
            total[one["slots"]] = one["total"]
            for name, values in one["components"].items():
                components[name][one["slots"]] = values
        return _Answers(
            total=total,
            components=components,
            num_asked=sum(len(one["slots"]) for one in everyone),
            failures=sum(one["counts"][0] for one in everyone),
            timeouts=sum(one["counts"][1] for one in everyone),
            notes=tuple(note for one in everyone for note in one["notes"]),
            busy_s=max(one["busy_s"] for one in everyone),
        )

    def _count_failures(self, answers: _Answers, step: int) -> None:
        allowed = self._objective.max_failed_rounds
        failed = answers.num_asked > 0 and not np.isfinite(answers.total).any()
        self._failed_rounds = self._failed_rounds + 1 if failed else 0
        if self._failed_rounds >= allowed:
            why = "; ".join(answers.notes[:3]) or "every reward was NaN"
            raise TrainingError(
                f"no picture had a reward in {allowed} steps in a row up to step {step + 1} "
                f"(objective.max_failed_rounds): {why}. Mend the reward; the same command goes on from the last "
                "checkpoint"
            )

    def _grid(
        self, batch: RankBatch, drawn: Sequence[_Drawn], answers: _Answers, groups: Groups, step: int
    ) -> Path | None:
        """Best and worst picture of the groups with the widest spread, side by side. Collective."""
        size, bucket = self._objective.group_size, batch.batch.bucket
        widest = [int(g) for g in np.argsort(-groups.spread, kind="stable")[:_SHOWN_GROUPS] if groups.useful[g]]
        chosen: list[int] = []
        for group in sorted(widest):
            rewards = answers.total[group * size : (group + 1) * size]
            chosen += [group * size + int(np.nanargmax(rewards)), group * size + int(np.nanargmin(rewards))]
        if not chosen:
            return None
        pixels = torch.zeros((len(chosen), bucket.height, bucket.width, 3), dtype=torch.uint8)
        for one in drawn:
            for slot, picture in zip(one.micro.slots.cpu().numpy()[one.real].tolist(), one.pictures, strict=True):
                if slot in chosen:
                    pixels[chosen.index(slot)] = torch.from_numpy(np.array(picture))
        # One rank has each picture, the others add nought.
        pixels = self._ranks.sum_tensor(pixels.to(self._ranks.device)).cpu()
        if not self._ranks.is_first:
            return None
        return saved_or_said(lambda: self._save_grid(batch, answers, chosen, pixels, step), self._say)

    def _save_grid(
        self, batch: RankBatch, answers: _Answers, chosen: Sequence[int], pixels: torch.Tensor, step: int
    ) -> Path:
        assert self._generations is not None
        words = self._generations.catalogs.prompts(batch.batch.rows[np.array(chosen)])
        labels = [
            f"{name} {answers.total[slot]:.3g}: {text}"
            for name, slot, (text, _) in zip(("best", "worst") * len(chosen), chosen, words, strict=False)
        ]
        file = Path(self._config.run.path or ".") / "samples" / f"step-{step + 1:08d}-groups.png"
        return save_grid([Image.fromarray(one.numpy()) for one in pixels], labels, file, columns=4)


def drawn_by_a_phase(generations: Generations, catalog: Catalog) -> npt.NDArray[np.bool_]:
    """Rows that the `where` of some phase takes."""
    mask = np.zeros(catalog.num_rows, dtype=np.bool_)
    for phase in generations.config.phases:
        mask |= compile_where(phase.where).mask(catalog.columns, catalog.num_rows) if phase.where else True
    return mask


def open_rollouts(config: Config, pipeline: Path, ranks: Ranks, hooks: Hooks, stack: ExitStack) -> Rollouts | None:
    """Those of a run whose objective draws pictures, with the rewards that were injected, or the config's in a process
    of their own. Collective; call before the engine is built."""
    objective = config.objective
    if not isinstance(objective, GrpoConfig):
        return None
    score = hooks.score or ranks.together(lambda: _own_rewards(config, stack))
    return Rollouts(config, objective, pipeline, ranks, score, hooks.say)


def _own_rewards(config: Config, stack: ExitStack) -> Score:
    from qwenimg_dist.rewards.service import RewardError, RewardService  # needed by this stage alone

    try:
        return stack.enter_context(RewardService(config.reward)).score
    except RewardError as error:
        raise ValueError(str(error)) from error


def _real(micro: MicroBatch) -> npt.NDArray[np.int64]:
    """Its rows that are prompts of the batch, and no filling."""
    return np.flatnonzero(micro.weights.cpu().numpy() > 0)


def _to_train(drawn: _Drawn, advantages: Rewards) -> list[MicroBatch]:
    """One micro-batch per stochastic step."""
    micro = drawn.micro
    padded = np.append(advantages, 0.0)  # what slots beyond the batch get
    at = np.minimum(micro.slots.cpu().numpy(), len(advantages))
    gains = torch.from_numpy(padded[at]).float().to(micro.slots.device)
    return [
        replace(
            micro,
            rollout=RolloutStep(
                sigma=one.sigma,
                sigma_next=one.sigma_next,
                x=one.x,
                x_next=one.x_next,
                log_prob=one.log_prob,
                advantages=gains,
                reference_mean=mean,
            ),
        )
        for one, mean in zip(drawn.taken, drawn.reference_means, strict=True)
    ]


def _metrics(batch: RankBatch, answers: _Answers, groups: Groups) -> dict[str, float]:
    there = answers.total[np.isfinite(answers.total)]
    real = batch.batch.weights.reshape(len(groups.useful), -1).any(axis=1)
    found = {
        "reward/failures": float(answers.failures),
        "reward/timeouts": float(answers.timeouts),
        "reward/without": float(answers.num_asked - len(there)),
        "reward/flat_groups": float((real & ~groups.useful).sum()),
        "reward/groups": float(real.sum()),
    }
    for name, values in {"total": answers.total, **answers.components}.items():
        known = values[np.isfinite(values)]
        if len(known):
            found |= {f"reward/{name}": float(known.mean()), f"reward/{name}_std": float(known.std())}
    if groups.useful.any():
        found["reward/group_std"] = float(groups.spread[groups.useful].mean())
        gains = np.abs(groups.advantages[groups.advantages != 0])
        found |= {"train/advantage_abs": float(gains.mean()), "train/advantage_max": float(gains.max())}
    return found


def _why_idle(answers: _Answers) -> str:
    if not np.isfinite(answers.total).any():
        return "no picture had a reward"
    return "no group's rewards differ"
