"""The process in which rewards judge: `python -m qwenimg_dist.rewards.process`, started by `service.py`.

It reads requests from standard input and answers on standard output, one reward and one batch at a time. It ends with
who started it, even while a reward hangs. What rewards print goes to standard error.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO, Final

from qwenimg_dist.config import RewardConfig
from qwenimg_dist.rewards.base import Reward
from qwenimg_dist.rewards.kind import Resources
from qwenimg_dist.rewards.wire import pack, read, unpack_request

Load = Callable[[RewardConfig, Resources], list[Reward]]
_LOOK_S: Final = 1.0


def main() -> int:
    """Serve until the pipe ends."""
    sink = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    job = read(sys.stdin.buffer)
    if job is None:
        return 0
    try:
        rewards = _load(job[0])
    except ValueError as error:
        _answer(sink, {"error": str(error), "unusable": True})
        return 2
    except Exception as error:  # told to who asked, who knows what to say to the user
        _answer(sink, {"error": f"{type(error).__name__}: {error}", "unusable": False})
        return 1
    _answer(sink, {"ready": sorted(rewards)})
    while (request := read(sys.stdin.buffer)) is not None:
        _answer(sink, _judge(rewards, *request))
    return 0


def _load(job: dict[str, Any]) -> dict[str, Reward]:
    module, _, function = str(job["load"]).partition(":")
    load: Load = getattr(importlib.import_module(module), function)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(job["num_threads"])
    resources = Resources(device=job["device"], num_threads=job["num_threads"])
    return {one.name: one for one in load(RewardConfig.model_validate(job["config"]), resources)}


def _judge(rewards: dict[str, Reward], header: dict[str, Any], payload: bytes) -> dict[str, Any]:
    try:
        images, prompts = unpack_request(header, payload)
        return {"values": [float(value) for value in rewards[header["reward"]](images, prompts)]}
    except Exception as error:  # a reward is a plug-in; who asked counts it
        return {"error": f"{type(error).__name__}: {error}"}


def _answer(sink: BinaryIO, header: dict[str, Any]) -> None:
    message = memoryview(pack(header))
    while message:
        message = message[sink.write(message) :]


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
