"""Which sigma and which noise a slot of the global batch gets: pure functions of (seed, step, slot).

Place in the flow: objectives draw sigma and noise here, the evaluation draws its fixed noise and sigma
quantiles. A slot is a position in the *global* batch, so that the values depend neither on the number of
ranks nor on how slots are grouped into micro-batches, and a resumed step repeats them.

Each (seed, stream, step, slot) is hashed to the seed of a CPU generator of its own. torch's CPU generator
uses 32 bits of it: two slots of a long run may share their noise by chance (about 1 pair in 4e9), which is
harmless.

Refuses: drawing on the GPU (another generator, other values), densities it does not know.
"""

import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import torch

Stream = Literal["sigma", "noise", "eval"]
Density = Literal["logit_normal", "uniform"]


def resolution_mu(
    image_tokens: int,
    *,
    base_shift: float = 0.5,
    max_shift: float = 0.9,
    base_tokens: int = 256,
    max_tokens: int = 8192,
) -> float:
    """mu of the resolution shift, linear in image tokens (diffusers' `calculate_shift`, Qwen-Image's
    constants).
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return image_tokens * slope + (base_shift - slope * base_tokens)


def shift(sigma: torch.Tensor, mu: float) -> torch.Tensor:
    """`e^mu / (e^mu + 1/sigma - 1)`, exponential time shift (Esser et al. 2024, Eq. 23); identity at mu = 0.

    Written as `e^mu sigma / (1 + (e^mu - 1) sigma)`, which is the same and holds at sigma = 0.
    """
    factor = math.exp(mu)
    return factor * sigma / (1.0 + (factor - 1.0) * sigma)


def slot_generator(seed: int, stream: Stream, step: int, slot: int) -> torch.Generator:
    """The CPU generator that belongs to one slot of one step in one stream."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}/{slot}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))


def draw_sigma(
    seed: int,
    step: int,
    slots: Sequence[int],
    *,
    density: Density = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    mu: float = 0.0,
    stream: Stream = "sigma",
) -> torch.Tensor:
    """Training sigmas (B,) fp32 on the CPU, in (0,1): one per slot, drawn from `density`, then shifted by
    `mu`.

    `logit_normal`: sigmoid of N(mean, std^2). `mu` from `resolution_mu`; 0 means no shift.
    """
    uniforms = [
        float(torch.rand((), generator=slot_generator(seed, stream, step, slot), dtype=torch.float64)) for slot in slots
    ]
    return sigma_at_quantiles(uniforms, density=density, mean=mean, std=std, mu=mu)


def draw_noise(
    seed: int, step: int, slots: Sequence[int], shape: Sequence[int], *, stream: Stream = "noise"
) -> torch.Tensor:
    """Standard normal noise (B, *shape) fp32 on the CPU, one independent draw per slot."""
    draws = [torch.randn(tuple(shape), generator=slot_generator(seed, stream, step, slot)) for slot in slots]
    return torch.stack(draws) if draws else torch.empty((0, *shape))


def sigma_at_quantiles(
    quantiles: Sequence[float], *, density: Density, mean: float, std: float, mu: float
) -> torch.Tensor:
    """Sigmas (N,) fp32 at given quantiles, in [0,1], of the training density shifted by `mu`."""
    # In fp64: the inverse normal near 0 and 1 is where fp32 would merge neighbours. The clamp keeps sigma
    # off 0 and 1, where a quantile of exactly 0 (possible, 2^-53) would have no logit.
    tiny = 2.0**-53
    inside = [min(max(q, tiny), 1.0 - tiny) for q in quantiles]
    if density == "logit_normal":
        if std <= 0:
            raise ValueError(f"the logit-normal density needs std > 0, got {std}")
        normal = NormalDist(mean, std)
        values = torch.tensor([normal.inv_cdf(q) for q in inside], dtype=torch.float64).sigmoid()
    elif density == "uniform":
        values = torch.tensor(inside, dtype=torch.float64)
    else:
        raise ValueError(f"unknown sigma density {density!r}; known are logit_normal and uniform")
    return shift(values, mu).float()
