"""The transformer under DeepSpeed ZeRO-3: built, filled and stepped without any rank ever holding the model.

Place in the flow: the trainer calls `predict`, `backward`, `step`; checkpoint and EMA read and write the fp32
partitions through `Engine.state`. Facts that this file rests on (deepspeed 0.19.8): a parameter of n elements is cut
into equal shares of ceil(n / ranks); sub-groups of shares form flat fp32 masters; gradients accumulate in fp32 shares
over as many backwards as one likes, `step` clips and updates. `zero.Init` decides type and device of the tensors that
constructors make, so the RoPE tables are rebuilt after it.

Refuses: DeepSpeed's own checkpoints (torn, pickled, bound to a world size), its gradient norm as the alarm for NaN,
offload of parameters, DeepSpeed's CPU Adam (it compiles code at run time; offloaded states are updated by torch's).
"""

from __future__ import annotations

import ctypes
import inspect
import logging
import os
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final, Literal

import torch
import torch.distributed as dist

from consumers.parameter_groups import parameter_groups
from consumers.process_group import join, set_timeouts
from consumers.ranks import Ranks
from consumers.zero_engine import Engine, FrozenModel, WeightSource
from consumers.zero_settings import adamw, deepspeed_config
from qwenimg_dist.config import Config
from qwenimg_dist.models import transformer as qwen

_COLLECTIVE_TIMEOUT_S: Final = 1800.0
_M_MMAP_THRESHOLD: Final = -3  # of glibc's malloc.h
_LARGE_PARAMETERS: Final = 1 << 25


def start_distributed(device: Literal["cpu", "cuda"], *, timeout_s: float = _COLLECTIVE_TIMEOUT_S) -> Ranks:
    """Join the process group of torchrun's (or Ray Train's) environment. Call before anything builds an engine.

    `timeout_s`: after which a rank gives up waiting for another in a collective.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    for variable, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(variable, value)
    os.environ.setdefault("MASTER_PORT", "0" if world_size == 1 else "29500")
    # Without it DeepSpeed's CPU accelerator asks numactl for the device count at every gradient reduction.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    import deepspeed  # after the environment is set: importing it chooses the accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by the names that torch 2.13 deprecates; nothing that a user could change.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    # Joining on a CPU would JIT-compile a shared-memory op for 20 s and need a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("cluster.device=cuda, but torch finds no GPU here: set cluster.device=cpu")
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        join("nccl" if device == "cuda" else "gloo", timedelta(seconds=timeout_s))
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)
    where = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=where)


def _give_memory_back() -> None:
    """Freed tensors above 128 KB return to the system at once: glibc otherwise learns to keep ever larger ones, and a
    rank's memory would grow to the sum of its phases instead of the largest. It costs a system call per tensor, which
    small models would feel.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 17)


