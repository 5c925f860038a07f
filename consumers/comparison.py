"""A model beside the one it came from: which two, found and checked before anything starts.

Place in the flow: the `eval` command calls `pin` and hands the pinned config to the ranks; `compare.py` measures. The
model is a run's checkpoint, or an export; the other one is given, or is found by the lineage in its certificate, and is
then what the fingerprint there says or refused. All that decides the numbers makes the name of the result's folder.
Refuses to compare models whose text encoder, tokenizer or VAE differ: pictures would differ by those as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from consumers.checkpoint_files import MANIFEST, read_certificate
from consumers.objectives import sample_kind
from consumers.pictures import Cell
from consumers.start_from import StartWeights, check_architecture, open_weights, read_record
from qwenimg_dist.compose import validate
from qwenimg_dist.config import Config, StartFromConfig, stable_hash
from qwenimg_dist.files import write_bytes, write_json
from qwenimg_dist.models.pipeline import CERTIFICATE, fingerprint_component, pipeline_dir
from qwenimg_dist.prompts_file import prompts_of
from qwenimg_dist.rewards import refusals, what_counts
from qwenimg_dist.rewards.base import Prompt
from qwenimg_dist.schema import PROMPT

ABOUT: Final = "about.json"
RESULT: Final = "eval.json"
FOLDER: Final = "eval"
_FROZEN: Final = ("text_encoder", "tokenizer", "vae")
SIDES: Final = ("start", "model")
"""What it came from, and the model that is judged: the names of files and folders."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models and what is measured of them."""

    config: Config
    """Pinned: `run.path` is the result's folder."""
    out: Path
    pipeline: Path
    """Of the encoders, the VAE and the scheduler of both."""
    sides: dict[str, StartWeights]
    """By `SIDES`."""
    prompts: list[Prompt]
    certificate: dict[str, Any]
    """Of the model; empty if it has none."""
    no_losses: str
    """Why held-out losses are not measured; empty where they are."""
    is_ancestor: bool
    """Whether the other model is what the model's run started from."""

    @property
    def cells(self) -> list[Cell]:
        """Prompts outermost."""
        return [Cell(prompt=i, seed=seed) for i in range(len(self.prompts)) for seed in self.config.sample.seeds]

    def about(self) -> dict[str, Any]:
        """All that the numbers depend on but rounding, and the data set's held-out rows, which are pinned in `out`."""
        config = self.config
        drawn = ("num_steps", "guidance", "negative_prompt", "height", "width", "seeds")
        measured = ("sigma_quantiles", "num_samples", "resolutions", "seed")
        sigma = ("sigma_density", "sigma_mean", "sigma_std", "sigma_mode_scale", "shift", "shift_constant")
        sample, evaluate, objective = (
            one.model_dump(mode="json") for one in (config.sample, config.evaluate, config.objective)
        )
        return {
            "weights": {name: side.fingerprint for name, side in self.sides.items()},
            "precision": config.engine.precision,
            "pictures": {name: sample[name] for name in drawn} if self.prompts else None,
            "side": max(config.resolutions),
            "prompts": [[prompt.text, dict(prompt.metadata)] for prompt in self.prompts],
            "rewards": what_counts(config.reward) if config.reward.active else {},
            "losses": None
            if self.no_losses
            else {
                **{name: evaluate[name] for name in measured},
                "sigma": {name: objective[name] for name in sigma},
                "data": sorted(mixed.path for mixed in config.data.mix.values()) or config.data.path,
                "images": config.evaluate.data_path,
                "held_out": [config.data.where, config.data.held_out, config.data.max_held_out],
            },
        }


def pin(config: Config) -> Config:
    """With both models named by path, step and weights, and the folder of the result as `run.path`: what the ranks
    then see does not depend on what a run that still trains has saved since. Raises ValueError for unusable input."""
    if config.eval.out is not None and config.run.path == config.eval.out:
        return config  # pinned already
    found = plan_comparison(config)
    model, start = found.sides["model"], found.sides["start"]
    out = Path(config.eval.out) if config.eval.out else _default_out(model) / _name(model, found.about())
    changed = {
        "path": str(_place(model)),
        "step": None,
        "weights": model.record["weights"] or config.eval.weights,
        "against": {"path": str(_place(start)), "step": None, "weights": start.record["weights"] or "ema"},
        "out": str(out),
    }
    tree = config.model_dump(mode="json")
    tree["eval"] |= changed
    tree["run"] = {"path": str(out)}
    tree["model"] |= {"path": str(found.pipeline), "revision": None}
    tree["follow"] = False
    # The held-out rows are those of the data as it is now, whatever order the run repeated; that file may be gone.
    tree["train"]["replay_generations"] = None
    _check_out(out, found.about())
    write_json(out / ABOUT, found.about())
    if config.sample.prompts_file is not None:
        # Where it lies, only this machine may know: the ranks read it from the result's folder.
        rows = [{**one.metadata, "prompt": one.text} for one in found.prompts[len(config.sample.prompts) :]]
        file = out / "prompts.jsonl"
        write_bytes(file, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows).encode())
        tree["sample"]["prompts_file"] = str(file)
    return validate(tree)


