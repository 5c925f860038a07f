"""torchrun over several nodes: a restart that could not work is refused before the first one is needed."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from consumers.process_group import join

NODES = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_USE_AGENT_STORE": "True"}
"""As torchrun sets it on two nodes, without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."""


class Joined(Exception):
    pass


@pytest.mark.parametrize(
    ("set_by_torchrun", "refused"),
    [
        ({"TORCHELASTIC_MAX_RESTARTS": "3"}, True),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "False"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "LOCAL_WORLD_SIZE": "16"}, False),
        ({}, False),
    ],
)
def test_restarts_over_several_nodes_need_a_store_of_their_own(
    monkeypatch: pytest.MonkeyPatch, set_by_torchrun: dict[str, str], refused: bool
) -> None:
    for name in ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**NODES, **set_by_torchrun}.items():
        monkeypatch.setenv(name, value)

    def joined(*_: object, **__: object) -> None:
        raise Joined

    monkeypatch.setattr(dist, "init_process_group", joined)
    with pytest.raises(ValueError if refused else Joined) as told:
        join("gloo", timedelta(seconds=1))
    assert not refused or "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in str(told.value)
