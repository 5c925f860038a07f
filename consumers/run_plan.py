"""The plan of a run, told before its first step: what every phase draws, how often, and what stays unfilled.

Place in the flow: rank 0 prints it when a run starts and keeps it as `plan.json`; `train.dry_run=true` prints it and
ends. All counts come from the ledger that trains (`Ledger.tally`), micro-batches from the stream's own cut, rates from
the curriculum. Warns of what is rarely meant: a phase or a resolution without a step, buckets that fill less than half
of a batch, captions and pictures that pass the token budget alone. A selection without a row is refused by the ledger,
with its phase and expression.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from consumers.curriculum import lr_at
from consumers.objectives import is_guided, rows_per_sample
from consumers.run_directory import preflight
from consumers.stream import cut_for, pictures_of
from consumers.zero_settings import check_hpz
from qwenimg_dist.config import Config, OptimConfig
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.generation_log import FILE as GENERATIONS_FILE
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger import Ledger
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.tally import Tally
from qwenimg_dist.files import write_json
from qwenimg_dist.report.table import Table, show_share
from qwenimg_dist.schema import Bucket

FILE: Final = "plan.json"
_LR_SAMPLES: Final = 512
_TINY: Final = 0.5
_START_LEFT: Final = 0.05
"""Share of the start's weights in the average at a run's end that is worth a word."""
_NAMED: Final = 4


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """How a rank cuts a bucket's global batch, with the longest caption of the data and with the empty prompt."""

    long: list[int]
    short: list[int]
    over_budget: int
    """Tokens of one sample with the longest caption, where they pass the budget; else 0."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What one phase draws at one resolution."""

    resolution: int
    tally: Tally
    micro_batches: dict[Bucket, MicroBatches]


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    phase: PlannedPhase
    lr: tuple[float, float, float]
    """Of the first step, the highest, of the last step; zeros without steps."""
    streams: tuple[StreamPlan, ...]

    @property
    def images(self) -> int:
        return sum(stream.tally.images for stream in self.streams)

    @property
    def fill(self) -> int:
        return sum(stream.tally.fill for stream in self.streams)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """All phases, on a number of ranks."""

    phases: tuple[PhasePlan, ...]
    world_size: int
    complete: bool
    """False while producers go on: counts are of what is there."""
    optim: OptimConfig

    def tables(self) -> list[Table]:
        """Phases, what they draw, and their buckets."""
        there = "" if self.complete else ", of what is there so far"
        return [
            Table(title="Phases", columns=_PHASE_COLUMNS, rows=tuple(_phase_row(plan) for plan in self.phases)),
            Table(
                title=f"What they draw{there}",
                columns=_STREAM_COLUMNS,
                rows=tuple(_stream_row(plan, stream) for plan in self.phases for stream in plan.streams),
            ),
            Table(
                title=f"Buckets{there}; micro-batches of one of {self.world_size} ranks",
                columns=_BUCKET_COLUMNS,
                rows=tuple(
                    _bucket_row(plan, stream, bucket)
                    for plan in self.phases
                    for stream in plan.streams
                    for bucket in stream.tally.buckets
                ),
            ),
        ]

    def warnings(self) -> list[str]:
        """What is rarely meant, a line each."""
        found = _length_warnings(self.optim, self.phases[-1].phase.last_step)
        for plan in self.phases:
            if not plan.phase.num_steps:
                found.append(f"{plan.phase} has no step: raise train.steps or its length, or drop it")
                continue
            if plan.phase.warmup_steps >= plan.phase.num_steps:
                found.append(
                    f"{plan.phase} has {plan.phase.num_steps:,} steps and warmup_steps={plan.phase.warmup_steps}: it "
                    "ends before its learning rate is reached"
                )
            for stream in plan.streams:
                found += _stream_warnings(plan.phase, stream)
        return found + self._weights_without_rows()

    def _weights_without_rows(self) -> list[str]:
        """Weights that change nothing: of a phase, where they hold for no row of it; of the run, for no row of any."""
        there = "" if self.complete else " so far"
        at_work = [plan for plan in self.phases if plan.phase.num_steps and plan.streams]
        of_phases = [frozenset.intersection(*(one.tally.unmatched for one in plan.streams)) for plan in at_work]
        found = [
            f"{plan.phase}: weights={expression!r} holds for no row that it trains on{there}"
            for plan, unmatched in zip(at_work, of_phases, strict=True)
            for expression in sorted(unmatched & plan.phase.row_weights.keys())
        ]
        of_run = frozenset.intersection(*of_phases) if of_phases else frozenset()
        own = {expression for plan in at_work for expression in plan.phase.row_weights}
        return found + [
            f"data.weights={expression!r} holds for no row that is trained on{there}: `data stats` shows what is there"
            for expression in sorted(of_run - own)
        ]

    def text(self) -> str:
        """For a log."""
        return "\n".join([*(table.text() for table in self.tables()), *(f"warning: {w}" for w in self.warnings())])

    def json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return {
            "ranks": self.world_size,
            "complete": self.complete,
            "phases": [_phase_json(plan) for plan in self.phases],
            "warnings": self.warnings(),
        }


