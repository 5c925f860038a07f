"""The parity certificate of a checkpoint: what it was made by and from, and how far its call is from stock diffusers'.

Place in the flow: the session measures at each start (and before each save, if asked), the trainer hands `record` to
`save_checkpoint`, which commits it as `certificate.json` under the manifest; `ckpt list` shows it, `ckpt export` takes
it along. Measured are differences of one forward of the run's own path (`Engine.predict`) from

    contract     the stock pipeline's call of the very same ZeRO-3 engine, so that no rank holds the model: any size
    independent  the stock class, loaded from the gathered weights on rank 0: up to checkpoint.certify_independent

and, where the run trains on edits, each with condition pictures too, from the stock edit pipeline's call.

A difference beyond rounding stops the run on all ranks: it would train a model that stock diffusers does not know. But
what bf16 rounds to over 60 blocks was never measured with the real weights: there, only a difference that no rounding
explains (the same inputs through the same engine) stops it, another one is a warning (`checkpoint.certify_strict`).
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from consumers.data_sets import kinds_of
from consumers.errors import TrainingError
from consumers.objectives.flow_matching import shift_mu
from consumers.run_directory import Prepared
from consumers.start_from import parent_of_pipeline
from consumers.zero_engine import Engine, Share
from qwenimg_dist.config import Config, stable_hash, training_identity
from qwenimg_dist.data.generation_log import FILE as GENERATIONS_FILE
from qwenimg_dist.data.generation_log import read_lines
from qwenimg_dist.models import parity
from qwenimg_dist.models.pipeline import fingerprint_component
from qwenimg_dist.models.template import DROP, TEMPLATE
from qwenimg_dist.models.transformer import assemble_transformer
from qwenimg_dist.schema import EDIT
from qwenimg_dist.versions import git_commit, package_versions

FORMAT: Final = 1
_DIGITS: Final = 16
_COMPARED: Final = {
    "contract": "Engine.predict against {pipeline}'s own packing, mask, img_shapes and timestep, both calling "
    "this run's ZeRO-3 engine in eval mode",
    "independent": "Engine.predict against {pipeline} with a stock QwenImageTransformer2DModel loaded from the "
    "gathered weights",
}


class Certifier:
    """Measures, and puts the certificate together. Making one and `measure` are collective, `record` is rank 0's."""

    def __init__(
        self, engine: Engine, config: Config, model: Mapping[str, Any], prepared: Prepared, resumed_from: int | None
    ) -> None:
        """`model`: the transformer's constructor arguments; `resumed_from`: step of the checkpoint gone on from."""
        self._engine = engine
        self._config = config
        self._model = model
        self._prepared = prepared
        self._resumed_from = resumed_from
        self._parity: dict[str, Any] = {"measured": False, "reason": "checkpoint.certify=off"}
        # Rank 0's; here, since what cannot be read must be told before the first step and on all ranks.
        self._facts = engine.ranks.together(lambda: self._constant_facts() if engine.ranks.is_first else {})

    def measure(self, step: int) -> str:
        """Compare and remember; what to warn of, the same on all ranks, or nothing. Collective.

        Raises `TrainingError` on all ranks if a difference is beyond rounding.
        """
        engine, ranks = self._engine, self._engine.ranks
        dtype = torch.bfloat16 if self._config.engine.precision == "bf16" else torch.float32
        edits = EDIT in kinds_of(self._config).values()
        cases = parity.probes(int(self._model["joint_attention_dim"]), edits=edits)
        engine.train(False)
        try:
            with torch.no_grad():
                ours = parity.our_answers(engine.predict, cases, dtype=dtype, device=ranks.device)
                stock = parity.stock_answers(engine.transformer, cases, dtype=dtype, device=ranks.device)
        finally:
            engine.train()
        found = {"contract": parity.differences(ours, stock, dtype=dtype, same_module=True)}
        if engine.num_parameters <= self._config.checkpoint.certify_independent:
            alone = self._independent(cases, dtype)
            if alone is not None:  # rank 0's
                found["independent"] = parity.differences(ours, alone, dtype=dtype, same_module=False)
        beyond = [(side, one) for side, some in found.items() for one in some if not one.within]
        lenient = dtype == torch.bfloat16 and not self._config.checkpoint.certify_strict
        faults = [_told(side, one) for side, one in beyond if not (lenient and one.may_be_rounding)]
        if told := ranks.first_problem("; ".join(faults)):
            raise TrainingError(
                f"step {step}: the transformer is not called as stock diffusers calls it, so what is trained would not "
                f"be what an export computes: {told}. Look at changes of the call path, of diffusers or of the "
                "attention backend; checkpoint.certify=off trains nevertheless"
            )
        self._parity = self._described(step, found)
        told = ranks.first_problem("; ".join(_told(side, one) for side, one in beyond))
        return told and (
            f"step {step}: one forward differs from stock diffusers' by more than bf16 is expected to round: {told}. "
            "It stands in the certificate; checkpoint.certify_strict=true would stop here"
        )

    def record(self, step: int, images: int) -> dict[str, Any]:
        """The content of `certificate.json`."""
        return {
            "format": FORMAT,
            "step": step,
            "images": images,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "parity": self._parity,
            "data": data_facts(self._prepared.run_dir),
            **self._facts,
        }

    def _described(self, step: int, found: Mapping[str, list[parity.Difference]]) -> dict[str, Any]:
        worst = max((one for some in found.values() for one in some), key=lambda one: one.max_difference)
        limit = self._config.checkpoint.certify_independent
        left_out = f"{self._engine.num_parameters} parameters, checkpoint.certify_independent={limit}"
        return {
            "measured": True,
            "at_step": step,
            "max_difference": worst.max_difference,
            "max_velocity": worst.max_velocity,
            "precision": self._config.engine.precision,
            "ranks": self._engine.ranks.world_size,
            "inputs": f"random, {parity.HEIGHT}x{parity.WIDTH} px, two samples; see qwenimg_dist.models.parity",
            "comparisons": [
                {
                    "compared": _COMPARED[side].format(pipeline=parity.pipeline_of(one.case)),
                    "kind": side,
                    **one.as_dict(),
                }
                for side, some in found.items()
                for one in some
            ],
            **({} if "independent" in found else {"independent_left_out": left_out}),
        }

    def _independent(self, cases: Mapping[str, parity.Probe], dtype: torch.dtype) -> parity.Answers | None:
        """The stock class's answers, on rank 0. Collective; every rank sees one whole tensor at a time."""
        engine, ranks = self._engine, self._engine.ranks
        weights: dict[str, torch.Tensor] = {}
        for share in (*engine.shares, *engine.frozen):
            whole = _whole(engine, share)
            if ranks.is_first:
                weights[share.name] = whole.to(dtype)

        def answers() -> parity.Answers:
            module = assemble_transformer(self._model, weights.__getitem__, dtype=dtype, device=ranks.device)
            with torch.no_grad():
                return parity.stock_answers(module, cases, dtype=dtype, device=ranks.device)

        return ranks.together(lambda: answers() if ranks.is_first else None)

    def _constant_facts(self) -> dict[str, Any]:
        config, pipeline, start = self._config, self._prepared.pipeline, self._prepared.start
        return {
            "conditioning": {
                "template_sha256": hashlib.sha256(TEMPLATE.encode()).hexdigest(),
                "template_tokens_dropped": DROP,
                "max_text_tokens": config.model.max_text_tokens,
                **{name: fingerprint_component(pipeline / name) for name in ("tokenizer", "text_encoder", "vae")},
            },
            "sigma": _sigma_facts(config, pipeline),
            "lineage": {
                "stage": config.stage,
                "model": config.model.name,
                "path": str(pipeline),
                "started_from": start.record["path"] if start else str(pipeline),
                "revision": config.model.revision,
                "fingerprint": self._prepared.model_fingerprint,
                "parent": start.record["parent"] if start else parent_of_pipeline(pipeline),
            },
            "run": {
                "path": str(self._prepared.run_dir),
                "resumed_from": self._resumed_from,
                "identity": stable_hash(training_identity(config)),
            },
            **({"judges": dict(self._prepared.judges)} if self._prepared.judges else {}),
            "versions": package_versions(),
            "git_commit": git_commit(),
        }


