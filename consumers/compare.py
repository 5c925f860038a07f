"""Measures two models beside each other on the ranks: held-out losses, pictures, rewards; then the page and the JSON.

Place in the flow: the `eval` command starts it under Ray Train, `torchrun -m consumers eval ...` without. Each model is
sharded over the ranks in turn as a frozen one (2 bytes per parameter over all of them in bf16), so what could be
trained can be judged. What is done is kept (losses per model, a file per picture, rewards per model), and the same
command goes on behind it. Refuses nothing by itself: `comparison.py` has checked before.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from consumers.comparison import RESULT, SIDES, Comparison, pin, plan_comparison
from consumers.curriculum import plan
from consumers.data_sets import check_ready, data_dirs, ledger_config
from consumers.engine import build_frozen, start_distributed, stop_distributed
from consumers.evaluate import HeldOut, Measured
from consumers.held_out import find_other_classes, make_held_out
from consumers.held_out_pairs import pair_metrics
from consumers.hooks import Hooks, Stopped
from consumers.pictures import Sampling, TextFolder, draw_pictures, judge_pictures, missing_cells, read_picture
from consumers.ranks import Ranks
from consumers.reference_pass import Watch
from consumers.run_data import open_data
from consumers.run_directory import Prepared, facets_of, run_lock
from consumers.trainer import stop_signals
from consumers.validation_data import for_measuring, validation_generations
from consumers.watchdog import watched
from consumers.zero_engine import FrozenModel
from qwenimg_dist.compose import validate
from qwenimg_dist.config import Config, DpoConfig
from qwenimg_dist.files import write_json
from qwenimg_dist.models.generate import load_scheduler_config, save_grid
from qwenimg_dist.models.transformer import load_transformer_config
from qwenimg_dist.models.vae import SIDE_MULTIPLE, LatentCodec
from qwenimg_dist.report import comparison as told
from qwenimg_dist.rewards.service import RewardError, RewardService

_GRID_COLUMNS = 6


def compare(config: Config, hooks: Hooks | None = None) -> Literal["complete", "stopped"]:
    """Measure what is missing, and write the result. Every rank calls it, in the environment of torchrun.

    Raises ValueError for unusable input, on every rank.
    """
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_rank)))
    with stop_signals(hooks or Hooks()) as hooks, watched(config, hooks) as hooks:
        try:
            ranks = start_distributed(config.cluster.device, timeout_s=config.train.collective_timeout_s)
            pinned = validate(ranks.on_first(lambda: pin(config).model_dump(mode="json")))
            with contextlib.ExitStack() as stack:
                out = Path(pinned.run.path or ".")
                ranks.on_first(lambda: stack.enter_context(run_lock(out)))
                _measure(ranks.together(lambda: plan_comparison(pinned)), ranks, hooks)
        except Stopped:
            return "stopped"
        finally:
            stop_distributed()
    return "complete"


def finished(comparison: Comparison) -> bool:
    """Whether nothing is left to measure, so that no ranks need to start."""
    judged = not (comparison.prompts and comparison.config.reward.active) or all(
        _rewards(comparison.out, name).is_file() for name in SIDES
    )
    return judged and all(_done(comparison, name) for name in SIDES)


def _measure(comparison: Comparison, ranks: Ranks, hooks: Hooks) -> None:
    config, out, watch = comparison.config, comparison.out, _watch(ranks, hooks)
    texts, sampling = TextFolder(out / "text"), ranks.together(lambda: _sampling(comparison))
    if comparison.prompts:
        wanted = [*(prompt.text for prompt in comparison.prompts), sampling.negative_prompt]
        texts.encode(config, comparison.pipeline, wanted, ranks, watch)
    todo: list[str] = ranks.on_first(lambda: [name for name in SIDES if not _done(comparison, name)])
    with contextlib.ExitStack() as stack:
        held_out = None
        if not comparison.no_losses and not ranks.on_first(lambda: all(_losses(out, n).is_file() for n in SIDES)):
            held_out = _open_held_out(comparison, ranks, hooks, stack)
        codec = None
        if comparison.prompts and todo:
            codec = ranks.together(lambda: LatentCodec.load(comparison.pipeline, device=ranks.device))
        for name in todo:
            side = comparison.sides[name]
            assert side.source is not None
            watch.say(f"{name}: {side.told}")
            watch.stage("loading the weights")
            model = build_frozen(
                load_transformer_config(comparison.pipeline / "transformer"), config, ranks, side.source
            )
            stack.callback(close := _once(model.close))
            if held_out is not None and not ranks.on_first(lambda: _losses(out, name).is_file()):  # noqa: B023
                _write_losses(held_out, model, _losses(out, name), ranks, watch)
            if codec is not None:
                folder = out / "pictures" / name
                cells, prompts = comparison.cells, comparison.prompts
                draw_pictures(model, codec, cells, prompts, texts, sampling, folder, ranks, watch)
            close()
            del model, close  # the other one must not be loaded beside it
            gc.collect()
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()
    if comparison.prompts and config.reward.active:
        _judge(comparison, ranks, hooks, watch)
    watch.stage("writing the page")
    ranks.on_first(lambda: conclude(comparison))


def _done(comparison: Comparison, name: str) -> bool:
    """Whether a model need not be loaded again."""
    folder = comparison.out / "pictures" / name
    drawn = not (comparison.cells and missing_cells(comparison.cells, folder))
    return drawn and bool(comparison.no_losses or _losses(comparison.out, name).is_file())


def _sampling(comparison: Comparison) -> Sampling:
    config, sample = comparison.config, comparison.config.sample
    height, width = (side or max(config.resolutions) for side in (sample.height, sample.width))
    budget = max(phase.micro_batch_tokens for phase in config.curriculum.phases)
    tokens = (height // SIDE_MULTIPLE) * (width // SIDE_MULTIPLE)
    return Sampling(
        height=height,
        width=width,
        num_steps=sample.num_steps,
        guidance=sample.guidance,
        negative_prompt=sample.negative_prompt,
        scheduler=load_scheduler_config(comparison.pipeline),
        batch_size=max(1, budget // (2 * tokens)),
    )


# ---- Held-out losses.


def _losses(out: Path, name: str) -> Path:
    return out / f"losses-{name}.json"


def _open_held_out(comparison: Comparison, ranks: Ranks, hooks: Hooks, stack: contextlib.ExitStack) -> HeldOut:
    """The frozen set, of the data as it was when this comparison began. Collective.

    More data can only lower the threshold below which rows are held out, so no run on an earlier state has trained on
    one of these.
    """
    config = comparison.config
    prepared = ranks.together(lambda: _prepare(comparison))
    hooks.stage("opening the data")
    generations, stream = open_data(config, prepared, ranks, hooks, 0, 0, stack)
    measured = validation_generations(config, prepared, generations, ranks)
    if measured is None:
        raise ValueError("prompts have no pictures to measure on: give a data set of images as evaluate.data_path")
    budgets = {r: phase.micro_batch_tokens for phase in prepared.ledger.phases for r in phase.weights}
    others = ranks.on_first(lambda: find_other_classes(config, measured, None, set(budgets)))
    classes = ranks.together(lambda: make_held_out(config, measured, stream, None, budgets, others))
    if not any(one.keys for one in classes.values()):
        raise ValueError(
            "the data set holds out no row (data.held_out): nothing is there that training has not seen. "
            "eval.losses=false goes by the rewards alone"
        )
    return HeldOut(config, classes, None)


def _prepare(comparison: Comparison) -> Prepared:
    config = comparison.config
    dirs, facets = data_dirs(config), facets_of(config, comparison.pipeline)
    check_ready(dirs, facets)
    return Prepared(
        run_dir=comparison.out,
        data_dirs=dirs,
        pipeline=comparison.pipeline,
        facets=facets,
        # Held-out rows are those of `data.where` alone; nothing is trained, so nothing need be there to train on.
        ledger=replace(ledger_config(config, for_measuring(plan(config))), weights={}),
        model_fingerprint=comparison.sides["model"].fingerprint,
    )


def _write_losses(held_out: HeldOut, model: FrozenModel, file: Path, ranks: Ranks, watch: Watch) -> None:
    measured = held_out.measure(model, None, lambda: watch.stage("held-out losses"))
    classes = {
        str(resolution): {
            "keys": list(one.keys),
            "buckets": list(one.buckets),
            "errors": measured.errors[resolution].tolist(),
            **({"rejected": measured.rejected[resolution].tolist()} if resolution in measured.rejected else {}),
        }
        for resolution, one in held_out.classes.items()
    }
    ranks.on_first(lambda: write_json(file, {"sigma_quantiles": list(held_out.quantiles), "classes": classes}))
    watch.stop()


# ---- Rewards.


def _rewards(out: Path, name: str) -> Path:
    return out / f"rewards-{name}.json"


def _judge(comparison: Comparison, ranks: Ranks, hooks: Hooks, watch: Watch) -> None:
    out = comparison.out
    missing: list[str] = ranks.on_first(lambda: [name for name in SIDES if not _rewards(out, name).is_file()])
    if not missing:
        return
    watch.stage("loading the rewards")
    with contextlib.ExitStack() as stack:

        def opened() -> Any:
            try:
                return stack.enter_context(RewardService(comparison.config.reward)).score
            except RewardError as error:
                raise ValueError(str(error)) from error

        score = hooks.score or ranks.together(opened)
        for name in missing:
            folder = out / "pictures" / name
            found = judge_pictures(score, comparison.cells, comparison.prompts, folder, ranks, watch)
            ranks.on_first(lambda: write_json(_rewards(out, name), found))  # noqa: B023 - called at once
            watch.stop()


# ---- The result. Rank 0's.


def conclude(comparison: Comparison) -> None:
    """Write `eval.json` and `eval.html` of what was measured."""
    config, out, sampling = comparison.config, comparison.out, _sampling(comparison)
    losses = None
    if not comparison.no_losses:
        losses = told.compare_losses(*(json.loads(_losses(out, name).read_text()) for name in SIDES))
        losses |= {"pairs": _pairs(config, out)}
    rewards = None
    if comparison.prompts and config.reward.active:
        judged = [json.loads(_rewards(out, name).read_text()) for name in SIDES]
        rewards = told.compare_rewards(*judged, per_prompt=len(config.sample.seeds))
    other = "what it came from" if comparison.is_ancestor else "the other model"
    verdict = told.verdict(losses, rewards, tolerance=config.evaluate.guard_tolerance, other=other)
    result = {
        "format": told.FORMAT,
        **{name: _described(comparison, name) for name in SIDES},
        "verdict": verdict,
        "losses": losses or {"left_out": comparison.no_losses},
        "rewards": rewards,
        "settings": {
            "prompts": len(comparison.prompts),
            "seeds": list(config.sample.seeds),
            "height": sampling.height,
            "width": sampling.width,
            "num_steps": sampling.num_steps,
            "guidance": sampling.guidance,
            "precision": config.engine.precision,
            "rewards": config.reward.active,
            "tolerance": config.evaluate.guard_tolerance,
        },
    }
    write_json(out / RESULT, result)
    told.write_page(out, result, _grids(comparison, rewards), comparison.certificate)


def _described(comparison: Comparison, name: str) -> dict[str, Any]:
    record = comparison.sides[name].record
    return {key: record[key] for key in ("path", "kind", "step", "weights", "fingerprint")} | {
        "told": comparison.sides[name].told
    }


def _pairs(config: Config, out: Path) -> dict[str, float] | None:
    """Implicit accuracy on held-out pairs, with the model that it came from as the reference."""
    if not isinstance(config.objective, DpoConfig):
        return None
    start, model = (_measured(json.loads(_losses(out, name).read_text())) for name in SIDES)
    beta = config.objective.beta
    return pair_metrics(model.errors, model.rejected, start.errors, start.rejected, beta=beta) or None


def _measured(kept: Mapping[str, Any]) -> Measured:
    classes = {int(r): one for r, one in kept["classes"].items()}
    return Measured(
        errors={r: np.array(one["errors"]) for r, one in classes.items()},
        rejected={r: np.array(one["rejected"]) for r, one in classes.items() if "rejected" in one},
    )


def _grids(comparison: Comparison, rewards: Mapping[str, Any] | None) -> list[told.GridPair]:
    """Both models' pictures of the same cells: the first ones, and those whose reward changed most."""
    cells, prompts, shown = comparison.cells, comparison.prompts, comparison.config.eval.shown
    if not cells:
        return []
    # One seed of as many prompts as there is room for tells more than all seeds of few.
    firsts = sorted(range(len(cells)), key=lambda i: (i % len(comparison.config.sample.seeds), i))[:shown]
    chosen = {"the same prompts and seeds": sorted(firsts)}
    if rewards is not None:
        change = np.array([math.nan if one is None else one for one in rewards["change_by_cell"]])
        ranked = [i for i in np.argsort(-np.nan_to_num(change), kind="stable").tolist() if math.isfinite(change[i])]
        some = max(1, shown // 2)
        chosen["where the reward rose most"] = [i for i in ranked[:some] if change[i] > 0]
        chosen["where the reward fell most"] = [i for i in ranked[::-1][:some] if change[i] < 0]
    made = []
    for number, (title, indices) in enumerate(chosen.items()):
        if not indices:
            continue
        files = []
        for name in SIDES:
            folder = comparison.out / "pictures" / name
            pictures = [read_picture(cells[index].file(folder)) for index in indices]
            labels = [prompts[cells[index].prompt].text for index in indices]
            file = comparison.out / f"grid-{number}-{name}.png"
            files.append(save_grid(pictures, labels, file, columns=_GRID_COLUMNS))
        made.append(told.GridPair(title=title, start=files[0], model=files[1]))
    return made


def _once(action: Callable[[], None]) -> Callable[[], None]:
    """Called again, it does nothing."""
    left = [action]
    return lambda: left.pop()() if left else None


def _watch(ranks: Ranks, hooks: Hooks) -> Watch:
    def stop() -> None:
        if ranks.any(hooks.stop_requested()):
            raise Stopped

    return Watch(stage=hooks.stage, say=lambda line: hooks.say(line) if ranks.is_first else None, stop=stop)
