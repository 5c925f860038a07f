"""Rewards in a process of their own, so that one that hangs or dies costs a number and not the training.

Place in the flow: `RewardService.score` is a `Score`; the consumers hold one each, and so does every actor that judges.
A batch that is not answered within `reward.timeout_s` ends the process; the next batch starts it anew. A process that
died is started anew and asked once more. Both are counted. Refuses, when it is opened, rewards that cannot be loaded.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from PIL import Image

from qwenimg_dist.config import RewardConfig
from qwenimg_dist.rewards import check_rewards
from qwenimg_dist.rewards.base import Prompt, RewardLost, Scores, WeightedRewards
from qwenimg_dist.rewards.wire import Late, pack, pack_request, receive, send

_ROOT: Final = Path(__file__).resolve().parents[2]
_LOAD: Final = "qwenimg_dist.rewards:load_rewards"
_SHOWN_BYTES: Final = 400
_CLOSE_S: Final = 2.0


class RewardError(RuntimeError):
    """The rewards' process cannot start, for a reason that is not the config's."""


class RewardService:
    """Rewards by the config, in a child process. One call at a time; others wait."""

    def __init__(self, config: RewardConfig, *, load: str = _LOAD) -> None:
        """Starts the process and waits until its models are loaded. Raises ValueError for what the user can mend,
        `RewardError` otherwise.

        `load` is `module:function` of another `load_rewards`, which then knows its own names.
        """
        if load == _LOAD:
            batch_sizes = {name: one.batch_size for name, one in check_rewards(config).items()}
        else:
            batch_sizes = {name: int(one["batch_size"]) for name, one in config.settings.items()}
        self._config = config
        self._load = load
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._told: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the service
        self.num_starts = 0
        remotes = [_Remote(name, self) for name in config.active]
        self._rewards = WeightedRewards(remotes, config.active, batch_sizes=batch_sizes)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """See `base.Score`."""
        with self._lock:
            return self._rewards.score(images, prompts)

    def close(self) -> None:
        """End the process."""
        self._end()
        self._told.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, name: str, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        """One reward's numbers for one batch. Raises `RewardLost` without an answer, `RewardError` for the reward's own
        exception."""
        message = pack_request(name, images, prompts)
        try:
            reply = self._exchange(message)
        except _Died:  # perhaps for want of memory, or by an operator's hand: once more
            reply = self._exchange_again(message)
        if "error" in reply:
            raise RewardError(reply["error"])
        return [float(value) for value in reply["values"]]

    def _exchange_again(self, message: bytes) -> dict[str, Any]:
        try:
            return self._exchange(message)
        except _Died as died:
            raise RewardLost(f"its process died twice ({died})", timed_out=False) from died

    def _exchange(self, message: bytes) -> dict[str, Any]:
        try:
            process = self._process or self._start()
        except (ValueError, RewardError) as error:
            raise RewardLost(f"its process cannot start again ({error})", timed_out=False) from error
        limit = self._config.timeout_s
        try:
            return self._talk(process, message, limit)
        except Late:
            self._end()
            what = f"no answer for reward.timeout_s={limit:g} s: its process was ended"
            raise RewardLost(what, timed_out=True) from None

    def _talk(self, process: subprocess.Popen[bytes], message: bytes, limit_s: float) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + limit_s
        try:
            send(process.stdin.fileno(), message, deadline)
            reply = receive(process.stdout.fileno(), deadline)
        except OSError:
            reply = None
        if reply is None:
            raise _Died(self._cause_of_death(process))
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        config = self._config
        path = os.pathsep.join([str(_ROOT), *(os.path.abspath(entry) for entry in sys.path)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(config.num_threads)}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        if config.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # a CUDA context would take half a GB of the rank's memory
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "qwenimg_dist.rewards.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._told,
            bufsize=0,
            env=environment,
            start_new_session=True,  # Ctrl-C is for who asked, who ends this
        )
        self.num_starts += 1
        assert process.stdin is not None
        assert process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        job = {
            "load": self._load,
            "config": config.model_dump(mode="json"),
            "device": _device(config),
            "num_threads": config.num_threads,
        }
        try:
            reply = self._talk(process, pack(job), config.start_timeout_s)
        except Late:
            self._end()
            raise RewardError(f"not loaded within reward.start_timeout_s={config.start_timeout_s:g} s") from None
        except _Died as died:
            raise RewardError(f"the process ended while loading: {died}") from died
        if "error" in reply:
            self._end()
            raise ValueError(reply["error"]) if reply["unusable"] else RewardError(reply["error"])
        if missing := config.active.keys() - set(reply["ready"]):
            self._end()
            raise ValueError(f"the process has no reward {', '.join(sorted(missing))}")
        return process

    def _cause_of_death(self, process: subprocess.Popen[bytes]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_CLOSE_S)
        code = process.returncode
        self._end()
        self._told.seek(0, os.SEEK_END)
        self._told.seek(max(0, self._told.tell() - _SHOWN_BYTES))
        lines = self._told.read().decode(errors="replace").split("\n")
        said = " ".join(lines[-2:]).strip()
        return f"exit code {code}" + (f", last words: {said}" if said else "")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if process.poll() is None:
            process.kill()  # it has nothing to lose, and one that hangs hears nothing else
        process.wait()


class _Died(Exception):
    """The process ended without an answer."""


class _Remote:
    """A `Reward` that asks the process."""

    def __init__(self, name: str, service: RewardService) -> None:
        self.name = name
        self._service = service

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        return self._service.ask(self.name, images, prompts)


def _device(config: RewardConfig) -> str:
    """The GPU that this process works on: all of a node's may be visible, and the first is another rank's."""
    if config.device == "cpu":
        return "cpu"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return f"cuda:{torch.cuda.current_device()}"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if "RANK" in os.environ else "cuda:0"
