"""Checks of the engine's steps on several ranks, most against a plain PyTorch loop, see `gang_checks.py`."""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fake_dataset import WIDTH
from gang_world import (
    EMA_DECAY,
    FREEZE,
    GLOBAL_BATCH,
    GROUPS,
    SETTINGS,
    World,
    difference,
    engine_step,
    equal,
    errors,
    max_difference,
    samples,
    snapshot,
)
from torch.distributed import distributed_c10d

import consumers.checkpoint as checkpoint
from consumers.batch import MicroBatch
from consumers.ema import Ema
from consumers.engine import build_frozen
from consumers.hooks import Hooks
from consumers.norms import block_norms, part_of
from consumers.objectives.base import LossOutput
from consumers.parameter_groups import parameter_groups
from consumers.updates import Updates, make_updates
from consumers.zero_engine import Engine
from qwenimg_dist.compose import load_config
from qwenimg_dist.models import transformer as qwen
from qwenimg_dist.patience import StorageAwayError
from qwenimg_dist.schema import Bucket


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
