"""Rewards as Ray actors beside the ranks, where they would take what training needs, or need packages of their own.

    driver: with reward_actors(config) as actors: ... the gang's job carries their handles
    rank:   Hooks(score=RewardClient(actors, config, rank=...).score)

Place in the flow: `train` starts `cluster.reward_actors` of them and hands every rank a client; the consumers see a
`Score` and no Ray. Each actor keeps its rewards in a process of their own (`RewardService`), so a reward that hangs is
ended there. An actor that dies, or whose machine stops answering, costs nothing if another one answers: its pictures
are sent to the next actor once, and are NaN and counted after that. Ray starts dead actors anew. Pictures travel as
uint8 arrays, a bounded number at a time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ray
from PIL import Image
from ray.exceptions import RayError

from producers.deaths import why_died
from producers.ray_cluster import machines
from qwenimg_dist.config import ClusterConfig, Config, RewardConfig
from qwenimg_dist.debug import fault_point
from qwenimg_dist.rewards.base import Prompt, Scores, join, none_judged
from qwenimg_dist.rewards.service import RewardError, RewardService
from qwenimg_dist.rewards.wire import Pixels, to_pixels

_CHUNK_BYTES: Final = 8 * 1024**2
"""Of pictures in one call: the object store must hold all that is under way."""
_MAX_UNDER_WAY: Final = 4
"""Calls of one rank at a time."""
_POLL_S: Final = 0.5
_SILENT_S: Final = 30.0
"""An actor that judges answers a question beside it; one that does not for so long is stopped or gone."""
_AVOID_S: Final = 60.0
"""After a failure an actor is asked last for so long."""
_TRIES: Final = 2


class RewardActor:
    """One process with the config's rewards; `alive` is answered while `score` is at work."""

    def __init__(self, config_json: str, cwd: str, load: str | None) -> None:
        with contextlib.suppress(OSError):  # relative paths mean what they mean to the command
            os.chdir(cwd)
        config = RewardConfig.model_validate_json(config_json)
        self._fault: tuple[str, bool] | None = None
        try:
            self._service = RewardService(config, load=load) if load else RewardService(config)
        except (ValueError, RewardError) as error:
            self._fault = str(error), isinstance(error, ValueError)

    def fault(self) -> tuple[str, bool] | None:
        """Why it cannot judge, and whether that is the config's; None once it can."""
        return self._fault

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def alive(self) -> int:
        return os.getpid()

    def score(self, pixels: Sequence[Pixels], prompts: Sequence[tuple[str, dict[str, Any]]]) -> Scores:
        """See `base.Score`."""
        fault_point("reward_actor")
        images = [Image.fromarray(one) for one in pixels]
        return self._service.score(images, [Prompt(text=text, metadata=data) for text, data in prompts])


@contextlib.contextmanager
def reward_actors(config: Config, *, load: str | None = None) -> Iterator[list[Any]]:
    """`cluster.reward_actors` actors that have loaded their rewards; none of them outlives the block.

    `load` is for tests, see `RewardService`. Raises ValueError if there is no room, or a reward cannot be loaded.
    """
    cluster = config.cluster
    _check_room(cluster)
    kind = ray.remote(concurrency_groups={"control": 1})(RewardActor).options(
        num_cpus=cluster.cpus_per_reward_actor,
        num_gpus=cluster.gpus_per_reward_actor,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=1,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(config.reward.num_threads)}} | (cluster.reward_env or {}),
    )
    actors = [kind.remote(config.reward.model_dump_json(), str(Path.cwd()), load) for _ in range(cluster.reward_actors)]
    try:
        _await(actors, config.reward.start_timeout_s)
        yield actors
    finally:
        for actor in actors:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor, no_restart=True)


def _await(actors: Sequence[Any], timeout_s: float) -> None:
    waiting = {actor.fault.remote(): number for number, actor in enumerate(actors)}
    ready, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
    if late:
        raise ValueError(
            f"{len(late)} of {len(actors)} reward actors were not there within reward.start_timeout_s={timeout_s:g} s: "
            "something else holds the CPUs or GPUs of the cluster, or their models take longer; lower "
            "cluster.reward_actors, or raise it"
        )
    for one in ready:
        try:
            fault = ray.get(one)
        except RayError as error:
            raise ValueError(f"reward actor {waiting[one]} cannot start: {why_died(error, who='it')}") from error
        if fault is not None:
            raise ValueError(f"reward actor {waiting[one]}: {fault[0]}")


