"""The objectives by name: one file each, one entry here."""

from __future__ import annotations

from typing import Final

from consumers.objectives.base import Objective, Predict
from consumers.objectives.dpo import Dpo
from consumers.objectives.flow_matching import FlowMatching
from consumers.objectives.grpo import Grpo
from qwenimg_dist.config import Config, GrpoConfig
from qwenimg_dist.schema import EDIT, Kind

OBJECTIVES: Final[dict[str, type[Objective]]] = {
    "flow_matching": FlowMatching,
    "dpo": Dpo,
    "grpo": Grpo,
}


def build_objective(config: Config, reference: Predict | None = None) -> Objective:
    """The configured objective, with a frozen reference model where it asks one."""
    return OBJECTIVES[config.objective.kind](config.objective, seed=config.train.seed, reference=reference)


ALSO_TRAINED_ON: Final[dict[str, tuple[Kind, ...]]] = {"flow_matching": (EDIT,)}
"""Kinds that an objective trains on besides its `sample_kind`, of data sets that are said to be of them."""


def sample_kind(config: Config, asked: Kind | None = None) -> Kind:
    """The kind of samples that is trained on, of a data set said to be of kind `asked`. Raises ValueError for one that
    the configured objective does not take."""
    name = config.objective.kind
    own = OBJECTIVES[name].sample_kind
    if asked not in (None, own, *ALSO_TRAINED_ON.get(name, ())):
        raise ValueError(f"objective={name} trains on samples of kind {own}, data.kind asks for {asked}: leave it out")
    return asked or own


def rows_per_sample(config: Config) -> int:
    """Rows of a global batch that each of the ledger's samples gives: a prompt is drawn several times."""
    return config.objective.group_size if isinstance(config.objective, GrpoConfig) else 1


def is_guided(config: Config) -> bool:
    """Whether every forward has the empty prompt's rows beside the prompts'."""
    return isinstance(config.objective, GrpoConfig) and config.objective.guidance > 1.0