def plan_comparison(config: Config) -> Comparison:
    """Find and check both models, without writing. Raises ValueError for unusable input."""
    given = config.eval.path or config.run.path
    if not given:
        raise ValueError("nothing to judge: set run.path=RUN, or eval.path to a run, a checkpoint or an export")
    wanted = StartFromConfig(path=given, step=config.eval.step, weights=config.eval.weights)
    try:
        model = open_weights(Path(given), wanted, key="eval")
    except (ValueError, OSError) as error:
        raise ValueError(f"{given}: {error}") from error
    is_export = model.checkpoint is None
    pipeline = Path(given) if is_export else pipeline_dir(config.model)
    certificate = (_certificate_of_export(Path(given)) if is_export else read_certificate(_place(model))) or {}
    start = _given(config) if config.eval.against.path is not None else by_lineage(model, certificate)
    for name, side in (("the model", model), ("what it is compared with", start)):
        assert side.source is not None
        check_architecture(side.source, pipeline, f"{name}, {side.told},")
    if start.checkpoint is None:
        _check_frozen_parts(pipeline, _place(start))
    prompts = prompts_of(config) or [Prompt(text=text) for text in config.evaluate.prompts]
    no_losses = _why_no_losses(config)
    if no_losses and not prompts:
        raise ValueError(f"nothing to measure: {no_losses}, and no prompts to draw: set sample.prompts_file=FILE")
    if prompts and not config.reward.active and no_losses:
        raise ValueError(f"nothing to measure: {no_losses}, and no reward has a weight: set reward.weights.NAME=1")
    if config.reward.active and (refused := refusals(config.reward, prompts)):
        told = "; ".join(f"{prompts[at].text!r}: {why}" for at, why in refused)
        raise ValueError(
            f"prompts that these rewards cannot judge: {told}. Leave them out, or set other reward.weights"
        )
    return Comparison(
        config=config,
        out=Path(config.eval.out or "."),
        pipeline=pipeline,
        sides={"start": start, "model": model},
        prompts=prompts,
        certificate=certificate,
        no_losses=no_losses,
        is_ancestor=start.fingerprint == (certificate.get("lineage") or {}).get("fingerprint"),
    )


def by_lineage(model: StartWeights, certificate: Mapping[str, Any]) -> StartWeights:
    """The weights that the model's run started from. Raises ValueError if they cannot be found, with the way out."""
    lineage = certificate.get("lineage") or {}
    if not lineage:
        raise ValueError(f"{model.told} has no certificate that says what it came from: set eval.against=PATH")
    fingerprint, problems = lineage.get("fingerprint"), []
    for path, weights in _candidates(model, lineage):
        try:
            found = open_weights(path, StartFromConfig(weights=weights), key="eval.against")
        except (ValueError, OSError) as error:
            problems.append(f"{path}: {error}")
            continue
        if found.fingerprint == fingerprint:
            return found
        problems.append(f"{path} holds other weights ({found.fingerprint})")
    raise ValueError(
        f"{model.told} started from weights {fingerprint}, which are not found any more ({'; '.join(problems)}): set "
        "eval.against=PATH to where they are, or to another model (checkpoint.keep and keep_every say what a run keeps)"
    )


def _candidates(model: StartWeights, lineage: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Where the starting weights may lie: (path, ema or raw), the likeliest first."""
    parent = lineage.get("parent")
    if parent and parent.get("run"):
        yield Path(str(parent["run"])), parent.get("weights") or "ema"
    if model.checkpoint is not None and (record := read_record(model.checkpoint.parents[1])):
        yield Path(str(record["path"])), record.get("weights") or "ema"
    for name in ("started_from", "path"):
        if lineage.get(name):
            yield Path(str(lineage[name])), "ema"


def _given(config: Config) -> StartWeights:
    against = config.eval.against
    try:
        return open_weights(Path(str(against.path)), against, key="eval.against")
    except (ValueError, OSError) as error:
        raise ValueError(f"eval.against={against.path}: {error}") from error


def _place(side: StartWeights) -> Path:
    """The checkpoint's directory, or the pipeline's."""
    return (side.checkpoint or Path(str(side.record["path"]))).absolute()


def _certificate_of_export(folder: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def _check_frozen_parts(pipeline: Path, other: Path) -> None:
    for name in _FROZEN:
        if pipeline.resolve() != other.resolve() and (other / name).is_dir():
            mine, theirs = fingerprint_component(pipeline / name), fingerprint_component(other / name)
            if mine != theirs:
                raise ValueError(
                    f"{other} has another {name} than {pipeline} ({theirs}, {mine}): pictures of the two would differ "
                    "by it as well. Compare models with the same frozen parts"
                )


def _why_no_losses(config: Config) -> str:
    if not config.eval.losses:
        return "held-out losses are turned off (eval.losses=false)"
    if config.data.path is None and not config.data.mix:
        return "no data set is known for held-out losses (data.path)"
    if sample_kind(config) == PROMPT and config.evaluate.data_path is None:
        return "prompts have no held-out losses (evaluate.data_path is a data set of images)"
    return ""


def _default_out(model: StartWeights) -> Path:
    if model.checkpoint is not None and (model.checkpoint / MANIFEST).is_file():
        return model.checkpoint.parents[1] / FOLDER
    return Path(FOLDER)


def _name(model: StartWeights, about: Mapping[str, Any]) -> str:
    step = (
        f"step-{model.record['step']:08d}-{model.record['weights']}" if model.record["step"] is not None else "export"
    )
    return f"{step}-{stable_hash(about, digits=8)}"


def _check_out(out: Path, about: Mapping[str, Any]) -> None:
    file = out / ABOUT
    if not file.is_file():
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    differing = [key for key in about if there.get(key) != json.loads(json.dumps(about[key]))]
    if differing:
        raise ValueError(
            f"{out} holds another comparison (it differs in {', '.join(differing)}): choose another eval.out, or leave "
            "it out for a folder of its own"
        )
