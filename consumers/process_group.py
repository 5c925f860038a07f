"""Joining the other ranks, and how long a rank waits for them in a collective.

Place in the flow: `engine.start_distributed` joins here unless Ray Train has. `engine.build_engine` sets the time-out
of the groups that DeepSpeed makes besides: it asks for none, and they would give up after torch's own (10 minutes
under NCCL), long before the watchdog can say where a rank is stuck.

Refuses, at the start and not after the first fault, torchrun over several nodes whose restarts could not find each
other.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Final

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

_OWN_STORE: Final = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_joined = False


def join(backend: str, timeout: timedelta) -> None:
    """Make the process group. After a restart by torchrun, not on the dead ranks' store.

    torchrun (2.13) keeps its store over restarts, and new ranks would call at the addresses that the dead ones left.
    On one node the number of the restart keeps them apart; nodes may count differently, so there it must be turned off:
    raises ValueError where it is not, and a restart may come.
    """
    global _joined
    _check_restarts()
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or not _on_agents_store():
        dist.init_process_group(backend, timeout=timeout)
        _joined = True
        return
    store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
    prefixed = distributed_c10d.PrefixStore(f"restart-{restart}", store)
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size, timeout=timeout)
    _joined = True


def has_joined() -> bool:
    """Whether this process was ever among the ranks, also once it has left: only then do the others know of its end."""
    return _joined


def _on_agents_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _check_restarts() -> None:
    several = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    may_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if several and may_restart and _on_agents_store():
        raise ValueError(
            "torchrun's --max-restarts over several nodes puts new ranks on the store of the dead ones, where they "
            f"cannot find each other: export {_OWN_STORE}=1 on every node and give torchrun --rdzv-backend c10d, or "
            "leave --max-restarts out"
        )


def set_timeouts(timeout_s: float) -> None:
    """Let collectives of every group that this rank is in give up after so long. Groups made later need it again.

    Torch has no public call for a group that is there (its own debugger and trainers take this one).
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
