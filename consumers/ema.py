"""Exponential moving average of the weights, in fp32, beside each rank's master partitions.

Place in the flow: updated after every optimiser step, saved with the masters, used for grids and the export. Costs no
communication: the average of a partition is a partition of the average. Refuses nothing; switched off by
`optim.ema_decay=0`. Deliberately left out: warm-up of the decay, since a run starts from weights worth averaging.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from consumers.zero_engine import Engine, Share


class Ema:
    """`average = decay * average + (1 - decay) * master`, element-wise; starts at the engine's present masters."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self._flats = [engine.flat("master", i).clone() for i in range(engine.num_sub_groups)]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the masters after a step that was not skipped."""
        for index, flat in enumerate(self._flats):
            flat.lerp_(self._engine.flat("master", index), 1.0 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the history: the average becomes the present masters."""
        for index, flat in enumerate(self._flats):
            flat.copy_(self._engine.flat("master", index))

    def state(self, share: Share) -> torch.Tensor:
        """The averaged elements of one share, (stop - start,), as a writable view."""
        return self._flats[share.sub_group][share.offset : share.offset + share.stop - share.start]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Forwards inside use the averaged weights; afterwards every partition is back bit for bit."""
        with self._engine.swapped(self._flats):
            yield
