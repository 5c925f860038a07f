"""What held-out pairs say of preference training: is the chosen picture preferred where training has not shown it?

Place in the flow: validation measures both pictures of each held-out pair in one forward, at the same fixed sigma
quantiles and noise as its losses (`evaluate.py`); the starting model's errors, kept from step 0, are the reference.
Accuracy that rises on training pairs and not here is memory. A model that has not moved has an accuracy of 0, not of
one half: nothing is preferred then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from consumers.held_out import Errors

NAMES: Final = ("pair_accuracy", "pair_wins", "pair_margin", "pair_loss", "loser_loss", "start_loser_loss")


def pair_metrics(
    chosen: Errors,
    rejected: Errors,
    start_chosen: Errors,
    start_rejected: Errors,
    *,
    beta: float,
    resolutions: Sequence[int] | None = None,
) -> dict[str, float]:
    """Over the pairs of the classes (None: of all) that have both sides' errors; empty if there are none.

    `pair_accuracy` counts pairs and sigmas one by one, as `train/implicit_accuracy` does, `pair_wins` the pairs whose
    margin over all sigmas is positive; `pair_margin` is how far the loser's error rose above the winner's, against the
    starting model; `pair_loss` the preference loss without its regulariser.
    """
    known = [r for r in sorted(rejected) if r in start_rejected and (resolutions is None or r in resolutions)]
    if not known:
        return {}
    winner = np.concatenate([chosen[r] - start_chosen[r] for r in known])
    loser = np.concatenate([rejected[r] - start_rejected[r] for r in known])
    margin = loser - winner
    return {
        "pair_accuracy": float((margin > 0).mean()),
        "pair_wins": float((margin.mean(axis=1) > 0).mean()),
        "pair_margin": float(margin.mean()),
        "pair_loss": float(np.logaddexp(0.0, -0.5 * beta * margin).mean()),
        "loser_loss": float(np.concatenate([rejected[r] for r in known]).mean()),
        "start_loser_loss": float(np.concatenate([start_rejected[r] for r in known]).mean()),
    }
