"""The objectives by name: one file each, one entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from consumers.objectives.base import Objective
from consumers.objectives.flow_matching import FlowMatching
from qwenimg_dist.config import Config

OBJECTIVES: Final[dict[str, Callable[[Config], Objective]]] = {
    "flow_matching": lambda config: FlowMatching(config.objective, seed=config.train.seed),
}


def build_objective(config: Config) -> Objective:
    """The configured objective."""
    return OBJECTIVES[config.objective.kind](config)