def make_plan(
    ledger: Ledger, optim: OptimConfig, *, world_size: int, complete: bool = True, pictures: int = 1, repeat: int = 1
) -> RunPlan:
    """Count what the ledger has for every phase. One pass over the rows per phase and resolution.

    `pictures` of a row are computed at once: 2 of a pair. Each sample fills `repeat` rows of a batch: a group's.
    """
    longest, shortest = _text_lengths(ledger)
    phases = []
    for phase in ledger.phases:
        streams = []
        for resolution in sorted(phase.weights):
            tally = ledger.tally(phase.index, resolution)
            cuts = {
                b: _micro_batches(phase, b, (longest, shortest), world_size, pictures, repeat) for b in tally.buckets
            }
            streams.append(StreamPlan(resolution=resolution, tally=tally, micro_batches=cuts))
        phases.append(PhasePlan(phase=phase, lr=_rates(ledger.phases, optim, phase), streams=tuple(streams)))
    return RunPlan(phases=tuple(phases), world_size=world_size, complete=complete, optim=optim)


def dry_run(config: Config, *, world_size: int) -> RunPlan:
    """The plan without a run: of the generation that the run directory has, else of what is ready in the data sets.

    Writes only to a temporary folder. Raises ValueError for unusable input, a phase without a row among it.
    """
    check_hpz(config, world_size)
    prepared = preflight(config)
    datasets = {name: Dataset.open(folder) for name, folder in prepared.data_dirs.items()}
    recorded = (prepared.run_dir / GENERATIONS_FILE).is_file() and not config.follow and not config.train.fresh
    with tempfile.TemporaryDirectory(prefix="qwenimg-dist-plan-") as scratch:
        run = prepared.run_dir if recorded else Path(scratch)
        generations = Generations(run, datasets, prepared.facets, prepared.ledger, follow=False)
        generations.refresh()
        if generations.count < len(datasets):
            generations = Generations(Path(scratch), datasets, prepared.facets, prepared.ledger, follow=False)
            generations.advance(0)
        return make_plan(
            generations.ledger,
            config.optim,
            world_size=world_size,
            complete=not config.follow,
            pictures=pictures_of(generations.facets.further, guided=is_guided(config)),
            repeat=rows_per_sample(config),
        )


def write_plan(plan: RunPlan, run_dir: Path) -> None:
    """`plan.json` of the run directory."""
    write_json(run_dir / FILE, plan.json())


def _text_lengths(ledger: Ledger) -> tuple[int, int]:
    """Tokens of the longest text of the data, and of the empty prompt."""
    catalogs = [ledger.catalogs[index] for index in range(len(ledger.catalogs))]
    with_texts = [catalog for catalog in catalogs if catalog.num_texts]
    longest = max((int(catalog.text_tokens.max()) for catalog in with_texts), default=1)
    return longest, min((int(catalog.text_tokens[catalog.empty_text]) for catalog in with_texts), default=1)


