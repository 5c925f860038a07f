"""Edits along the way: held-out ones with fixed seeds, a row each of conditions, what the model draws, and the target.

Place in the flow: the trainer draws them beside the grids of prompts; `samples/edits-step-NNNNNNNN.png` appears. All
that is needed lies in the data set (condition latents, text features that saw the pictures, those of the empty
instruction for guidance), so no encoder is held. An edit has sizes of its own and is drawn alone; each rank draws as
many, which under ZeRO-3 is what counts, and rank 0 decodes. Refuses nothing: an edit that some rank cannot read is left
out and told, on all ranks alike, and without held-out edits there is no grid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from consumers.batch import MicroBatch
from consumers.ema import Ema
from consumers.grids import saved_or_said
from consumers.ranks import Ranks
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.held_out import HeldOutBucket
from qwenimg_dist.models.generate import generate_latents, save_grid, seeded_noise, to_pictures
from qwenimg_dist.models.vae import LatentCodec
from qwenimg_dist.schema import LISTING

if TYPE_CHECKING:
    from PIL import Image

    from consumers.session import Session


Read = dict[int, tuple[MicroBatch, MicroBatch]]
"""Number of an edit -> the edit, and the same with the empty instruction."""


@torch.no_grad()
def draw_edits(session: Session, ema: Ema | None, *, resolution: int, suffix: str = "") -> Path | None:
    """One row per edit, by the EMA's weights if given; returns the file on rank 0. Collective."""
    evaluate, ranks, grids = session.config.evaluate, session.ranks, session.grids
    chosen = chosen_edits(session.generations, resolution, evaluate.edits) if grids is not None else []
    if grids is None or not chosen:
        return None
    there, read = readable(session, chosen)
    if not there:
        return None
    drawn = []
    session.engine.train(False)
    with ema.applied() if ema is not None else contextlib.nullcontext():
        for at in _share(there, ranks):
            micro, empty = read[at]
            noise = seeded_noise([evaluate.seed + at], micro.bucket.height, micro.bucket.width)
            drawn.append(
                generate_latents(
                    session.engine.transformer,
                    [micro.text[0].to(ranks.device)],
                    empty.text[0].to(ranks.device),
                    noise.to(ranks.device),
                    num_steps=evaluate.num_steps,
                    guidance=evaluate.guidance,
                    scheduler_config=grids.scheduler,
                    conditions=[one.to(ranks.device).float() for one in micro.conditions],
                )
            )
    session.engine.train()
    chosen = [chosen[at] for at in there]
    latents = _gathered(session, chosen, drawn)
    if grids.codec is None:
        return None
    codec, shown = grids.codec, [read[at][0] for at in there]
    return saved_or_said(lambda: _save(session, codec, chosen, shown, latents, suffix), session.hooks.say)


def chosen_edits(generations: Generations, resolution: int, limit: int) -> list[HeldOutBucket]:
    """The first held-out edits of a class, each a set of one; the same on every rank."""
    shared = limit * len(generations.datasets)  # among which they are divided
    found = [group for group in generations.held_out(resolution, shared) if group.bucket.conditions]
    alone = [
        replace(group, rows=group.rows[at : at + 1], texts=group.texts[at : at + 1], slots=group.slots[at : at + 1])
        for group in found
        for at in range(len(group.rows))
    ]
    return sorted(alone, key=lambda one: int(one.slots[0]))[:limit]


def readable(session: Session, chosen: Sequence[HeldOutBucket]) -> tuple[list[int], Read]:
    """Which of the edits can be drawn, the same on every rank, and what this one has read of them: its share, and rank
    0, which shows them, all. Collective.

    What is left out moves the shares, so they are looked at again until every rank has read its own.
    """
    ranks, there, read = session.ranks, list(range(len(chosen))), Read()
    while there:
        wanted = there if ranks.is_first else _share(there, ranks)
        lost = ranks.together(lambda: _read(session, chosen, wanted, read))  # noqa: B023 - called at once
        problems = {int(at): why for one in ranks.gather_json(lost) for at, why in one.items()}
        if not problems:
            break
        if ranks.is_first:
            session.hooks.say(
                f"warning: the grid goes without {len(problems)} of {len(there)} edits, which cannot be read "
                f"(evaluate.edits=0 draws none): {problems[min(problems)]}"
            )
        there = [at for at in there if at not in problems]
    return there, read


