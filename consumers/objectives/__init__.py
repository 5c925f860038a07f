"""The objectives by name: one file each, one entry here."""

from __future__ import annotations

from typing import Final

from consumers.objectives.base import Objective
from consumers.objectives.flow_matching import FlowMatching
from qwenimg_dist.config import Config
from qwenimg_dist.schema import Kind

OBJECTIVES: Final[dict[str, type[FlowMatching]]] = {
    "flow_matching": FlowMatching,
}


def build_objective(config: Config) -> Objective:
    """The configured objective."""
    return OBJECTIVES[config.objective.kind](config.objective, seed=config.train.seed)


def sample_kind(config: Config) -> Kind:
    """The kind of samples that the configured objective trains on."""
    return OBJECTIVES[config.objective.kind].sample_kind
