"""What can be configured: one frozen pydantic tree, validated from the plain YAML that Hydra composes.

`compose.py` turns groups and overrides into this tree; every command receives it whole and reads its own part.
Unknown keys, wrong types and wrong choices are refused here. Deliberately left out: `_target_`, `instantiate` and
resolvers that run code. Filters are validated by their own files (`producers/filters`), since the core may not know
them.
"""

from qwenimg_dist.config.commands import ClusterConfig, InspectConfig, LoggerConfig, PlanConfig
from qwenimg_dist.config.curriculum import FlowConfig, FlowMatchingConfig, Phase
from qwenimg_dist.config.data import EditEncodeConfig
from qwenimg_dist.config.identity import flatten, stable_hash, training_identity
from qwenimg_dist.config.pairs import PairsConfig
from qwenimg_dist.config.post_training import DpoConfig, GrpoConfig, StartFromConfig
from qwenimg_dist.config.reward import RewardConfig
from qwenimg_dist.config.section import Section
from qwenimg_dist.config.sources import (
    EditsSource,
    FolderSource,
    ManifestSource,
    PairsSource,
    PromptsSource,
    SourceConfig,
    SyntheticTextSource,
    WebdatasetSource,
)
from qwenimg_dist.config.training import CheckpointConfig, EvaluateConfig, OptimConfig
from qwenimg_dist.config.tree import Config, ModelConfig

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DpoConfig",
    "EditEncodeConfig",
    "EditsSource",
    "EvaluateConfig",
    "FlowConfig",
    "FlowMatchingConfig",
    "FolderSource",
    "GrpoConfig",
    "InspectConfig",
    "LoggerConfig",
    "ManifestSource",
    "ModelConfig",
    "OptimConfig",
    "PairsConfig",
    "PairsSource",
    "Phase",
    "PlanConfig",
    "PromptsSource",
    "RewardConfig",
    "Section",
    "SourceConfig",
    "StartFromConfig",
    "SyntheticTextSource",
    "WebdatasetSource",
    "flatten",
    "stable_hash",
    "training_identity",
]
