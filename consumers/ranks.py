"""The few collectives that training needs besides DeepSpeed's own: flags, sums, small JSON, whole tensors.

Place in the flow: trainer, evaluation and checkpoint agree through this. Nothing is pickled on the wire: values travel
as fp64 or as JSON bytes. With one rank every call is local. Refuses to guess: every rank must make the same calls in
the same order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist

from qwenimg_dist.patience import StorageAwayError, is_away

_TOLD_BYTES: Final = 1024
"""Of a message that travels; equal on all ranks."""
_Result = TypeVar("_Result")


class AgreedError(ValueError):
    """What one rank refused, raised on every rank at the same place: they may go on to agree on what is left to do."""


@dataclass
class Waited:
    """Seconds that this rank has spent in reductions: the fewer, the later it came to them."""

    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the ranks of the run."""

    rank: int
    world_size: int
    device: torch.device
    """Where collectives happen: the local GPU under nccl, else the CPU."""
    waited: Waited = field(default_factory=Waited)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in fp64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        return bool(self.max([float(flag)])[0])

    def first_problem(self, problem: str) -> str:
        """The first rank's problem that is not empty, on every rank; empty if no rank has one."""
        if not self.any(bool(problem)):
            return ""
        told = self.gather_bytes(problem.encode()[:_TOLD_BYTES].ljust(_TOLD_BYTES))
        return next(text for data in told if (text := data.decode(errors="replace").strip()))

    def first_error(self, error: Exception | None) -> AgreedError | StorageAwayError | None:
        """What to raise on every rank if one of them met an error, with its message; None if no rank did.

        `StorageAwayError`, by which the gang starts anew, if storage that was away is all that any of them met.
        """
        refuses = error is not None and not is_away(error)
        failed, refused = self.max([float(error is not None), float(refuses)])
        if not failed:
            return None
        mine = error if refuses or not refused else None
        told = self.first_problem((str(mine) or type(mine).__name__) if mine is not None else "")
        return AgreedError(told) if refused else StorageAwayError(told)

    def together(self, action: Callable[[], _Result]) -> _Result:
        """Run a local action on every rank. What one rank refuses is raised on all of them, as `AgreedError`; storage
        that was away on one as `StorageAwayError`.

        A rank that raised alone would leave the others waiting in their next collective, and its reason unheard.
        """
        made: list[_Result] = []
        met: Exception | None = None
        try:
            made.append(action())
        except (ValueError, OSError, StorageAwayError) as error:
            met = error
        if (told := self.first_error(met)) is not None:
            raise told from met
        return made[0]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Run on rank 0; every rank gets its JSON result, or ValueError with what rank 0 refused, or `StorageAwayError`
        where that was storage that was away."""
        answer: list[Any] = ["", None, False]
        error: Exception | None = None
        if self.is_first:
            try:
                result = action()
                answer[1] = result if isinstance(result, str | int | float | bool | list | dict) else None
            except Exception as problem:  # told to the others first, else they wait for ever
                error = problem
                answer[0], answer[2] = f"{type(problem).__name__}: {problem}", is_away(problem)
        message, result, away = self.broadcast_json(answer)
        if error is not None:
            raise error
        if message and away:
            raise StorageAwayError(f"rank 0: {message}")
        if message:
            raise ValueError(f"rank 0 refused: {message}")
        return result

    def all_finite(self, value: torch.Tensor) -> bool:
        """Whether a scalar is finite on every rank; the check that precedes each backward."""
        return not self.any(not bool(torch.isfinite(value.detach()).all()))

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        begin = time.perf_counter()
        dist.all_reduce(tensor, op=operation)
        reduced = [float(value) for value in tensor.tolist()]
        self.waited.seconds += time.perf_counter() - begin
        return reduced

    def table(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, by rank, in fp64; equally many on each."""
        mine = torch.tensor([list(values)], dtype=torch.float64, device=self.device)
        return [[float(value) for value in row] for row in self.gather_tensor(mine).tolist()]

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank; the others pass anything."""
        if self.world_size == 1:
            return value
        data = bytearray(json.dumps(value).encode()) if self.is_first else bytearray()
        length = int(self.sum([float(len(data))])[0])
        buffer = torch.zeros(length, dtype=torch.uint8, device=self.device)
        if self.is_first:
            buffer.copy_(torch.frombuffer(data, dtype=torch.uint8))
        dist.broadcast(buffer, 0)
        return json.loads(bytes(buffer.cpu().numpy()))

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Equally long bytes of all ranks, by rank."""
        if self.world_size == 1:
            return [data]
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        return [bytes(part.cpu().numpy()) for part in everyone]

    def gather_json(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, by rank, on every rank; of any length."""
        data = json.dumps(value).encode()
        longest = int(self.max([float(len(data))])[0])
        return [json.loads(part) for part in self.gather_bytes(data.ljust(longest))]

    def broadcast_tensor(self, tensor: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Rank 0's tensor of known shape on every rank, on the ranks' device."""
        if tensor is None:
            tensor = torch.empty(tuple(shape), dtype=dtype)
        tensor = tensor.to(device=self.device, dtype=dtype).contiguous()
        if self.world_size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks of equally shaped tensors, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Equally shaped tensors of all ranks, concatenated along the first axis by rank."""
        if self.world_size == 1:
            return tensor
        everyone = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(everyone, tensor.contiguous())
        return torch.cat(everyone)
