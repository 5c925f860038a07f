"""What needs several ranks, run on them: `python gang_checks.py PIPELINE OUT CHECK...` in torchrun's environment.

One gang runs many checks, since starting it costs more than they do. Each check writes `OUT/CHECK.json` (rank 0);
the tests read them. An exception ends the gang, and the test of the check says so.
"""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from fake_dataset import WIDTH
from torch.distributed import distributed_c10d

import consumers.checkpoint as checkpoint
import consumers.checkpoint_files as checkpoint_files
import consumers.saver as saver_module
from consumers.batch import MicroBatch
from consumers.certificate import Certifier
from consumers.ema import Ema
from consumers.engine import build_engine, build_frozen, start_distributed, stop_distributed
from consumers.errors import TrainingError
from consumers.hooks import Hooks
from consumers.norms import block_norms, part_of
from consumers.objectives.base import LossOutput
from consumers.parameter_groups import parameter_groups
from consumers.ranks import Ranks
from consumers.run_directory import Prepared
from consumers.saver import Saver
from consumers.updates import Updates, make_updates
from consumers.zero_engine import KINDS, Engine
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.generations import LedgerConfig
from qwenimg_dist.debug import FAULT_DIR_VARIABLE
from qwenimg_dist.models import transformer as qwen
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory
from qwenimg_dist.patience import StorageAwayError
from qwenimg_dist.schema import Bucket

SCRIPT = str(Path(__file__).resolve())
GLOBAL_BATCH = 8
EMA_DECAY = 0.9
PREDICT_VELOCITY = qwen.predict_velocity
SETTINGS = ["engine.precision=fp32", "optim.weight_decay=0.1", "optim.clip_grad_norm=0.5"]


@dataclass(frozen=True, kw_only=True)
class World:
    """What the checks share."""

    ranks: Ranks
    pipeline: Path
    out: Path

    @property
    def source(self) -> SafetensorsDirectory:
        return SafetensorsDirectory(self.pipeline / "transformer")

    def engine(self, *settings: str) -> tuple[Engine, Config]:
        config = load_config([*SETTINGS, *settings])
        model = qwen.load_transformer_config(self.pipeline / "transformer")
        return build_engine(model, config, self.ranks, self.source), config

    def plain(self) -> Any:
        return QwenImageTransformer2DModel.from_pretrained(self.pipeline / "transformer").train()


def samples(step: int) -> tuple[torch.Tensor, ...]:
    """The global batch of a step: noisy latents, sigma, text, target."""
    generator = torch.Generator().manual_seed(step)
    height, width = ((8, 8), (8, 16))[step % 2]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(GLOBAL_BATCH, *shape, generator=generator)

    noisy, target = draw(16, height, width), draw(16, height, width)
    return noisy, torch.rand(GLOBAL_BATCH, generator=generator), draw(5 + step % 3, WIDTH), target


def errors(predict: Callable[..., torch.Tensor], part: tuple[torch.Tensor, ...]) -> torch.Tensor:
    noisy, sigma, text, target = part
    return (predict(noisy, sigma, text, None) - target).square().mean(dim=(1, 2, 3)).sum()


