"""The Ray actor of the producers: does one task at a time and answers with a small message, whatever happens.

Place in the flow: `pool.py` makes these. Errors come back as a `Failure` with a kind that the pool acts on, not as
pickled exceptions. Tensors never leave the process but into shards; only where loaders feed an encoder of their machine
(`cluster.loaders_per_producer`), pixels and tensors pass between these two, a batch at a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2

from producers import fence
from producers.filters.base import Resources, Scorers
from producers.messages import Failure, Seat, describe_failure, own_seat
from producers.plan import make_plan
from producers.workers import Outcome, Task, run_task
from producers.write import Encoders
from qwenimg_dist.config import Config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.mirror import data_root
from qwenimg_dist.storage import is_remote

_WAIT: Final = 0.9
"""Of `cluster.unit_timeout_s`, before a loader that waits for its encoder says that this one is gone: a loader that
says nothing for the whole of it is itself taken for hung."""


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
    is_loader: bool = False
    """Has no GPU and no encoders of its own: an encoder is named with each task that needs one."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Exactly one of the two is set."""

    outcome: Outcome | None = None
    failure: Failure | None = None


class UnitActor:
    """One producer process: a whole producer, or a loader that feeds an encoder in another process
    (`encoder_actor.py`). Models are loaded at the first unit that is encoded."""

    def __init__(self, job: Job) -> None:
        # Before torch is imported: it reads the variable once, and a wrong thread count costs up to 40x.
        os.environ["OMP_NUM_THREADS"] = str(job.num_threads)
        cv2.setNumThreads(1)  # pictures are worked on in threads already; OpenCV would take every core of the node
        self._job = job
        self._config = on_its_device(Config.model_validate_json(job.config_json), job)
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
        return own_seat()

    def run(self, task: Task, encoder: Any = None) -> Reply:
        """Do the task; a loader has `encoder`, an actor handle, encode. Never raises for what the task meets."""
        try:
            outcome = run_task(
                task,
                self._dataset,
                self._plan,
                root=self._job.root,
                encoders=self._load_encoders if encoder is None else self._remote_encoders(encoder),
                scorers=self._scorers,
                num_threads=self._job.num_threads,
                max_poison_rows=self._config.cluster.max_poison_rows,
            )
        except Exception as error:
            return Reply(failure=describe_failure(error))
        return Reply(outcome=outcome)

    def _load_encoders(self) -> Encoders:
        if self._encoders is None:
            import torch

            from producers.encode import PipelineEncoders

            torch.set_num_threads(self._job.num_threads)
            self._encoders = PipelineEncoders.load(Path(self._job.pipeline_dir), self._config)
        return self._encoders

    def _remote_encoders(self, encoder: Any) -> Callable[[], Encoders]:
        from producers.remote_encoders import RemoteEncoders  # imports Ray, which the driver's commands do later

        deadline = time.monotonic() + _WAIT * self._config.cluster.unit_timeout_s
        return lambda: RemoteEncoders(encoder, deadline=deadline)


def on_its_device(config: Config, job: Job) -> Config:
    """A producer that reserves no GPU sees none, whatever device the ranks train on."""
    if config.cluster.gpus_per_producer > 0 and not job.is_loader:
        return config
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"device": "cpu"})})
