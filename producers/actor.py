"""The Ray actor of the producers: does one task at a time and answers with a small message, whatever happens.

Place in the flow: `pool.py` makes these. Errors come back as a `Failure` with a kind that the pool acts on, not as
pickled exceptions. Tensors never leave the process but into shards.
"""

from __future__ import annotations

import errno
import os
import socket
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2

from producers import fence
from producers.commit import UnitConflictError
from producers.filters.base import Resources, Scorers
from producers.plan import make_plan
from producers.sources.base import SourceGoneError
from producers.unit import UnitReport
from producers.workers import Task, run_task
from producers.write import Encoders
from qwenimg_dist.config import Config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.mirror import data_root
from qwenimg_dist.storage import is_remote

FailureKind = Literal["full_disk", "out_of_memory", "try_again", "fatal"]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch has no class of its own for this: its allocator, oneDNN and the standard library, in this order.
_NO_MEMORY = ("can't allocate memory", "could not create a primitive", "bad_alloc")


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that an actor is told, once."""

    config_json: str
    data_path: str
    """Absolute: another machine has another working directory."""
    pipeline_dir: str
    text_facet: str
    latents_facets: Mapping[int, str]
    root: str
    """Of the source."""
    num_threads: int


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where an actor runs."""

    host: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    kind: FailureKind
    message: str
    trace: str


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Exactly one of the two is set; a scan that went well sets none."""

    report: UnitReport | None = None
    failure: Failure | None = None


class UnitActor:
    """One producer process. Models are loaded at the first unit that is encoded."""

    def __init__(self, job: Job) -> None:
        # Before torch is imported: it reads the variable once, and a wrong thread count costs up to 40x.
        os.environ["OMP_NUM_THREADS"] = str(job.num_threads)
        cv2.setNumThreads(1)  # pictures are worked on in threads already; OpenCV would take every core of the node
        self._job = job
        self._config = _on_its_device(Config.model_validate_json(job.config_json))
        path, root = self._config.data.path, Path(job.data_path)
        self._dataset = Dataset.open(data_root(path, self._config.data, at=root) if path and is_remote(path) else root)
        self._fence = fence.enter(self._dataset.root)
        self._plan = make_plan(self._config, text_facet=job.text_facet, latents_facets=job.latents_facets)
        self._encoders: Encoders | None = None
        self._scorers = Scorers(
            Resources(
                pipeline_dir=Path(job.pipeline_dir),
                device=self._config.cluster.device,
                num_threads=job.num_threads,
            )
        )

    def ready(self) -> Seat:
        """Answers once the actor is placed and made."""
        return Seat(host=socket.gethostname(), pid=os.getpid())

    def run(self, task: Task) -> Reply:
        """Do the task. Never raises for what the task meets."""
        try:
            report = run_task(
                task,
                self._dataset,
                self._plan,
                root=self._job.root,
                encoders=self._load_encoders,
                scorers=self._scorers,
                num_threads=self._job.num_threads,
                max_poison_rows=self._config.cluster.max_poison_rows,
            )
        except Exception as error:
            return Reply(failure=describe_failure(error))
        return Reply(report=report)

    def _load_encoders(self) -> Encoders:
        if self._encoders is None:
            import torch

            from producers.encode import PipelineEncoders

            torch.set_num_threads(self._job.num_threads)
            self._encoders = PipelineEncoders.load(Path(self._job.pipeline_dir), self._config)
        return self._encoders


def _on_its_device(config: Config) -> Config:
    """A producer that reserves no GPU sees none, whatever device the ranks train on."""
    if config.cluster.gpus_per_producer > 0:
        return config
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"device": "cpu"})})


def describe_failure(error: Exception) -> Failure:
    """Which kind it is: a full disk ends everything, a process out of memory is replaced, what the moment brought is
    tried again, the rest is a bug or unusable input."""
    kind: FailureKind = "fatal"
    if (isinstance(error, OSError) and error.errno in _FULL) or "No space left on device" in str(error):
        kind = "full_disk"
    elif _is_out_of_memory(error):
        kind = "out_of_memory"
    elif isinstance(error, UnitConflictError | SourceGoneError | OSError):
        kind = "try_again"
    message = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])  # they name row and file
    return Failure(kind=kind, message=message, trace=traceback.format_exc())


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )
