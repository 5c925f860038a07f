"""What a run will need and how long it will take, before anything is started.

    qwenimg-dist plan model=qwen_image_2512 cluster=nodes_8x8 [data.path=DATA stage=... any override] [--json]

Device memory of a rank by phase, host memory, disk, traffic, steps, hours, a model of what more GPUs would give, and
what producers take: encoders on a GPU, images/s and hours to encode.
Without data.path the data is assumed (`plan.images`, `plan.text_tokens`), and said. What cannot fit is refused with
exit code 2, with the overrides that would make it fit, each recomputed; `plan.force=true` ends with 0 all the same.
`plan.probe=true` starts `cluster.ranks` ranks here and times a few real steps instead of assuming a rate. Writes
nothing.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Final

from rich.console import Console

from qwenimg_dist.compose import load_config
from qwenimg_dist.schema import EDIT

if TYPE_CHECKING:
    from consumers.planning.plan import JobPlan
    from consumers.planning.timing import Probe
    from producers.planning import ProducersPlan

_START_S: Final = 300.0
SUMMARY: Final = "memory, disk, traffic and hours of a run before it starts; refuses what cannot fit, says what would"


def run(args: list[str]) -> int:
    """Print the plan. Returns 2 if it cannot fit, unless `plan.force=true`, and 1 if a probe failed."""
    as_json = "--json" in args
    overrides = [word for word in args if word != "--json"]
    config = load_config(overrides)
    from consumers.planning.fit import changes_that_fit  # imports torch
    from consumers.planning.plan import make_job_plan
    from consumers.planning.report import assumptions, change_lines, tables, to_json, verdict
    from producers import planning as producing

    plan = make_job_plan(config, world_size=config.cluster.ranks)
    if config.plan.probe and (not plan.faults or config.plan.force):
        from qwenimg_dist.commands.rank_actors import RanksError

        try:
            with contextlib.redirect_stdout(sys.stderr):  # Ray reports deaths there, and JSON must stand alone
                probe = _probe(plan)
        except RanksError as error:
            print(f"error: the probe failed: {error}", file=sys.stderr)
            return 1
        plan = make_job_plan(config, world_size=config.cluster.ranks, data=plan.data, probe=probe)
    changes = changes_that_fit(plan, overrides, load_config) if plan.faults else []
    made = _producers(plan)
    # Of data that is there the encoding is done.
    missing = made.faults if plan.data.assumed else []
    code = 2 if (plan.faults or missing) and not config.plan.force else 0
    if as_json:
        told = {**to_json(plan, changes), "producers": producing.to_json(made)}
        told |= {"fits": False, "faults": [*plan.faults, *missing]} if missing else {}
        print(json.dumps(told, indent=1))
        return code
    console = Console(soft_wrap=True)
    drawn = max((time.images_per_s for time in plan.times if time.images_per_s), default=None)
    for table in [*tables(plan), producing.table(made, drawn)]:
        console.print(table.rich() if console.is_terminal else table.text(), highlight=False, markup=False)
    lines = [*assumptions(plan), *producing.lines(made, drawn), verdict(plan)]
    lines += [*(change_lines(changes) if plan.faults else []), *(f"producers do not fit: {one}" for one in missing)]
    for line in lines:
        console.print(line, highlight=False, markup=False)
    return code


def _producers(plan: JobPlan) -> ProducersPlan:
    from consumers.data_sets import kinds_of
    from consumers.planning.facts import local_pipeline
    from producers.planning import producers_plan

    kinds, data = set(kinds_of(plan.config).values()), plan.data
    return producers_plan(
        plan.config,
        kind=kinds.pop() if len(kinds) == 1 else EDIT,
        num_rows=data.num_images,
        captions=data.captions_per_image,
        text_tokens=data.mean_text,
        pipeline=local_pipeline(plan.config),
    )


def _probe(plan: JobPlan) -> Probe:
    from consumers.planning.probe import cases_of, job_of, measured, probe
    from producers.ray_cluster import machines, ray_session
    from qwenimg_dist.commands.rank_actors import rank_actors
    from qwenimg_dist.commands.train import check_room

    cluster = plan.config.cluster
    cases = cases_of(plan.config, plan.model, plan.data, world_size=plan.world_size)
    print(f"probing: {cluster.ranks} ranks, {len(cases)} cases", file=sys.stderr)
    with ray_session(cluster, cpus=cluster.ranks * cluster.cpus_per_rank):
        check_room(cluster, machines())
        with rank_actors(cluster, start_timeout_s=_START_S) as ranks:
            job = job_of(plan.config, plan.model, cases)
            return measured(ranks.call(probe, job, timeout_s=plan.config.train.stall_timeout_s)[0])
