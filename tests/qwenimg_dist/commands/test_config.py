"""`config keys` shows values as an override sets them, and those of overrides given; `config explain` every option."""

from __future__ import annotations

import pytest

from qwenimg_dist.commands.config import explanations
from qwenimg_dist.commands.main import main
from qwenimg_dist.config import Config
from qwenimg_dist.config.curriculum import FlowMatchingConfig, Phase
from qwenimg_dist.config.data import DataConfig, MixedDataset
from qwenimg_dist.config.training import (
    CheckpointConfig,
    EngineConfig,
    EvaluateConfig,
    OptimConfig,
    ParameterGroupConfig,
    TrainConfig,
)


def test_keys_can_be_pasted_back_and_follow_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "data.where"]) == 0
    assert capsys.readouterr().out == "data.where=null\n"
    assert main(["config", "keys", "optim.lr", "optim.lr=0.5"]) == 0
    assert "optim.lr=0.5" in capsys.readouterr().out.splitlines()


def test_every_option_of_training_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    explained = dict(explanations())
    sections = {
        "curriculum.phases.NAME": Phase,
        "objective": FlowMatchingConfig,
        "optim": OptimConfig,
        "optim.groups.NAME": ParameterGroupConfig,
        "engine": EngineConfig,
        "checkpoint": CheckpointConfig,
        "train": TrainConfig,
        "evaluate": EvaluateConfig,
        "data": DataConfig,
        "data.mix.NAME": MixedDataset,
    }
    for prefix, section in sections.items():
        for name in section.model_fields:
            assert len(explained[f"{prefix}.{name}"]) > 15, f"{prefix}.{name}"
    assert main(["config", "explain", "engine.hpz"]) == 0
    words = capsys.readouterr().out
    assert words.startswith("engine.hpz_partition: ZeRO++'s hpZ")
    assert "1 is off" in words
    assert main(["config", "explain", "source.captions"]) == 0
    assert "(source=folder) `auto` takes `metadata.jsonl`" in capsys.readouterr().out
    assert {key.partition(".")[0] for key in explained} <= set(Config.model_fields)
