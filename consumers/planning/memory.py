"""Memory of one rank, on its device and in its host, for every phase and resolution.

Place in the flow: `plan.py` and the check before a run ask here. Sizes of DeepSpeed's buffers are those that the engine
will be built with (`zero_settings.py`), micro-batches are cut by the stream's own rule, so the sum cannot drift from
the run. The peak of a phase is over all buckets and all text lengths up to the longest. Refuses nothing: `fit.py`
judges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from consumers.planning.facts import DataFacts, ModelFacts, StreamFacts
from consumers.planning.passes import passes_of
from consumers.ranks import Ranks
from consumers.stream import PREFETCH, micro_batch_sizes
from consumers.zero_settings import deepspeed_config
from qwenimg_dist.config import Config, GrpoConfig
from qwenimg_dist.estimate import DeviceMemory, device_memory, offloaded_bytes
from qwenimg_dist.rewards import REWARDS
from qwenimg_dist.schema import Bucket

_PROCESS_BYTES: Final = 1.5e9
"""A rank's Python with torch, DeepSpeed and diffusers imported, CUDA's host part among it (0.6 GB without)."""
_VAE_BYTES: Final = 4.0 * 127e6
"""Rollouts keep the VAE on the device, in fp32; what it needs to decode comes when no graph is there."""
_CONTEXT_BYTES: Final = 0.5e9
"""CUDA's own, of a further process on a GPU."""
_LATENT_CHANNELS: Final = 16
_DTYPE_BYTES: Final = {"bfloat16": 2, "float32": 4}
GIB: Final = 1024.0**3


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The micro-batch of a phase and resolution that takes most memory."""

    stream: StreamFacts
    bucket: Bucket
    samples: int
    text_tokens: int
    tokens: int
    """Of the whole micro-batch, padding included."""
    memory: DeviceMemory


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes of host memory of one rank beside what the device of a CPU run holds."""

    process: float
    batches: float
    """Batches in use, ahead and under way, pinned for a GPU."""
    held_out: float
    offloaded: float
    """Masters, moments, gradients and EMA with `engine.offload_optimizer=cpu`."""
    saving: float
    """The largest piece of a checkpoint on its way to disk, or with `checkpoint.background` a copy of all of them."""

    @property
    def total(self) -> float:
        return self.process + self.batches + self.held_out + self.offloaded + self.saving

    def parts(self) -> dict[str, float]:
        return {name: float(value) for name, value in vars(self).items()}


