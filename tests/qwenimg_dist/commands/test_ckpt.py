"""`ckpt export`, `sample` and `pairs` say what they cannot do, the first before it reads hundreds of gigabytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from small_run import overrides, write_pipeline
from written_checkpoint import write_checkpoint

from consumers import checkpoint_reader
from qwenimg_dist.commands.main import main
from qwenimg_dist.compose import load_config


def test_a_run_without_an_average_is_refused_before_its_bytes_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pipeline(tmp_path / "pipeline")
    write_checkpoint(tmp_path, "run", 2, ema=False)
    tree = load_config(overrides(tmp_path, "run", "optim.ema_decay=0")).model_dump(mode="json")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(tree))
    words = ["ckpt", "export", f"run.path={tmp_path / 'run'}", f"export.path={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_reader, "verify_checkpoint", lambda path: pytest.fail("every byte was hashed"))
        assert main(words) == 2
    told = "step-00000002 has no EMA (optim.ema_decay was 0): set export.weights=raw"
    assert told in capsys.readouterr().err
    pairs = [f"pairs.path={tmp_path / 'pairs'}", "reward.weights.shapes=1"]
    for command in (["sample"], ["pairs", *pairs]):
        assert main([*command, words[2], "sample.prompts=[a red circle on white]"]) == 2
        assert told in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline", "run"]
    assert main([*words, "export.weights=raw"]) == 0
    assert (tmp_path / "out" / "transformer").is_dir()
