"""Groups, frozen parameters, offload and hpZ: each is still a plain PyTorch loop. A hundred steps are, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gang_checks import SCRIPT
from small_run import run_gang

from consumers.checkpoint import CheckpointError, open_checkpoint
from consumers.ranks import Ranks
from consumers.zero_settings import deepspeed_config
from qwenimg_dist.compose import ConfigError, load_config
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory

Results = Callable[[str], dict[str, Any]]
COMPARED = ("weights", "ema", "averaged", "loss", "norm")


def assert_plain(found: dict[str, Any]) -> None:
    assert found["frozen_moved"] == 0.0
    assert found["moved"] > 1e-3
    for name in COMPARED:
        assert found[name] < 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "num_frozen"), [("groups", 0), ("freeze", 11), ("layer", 11), ("through", 32), ("last", 43)]
)
def test_groups_and_frozen_parameters_equal_a_plain_loop(option_results: Results, case: str, num_frozen: int) -> None:
    found = option_results("groups")[case]
    assert found["num_frozen"] == num_frozen
    assert_plain(found)


@pytest.mark.slow
def test_frozen_weights_are_saved_once_and_exported(
    option_results: Results, options_out: Path, small_input: Path
) -> None:
    assert option_results("frozen_save") == {"same": True, "same_later": True, "num_frozen": 11}
    reader = open_checkpoint(options_out / "frozen", verify=True)
    source = SafetensorsDirectory(small_input / "pipeline" / "transformer")
    assert reader.names == source.names
    start = source.read("img_in.weight").bfloat16().float()
    assert torch.equal(reader.read("img_in.weight", "master"), start)
    assert torch.equal(reader.read("img_in.weight", "ema"), start)
    with pytest.raises(CheckpointError, match="lacks elements"):
        reader.read("img_in.weight", "exp_avg")
    assert not torch.equal(reader.read("proj_out.weight", "master"), source.read("proj_out.weight"))


@pytest.mark.slow
def test_offloaded_states_equal_a_plain_loop_and_resume_anywhere(option_results: Results) -> None:
    found = option_results("offload")
    assert_plain(found["plain"])
    assert found["skipped"]
    assert found["resumed"]
    assert found["num_norms"] > 8
    assert found["norms"] < 1e-5


@pytest.mark.slow
def test_hpz_is_never_stale(option_results: Results) -> None:
    assert_plain(option_results("hpz"))
    assert option_results("hpz")["timeouts"] == [777 + 300] * 3  # the world's, DeepSpeed's copy of it, and hpZ's


@pytest.mark.slow
def test_two_fp32_ranks_equal_a_plain_loop_for_a_hundred_steps(small_input: Path, tmp_path: Path) -> None:
    command = [SCRIPT, str(small_input / "pipeline"), str(tmp_path), "parity_long"]
    ended = run_gang(command, 2, tmp_path / "logs", timeout_s=900)
    assert [end.code for end in ended] == [0, 0], ended[0].output[-2000:]
    assert_plain(json.loads((tmp_path / "parity_long.json").read_text()))


def settings_of(*settings: str, ranks: int = 8) -> dict[str, Any]:
    shapes = {f"transformer_blocks.{i}.w": (1000, 1000) for i in range(4)}
    ours = Ranks(rank=0, world_size=ranks, device=torch.device("cpu"))
    found: dict[str, Any] = deepspeed_config(load_config(list(settings)), shapes, ours)["zero_optimization"]
    return found


def test_what_deepspeed_is_told() -> None:
    plain = settings_of()
    assert not {"zero_hpz_partition_size", "offload_optimizer"} & plain.keys()
    assert settings_of("engine.hpz_partition=4")["zero_hpz_partition_size"] == 4
    on_gpu = settings_of("engine.offload_optimizer=cpu", "cluster.device=cuda")
    assert on_gpu["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    given = settings_of("engine.zero={reduce_bucket_size:7}")
    assert given == {**plain, "reduce_bucket_size": 7}
    with pytest.raises(ValueError, match=r"hpz_partition=4 does not divide the 6 ranks"):
        settings_of("engine.hpz_partition=4", ranks=6)
    with pytest.raises(ConfigError, match=r"engine\.zero"):
        load_config(["engine.zero={stage:2}"])
