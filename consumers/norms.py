"""Norms of gradients and parameters per block, on request (`train.norms_every`): which part of the model explodes,
or no longer moves.

Place in the flow: the trainer asks between the last backward and the step, so gradients are whole and not clipped yet.
Every rank sums the squares of its own partitions, one small vector is all-reduced, and nothing is gathered. Refuses
nothing; costs one pass over gradients and masters, a few milliseconds per billion parameters of a rank's share.
"""

from __future__ import annotations

import math

import torch

from consumers.zero_engine import Engine

_BLOCKS = "transformer_blocks."


def part_of(name: str) -> str:
    """The block that a parameter belongs to, `block_07`, or its module outside the blocks, `img_in`."""
    if name.startswith(_BLOCKS):
        return f"block_{int(name.removeprefix(_BLOCKS).partition('.')[0]):02d}"
    return name.partition(".")[0]


@torch.no_grad()
def block_norms(engine: Engine) -> dict[str, float]:
    """`norms/grad/PART` and `norms/param/PART` over all ranks, and `all`; of trained parameters only. Collective."""
    parts = sorted({part_of(share.name) for share in engine.shares})
    position = {part: index for index, part in enumerate(parts)}
    device = engine.ranks.device
    squares = torch.zeros(2, len(parts), dtype=torch.float64, device=device)
    for share, gradient in engine.gradients():
        if share.stop > share.start:
            index = position[part_of(share.name)]
            # The norm of a share in fp32 is exact enough; its square, and the sum over shares, are not.
            squares[0, index] += torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()
            master = engine.state("master", share)
            squares[1, index] += torch.linalg.vector_norm(master, dtype=torch.float32).double().square()
    totals = engine.ranks.sum(squares.flatten().tolist())
    norms: dict[str, float] = {}
    for kind, values in (("grad", totals[: len(parts)]), ("param", totals[len(parts) :])):
        norms |= {f"norms/{kind}/{part}": math.sqrt(value) for part, value in zip(parts, values, strict=True)}
        norms[f"norms/{kind}/all"] = math.sqrt(sum(values))
    return norms
