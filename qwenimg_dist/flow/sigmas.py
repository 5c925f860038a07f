"""Which sigma and which noise a slot of the global batch gets: pure functions of (seed, step, slot).

Place in the flow: objectives draw sigma and noise here, the evaluation draws its fixed noise and sigma
quantiles. A slot is a position in the *global* batch, so that the values depend neither on the number of
ranks nor on how slots are grouped into micro-batches, and a resumed step repeats them.

Each (seed, stream, step, slot) is hashed to the seed of a CPU generator of its own. torch's CPU generator
uses 32 bits of it: two slots of a long run may share their noise by chance (about 1 pair in 4e9), which is
harmless.

Refuses: drawing on the GPU (another generator, other values), densities it does not know, strata of a batch whose size
it was not told.
"""

import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final, Literal

import torch

Stream = Literal[
    "sigma",
    "noise",
    "eval",
    "posterior",
    "strata",
    "pair_sigma",
    "pair_noise",
    "pair_draw",
    "rollout",
    "sde",
    "sde_window",
]
Density = Literal["logit_normal", "uniform", "mode"]
MAX_MODE_SCALE: Final = 2.0 / (math.pi - 2.0)
"""1.75: beyond it the mode density's map is not monotone."""


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
    mode_scale: float = 0.0,
    mu: float = 0.0,
    strata: int = 0,
    stream: Stream = "sigma",
) -> torch.Tensor:
    """Training sigmas (B,) fp32 on the CPU, in (0,1): one per slot, drawn from `density`, then shifted by
    `mu`.

    `mu` from `resolution_mu`; 0 means no shift. `strata` > 0 is the size of the global batch: its slots then share the
    density's quantiles evenly, one in each of `strata` equal parts, dealt anew at every step.
    """
    uniforms = [
        float(torch.rand((), generator=slot_generator(seed, stream, step, slot), dtype=torch.float64)) for slot in slots
    ]
    if strata:
        dealt = _deal(seed, step, strata)
        # Slots beyond the batch only even out the ranks, at weight zero.
        uniforms = [(dealt[slot % strata] + u) / strata for slot, u in zip(slots, uniforms, strict=True)]
    return sigma_at_quantiles(uniforms, density=density, mean=mean, std=std, mode_scale=mode_scale, mu=mu)


def _deal(seed: int, step: int, strata: int) -> list[int]:
    """Slot -> stratum: a permutation of 0 .. strata - 1, the same on every rank."""
    order: list[int] = torch.randperm(strata, generator=slot_generator(seed, "strata", step, strata)).tolist()
    return order


def draw_noise(
    seed: int, step: int, slots: Sequence[int], shape: Sequence[int], *, stream: Stream = "noise"
) -> torch.Tensor:
    """Standard normal noise (B, *shape) fp32 on the CPU, one independent draw per slot."""
    draws = [torch.randn(tuple(shape), generator=slot_generator(seed, stream, step, slot)) for slot in slots]
    return torch.stack(draws) if draws else torch.empty((0, *shape))


def sigma_at_quantiles(
    quantiles: Sequence[float], *, density: Density, mean: float, std: float, mu: float, mode_scale: float = 0.0
) -> torch.Tensor:
    """Sigmas (N,) fp32 at given quantiles, in [0,1], of the training density shifted by `mu`.

    `logit_normal`: sigmoid of N(mean, std^2). `mode`: `1 - u - s (cos^2(pi u / 2) - 1 + u)` of a uniform u (Esser et
    al. 2024, Eq. 20, where t = 1 is noise as here); it falls with u, so that its quantile q is its value at 1 - q.
    Raises ValueError for an s outside [-1, 2 / (pi - 2)], where it is no density.
    """
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
    elif density == "mode":
        if not -1.0 <= mode_scale <= MAX_MODE_SCALE:
            raise ValueError(f"the mode density needs a scale from -1 to {MAX_MODE_SCALE:.4f}, got {mode_scale}")
        uniform = 1.0 - torch.tensor(inside, dtype=torch.float64)
        values = 1.0 - uniform - mode_scale * ((math.pi / 2 * uniform).cos().square() - 1.0 + uniform)
        values = values.clamp(tiny, 1.0 - tiny)
    else:
        raise ValueError(f"unknown sigma density {density!r}; known are logit_normal, uniform and mode")
    return shift(values, mu).float()