def _micro_batches(
    phase: PlannedPhase, bucket: Bucket, lengths: tuple[int, int], world_size: int, pictures: int, repeat: int
) -> MicroBatches:
    """`lengths` of the longest text and the shortest."""
    size, image_tokens, budget = phase.global_batch * repeat, bucket.tokens, phase.micro_batch_tokens
    long, short = (
        cut_for(size, image_tokens, tokens, budget, rank=0, world=world_size, pictures=pictures) for tokens in lengths
    )
    tokens = pictures * (image_tokens + lengths[0])
    return MicroBatches(
        long=long.sizes, short=short.sizes, over_budget=tokens if tokens > phase.micro_batch_tokens else 0
    )


def _rates(phases: tuple[PlannedPhase, ...], optim: OptimConfig, phase: PlannedPhase) -> tuple[float, float, float]:
    if not phase.num_steps:
        return 0.0, 0.0, 0.0
    last = phase.last_step - 1
    turns = {phase.first_step, last, phase.first_step + phase.warmup_steps - 1, optim.warmup_steps - 1}
    steps = {*range(phase.first_step, last, max(1, phase.num_steps // _LR_SAMPLES)), *turns}
    rates = {step: lr_at(phases, optim, step) for step in steps if phase.first_step <= step <= last}
    return rates[phase.first_step], max(rates.values()), rates[last]


def _length_warnings(optim: OptimConfig, num_steps: int) -> list[str]:
    """What is set for a longer run than this one."""
    found = []
    left = optim.ema_decay**num_steps if optim.ema_decay else 0.0
    if left > _START_LEFT:
        enough = _START_LEFT ** (5 / (2 * num_steps))
        found.append(
            f"after {num_steps:,} steps the average of the weights (optim.ema_decay={optim.ema_decay}), which is "
            f"exported, judged and gone on from, is still {left:.0%} what the run started from: train longer, or set "
            f"optim.ema_decay={enough:.4g} or lower"
        )
    if 2 * optim.warmup_steps > num_steps:
        found.append(f"optim.warmup_steps={optim.warmup_steps} is over half of the run's {num_steps:,} steps: lower it")
    return found


def _stream_warnings(phase: PlannedPhase, stream: StreamPlan) -> list[str]:
    name, tally, found = f"{phase} at {stream.resolution} px", stream.tally, []
    if not tally.asked:
        return [f"{name} gets none of the {phase.num_steps:,} steps: raise its weight or the steps, or drop it"]
    # Prompts are drawn in every shape: no batch is of those of one shape alone.
    num_of = {b: tally.samples if stream.resolution in phase.drawn else n.samples for b, n in tally.buckets.items()}
    tiny = [bucket for bucket, num in num_of.items() if 0 < num < _TINY * phase.global_batch]
    if tiny:
        listed = ", ".join(f"{bucket} ({num_of[bucket]} samples)" for bucket in tiny[:_NAMED])
        more = f" and {len(tiny) - _NAMED} more" if len(tiny) > _NAMED else ""
        found.append(
            f"{name}: {listed}{more} fill less than half of a global batch of {phase.global_batch}, yet take a step of "
            "their own in every epoch: fewer encode.aspects, a smaller global_batch, or more such pictures"
        )
    over = [bucket for bucket, cut in stream.micro_batches.items() if cut.over_budget]
    if over:
        most = max(cut.over_budget for cut in stream.micro_batches.values())
        found.append(
            f"{name}: one sample with the longest caption has up to {most:,} tokens, more than micro_batch_tokens="
            f"{phase.micro_batch_tokens}: it is taken alone"
        )
    return found


_PHASE_COLUMNS: Final = (
    "phase", "steps", "images", "fill slots", "global batch", "px", "lr first", "highest", "last", "checkpointing",
    "selection",
)  # fmt: skip
_STREAM_COLUMNS: Final = (
    "phase", "px", "steps", "images", "samples", "epochs", "buckets", "left over per epoch", "fill slots",
    "of all slots",
)  # fmt: skip
_BUCKET_COLUMNS: Final = (
    "phase", "bucket", "samples", "left over", "steps", "fill slots", "micro-batches, long captions", "short",
)  # fmt: skip


def _name(phase: PlannedPhase) -> str:
    return phase.name or str(phase.index)


def _phase_row(plan: PhasePlan) -> tuple[str | int | float | None, ...]:
    phase = plan.phase
    total = sum(phase.weights.values())
    mixture = [
        f"{resolution}" + (f" ({phase.weights[resolution] / total:.0%})" if len(phase.weights) > 1 else "")
        for resolution in sorted(phase.weights)
    ]
    return (
        _name(phase),
        phase.num_steps,
        plan.images,
        plan.fill,
        phase.global_batch,
        ", ".join(mixture),
        *(f"{rate:.3g}" for rate in plan.lr),
        "on" if phase.activation_checkpointing else "off",
        "; ".join(
            ([phase.where] if phase.where else [])
            + [f"{weight:g} x {expression}" for expression, weight in sorted(phase.row_weights.items())]
            + [f"mix {name}: {amount:g}" for name, amount in sorted((phase.mix or {}).items())]
        ),
    )


def _stream_row(plan: PhasePlan, stream: StreamPlan) -> tuple[str | int | float | None, ...]:
    tally = stream.tally
    filled = sum(1 for bucket in tally.buckets.values() if bucket.samples)
    return (
        _name(plan.phase),
        str(stream.resolution),
        tally.asked,
        tally.images,
        tally.samples,
        ", ".join([f"{tally.epochs:.2f}", *(f"{name} {n:.2f}" for name, n in tally.epochs_by_dataset.items())]),
        filled,
        tally.left_over,
        tally.fill,
        show_share(tally.fill, tally.fill + tally.images),
    )


def _bucket_row(plan: PhasePlan, stream: StreamPlan, bucket: Bucket) -> tuple[str | int | float | None, ...]:
    counts, cut = stream.tally.buckets[bucket], stream.micro_batches[bucket]
    return (
        _name(plan.phase),
        str(bucket),
        counts.samples,
        counts.left_over,
        counts.batches,
        counts.fill,
        _sizes(cut.long),
        _sizes(cut.short),
    )


def _sizes(sizes: Sequence[int]) -> str:
    """`3 x 11` for three micro-batches of at most eleven."""
    return f"{len(sizes)} x {max(sizes)}"


def _phase_json(plan: PhasePlan) -> dict[str, Any]:
    phase = plan.phase
    return {
        "name": _name(phase),
        "first_step": phase.first_step,
        "last_step": phase.last_step,
        "global_batch": phase.global_batch,
        "images": plan.images,
        "fill_slots": plan.fill,
        "lr": dict(zip(("first", "highest", "last"), plan.lr, strict=True)),
        "activation_checkpointing": phase.activation_checkpointing,
        "where": phase.where,
        "weights": dict(phase.row_weights),
        "mix": dict(phase.mix or {}),
        "resolutions": {
            str(stream.resolution): {
                "steps": stream.tally.asked,
                "batches": stream.tally.batches,
                "images": stream.tally.images,
                "samples": stream.tally.samples,
                "epochs": stream.tally.epochs,
                "epochs_by_dataset": dict(stream.tally.epochs_by_dataset),
                "left_over": stream.tally.left_over,
                "fill_slots": stream.tally.fill,
                "buckets": {
                    str(bucket): {
                        **vars(counts),
                        "micro_batches": {
                            "long": stream.micro_batches[bucket].long,
                            "short": stream.micro_batches[bucket].short,
                        },
                    }
                    for bucket, counts in stream.tally.buckets.items()
                },
            }
            for stream in plan.streams
        },
    }