def engine_step(engine: Engine, ema: Ema | None, step: int, lr: float) -> tuple[float, float]:
    """One step on this rank's cut, in as many micro-batches as the step says; (loss, gradient norm)."""
    ranks = engine.ranks
    size = GLOBAL_BATCH // ranks.world_size
    cut = [tensor[ranks.rank * size : (ranks.rank + 1) * size] for tensor in samples(step)]
    num_micro = min(size, 1 + step % 3)
    bounds = [size * i // num_micro for i in range(num_micro + 1)]
    total = 0.0
    for index in range(num_micro):
        part = tuple(tensor[bounds[index] : bounds[index + 1]] for tensor in cut)
        loss = errors(engine.predict, part)
        total += float(loss.detach())
        engine.backward(loss * ranks.world_size / GLOBAL_BATCH, last=index + 1 == num_micro)
    result = engine.step(lr)
    if ema is not None:
        ema.update()
    return ranks.sum([total])[0] / GLOBAL_BATCH, result.grad_norm


def check_parity(world: World) -> dict[str, Any]:
    """Two fp32 ranks against a plain PyTorch loop: clipping, accumulation, two groups, EMA, a forgotten gradient."""
    return compare_with_plain_loop(world, 20)


def compare_with_plain_loop(world: World, num_steps: int, *settings: str) -> dict[str, Any]:
    """Largest differences over the steps, and what moved."""
    engine, config = world.engine(*settings)
    ema = Ema(engine, EMA_DECAY)
    plain = world.plain()
    initial = {name: value.detach().clone() for name, value in plain.named_parameters()}
    at_start = max_difference(engine, lambda share: engine.state("master", share), initial)
    layers = int(plain.config.num_layers)
    named = dict(plain.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    groups = [group for group in parameter_groups(shapes, config.optim, layers) if not group.frozen]
    adam = torch.optim.AdamW(
        [{"params": [named[n] for n in g.names], "weight_decay": g.weight_decay} for g in groups],
        betas=config.optim.betas,
        eps=config.optim.eps,
    )
    for name, parameter in named.items():
        parameter.requires_grad_(any(name in group.names for group in groups))
    average = {name: value.clone() for name, value in initial.items()}
    worst = {"weights": 0.0, "ema": 0.0, "loss": 0.0, "norm": 0.0}
    for step in range(num_steps):
        if step == 5:  # as after a loss that was not finite: nothing of it may remain
            engine.backward(errors(engine.predict, tuple(t[:1] for t in samples(999))), last=False)
            engine.discard_gradients()
        lr = 1e-3 * (step + 1) / num_steps
        loss, norm = engine_step(engine, ema, step, lr)
        adam.zero_grad()
        expected = errors(lambda *args: qwen.predict_velocity(plain, *args), samples(step)) / GLOBAL_BATCH
        expected.backward()  # type: ignore[no-untyped-call]
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group, made in zip(adam.param_groups, groups, strict=True):
            group["lr"] = lr * made.lr_scale
        adam.step()
        present = dict(plain.named_parameters())
        for name, value in present.items():
            average[name].lerp_(value.detach(), 1 - EMA_DECAY)
        found = {
            "weights": max_difference(engine, lambda share: engine.state("master", share), present),
            "ema": max_difference(engine, ema.state, average),
            "loss": abs(loss - float(expected.detach())),
            "norm": abs(norm - float(expected_norm)),
        }
        worst = {key: max(worst[key], value) for key, value in found.items()}
    still = [
        float((engine.frozen_values(s) - initial[s.name].flatten()[s.start : s.stop]).abs().sum())
        for s in engine.frozen
    ]
    noisy, sigma, text, _ = samples(7)
    with torch.no_grad(), ema.applied():
        averaged = engine.predict(noisy, sigma, text, None)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(average[name])
        expected_average = qwen.predict_velocity(plain, noisy, sigma, text, None)
    last = f"transformer_blocks.{layers - 1}."
    unused = [s for s in engine.shares if s.name.startswith((f"{last}txt_mlp.", f"{last}attn.to_add_out."))]
    moved = max_difference(engine, lambda share: engine.state("master", share), initial, unused)
    trained = max_difference(engine, lambda share: engine.state("master", share), initial)
    engine.close()
    return {
        "at_start": at_start,
        **worst,
        "averaged": engine.ranks.max([float((averaged - expected_average).abs().max())])[0],
        "unused_moved": moved,
        "num_unused": len(unused),
        "moved": trained,
        "num_frozen": len(engine.frozen),
        "frozen_moved": engine.ranks.max([sum(still)])[0],
    }


GROUPS = [
    "optim.groups={modulation:{pattern:'mod\\.1',lr_scale:0.5,weight_decay:0},all_mlp:{pattern:_mlp,weight_decay:0.3}}"
]
# All before the first block is frozen, so that its inputs have no gradient of their own; part of it trains.
FREEZE = ["optim.freeze=['^(img|txt)_(in|norm)','^time_text_embed','blocks\\.0\\.attn\\.to_q']"]
ONLY_LAST = ["optim.train=['blocks\\.1\\.','^proj_out']"]


def check_groups(world: World) -> dict[str, Any]:
    """As `check_parity`, with groups by expression, and with much frozen, gathered by block and by layer."""
    return {
        "groups": compare_with_plain_loop(world, 12, *GROUPS),
        "freeze": compare_with_plain_loop(world, 12, *GROUPS, *FREEZE),
        "layer": compare_with_plain_loop(world, 8, *FREEZE, "engine.gather=layer"),
        "through": compare_with_plain_loop(world, 6, "optim.freeze=['blocks\\.1\\.']"),
        "last": compare_with_plain_loop(world, 8, *ONLY_LAST, "engine.activation_checkpointing=true"),
    }


def check_offload(world: World) -> dict[str, Any]:
    """Optimizer states by way of DeepSpeed's offload: as a plain loop; saved and loaded; a skipped step; gradients."""
    settings = ["engine.offload_optimizer=cpu", *GROUPS, *FREEZE]
    found = compare_with_plain_loop(world, 12, *settings)
    engine, _ = world.engine(*settings)
    other, _ = world.engine(*GROUPS, *FREEZE)
    before = snapshot(engine, None)
    loss = errors(engine.predict, tuple(t[:1] for t in samples(0)))
    engine.backward(loss * (float("inf") if world.ranks.rank == 1 else 1.0), last=True)
    skipped = engine.step(1e-3).skipped and equal(before, snapshot(engine, None))
    norms = []
    for one in (engine, other):
        loss = errors(one.predict, tuple(t[world.ranks.rank :][:1] for t in samples(0)))
        one.backward(loss, last=True)
        norms.append(block_norms(one))
        one.step(1e-3)
    for step in range(2):
        engine_step(engine, None, step, 1e-3)
        engine_step(other, None, step, 1e-3)
    checkpoint.save_checkpoint(engine, None, world.out / "offload", step=2, state={}, keep=1)
    checkpoint.load_newest(other, None, world.out / "offload")  # what was offloaded resumes where nothing is
    resumed = equal(snapshot(engine, None), snapshot(other, None))
    engine.close()
    other.close()
    difference = max(abs(norms[0][name] - norms[1][name]) for name in norms[1])
    return {"plain": found, "skipped": skipped, "resumed": resumed, "norms": difference, "num_norms": len(norms[0])}


def check_hpz(world: World) -> dict[str, Any]:
    """hpZ's second partitions are never stale: after steps, after the EMA was applied, with frozen parameters. The
    groups that DeepSpeed made for it wait as long as the others."""
    found = compare_with_plain_loop(world, 8, "engine.hpz_partition=2", "train.stall_timeout_s=777", *FREEZE)
    return found | {"timeouts": timeouts()}


def timeouts() -> list[float]:
    """Seconds after which each process group of this rank gives up."""
    groups = list(distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def check_parity_long(world: World) -> dict[str, Any]:
    """A hundred steps, with groups, much frozen, clipping, accumulation and EMA."""
    return compare_with_plain_loop(world, 100, *GROUPS)


def check_frozen_save(world: World) -> dict[str, Any]:
    """Frozen weights stand in the checkpoint once, in bf16 too, and come back from it, not from the source."""
    run_dir = world.out / "frozen"
    settings = ["engine.precision=bf16", *GROUPS, *FREEZE]
    engine, _ = world.engine(*settings)
    ema = Ema(engine, EMA_DECAY)
    for step in range(3):
        engine_step(engine, ema, step, 1e-3)
    checkpoint.save_checkpoint(engine, ema, run_dir, step=3, state={}, keep=1)
    other, _ = world.engine(*settings)
    other_ema = Ema(other, EMA_DECAY)
    for share in other.frozen:
        other.frozen_values(share).add_(1)
    checkpoint.load_newest(other, other_ema, run_dir)
    same = equal(snapshot(engine, ema), snapshot(other, other_ema))
    frozen = all(
        torch.equal(engine.frozen_values(a), other.frozen_values(b)) for a, b in zip(engine.frozen, other.frozen)
    )
    after = [engine_step(one, average, 3, 1e-3) for one, average in ((engine, ema), (other, other_ema))]
    engine.close()
    other.close()
    return {"same": same and frozen, "same_later": after[0] == after[1], "num_frozen": len(engine.frozen)}


def max_difference(engine: Engine, state: Callable[..., torch.Tensor], expected: Any, shares: Any = None) -> float:
    found = 0.0
    for share in engine.shares if shares is None else shares:
        if share.stop > share.start:
            wanted = expected[share.name].detach().flatten()[share.start : share.stop]
            found = max(found, float((state(share) - wanted).abs().max()))
    return engine.ranks.max([found])[0]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max()) if one.numel() else 0.0


def check_norms(world: World) -> dict[str, Any]:
    """Norms per block from the partitions against those of a plain PyTorch loop; before clipping, after accumulation.

    And who is slow is named: rank 1 comes late to a forward.
    """
    engine, _ = world.engine("optim.clip_grad_norm=0.1")
    plain = world.plain()
    ranks, size = world.ranks, GLOBAL_BATCH // world.ranks.world_size
    cut = [tensor[ranks.rank * size : (ranks.rank + 1) * size] for tensor in samples(3)]
    for index in range(2):
        part = tuple(tensor[index * size // 2 : (index + 1) * size // 2] for tensor in cut)
        engine.backward(errors(engine.predict, part) * ranks.world_size / GLOBAL_BATCH, last=index == 1)
    found = block_norms(engine)
    norm = engine.step(1e-3).grad_norm
    (errors(lambda *args: qwen.predict_velocity(plain, *args), samples(3)) / GLOBAL_BATCH).backward()  # type: ignore[no-untyped-call]
    squares: dict[str, float] = {}
    for name, parameter in plain.named_parameters():
        for kind, tensor in (("grad", parameter.grad), ("param", parameter.detach())):
            square = 0.0 if tensor is None else float(tensor.double().square().sum())
            for where in (part_of(name), "all"):
                squares[f"norms/{kind}/{where}"] = squares.get(f"norms/{kind}/{where}", 0.0) + square
    late = time.perf_counter()
    waited = ranks.waited.seconds
    with torch.no_grad():
        for _ in range(3):
            time.sleep(0.05 * (ranks.rank == 1))
            ranks.all_finite(errors(engine.predict, tuple(t[:1] for t in cut)))
    own = [row[0] for row in ranks.table([time.perf_counter() - late - (ranks.waited.seconds - waited)])]
    engine.close()
    return {
        "found": found,
        "expected": {name: math.sqrt(square) for name, square in squares.items()},
        "grad_norm": norm,
        "slowest": own.index(max(own)),
    }


def check_skip(world: World) -> dict[str, Any]:
    """A gradient that is not finite on one rank: no update anywhere, and the next step is as if nothing had been."""
    engine, _ = world.engine()
    untouched, _ = world.engine()
    before = snapshot(engine, None)
    loss = errors(engine.predict, tuple(t[:1] for t in samples(0)))
    finite = world.ranks.all_finite(loss * (float("nan") if world.ranks.rank == 1 else 1.0))
    engine.backward(loss * (float("inf") if world.ranks.rank == 1 else 1.0), last=True)
    result = engine.step(1e-3)
    same = equal(before, snapshot(engine, None))
    steps = engine.optimizer_steps
    engine_step(engine, None, 1, 1e-3)
    engine_step(untouched, None, 1, 1e-3)
    after = equal(snapshot(engine, None), snapshot(untouched, None))
    engine.close()
    untouched.close()
    return {"finite": finite, "skipped": result.skipped, "unchanged": same, "steps": steps, "next_is_clean": after}


class Broken:
    """An objective of two updates per step, of which one is not finite on rank 1, by its loss or its gradient alone."""

    updates_per_step = 2

    def __init__(self, world: World, fault: str, broken: int) -> None:
        self._rank, self._fault, self._broken, self._calls = world.ranks.rank, fault, broken, 0

    def loss(self, predict: Any, micro: MicroBatch, *, step: int) -> LossOutput:
        self._calls += 1
        loss = errors(predict, tuple(tensor[:4] for tensor in samples(0)))
        if self._rank == 1 and self._calls == self._broken:
            loss = loss * float("nan") if self._fault == "loss" else loss + (loss - loss.detach()) * 1e38 * 1e38
        return LossOutput(loss=loss, metrics={"twice": 2 * loss.detach()})


def check_updates(world: World) -> dict[str, Any]:
    """Several updates of a step up to one that is not finite: what was made stays, and nothing of the other."""
    found: dict[str, Any] = {}
    once, _ = world.engine()
    start = snapshot(once, None)
    alone = Broken(world, "", 0)
    alone.updates_per_step = 1
    two_updates(world, once, alone)
    for fault in ("loss", "gradient"):
        for broken in (1, 2):
            engine, _ = world.engine()
            name = f"{fault}_{broken}"
            made = two_updates(world, engine, Broken(world, fault, broken), world.out / f"updates-{name}")
            assert made.failed is not None
            world.ranks.any(False)  # rank 1 has written its dump
            norm = made.result.grad_norm
            found[name] = {
                "made": made.made,
                "skipped": made.result.skipped,
                "norm": norm if math.isfinite(norm) else None,
                "failed_norm": str(made.failed.grad_norm),
                "metrics": made.metrics,
                "names": sorted(made.losses or {}),
                "dumped": [
                    json.loads(file.read_text())["update"]
                    for file in (world.out / f"updates-{name}" / "faults").glob("*/batch.json")
                ],
            }
            left = start if broken == 1 else snapshot(once, None)
            found[f"{name}_as_if_it_had_not_been"] = equal(snapshot(engine, None), left)
            engine.close()
    once.close()
    return found


def two_updates(world: World, engine: Engine, objective: Broken, run_dir: Path = Path()) -> Updates:
    micro = MicroBatch(
        latents=torch.zeros(4, 16, 8, 8),
        logvar=None,
        text=torch.zeros(4, 5, WIDTH),
        text_mask=None,
        weights=torch.ones(4),
        slots=torch.arange(4),
        num_slots=4,
        bucket=Bucket(height=64, width=64),
    )
    whole = SimpleNamespace(bucket=micro.bucket, resolution=64, epoch=0)
    batch: Any = SimpleNamespace(num_real=8, keys=["a", "b", "c", "d"], batch=whole)
    session: Any = SimpleNamespace(
        config=load_config(SETTINGS),
        engine=engine,
        ema=None,
        objective=objective,
        ranks=world.ranks,
        hooks=Hooks(),
        progress=SimpleNamespace(step=0),
        run_dir=run_dir,
    )
    return make_updates(session, batch, [micro], 1e-3, idle=False)


def check_ema_swap(world: World) -> dict[str, Any]:
    """Inside `applied` the averaged weights answer; afterwards everything is back bit for bit. In bf16."""
    engine, _ = world.engine("engine.precision=bf16")
    ema = Ema(engine, EMA_DECAY)
    for step in range(3):
        engine_step(engine, ema, step, 1e-2)
    noisy, sigma, text, _ = samples(7)
    with torch.no_grad():
        before, raw = snapshot(engine, ema), engine.predict(noisy, sigma, text, None)
        with ema.applied():
            averaged = engine.predict(noisy, sigma, text, None)
        again = engine.predict(noisy, sigma, text, None)
    found = {
        "differs": not torch.equal(raw, averaged),
        "restored": equal(before, snapshot(engine, ema)) and torch.equal(raw, again),
    }
    engine.close()
    return found


def check_bf16(world: World) -> dict[str, Any]:
    """Masters are the source's fp32 values, RoPE tables are stock's, the loss is near that of fp32. Layer by layer."""
    engine, _ = world.engine("engine.precision=bf16", "engine.activation_checkpointing=true", "engine.gather=layer")
    plain = world.plain()
    masters = max_difference(engine, lambda s: engine.state("master", s), dict(plain.named_parameters()))
    ours, stock = engine.transformer.module.pos_embed, plain.pos_embed
    rope = torch.equal(ours.pos_freqs, stock.pos_freqs) and torch.equal(ours.neg_freqs, stock.neg_freqs)
    loss, _ = engine_step(engine, None, 0, 1e-3)
    expected = errors(lambda *args: qwen.predict_velocity(plain, *args), samples(0)) / GLOBAL_BATCH
    dtype = str(next(engine.transformer.parameters()).dtype)
    engine.close()
    return {"masters": masters, "rope": rope, "loss": abs(loss - float(expected.detach())), "dtype": dtype}


def check_compile(world: World) -> dict[str, Any]:
    """Compiled blocks, their activations recomputed, take the same steps as eager ones that keep theirs."""
    eager, _ = world.engine()
    compiled, _ = world.engine("engine.compile=true", "engine.activation_checkpointing=true")
    pairs = [(engine_step(eager, None, step, 1e-3), engine_step(compiled, None, step, 1e-3)) for step in range(4)]
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    model = qwen.load_transformer_config(world.pipeline / "transformer")
    frozen = build_frozen(model, load_config([*SETTINGS, "engine.compile=true"]), world.ranks, world.source)
    noisy, sigma, text, _ = samples(0)
    with torch.no_grad():
        expected = qwen.predict_velocity(world.plain(), noisy, sigma, text, None)
        reference = difference(frozen.predict(noisy, sigma, text, None), expected)
    reference_graphs = counters["stats"]["unique_graphs"] - graphs
    frozen.close()
    weights = max(difference(eager.state("master", share), compiled.state("master", share)) for share in eager.shares)
    eager.close()
    compiled.close()
    loss = max(abs(one[0] - other[0]) for one, other in pairs)
    return {
        "loss": loss,
        "weights": world.ranks.max([weights])[0],
        "graphs": graphs,
        "breaks": breaks,
        "reference": reference,
        "reference_graphs": reference_graphs,
    }


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


def check_recompute(world: World) -> dict[str, Any]:
    """Recomputation comes and goes between steps: blocks run once more then, and nothing else changes. A checkpoint
    from before a change goes on as if it had never been loaded."""
    engine, _ = world.engine()
    never, _ = world.engine()
    calls = [0]
    # Before the forward: a recomputation stops, by an exception, at the last tensor that is needed.
    block = engine.transformer.module.transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    run_dir, wanted = world.out / "recompute", [False, False, True, True, True, False, False]
    losses, expected, forwards = [], [], []
    for step, enabled in enumerate(wanted):
        engine.checkpoint_activations(enabled)
        calls[0] = 0
        losses.append(engine_step(engine, None, step, 1e-3))
        forwards.append(calls[0])
        expected.append(engine_step(never, None, step, 1e-3))
        if step == 3:
            checkpoint.save_checkpoint(engine, None, run_dir, step=4, state={}, keep=1)
    same = equal(snapshot(engine, None), snapshot(never, None))
    loaded = checkpoint.load_newest(never, None, run_dir)
    assert loaded is not None
    again = []
    for step in range(4, len(wanted)):
        never.checkpoint_activations(wanted[step])
        again.append(engine_step(never, None, step, 1e-3))
    found = {
        "forwards": forwards,
        "same": same and losses == expected,
        "resumed": again == losses[4:] and equal(snapshot(engine, None), snapshot(never, None)),
        "timeouts": timeouts(),
    }
    engine.close()
    never.close()
    return found


def check_away(world: World) -> dict[str, Any]:
    """What one rank meets all raise: a refusal before storage that was away, whichever rank met which."""
    away, full, refused = OSError(errno.ESTALE, "Stale"), OSError(errno.ENOSPC, "No room"), ValueError("refused")
    told: dict[str, list[str]] = {}

    def note(name: str, errors: tuple[Exception | None, Exception | None], agree: Callable[[Any], Any]) -> None:
        def action() -> None:
            if (error := errors[world.ranks.rank]) is not None:
                raise error

        try:
            agree(action)
        except Exception as error:
            told[name] = [type(error).__name__, str(error)]

    note("away on one", (None, away), world.ranks.together)
    note("away and refused", (away, refused), world.ranks.together)
    note("full and away", (full, away), world.ranks.together)
    note("away on both", (away, StorageAwayError("Away")), world.ranks.together)
    note("away on the first", (away, None), world.ranks.on_first)
    note("nothing", (None, None), world.ranks.together)
    return {f"rank {rank}": one for rank, one in enumerate(world.ranks.gather_json(told))}


def check_save(world: World) -> dict[str, Any]:
    """Saved after 4 steps, loaded into another engine: bitwise the same, and so are the next steps."""
    run_dir = world.out / "run"
    run_dir.mkdir(exist_ok=True)
    engine, _ = world.engine()
    ema = Ema(engine, EMA_DECAY)
    fresh = checkpoint.load_newest(engine, ema, run_dir)
    for step in range(4):
        engine_step(engine, ema, step, 1e-3)
    checkpoint.save_checkpoint(engine, ema, run_dir, step=4, state={"note": "kept"}, keep=2)
    other, _ = world.engine()
    other_ema = Ema(other, EMA_DECAY)
    loaded = checkpoint.load_newest(other, other_ema, run_dir)
    same = equal(snapshot(engine, ema), snapshot(other, other_ema))
    after = [engine_step(engine, ema, step, 1e-3) for step in range(4, 10)]
    other_after = [engine_step(other, other_ema, step, 1e-3) for step in range(4, 10)]
    end = equal(snapshot(engine, ema), snapshot(other, other_ema))
    checkpoint.save_checkpoint(engine, ema, world.out / "end", step=10, state={}, keep=1)
    engine.close()
    other.close()
    return {
        "fresh": fresh is None,
        "step": loaded.step if loaded else None,
        "note": loaded.state["note"] if loaded else None,
        "same": same,
        "same_later": end and after == other_after,
        "losses": after,
    }


def check_damage(world: World) -> dict[str, Any]:
    """Newest valid wins, the others are named; none valid is an error; a rank that cannot write fails all."""
    run_dir = world.out / "damaged"
    ranks = world.ranks
    engine, _ = world.engine()
    for step in (1, 2, 3, 4):
        checkpoint.save_checkpoint(engine, None, run_dir, step=step, state={}, keep=4)
    if ranks.is_first:
        flip(rank_file_of(run_dir, 4), -1000)
        truncate(rank_file_of(run_dir, 3))
        (run_dir / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    ranks.any(False)
    loaded = checkpoint.load_newest(engine, None, run_dir)
    found: dict[str, Any] = {"step": loaded.step if loaded else None, "skipped": loaded.skipped if loaded else None}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # the kernel refuses byte 10,001 of a file
    found["write_error"] = save_refusal(engine, run_dir, step=5)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    faults = world.out / "away"
    if ranks.rank == 1:
        faults.mkdir()
        (faults / "checkpoint_write@next").write_text("raise ESTALE")
        os.environ[FAULT_DIR_VARIABLE] = str(faults)
    try:
        save_refusal(engine, run_dir, step=5)
    except StorageAwayError as error:
        found["away_error"] = ranks.gather_json(str(error))
    os.environ.pop(FAULT_DIR_VARIABLE, None)
    found["visible"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    found["read_errors"] = one_rank_cannot_read(world, engine, run_dir)

    if ranks.is_first:
        shutil.rmtree(run_dir / "checkpoints" / "step-00000001" / "state.json", ignore_errors=True)
        flip(run_dir / "checkpoints" / "step-00000001" / "state.json", 10)
    ranks.any(False)
    try:
        checkpoint.load_newest(engine, None, run_dir)
        found["none_valid"] = None
    except checkpoint.CheckpointError as error:
        found["none_valid"] = str(error)
    checkpoint.save_checkpoint(engine, None, run_dir, step=4, state={}, keep=1)  # over the invalid one
    found["kept"] = [[info.step, info.fault] for info in checkpoint.list_checkpoints(run_dir)]
    # Step 4 rots unseen by its size; a run that fell back to before it commits step 2, which must be what is kept.
    if ranks.is_first:
        flip(rank_file_of(run_dir, 4), -1000)
    checkpoint.save_checkpoint(engine, None, run_dir, step=2, state={}, keep=1)
    found["kept_of_new_line"] = [[info.step, info.fault] for info in checkpoint.list_checkpoints(run_dir)]
    engine.close()
    return found


def one_rank_cannot_read(world: World, engine: Engine, run_dir: Path) -> list[str]:
    """What this rank is told where rank 1 alone can read neither checkpoint nor weights: its mount is gone."""

    def unreadable(*_: object) -> Any:
        raise OSError("the mount is gone")

    told = []
    reader, source = checkpoint.CheckpointReader.read_range_into, SafetensorsDirectory.read_flat_range
    if world.ranks.rank == 1:
        checkpoint.CheckpointReader.read_range_into = unreadable  # type: ignore[method-assign, assignment]
        SafetensorsDirectory.read_flat_range = unreadable  # type: ignore[method-assign, assignment]
    for action in (lambda: checkpoint.load_newest(engine, None, run_dir), world.engine):
        try:
            action()
        except ValueError as error:
            told.append(str(error))
    checkpoint.CheckpointReader.read_range_into = reader  # type: ignore[method-assign]
    SafetensorsDirectory.read_flat_range = source  # type: ignore[method-assign]
    return told


def check_each_damage(world: World) -> dict[str, Any]:
    """Each kind of damage on each kind of file of the newest checkpoint: the one before is loaded, and why is said."""
    run_dir, ranks = world.out / "each", world.ranks
    engine, _ = world.engine()
    for step in (1, 2):
        checkpoint.save_checkpoint(engine, None, run_dir, step=step, state={}, keep=2)
    newest = run_dir / "checkpoints" / "step-00000002"
    sound = {file.name: file.read_bytes() for file in newest.iterdir()}
    found: dict[str, Any] = {}
    for name, data in sound.items():
        middle = len(data) // 2
        damages = {
            "missing": None,
            "empty": b"",
            "cut": data[:-9],
            "longer": data + b"\0",
            "flipped": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
            "torn": data[:middle] + bytes(len(data) - middle),
        }
        for damage, damaged in damages.items():
            ranks.any(False)  # nobody still reads
            if ranks.is_first:
                (newest / name).unlink(missing_ok=True)
                if damaged is not None:
                    (newest / name).write_bytes(damaged)
            ranks.any(False)
            loaded = checkpoint.load_newest(engine, None, run_dir)
            assert loaded is not None
            found[f"{name} {damage}"] = [loaded.step, *loaded.skipped]
        ranks.any(False)
        if ranks.is_first:
            (newest / name).write_bytes(data)
    ranks.any(False)
    loaded = checkpoint.load_newest(engine, None, run_dir)
    found["restored"] = [loaded.step, *loaded.skipped] if loaded else None
    engine.close()
    return found


def check_full_disk(world: World) -> dict[str, Any]:
    """A real file system of the size of two and a half checkpoints (OUT/small, if the test could mount one)."""
    small, ranks = world.out / "small", world.ranks
    if not os.path.ismount(small):
        return {"mounted": None}
    run_dir, filler = small / "run", small / "filler"
    engine, _ = world.engine()
    before = snapshot(engine, None)
    found: dict[str, Any] = {"mounted": 1, "first": save_refusal(engine, run_dir, step=1)}
    faults = world.out / "faults"
    if ranks.is_first:
        faults.mkdir()
        (faults / "checkpoint_write@next").write_text(f"fill {filler}")
        torn = run_dir / "checkpoints" / ".tmp-step-00000002-of-the-dead"
        torn.mkdir()
        shutil.copy(rank_file_of(run_dir, 1), torn)
        shutil.copy(rank_file_of(run_dir, 1), torn / "another")  # leaves no room for a whole checkpoint
    os.environ[FAULT_DIR_VARIABLE] = str(faults)
    ranks.any(False)
    found["filled_while_writing"] = save_refusal(engine, run_dir, step=2)
    del os.environ[FAULT_DIR_VARIABLE]
    found["after_filling"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    found["full_before"] = save_refusal(engine, run_dir, step=2)
    found["unchanged"] = equal(before, snapshot(engine, None))
    loaded = checkpoint.load_newest(engine, None, run_dir)
    found["loaded"] = [loaded.step, *loaded.skipped] if loaded else None
    if ranks.is_first:
        filler.unlink()
    ranks.any(False)
    found["room_again"] = save_refusal(engine, run_dir, step=3, keep=1)
    # And while training goes on: one rank's thread fills the disk.
    if ranks.is_first:
        (faults / "checkpoint_write@next").write_text(f"fill {filler}")
    os.environ[FAULT_DIR_VARIABLE] = str(faults)
    ranks.any(False)
    saver = Saver(engine, None, run_dir, BACKGROUND)
    found["filled_in_background"] = background_refusal(saver, step=4)
    del os.environ[FAULT_DIR_VARIABLE]
    saver.close()
    found["left"] = [[info.step, info.fault] for info in checkpoint.list_checkpoints(run_dir)]
    engine.close()
    return found


def check_background(world: World) -> dict[str, Any]:
    """A save beside training is of the step at which it began, and nothing before all ranks have written."""
    run_dir, ranks = world.out / "background", world.ranks
    engine, _ = world.engine(*FREEZE)
    ema = Ema(engine, EMA_DECAY)
    saver = Saver(engine, ema, run_dir, BACKGROUND)
    numel = sum(3 * (share.stop - share.start) for share in engine.shares)
    numel += sum(share.stop - share.start for share in (*engine.shares, *engine.frozen))
    found: dict[str, Any] = {"copy": saver.copy_bytes == 4 * numel}
    engine_step(engine, ema, 0, 1e-3)
    before, gate = snapshot(engine, ema), threading.Event()
    in_the_middle = checkpoint_files.fault_point  # type: ignore[attr-defined]
    checkpoint_files.fault_point = lambda _: bool(gate.wait())  # type: ignore[attr-defined, assignment]
    begin_background(saver, step=1)
    after = [engine_step(engine, ema, step, 1e-3) for step in (1, 2, 3)]
    found["writing"] = ranks.max(saver.flags()) == [0.0, 1.0]
    found["nothing_yet"] = checkpoint.list_checkpoints(run_dir) == []
    gate.set()
    found["finished"] = [saver.finish(), saver.under_way]

    other, _ = world.engine(*FREEZE)
    other_ema = Ema(other, EMA_DECAY)
    loaded = checkpoint.load_newest(other, other_ema, run_dir)
    assert loaded is not None
    found["note"] = [loaded.step, loaded.state["note"], loaded.state["optimizer_steps"]]
    found["same"] = equal(before, snapshot(other, other_ema))
    found["same_later"] = after == [engine_step(other, other_ema, step, 1e-3) for step in (1, 2, 3)]
    found["same_later"] &= equal(snapshot(engine, ema), snapshot(other, other_ema))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    gate.clear()
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        checkpoint_files.fault_point = in_the_middle  # type: ignore[attr-defined]
    found["one_failed"] = background_refusal(saver, step=4, gate=gate)  # rank 0 is still in the middle of it
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found["visible"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    checkpoint_files.fault_point = lambda _: gate.wait(1)  # type: ignore[attr-defined, assignment]
    gate.clear()
    begin_background(saver, step=5)
    saver.close()  # as when the run ends by an error: nobody agrees on anything any more
    found["given_up"] = sorted(path.name.rpartition("-")[0] for path in (run_dir / "checkpoints").iterdir())
    checkpoint_files.fault_point = in_the_middle  # type: ignore[attr-defined]

    saver = Saver(engine, ema, run_dir, BACKGROUND)
    for step, wait in ((6, False), (7, True), (8, False)):
        begin_background(saver, step=step, wait=wait)
        saver.finish()
    saver.close()
    found["kept"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    meminfo = saver_module._MEMINFO
    if ranks.rank == 1:
        saver_module._MEMINFO = world.out / "meminfo"  # type: ignore[misc]
        (world.out / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 1 kB\n")
    try:
        Saver(engine, ema, run_dir, BACKGROUND)
    except ValueError as error:
        found["no_memory"] = str(error)
    saver_module._MEMINFO = meminfo  # type: ignore[misc]
    engine.close()
    other.close()
    return found


BACKGROUND = load_config(["checkpoint.background=true", "checkpoint.keep=2"]).checkpoint


def begin_background(saver: Saver, *, step: int, wait: bool = False) -> None:
    saver.begin(step=step, state={"note": "then"}, certificate=dict, wait=wait)


def background_refusal(saver: Saver, *, step: int, gate: threading.Event | None = None) -> str | None:
    """What a save beside training refuses with, asked as the trainer does."""
    ranks = saver._engine.ranks
    begin_background(saver, step=step)
    while True:
        failed, writing = ranks.max(saver.flags())
        if failed or not writing:
            break
        time.sleep(0.01)
    if gate:
        gate.set()
    try:
        saver.finish(failed=bool(failed))
    except TrainingError as error:
        return str(error)
    return None


def check_retention(world: World) -> dict[str, Any]:
    """The last two and every third; loaded groups are those of the names, with their own weight decay."""
    run_dir = world.out / "retained"
    engine, _ = world.engine()
    for step in range(1, 9):
        checkpoint.save_checkpoint(engine, None, run_dir, step=step, state={}, keep=2, keep_every=3)
    kept = [info.step for info in checkpoint.list_checkpoints(run_dir)]
    checkpoint.load_newest(engine, None, run_dir)
    number, groups_of_adam = engine._zero.sub_group_to_group_id, engine._adam.param_groups
    decays = {share.name: groups_of_adam[number[share.sub_group]]["weight_decay"] for share in engine.shares}
    groups = {share.name: share.group for share in engine.shares}
    engine.close()
    return {"kept": kept, "decays": decays, "groups": groups}


def check_continue(world: World) -> dict[str, Any]:
    """Go on from the newest checkpoint of OUT/other for three steps and save: for gangs of another size."""
    run_dir = world.out / "other"
    engine, _ = world.engine()
    ema = Ema(engine, EMA_DECAY)
    loaded = checkpoint.load_newest(engine, ema, run_dir)
    assert loaded is not None
    losses = [engine_step(engine, ema, step, 1e-3) for step in range(loaded.step, loaded.step + 3)]
    checkpoint.save_checkpoint(engine, ema, run_dir, step=loaded.step + 3, state={}, keep=9)
    engine.close()
    return {"from": loaded.step, "losses": losses}


def save_refusal(engine: Engine, run_dir: Path, *, step: int, keep: int = 4, keep_every: int = 0) -> str | None:
    """What a save refuses with; None if it did not."""
    try:
        checkpoint.save_checkpoint(engine, None, run_dir, step=step, state={}, keep=keep, keep_every=keep_every)
    except TrainingError as error:
        return str(error)
    return None


def rank_file_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}" / "rank-00001-of-00002.safetensors"


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-17])


def snapshot(engine: Engine, ema: Ema | None) -> list[torch.Tensor]:
    """Copies of all state of this rank."""
    state = [engine.flat(kind, i).clone() for kind in KINDS for i in range(engine.num_sub_groups)]
    state += [copy.deepcopy(ema.state(share)) for share in engine.shares] if ema else []
    return [*state, torch.tensor(engine.optimizer_steps)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    pipeline, out, *checks = arguments
    world = World(ranks=start_distributed("cpu"), pipeline=Path(pipeline), out=Path(out))
    for name in checks:
        found = globals()[f"check_{name}"](world)
        verdicts = {key: not world.ranks.any(not value) for key, value in found.items() if isinstance(value, bool)}
        if world.ranks.is_first:
            (world.out / f"{name}.json").write_text(json.dumps({**found, **verdicts}))
    stop_distributed()


if __name__ == "__main__":
    main(sys.argv[1:])