def _check_room(cluster: ClusterConfig) -> None:
    """Raise ValueError if no machine could hold one, or all together could not hold them beside the ranks: Ray would
    wait for ever, without a word."""
    need = {"CPU": cluster.cpus_per_reward_actor, "GPU": cluster.gpus_per_reward_actor}
    there = machines()
    if not any(all(machine.get(name, 0.0) >= amount for name, amount in need.items()) for machine in there):
        raise ValueError(
            f"a reward actor needs {need['CPU']:g} CPUs and {need['GPU']:g} GPUs on one machine "
            "(cluster.cpus_per_reward_actor, cluster.gpus_per_reward_actor), which no machine of the cluster has"
        )
    ranks = {"CPU": cluster.cpus_per_rank, "GPU": 1.0 if cluster.device == "cuda" else 0.0}
    for name, amount in need.items():
        wanted = cluster.reward_actors * amount + cluster.ranks * ranks[name]
        if amount and wanted > (has := sum(machine.get(name, 0.0) for machine in there)):
            raise ValueError(
                f"{cluster.reward_actors} reward actors beside {cluster.ranks} ranks need {wanted:g} {name}s, the "
                f"cluster has {has:g}: lower cluster.ranks or cluster.reward_actors, or what each reward actor takes"
            )


@dataclass
class _Call:
    """A chunk of pictures at one actor."""

    chunk: int
    actor: int
    tries: int
    since: float
    ping: Any = None
    ping_since: float = 0.0


class RewardClient:
    """What a rank holds."""

    def __init__(self, actors: Sequence[Any], config: RewardConfig, *, rank: int = 0) -> None:
        """Ranks begin at different actors."""
        self._actors = list(actors)
        self._config = config
        self._rank = rank
        self._failed_at: dict[int, float] = {}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """See `base.Score`. Raises ValueError only where pictures and prompts are not equally many."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts")
        names = list(self._config.active)
        chunks = _chunks([to_pixels(image) for image in images])
        if not chunks:
            return none_judged(names, 0, timed_out=False, note="")
        found: dict[int, Scores] = {}
        waiting = [(number, 0) for number in range(len(chunks))]
        calls: dict[Any, _Call] = {}
        at = [0, *[sum(len(one) for one in chunks[: number + 1]) for number in range(len(chunks))]]
        most = min(_MAX_UNDER_WAY, len(self._actors))
        while waiting or calls:
            while waiting and len(calls) < most:
                number, tries = waiting.pop(0)
                texts = [(one.text, dict(one.metadata)) for one in prompts[at[number] : at[number + 1]]]
                actor = self._next(number + tries)
                reference = self._actors[actor].score.remote(chunks[number], texts)
                calls[reference] = _Call(chunk=number, actor=actor, tries=tries + 1, since=time.monotonic())
            done, _ = ray.wait(list(calls), num_returns=1, timeout=_POLL_S)
            for reference in list(calls):
                call = calls[reference]
                answer = self._answer(reference, reference in done, call, len(chunks[call.chunk]))
                if answer is None:
                    continue
                del calls[reference]
                if isinstance(answer, Scores):
                    found[call.chunk] = answer
                    continue
                self._failed_at[call.actor] = time.monotonic()
                if call.tries < _TRIES:
                    waiting.insert(0, (call.chunk, call.tries))
                    continue
                why, timed_out = answer
                found[call.chunk] = none_judged(names, len(chunks[call.chunk]), timed_out=timed_out, note=why)
        return join([found[number] for number in range(len(chunks))])

    def _answer(self, reference: Any, done: bool, call: _Call, num_pictures: int) -> Scores | tuple[str, bool] | None:
        """The scores, or (why there are none, whether for want of an answer), or None to wait on."""
        if done:
            try:
                scores: Scores = ray.get(reference)
            except RayError as error:
                return why_died(error, who="a reward actor"), False
            return scores
        now = time.monotonic()
        limit = 2 * self._config.start_timeout_s + num_pictures * len(self._config.active) * self._config.timeout_s
        if now - call.since > limit:
            return f"no answer from a reward actor for {limit:g} s", True
        if call.ping is None:
            call.ping, call.ping_since = self._actors[call.actor].alive.remote(), now
        heard, _ = ray.wait([call.ping], timeout=0)
        if heard:
            with contextlib.suppress(RayError):  # a dead one is told by the call itself
                ray.get(call.ping)
            if now - call.ping_since > _SILENT_S / 3:
                call.ping = None
        elif now - call.ping_since > _SILENT_S:
            return f"a reward actor did not answer for {_SILENT_S:g} s: it is stopped, or its machine is gone", True
        return None

    def _next(self, number: int) -> int:
        """The actor's number: round and round from the rank's own on, those that failed lately last."""
        order = [(self._rank + number + i) % len(self._actors) for i in range(len(self._actors))]
        long_ago = time.monotonic() - _AVOID_S
        return next((actor for actor in order if self._failed_at.get(actor, long_ago) <= long_ago), order[0])


def _chunks(pixels: Sequence[Pixels]) -> list[list[Pixels]]:
    """In order, each at least one picture and otherwise at most `_CHUNK_BYTES`."""
    chunks: list[list[Pixels]] = []
    room = 0
    for one in pixels:
        if not chunks or one.nbytes > room:
            chunks.append([])
            room = _CHUNK_BYTES
        chunks[-1].append(one)
        room -= one.nbytes
    return chunks
