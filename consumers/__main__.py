"""`torchrun --nproc-per-node N -m consumers OVERRIDES`: training without Ray.
`torchrun ... -m consumers eval OVERRIDES` is `qwenimg-dist eval`.

`cluster.ranks` is not read here: the ranks are those that torchrun started. Exit codes: 0 done or stopped and saved,
1 failed, 2 unusable input; after 1 and 2 alike torchrun starts the ranks anew, as often as `--max-restarts` says.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys

from consumers.errors import TrainingError
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.config_of_run import config_for_eval
from qwenimg_dist.patience import StorageAwayError
from qwenimg_dist.storage import StorageError


def main(arguments: list[str]) -> int:
    """Train with Hydra overrides as arguments; returns the exit code."""
    rank = os.environ.get("RANK", "0")
    try:
        # A mistyped key is named before torch is imported.
        told = _compare(arguments[1:]) if arguments[:1] == ["eval"] else _train(load_config(arguments))
    except ValueError as error:
        _say_why(rank, error)
        return 2
    except (TrainingError, StorageAwayError, StorageError) as error:
        _say_why(rank, error)
        return 1
    if rank == "0":
        _say(told)
    return 0


def _train(config: Config) -> str:
    if config.train.dry_run:
        return f"training {_dry_run(config)}"
    from consumers.hooks import Hooks
    from consumers.trainer import train

    return f"training {train(config, Hooks(say=_say, command_id=_command_id()))}"


def _compare(overrides: list[str]) -> str:
    config = config_for_eval(overrides)
    from consumers.compare import compare
    from consumers.hooks import Hooks

    return f"comparison {compare(config, Hooks(say=_say, command_id=_command_id()))}"


def _dry_run(config: Config) -> str:
    if os.environ.get("RANK", "0") == "0":
        from consumers.run_plan import dry_run

        sys.stdout.write(dry_run(config, world_size=int(os.environ.get("WORLD_SIZE", "1"))).text() + "\n")
    return "planned; nothing was written"


def _command_id() -> str:
    """The same for every start of the gang by one torchrun: its own process."""
    return f"torchrun-{os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else ""


def _say_why(rank: str, error: Exception) -> None:
    """Once, by rank 0, what all ranks have agreed on; by each rank what it met before there were others to tell."""
    process_group = sys.modules.get("consumers.process_group")  # brings torch
    if rank == "0":
        _say(f"error: {error}")
    elif process_group is None or not process_group.has_joined():
        _say(f"error: rank {rank} on {socket.gethostname()}, before it joined the others: {error}")
    else:
        _say(f"rank {rank} stopped, rank 0 says why")


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # a log on a full disk must not end the run
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