def stop_distributed() -> None:
    """Leave the process group; a process that exits without it may abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def build_frozen(
    transformer_config: Mapping[str, Any], config: Config, ranks: Ranks, source: WeightSource
) -> FrozenModel:
    """A model that only predicts, with `source`'s weights in the compute dtype: 2 bytes per parameter over all ranks in
    bf16. Host memory and errors as of `build_engine`."""
    import deepspeed

    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in qwen.build_transformer(transformer_config).named_parameters()}
    _check_source(source, shapes)
    settings = deepspeed_config(config, shapes, ranks)
    settings["zero_optimization"].pop("offload_optimizer", None)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        set_timeouts(config.train.collective_timeout_s)  # of the groups that Init has just made
        module = qwen.build_transformer(transformer_config)
    qwen.rebuild_rope(module)
    qwen.set_attention(module, config.engine.attention)
    module.requires_grad_(False)
    if config.engine.gather == "block":
        _gather_whole_blocks(module)
    ranks.together(lambda: _fill_partitions(module, source, ranks))
    deepspeed_engine, _, _, _ = deepspeed.initialize(model=module, config=settings, dist_init_required=False)
    set_timeouts(config.train.collective_timeout_s)
    if config.engine.compile:
        qwen.compile_blocks(module)  # as the trained model, whose rounding it must share
    deepspeed_engine.eval()
    return FrozenModel(deepspeed_engine, ranks)


def build_engine(
    transformer_config: Mapping[str, Any], config: Config, ranks: Ranks, source: WeightSource | None
) -> Engine:
    """The transformer with `source`'s weights (None: random, rank 0's draw) under ZeRO-3.

    Host memory stays within the partitions plus about two tensors. Raises ValueError if the source lacks or has other
    tensors than the architecture.
    """
    import deepspeed

    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in qwen.build_transformer(transformer_config).named_parameters()}
    if source is not None:
        _check_source(source, shapes)
    num_layers = int(transformer_config["num_layers"])
    groups = parameter_groups(shapes, config.optim, num_layers)
    frozen = {name for group in groups if group.frozen for name in group.names}
    settings = deepspeed_config(config, shapes, ranks)
    if ranks.device.type == "cpu" and sum(torch.Size(shape).numel() for shape in shapes.values()) > _LARGE_PARAMETERS:
        _give_memory_back()
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    # No `dtype=`: given one, zero.Init ignores it where the accelerator lacks fp16 and takes bf16.
    with deepspeed.zero.Init(config_dict_or_path=settings):
        set_timeouts(config.train.collective_timeout_s)  # of the groups that Init has just made
        module = qwen.build_transformer(transformer_config)
    qwen.rebuild_rope(module)
    qwen.activation_checkpointing(module, config.engine.activation_checkpointing)
    qwen.set_attention(module, config.engine.attention)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if config.engine.gather == "block":
        _gather_whole_blocks(module)
    if source is not None:
        ranks.together(lambda: _fill_partitions(module, source, ranks))
    deepspeed_engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=adamw(module.named_parameters(), groups, config),
        config=settings,
        dist_init_required=False,
    )
    set_timeouts(config.train.collective_timeout_s)
    if config.engine.compile:
        qwen.compile_blocks(module)  # after the hooks are in place, which stay outside of the compiled code
    engine = Engine(deepspeed_engine, groups, ranks)
    if source is not None and any(source.dtype(name) != dtype for name in shapes):
        engine.fill(source)  # DeepSpeed made the masters from bf16; the source knows them better
    engine.train()
    return engine


def _gather_whole_blocks(module: Any) -> None:
    """A block is gathered and released as one: one collective instead of one per linear layer, a tenth of the hooks.

    DeepSpeed sees the end of a block's backward on its positional inputs only; diffusers passes them by keyword, so
    they are made positional first. Must precede `deepspeed.initialize`, whose hooks come after this one.
    """
    from deepspeed.utils import set_z3_leaf_modules

    blocks = list(module.transformer_blocks)
    names = list(inspect.signature(blocks[0].forward).parameters)

    def by_position(
        block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = [name for name in names[len(args) :] if name in kwargs]
        if given != names[len(args) : len(args) + len(given)] or len(given) != len(kwargs):
            raise TypeError(f"a block was called with {sorted(kwargs)}, which are not its next arguments {names}")
        inputs = (*args, *(kwargs[name] for name in given))
        return (_with_gradient(inputs) if trains[id(block)] else inputs), {}

    trains = {id(block): any(parameter.requires_grad for parameter in block.parameters()) for block in blocks}
    for block in blocks:
        block.register_forward_pre_hook(by_position, with_kwargs=True)
    set_z3_leaf_modules(module, [type(blocks[0])])


def _with_gradient(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a block that trains, the first of them with a gradient where none has one.

    Where all before a block is frozen, torch would call the hook at the end of its backward at its beginning instead,
    and DeepSpeed, which reduces the block's gradients there, would find none.
    """
    tensors = [one for one in inputs if isinstance(one, torch.Tensor)]
    if not torch.is_grad_enabled() or any(tensor.requires_grad for tensor in tensors):
        return inputs
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def _check_source(source: WeightSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
    found = set(source.names)
    missing, unexpected = sorted(set(shapes) - found), sorted(found - set(shapes))
    if missing or unexpected:
        raise ValueError(
            f"the weights do not belong to this transformer: {len(missing)} tensors missing (first {missing[:3]}), "
            f"{len(unexpected)} unexpected (first {unexpected[:3]}); check model.path and start_from"
        )
    for name, shape in shapes.items():
        if tuple(source.shape(name)) != shape:
            raise ValueError(f"tensor {name!r} has shape {tuple(source.shape(name))}, the architecture needs {shape}")


@torch.no_grad()
def _fill_partitions(module: Any, source: WeightSource, ranks: Ranks) -> None:
    for name, parameter in module.named_parameters():
        size = parameter.ds_tensor.ds_numel
        start = min(ranks.rank * size, parameter.ds_numel)
        stop = min(start + size, parameter.ds_numel)
        parameter.ds_tensor.zero_()  # the padding too, so that no rank keeps uninitialised memory
        if stop > start:
            parameter.ds_tensor[: stop - start].copy_(source.read_flat_range(name, start, stop))
        parameter.ds_secondary_tensor = None  # of hpZ: zero.Init made it of random weights
