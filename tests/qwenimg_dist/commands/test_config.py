"""`config keys` shows values as an override sets them, and those of the overrides given."""

from __future__ import annotations

import pytest

from qwenimg_dist.commands.main import main


def test_keys_can_be_pasted_back_and_follow_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "data.where"]) == 0
    assert capsys.readouterr().out == "data.where=null\n"
    assert main(["config", "keys", "optim.lr", "optim.lr=0.5"]) == 0
    assert "optim.lr=0.5" in capsys.readouterr().out.splitlines()
