"""The objectives by name: one file each, one entry here."""

from __future__ import annotations

from typing import Final

from consumers.objectives.base import Objective, Predict
from consumers.objectives.dpo import Dpo
from consumers.objectives.flow_matching import FlowMatching
from qwenimg_dist.config import Config
from qwenimg_dist.schema import Kind

OBJECTIVES: Final[dict[str, type[Objective]]] = {
    "flow_matching": FlowMatching,
    "dpo": Dpo,
}


def build_objective(config: Config, reference: Predict | None = None) -> Objective:
    """The configured objective, with a frozen reference model where it asks one."""
    return OBJECTIVES[config.objective.kind](config.objective, seed=config.train.seed, reference=reference)


def sample_kind(config: Config) -> Kind:
    """The kind of samples that the configured objective trains on."""
    return OBJECTIVES[config.objective.kind].sample_kind
