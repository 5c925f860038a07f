"""What to change so that a plan fits: overrides, each tried on the plan itself before it is offered.

Place in the flow: the command `plan` asks when its plan does not fit. Single changes that suffice come first, those
that cost least before others; where none suffices alone, they are joined in the same order until the plan fits. Refuses
to offer what it has not recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from consumers.planning.facts import with_phases_of
from consumers.planning.memory import rewards_on_device
from consumers.planning.plan import JobPlan, make_job_plan
from qwenimg_dist.config import Config, DpoConfig, GrpoConfig

_MAX_RANKS: Final = 1024


@dataclass(frozen=True, kw_only=True)
class Change:
    """Overrides that make a plan fit, and what they cost."""

    overrides: tuple[str, ...]
    costs: str
    plan: JobPlan


def changes_that_fit(
    plan: JobPlan, overrides: Sequence[str], compose: Callable[[Sequence[str]], Config]
) -> list[Change]:
    """What would fit, recomputed; empty if nothing tried does. `compose` makes a config of overrides."""

    def tried(extra: Sequence[str]) -> JobPlan | None:
        try:
            config = compose([*overrides, *extra])
            world_size = config.cluster.ranks
            return make_job_plan(config, world_size=world_size, data=with_phases_of(plan.data, config), scale=False)
        except ValueError:  # the change does not go together with what was given
            return None

    found: list[Change] = []
    partial: list[tuple[list[tuple[str, ...]], str]] = []
    for family, costs in _candidates(plan):
        helped = False
        for changed in family:
            result = tried(changed)
            if result is not None and not result.faults:
                found.append(Change(overrides=changed, costs=costs, plan=result))
                helped = False
                break
            helped = helped or (result is not None and result.worst.memory.total < plan.worst.memory.total)
        if helped:
            partial.append((family, costs))
    return found or _joined(partial, tried)


def _joined(
    partial: Sequence[tuple[list[tuple[str, ...]], str]], tried: Callable[[Sequence[str]], JobPlan | None]
) -> list[Change]:
    """One change of several overrides, where none suffices alone."""
    given: tuple[str, ...] = ()
    told: list[str] = []
    for family, costs in partial:
        told.append(costs)
        for changed in family:
            keys = {one.partition("=")[0] for one in changed}
            more = (*(one for one in given if one.partition("=")[0] not in keys), *changed)
            result = tried(more)
            if result is not None and not result.faults:
                return [Change(overrides=more, costs="; ".join(told), plan=result)]
        given = more
    return []


def _candidates(plan: JobPlan) -> Iterator[tuple[list[tuple[str, ...]], str]]:
    """Families of overrides with what they cost, the cheapest first; within a family the mildest first."""
    config, room = plan.config, plan.room
    over = [peak for peak in plan.peaks if room is None or peak.memory.total > room]
    phases = {peak.stream.phase.name: peak for peak in over if peak.stream.phase.name}
    if config.checkpoint.background:
        yield [("checkpoint.background=false",)], "training waits while a checkpoint is written"
    if config.engine.hpz_partition > 1:
        yield [("engine.hpz_partition=1",)], "all gathering over all ranks again"
    budgets = [
        tuple(
            f"curriculum.phases.{name}.micro_batch_tokens={peak.stream.phase.micro_batch_tokens // factor}"
            for name, peak in phases.items()
            if peak.samples > 1 and peak.stream.phase.micro_batch_tokens >= factor
        )
        for factor in (2, 4, 8)
    ]
    if any(budgets):
        yield [one for one in budgets if one], "smaller micro-batches: more collectives per step"
    plain = tuple(
        f"curriculum.phases.{name}.activation_checkpointing=true"
        for name, peak in phases.items()
        if not peak.stream.phase.activation_checkpointing
    )
    if plain:
        yield [plain], "a third more computation in these phases"
    if isinstance(config.objective, DpoConfig) and config.objective.reference == "online":
        online = ("objective.reference=precomputed", "objective.caption_dropout=0", *_draws(config.objective))
        yield [online], "a pass over the pairs before the first step"
    if isinstance(config.objective, GrpoConfig) and config.objective.kl_weight:
        yield [("objective.kl_weight=0",)], "nothing holds the model to its start"
    if isinstance(config.objective, GrpoConfig) and rewards_on_device(config):
        yield [("reward.device=cpu",)], "rewards on CPU cores, seconds per picture (or cluster.reward_actors with GPUs)"
    if config.engine.gather == "block" and not config.engine.compile:
        yield [("engine.gather=layer",)], "more and smaller collectives, a third gathering with checkpointing"
    if config.optim.ema_decay:
        yield [("optim.ema_decay=0",)], "no averaged weights"
    doubled = [plan.world_size * 2**n for n in range(1, 8) if plan.world_size * 2**n <= _MAX_RANKS]
    if doubled:
        yield [(f"cluster.ranks={ranks}",) for ranks in doubled], "more GPUs"
    if config.engine.offload_optimizer == "none" and config.cluster.device == "cuda":
        told = "states in host memory: the update on CPU cores, gradients over PCIe"
        yield [("engine.offload_optimizer=cpu",)], told
    if not config.optim.freeze and not config.optim.train:
        yield [("optim.freeze=[_mod]",)], "modulation stays as it is, a third of the parameters: another training"


def _draws(objective: DpoConfig) -> tuple[str, ...]:
    return ("objective.draws=4",) if objective.draws is None else ()