def data_facts(run_dir: Path) -> dict[str, Any]:
    """What the run has trained on or may: a digest over all pinned parts, and how much that is."""
    lines, _ = read_lines(run_dir / GENERATIONS_FILE)
    digests = [line.digest for line in lines]
    facets = lines[-1].facets if lines else {}
    # One generation (no `follow`): its own digest, which runs over the same data share.
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return {
        "fingerprint": digest[:_DIGITS],
        "generations": len(lines),
        "rows": sum(line.num_rows for line in lines if line.phase in (None, 0) and line.epoch == 0),
        "facets": {line.dataset: line.facets for line in lines} if any(one.dataset for one in lines) else facets,
    }


def _told(side: str, one: parity.Difference) -> str:
    return (
        f"{side}, {one.case}: {one.max_difference:g} where velocities reach {one.max_velocity:g} "
        f"(allowed: {one.tolerance:g} of that)"
    )


def _sigma_facts(config: Config, pipeline: Path) -> dict[str, Any]:
    shifts = {
        str(resolution): math.exp(shift_mu(config.objective, (resolution // 16) ** 2))
        for resolution in sorted({r for phase in config.curriculum.phases for r in phase.resolutions})
    }
    return {
        **{key: value for key, value in config.objective.model_dump(mode="json").items() if "caption" not in key},
        "shift_of_square_bucket": shifts,
        "scheduler": fingerprint_component(pipeline / "scheduler"),
    }


def _whole(engine: Engine, share: Share) -> torch.Tensor:
    """A whole fp32 parameter from the partitions of all ranks, on every rank."""
    ranks = engine.ranks
    numel = torch.Size(share.shape).numel()
    padded = torch.zeros(-(-numel // ranks.world_size), device=ranks.device)
    if share.stop > share.start:
        padded[: share.stop - share.start].copy_(engine.weights(share))
    return ranks.gather_tensor(padded)[:numel].view(share.shape)
