"""The whole tree, and what is checked between its parts."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt, model_validator

from qwenimg_dist.config.commands import (
    ClusterConfig,
    DemoConfig,
    DoctorConfig,
    EvalConfig,
    ExportConfig,
    InspectConfig,
    LoggerConfig,
    PlanConfig,
    RunConfig,
    SampleConfig,
)
from qwenimg_dist.config.curriculum import CurriculumConfig
from qwenimg_dist.config.data import CaptionsConfig, DataConfig, DedupConfig, EncodeConfig
from qwenimg_dist.config.pairs import PairsConfig
from qwenimg_dist.config.post_training import DpoConfig, ObjectiveConfig, StartFrom, StartFromConfig
from qwenimg_dist.config.reward import RewardConfig
from qwenimg_dist.config.section import Section
from qwenimg_dist.config.sources import SourceConfig
from qwenimg_dist.config.training import CheckpointConfig, EngineConfig, EvaluateConfig, OptimConfig, TrainConfig


class ModelConfig(Section):
    """Which pipeline is trained."""

    name: str
    """What the model is called in run directories and reports."""
    path: str | None = None
    """Local diffusers directory or hub id. `None` with `name=tiny` builds the tiny pipeline in the user's cache."""
    revision: str | None = None
    """Pinned commit of the hub repository; ignored for a local directory."""
    edit: bool = False
    """Of `name=tiny` without a path: the twin of an edit pipeline (`QwenImageEditPlusPipeline`), whose transformer
    gives condition tokens the time 0. Other models are what their pipeline is."""
    max_text_tokens: PositiveInt = 512
    """Captions are cut to this many tokens (the model was trained on at most 512)."""


class Config(Section):
    """Everything. See `conf/` for the groups."""

    stage: str
    model: ModelConfig
    source: SourceConfig
    captions: CaptionsConfig = CaptionsConfig()
    filters: dict[str, dict[str, Any]]
    dedup: DedupConfig
    encode: EncodeConfig
    data: DataConfig
    curriculum: CurriculumConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    logger: LoggerConfig
    cluster: ClusterConfig
    run: RunConfig = RunConfig()
    start_from: StartFrom = StartFromConfig()
    export: ExportConfig = ExportConfig()
    sample: SampleConfig
    reward: RewardConfig = RewardConfig()
    pairs: PairsConfig = PairsConfig()
    eval: EvalConfig = EvalConfig()
    demo: DemoConfig
    inspect: InspectConfig = InspectConfig()
    plan: PlanConfig = PlanConfig()
    doctor: DoctorConfig = DoctorConfig()
    follow: bool = False
    """`produce` watches the source, `train` waits for new units, until the other side is done."""

    @model_validator(mode="after")
    def _cached_logvar(self) -> Config:
        if self.objective.posterior == "sample" and self.encode.posterior != "mean_logvar":
            raise ValueError(
                "objective.posterior=sample needs cached log-variances: set encode.posterior=mean_logvar and produce "
                "with it first (a facet of latents beside the one of means), or train on objective.posterior=mode"
            )
        return self

    @model_validator(mode="after")
    def _kernels_of_the_device(self) -> Config:
        if self.engine.attention in ("cudnn", "efficient") and self.cluster.device == "cpu":
            raise ValueError(f"engine.attention={self.engine.attention} is a GPU's: set engine.attention=native")
        return self

    @model_validator(mode="after")
    def _reference_of_settled_data(self) -> Config:
        if self.follow and isinstance(self.objective, DpoConfig) and self.objective.reference == "precomputed":
            raise ValueError(
                "objective.reference=precomputed needs all pairs before the first step: leave follow=true out, or take "
                "objective.reference=online"
            )
        return self

    @model_validator(mode="after")
    def _rewards_before_the_watchdog(self) -> Config:
        waits, stalls = getattr(self.objective, "reward_timeout_s", 0.0), self.train.stall_timeout_s
        if waits >= stalls:
            raise ValueError(
                f"objective.reward_timeout_s={waits:g} is not below train.stall_timeout_s={stalls:g}: the watchdog "
                "would end a rank that waits for a reward; lower the first or raise the second"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _steps_of_the_phases(cls, tree: Any) -> Any:
        """`train.steps: null` becomes a number here, so that all else, and the run's `config.yaml`, has one."""
        if not isinstance(tree, dict) or not isinstance(tree.get("train"), dict):
            return tree
        if tree["train"].get("steps", 0) is not None:
            return tree
        try:
            steps = CurriculumConfig.model_validate(tree.get("curriculum")).own_steps
        except ValueError:
            return tree  # told when the tree itself is validated
        if steps is None:
            raise ValueError("train.steps is null, but the phases have shares of it: set train.steps=...")
        return {**tree, "train": {**tree["train"], "steps": steps}}

    @model_validator(mode="after")
    def _phases_mix_what_there_is(self) -> Config:
        for number, phase in enumerate(self.curriculum.phases):
            changes = phase.mix or {}
            if unknown := sorted(changes.keys() - self.data.mix.keys()):
                raise ValueError(
                    f"phase {phase.name or number} has a `mix` with {', '.join(unknown)}, data.mix has "
                    f"{', '.join(self.data.mix) or 'nothing'}"
                )
            amounts = {name: one.amount for name, one in self.data.mix.items()} | changes
            if amounts and not any(amounts.values()):
                raise ValueError(f"phase {phase.name or number} has a `mix` in which every data set has 0")
        return self

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Resolution classes that are encoded, ascending."""
        if self.encode.resolutions is not None:
            return tuple(sorted(set(self.encode.resolutions)))
        return tuple(sorted({r for phase in self.curriculum.phases for r in phase.resolutions}))
