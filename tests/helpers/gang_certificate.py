"""Checks of the parity certificate on several ranks, see `gang_checks.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from gang_world import SETTINGS, World, engine_step, equal, snapshot

from consumers.certificate import Certifier
from consumers.errors import TrainingError
from consumers.run_directory import Prepared
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.models import transformer as qwen

PREDICT_VELOCITY = qwen.predict_velocity


def check_certificate(world: World) -> dict[str, Any]:
    """The run's call is stock's, in both precisions; a wrong one on one rank, and a wrong engine, stop all ranks."""
    found: dict[str, Any] = {}
    prepared = prepared_for(world)
    for precision in ("fp32", "bf16"):
        engine, config = world.engine(f"engine.precision={precision}", "checkpoint.certify_strict=true")
        for step in range(2):
            engine_step(engine, None, step, 1e-2)
        before = snapshot(engine, None)
        model = qwen.load_transformer_config(world.pipeline / "transformer")
        certifier = Certifier(engine, config, model, prepared, None)
        certifier.measure(2)
        found[precision] = certifier.record(2, 16)
        found[f"{precision}_untouched"] = equal(before, snapshot(engine, None))
        found[f"{precision}_wrong_rank"] = refusal(certifier, wrong_on=1)
        if precision == "fp32":
            of_edits = load_config([*SETTINGS, "stage=edit"])
            edits = Certifier(engine, of_edits, model, prepared, None)
            edits.measure(2)
            found["edit"] = edits.record(2, 16)
            found["without_conditions"] = refusal(certifier, wrong_on=1, way=without_conditions)
            found["edit_without_conditions"] = refusal(edits, wrong_on=1, way=without_conditions)
        if precision == "bf16":  # forwards gather stale weights: only the independent stock module tells
            engine.flat("master", 0).mul_(1.5)
            found["stale"] = refusal(certifier, wrong_on=None)
            lenient = config.checkpoint.model_copy(update={"certify_strict": False})
            warner = Certifier(engine, config.model_copy(update={"checkpoint": lenient}), model, prepared, None)
            found["stale_warned"] = warner.measure(3)
            found["stale_within"] = [one["within"] for one in warner.record(3, 16)["parity"]["comparisons"]]
            found["wrong_call_lenient"] = refusal(warner, wrong_on=1)
            small = config.checkpoint.model_copy(update={"certify_independent": 0})
            alone = Certifier(engine, config.model_copy(update={"checkpoint": small}), model, prepared, None)
            found["stale_contract_only"] = refusal(alone, wrong_on=None)
        engine.close()
    return found


def prepared_for(world: World) -> Prepared:
    run_dir = world.out / "certified"
    if world.ranks.is_first:
        line: dict[str, Any] = {
            "generation": 0,
            "phase": None,
            "first_step": 0,
            "epoch": 0,
            "first_unit": 0,
            "units": 1,
            "last": True,
        }
        line |= {"rows_parts": {}, "facets": {"text": "text-0"}, "index": "0", "num_rows": 7, "num_texts": 7}
        run_dir.mkdir()
        (run_dir / "generations.jsonl").write_text(
            json.dumps({**line, "digest": "ab" * 32, "held_out_below": 0}) + "\n"
        )
    facets = RunFacets(text="text-0", latents={})
    return Prepared(
        run_dir=run_dir,
        data_dirs={"": world.out},
        pipeline=world.pipeline,
        facets=facets,
        ledger=LedgerConfig(phases=(), seed=0, caption_dropout=0, where=None, held_out=0, max_held_out=0),
        model_fingerprint="0123456789ab",
    )


def thousandfold(transformer: Any, noisy: Any, sigma: Any, *words: Any) -> torch.Tensor:
    return PREDICT_VELOCITY(transformer, noisy, sigma * 1000, *words)


def without_conditions(transformer: Any, noisy: Any, sigma: Any, text: Any, mask: Any, *_: Any) -> torch.Tensor:
    return PREDICT_VELOCITY(transformer, noisy, sigma, text, mask)


def refusal(
    certifier: Certifier, *, wrong_on: int | None, way: Callable[..., torch.Tensor] = thousandfold
) -> str | None:
    """What `measure` refuses, with another call on one rank; None if it finds nothing."""
    right = qwen.predict_velocity
    if certifier._engine.ranks.rank == wrong_on:
        qwen.predict_velocity = way
    try:
        certifier.measure(3)
    except TrainingError as error:
        return str(error)
    finally:
        qwen.predict_velocity = right
    return None