def _share(there: Sequence[int], ranks: Ranks) -> list[int]:
    """The edits that this rank draws; as many on every rank, of which the last draws one again where they run out."""
    per_rank = -(-len(there) // ranks.world_size)
    return [there[min(ranks.rank * per_rank + index, len(there) - 1)] for index in range(per_rank)]


def _read(session: Session, chosen: Sequence[HeldOutBucket], wanted: Sequence[int], read: Read) -> dict[int, str]:
    """Read what is not there yet; which could not be, and why."""
    problems = {}
    for at in dict.fromkeys(wanted):
        if at not in read:
            try:
                micro, empty = session.stream.whole(_with_empty(session, chosen[at]))
                read[at] = micro, empty
            except DataError as error:
                problems[at] = str(error)
    return problems


def _with_empty(session: Session, edit: HeldOutBucket) -> tuple[HeldOutBucket, HeldOutBucket]:
    """The edit, and the same with the empty instruction."""
    catalogs = session.generations.catalogs
    ((index, local, _),) = catalogs.split_rows(edit.rows)
    return edit, replace(edit, texts=catalogs[index].empty_texts(local) + catalogs.text_base(index))


def _gathered(session: Session, chosen: Sequence[HeldOutBucket], drawn: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """(1,16,h,w) of each edit, on every rank; they travel as long as the largest."""
    shapes = [(1, 16, one.bucket.height // 8, one.bucket.width // 8) for one in chosen]
    most = max(int(np.prod(shape)) for shape in shapes)
    flat = torch.stack([torch.nn.functional.pad(one.flatten(), (0, most - one.numel())) for one in drawn])
    gathered = session.ranks.gather_tensor(flat)
    return [row[: int(np.prod(shape))].view(shape) for row, shape in zip(gathered, shapes, strict=False)]


def _save(
    session: Session,
    codec: LatentCodec,
    chosen: Sequence[HeldOutBucket],
    shown: Sequence[MicroBatch],
    latents: Sequence[torch.Tensor],
    suffix: str,
) -> Path:
    def picture(latent: torch.Tensor) -> Image.Image:
        return to_pictures(codec.decode(latent.float()))[0]

    most = max(len(one.bucket.conditions) for one in chosen)
    pictures: list[Image.Image] = []
    labels: list[str] = []
    for edit, micro, latent in zip(chosen, shown, latents, strict=True):
        row = [picture(one) for one in micro.conditions]
        blank = row[0].copy()
        blank.paste("white", (0, 0, *blank.size))
        pictures += [*row, *[blank] * (most - len(row)), picture(latent), picture(micro.latents)]
        words = instruction_of(session.generations, edit) or "(no instruction)"
        labels += [*(f"condition {index + 1}" for index in range(len(row))), *[""] * (most - len(row)), words, "target"]
    file = session.run_dir / "samples" / f"edits-step-{session.progress.step:08d}{suffix}.png"
    return save_grid(pictures, labels, file, columns=most + 2)


def instruction_of(generations: Generations, edit: HeldOutBucket) -> str:
    """The first instruction that the listing has of an edit. Reads the listing of one unit."""
    ((index, local, _),) = generations.catalogs.split_rows(edit.rows)
    catalog = generations.catalogs[index]
    row, unit = int(catalog.rows[local][0]), int(catalog.units[local][0])
    listed = generations.datasets[edit.dataset].read_unit(LISTING, unit, ["row", "captions"])
    found = {} if listed is None else {entry["row"]: entry["captions"] for entry in listed.to_pylist()}
    return str((found.get(row) or [""])[0])
