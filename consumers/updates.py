"""The optimiser updates of one step: losses, gradients, clip, AdamW, EMA; one, or as many as the objective makes.

Place in the flow: the trainer calls `make_updates` once per step, on this rank's micro-batches, and counts and logs
what came of it. An update with a loss that is not finite on some rank moves no weight on any; the ones before it in the
same step stay, and the step says how many were made. Refuses nothing: how often that may happen is the trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from consumers.batch import MicroBatch, RankBatch
from consumers.fault_dump import dump_micro_batch
from consumers.session import Session
from consumers.watch import due_norms
from consumers.zero_engine import StepResult
from qwenimg_dist.debug import fault_point

Sums = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Updates:
    """What has become of a step's updates; the same on every rank but for the sums."""

    losses: Sums | None
    """This rank's sums, as means over the updates made, or of one whose gradient alone was not finite; None if there
    are none."""
    result: StepResult
    """Of the last update made; `skipped` if none was, for a fault."""
    made: int
    planned: int
    failed: StepResult | None = None
    """Of the update that was not finite, and ended the step; an infinite `grad_norm` says that its losses were."""
    norms: dict[str, float] = field(default_factory=dict)
    """Where they are due."""

    @property
    def metrics(self) -> dict[str, float]:
        """How many were made, where several are planned."""
        return {"train/updates": float(self.made)} if self.planned > 1 else {}


def make_updates(
    session: Session, batch: RankBatch, micro_batches: Sequence[MicroBatch], lr: float, *, idle: bool
) -> Updates:
    """All updates of a step, up to one that is not finite. With `idle` none: nothing moves the model, AdamW's momentum
    neither. Collective."""
    engine, planned = session.engine, session.objective.updates_per_step
    if idle:
        return Updates(losses=None, result=StepResult(grad_norm=0.0, skipped=False), made=0, planned=planned)
    norms: dict[str, float] = {}
    sums: list[Sums] = []
    result = failed = None
    for number in range(planned):
        update = number + 1 if planned > 1 else None
        losses = _accumulate(session, batch, micro_batches, update) if batch.num_real else None
        session.hooks.stage("update")
        if losses is None:
            engine.discard_gradients()
            failed = StepResult(grad_norm=float("nan"), skipped=True)
            break
        norms = norms or due_norms(session)
        tried = engine.step(lr)
        if tried.skipped:
            failed, sums = tried, sums or [losses]
            break
        if session.ema is not None:
            session.ema.update()
        result = tried
        sums.append(losses)
        fault_point("update")
    ended = result or failed
    assert ended is not None
    return Updates(
        losses=_over_updates(sums, several=planned > 1) if sums else None,
        result=ended,
        made=len(sums) if result else 0,
        planned=planned,
        failed=failed,
        norms=norms,
    )


def _over_updates(sums: Sequence[Sums], *, several: bool) -> Sums:
    """Means over the updates made; beside them the first one's, where several are planned."""
    if not several:
        return sums[0]
    means = {name: torch.stack([one[name] for one in sums]).mean() for name in sums[0]}
    return means | {f"{name}_of_first_update": value for name, value in sums[0].items()}


def _accumulate(
    session: Session, batch: RankBatch, micro_batches: Sequence[MicroBatch], update: int | None
) -> Sums | None:
    """Backward of every micro-batch. Sums of loss and metrics on this rank; None, agreed by all, if not finite."""
    ranks, engine = session.ranks, session.engine
    scale = ranks.world_size / batch.num_real  # the engine averages over ranks
    sums: Sums = {}  # left on the device: to read one would wait for the backward
    for index, micro in enumerate(micro_batches):
        session.hooks.stage("forward and backward")
        output = session.objective.loss(engine.predict, micro.to(ranks.device), step=session.progress.step)
        if not ranks.all_finite(output.loss):
            if not bool(torch.isfinite(output.loss.detach())):
                step = session.progress.step + 1
                where = f"micro-batch {index} of {batch.batch.bucket}, slots {micro.slots.tolist()}"
                told = dump_micro_batch(
                    session.run_dir,
                    step=step,
                    rank=ranks.rank,
                    index=index,
                    batch=batch,
                    micro=micro,
                    output=output,
                    update=update,
                )
                which = f" of update {update} of {session.objective.updates_per_step}" if update else ""
                said = f"rank {ranks.rank}: step {step}: the loss{which} is not finite in {where}: {told}"
                session.hooks.say(f"warning: {said}")
            return None
        engine.backward(output.loss * scale, last=index + 1 == len(micro_batches))
        for name, value in {"loss": output.loss, **output.metrics}.items():
            sums[name] = value.detach().double() + sums.get(name, 0.0)
    return sums