def zero_sizes(config: Config, model: ModelFacts, world_size: int) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization` as the engine will be told. Raises ValueError for an hpZ that does not divide."""
    ranks = Ranks(rank=0, world_size=world_size, device=torch.device("cpu"))
    found: dict[str, Any] = deepspeed_config(config, model.shapes, ranks)["zero_optimization"]
    return found


def memory_of(
    config: Config,
    model: ModelFacts,
    *,
    world_size: int,
    tokens: int,
    activation_checkpointing: bool,
    graph: bool = True,
) -> DeviceMemory:
    """One rank's device with a micro-batch of so many tokens."""
    sizes = zero_sizes(config, model, world_size)
    whole_blocks = config.engine.gather == "block"
    unit = model.block if whole_blocks else model.largest
    # The block at work, and the next one twice: as it was fetched, flat, and cut into its parameters.
    ahead = min(sizes["stage3_prefetch_bucket_size"], max(0, sizes["stage3_max_live_parameters"] - unit))
    return device_memory(
        model.architecture,
        model.num_parameters,
        num_ranks=world_size,
        precision=config.engine.precision,
        ema=config.optim.ema_decay > 0,
        tokens=tokens,
        activation_checkpointing=activation_checkpointing,
        num_trained=model.num_trained,
        offloaded=config.engine.offload_optimizer == "cpu",
        hpz_partition=config.engine.hpz_partition,
        reference=passes_of(config).second_model,
        compiled=config.engine.compile,
        gathered_elements=unit + 2 * ahead,
        gradient_elements=unit,
        bucket_elements=sizes["reduce_bucket_size"],
        update_elements=min(sizes["sub_group_size"] + model.largest // world_size, model.num_trained // world_size),
        graph=graph,
        other=_VAE_BYTES + rewards_on_device(config) if isinstance(config.objective, GrpoConfig) else 0.0,
    )


def rewards_on_device(config: Config) -> float:
    """What the rewards' process beside a rank takes of its GPU. Reward actors have GPUs of their own."""
    reward, cluster = config.reward, config.cluster
    if reward.device != "cuda" or cluster.device != "cuda" or cluster.reward_actors:
        return 0.0
    models = sum(REWARDS[name].device_bytes for name in reward.active if name in REWARDS)
    return _CONTEXT_BYTES + models if models else 0.0


def peak_of(config: Config, model: ModelFacts, data: DataFacts, stream: StreamFacts, *, world_size: int) -> Peak:
    """The bucket and text length of a phase and resolution that take most memory."""
    best: tuple[int, Bucket, int, int] | None = None
    for bucket in stream.steps:
        for text in range(1, data.longest_text + 1):
            samples = _largest_micro_batch(data, stream, bucket, text, world_size)
            tokens = samples * data.pictures * (data.image_tokens(bucket) + text)
            if best is None or tokens > best[0]:
                best = (tokens, bucket, samples, text)
    assert best is not None
    tokens, bucket, samples, text = best
    checkpointing = stream.phase.activation_checkpointing
    memory = memory_of(config, model, world_size=world_size, tokens=tokens, activation_checkpointing=checkpointing)
    return Peak(stream=stream, bucket=bucket, samples=samples, text_tokens=text, tokens=tokens, memory=memory)


def host_memory(config: Config, model: ModelFacts, data: DataFacts, *, world_size: int) -> HostMemory:
    """One rank's share of its node's memory, without what `cluster.device=cpu` keeps of the device's sum there."""
    on_gpu = config.cluster.device == "cuda"
    latent_bytes = _DTYPE_BYTES[config.encode.dtype] * (2 if config.objective.posterior == "sample" else 1)
    text_bytes = model.text_width * (2 if config.engine.precision == "bf16" else 4)
    batches = 0.0
    for stream in data.streams:
        per_rank = -(-stream.phase.global_batch * data.rows_per_sample // world_size)
        for bucket in stream.steps:
            latents = per_rank * data.pictures * latent_bytes * _latent_elements(bucket) * (not data.are_prompts)
            texts = per_rank * data.longest_text * text_bytes
            # In use, ahead, and being made.
            batches = max(batches, (PREFETCH + 2) * sum(_pinned(nbytes, on_gpu) for nbytes in (latents, texts)))
    held_out = 0.0
    for resolution in {stream.resolution for stream in data.streams}:
        samples = -(-min(config.evaluate.num_samples, config.data.max_held_out) // world_size)
        latents = latent_bytes * _LATENT_CHANNELS * (resolution // 8) ** 2
        held_out += samples * (latents + data.longest_text * text_bytes)
    offloaded = 0.0
    if config.engine.offload_optimizer == "cpu":
        ema = config.optim.ema_decay > 0
        offloaded = offloaded_bytes(model.num_trained, num_ranks=world_size, ema=ema)
        if on_gpu:  # the accumulated gradients are one pinned buffer
            flat = 4.0 * model.num_trained / world_size
            offloaded += _pinned(flat, on_gpu) - flat
    return HostMemory(
        process=_PROCESS_BYTES,
        batches=batches,
        held_out=held_out if config.evaluate.every else 0.0,
        offloaded=offloaded,
        saving=_saving(config, model, world_size),
    )


def _saving(config: Config, model: ModelFacts, world_size: int) -> float:
    if config.checkpoint.background:
        of_trained = 4.0 * model.num_trained * (2 + (config.optim.ema_decay > 0))
        return (4.0 * model.num_parameters + of_trained) / world_size
    return 4.0 * model.largest / world_size if config.cluster.device == "cuda" else 0.0


def _largest_micro_batch(data: DataFacts, stream: StreamFacts, bucket: Bucket, text: int, world_size: int) -> int:
    phase = stream.phase
    per_rank = -(-phase.global_batch * data.rows_per_sample // world_size)
    tokens = data.image_tokens(bucket)
    return max(micro_batch_sizes(per_rank, tokens, text, phase.micro_batch_tokens, pictures=data.pictures))


def _latent_elements(bucket: Bucket) -> int:
    return _LATENT_CHANNELS * (bucket.height // 8) * (bucket.width // 8)


def _pinned(nbytes: float, on_gpu: bool) -> float:
    """torch rounds pinned memory up to a power of two."""
    return float(1 << (int(nbytes) - 1).bit_length()) if on_gpu and nbytes > 1 else nbytes
